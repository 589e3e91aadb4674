#include "hostile/memory.h"

#include <cstddef>
#include <cstdlib>
#include <new>

namespace {

constexpr std::size_t kMostBytes = std::size_t{256} << 20;

bool limited = false;
int left = -1;  // of the allocations that succeed; negative: any number
bool any_failed = false;

void* get(std::size_t bytes, std::size_t alignment = 1) noexcept {
  if (left == 0 || (limited && bytes > kMostBytes)) {
    any_failed = true;
    return nullptr;
  }
  if (left > 0) --left;
  if (alignment <= alignof(std::max_align_t)) return std::malloc(bytes == 0 ? 1 : bytes);
  void* memory = nullptr;
  return posix_memalign(&memory, alignment, bytes) == 0 ? memory : nullptr;
}

void* get_or_throw(std::size_t bytes, std::size_t alignment = 1) {
  void* memory = get(bytes, alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

std::size_t of(std::align_val_t alignment) { return static_cast<std::size_t>(alignment); }

}  // namespace

namespace quire::testing::allocations {

void limit() {
  limited = true;
  left = -1;
}

void fail_after(int n) {
  left = n;
  any_failed = false;
}

bool failed() { return any_failed; }

}  // namespace quire::testing::allocations

// All forms are replaced, since a sanitizer's library has its own of each and would not take memory of another.
void* operator new(std::size_t bytes) { return get_or_throw(bytes); }
void* operator new[](std::size_t bytes) { return get_or_throw(bytes); }
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept { return get(bytes); }
void* operator new[](std::size_t bytes, const std::nothrow_t&) noexcept { return get(bytes); }
void* operator new(std::size_t bytes, std::align_val_t alignment) { return get_or_throw(bytes, of(alignment)); }
void* operator new[](std::size_t bytes, std::align_val_t alignment) { return get_or_throw(bytes, of(alignment)); }
void* operator new(std::size_t bytes, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  return get(bytes, of(alignment));
}
void* operator new[](std::size_t bytes, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  return get(bytes, of(alignment));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete[](void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t, const std::nothrow_t&) noexcept { std::free(memory); }

// malloc and calloc give a null pointer above the limit, where AddressSanitizer would end the process. Stacks of
// allocations are short, since every page of them that a child touches is copied.
// NOLINTNEXTLINE(bugprone-reserved-identifier): AddressSanitizer's name for it
extern "C" const char* __asan_default_options() {
  return "allocator_may_return_null=1:max_allocation_size_mb=256:malloc_context_size=2";
}

extern "C" void* aligned_alloc(std::size_t alignment, std::size_t bytes) noexcept { return get(bytes, alignment); }
