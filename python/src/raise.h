// Statuses as Python exceptions: the classes are those of quire/errors.py, the sentence is the library's.
#pragma once

#include <Python.h>

#include <string>

#include "quire/status.h"

namespace quire::python {

// Finds the classes; once, when the module is imported. False: a Python exception is set.
bool find_error_classes();

// Sets the exception of a Status that is not ok. Always null.
PyObject* raise(const Status& status);

// Refuses an argument, as the library does with StatusCode::kInvalidArgument. Always false.
bool refuse(const std::string& sentence);

// The Status of the Python exception that is set: its own code for quire's, kInternal for others. The exception itself
// becomes the cause of the one that this thread raises next.
Status status_of_exception(const std::string& where);

// The same for an exception on a thread that no Python call is waiting on, one of quire's own.
Status keep_as_cause(const std::string& where);

// Forgets such a cause: the op has gone well all the same.
void drop_cause();

}  // namespace quire::python
