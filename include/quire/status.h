// Errors are values. An operation that can fail returns a Status, or a Result<T> that holds either a T or a Status.
// A Status that is not ok carries one sentence naming the argument, what was given and what is supported.
// The library never prints, never aborts and, when it refuses a call, has written nothing.
#pragma once

#include <string>
#include <utility>
#include <variant>

namespace quire {

enum class StatusCode {
  kOk = 0,
  kInvalidArgument,  // the call can never succeed as written: a shape, dtype, stride or flag is wrong
  kOutOfRange,       // a value inside a tensor (a slot, a block id, a length) is outside its tensor
  kNotFound,         // no mode, backend or file of that name
  kUnsupported,      // well-formed, but not built here or not possible on this device
  kAlreadyExists,    // a second, different registration for a name
  kInternal,         // the device, the operating system or a registered backend reported an error
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == StatusCode::kOk; }
  explicit operator bool() const { return ok(); }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

inline Status invalid_argument(std::string message) { return {StatusCode::kInvalidArgument, std::move(message)}; }
inline Status out_of_range(std::string message) { return {StatusCode::kOutOfRange, std::move(message)}; }
inline Status not_found(std::string message) { return {StatusCode::kNotFound, std::move(message)}; }
inline Status unsupported(std::string message) { return {StatusCode::kUnsupported, std::move(message)}; }
inline Status already_exists(std::string message) { return {StatusCode::kAlreadyExists, std::move(message)}; }
inline Status internal_error(std::string message) { return {StatusCode::kInternal, std::move(message)}; }

// A T or the reason there is none. value() may be called only when ok(). Of a temporary, `*call()` and call().value()
// move the T out, so that what is bound to them lives on.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::in_place_index<1>, std::move(value)) {}
  Result(Status status) : state_(std::in_place_index<0>, std::move(status)) {}

  bool ok() const { return state_.index() == 1; }
  explicit operator bool() const { return ok(); }
  Status status() const { return ok() ? Status() : std::get<0>(state_); }

  T& value() & { return std::get<1>(state_); }
  const T& value() const& { return std::get<1>(state_); }
  T value() && { return std::get<1>(std::move(state_)); }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T operator*() && { return std::move(*this).value(); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }

 private:
  std::variant<Status, T> state_;
};

}  // namespace quire
