"""The exceptions of quire: one class for each code of the C++ library's ``Status``.

Each carries the library's sentence unchanged: the argument, what came, what is supported. A refused call has written
nothing.
"""


class Error(Exception):
    """What quire raises."""


class InvalidArgumentError(Error, ValueError):
    """The call can never succeed as written: a shape, dtype, stride or flag is wrong."""


class OutOfRangeError(Error, IndexError):
    """A value inside an array (a slot, a block id, a length) is outside of what it points into."""


class NotFoundError(Error, LookupError):
    """There is no mode or backend of that name."""


class UnsupportedError(Error, NotImplementedError):
    """Well formed, but not built here or not possible on this device."""


class AlreadyExistsError(Error, ValueError):
    """A second, different registration of a name."""


class InternalError(Error, RuntimeError):
    """The device, the operating system or a registered backend reported an error."""


for _class in (
    Error,
    InvalidArgumentError,
    OutOfRangeError,
    NotFoundError,
    UnsupportedError,
    AlreadyExistsError,
    InternalError,
):
    _class.__module__ = "quire"
del _class
