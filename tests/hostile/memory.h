// What a probe's process gets from operator new and aligned_alloc: never more than 256 MiB at once, and on request
// nothing at all from the n-th allocation on. (malloc: RLIMIT_AS or AddressSanitizer's limit.) Every build then sees
// what a machine without memory would show, std::bad_alloc or a null pointer, where AddressSanitizer's own allocator
// would end the process.
#pragma once

namespace quire::testing::allocations {

// From here on every allocation above 256 MiB fails, and all smaller ones succeed.
void limit();

// The first n of the allocations from here on succeed.
void fail_after(int n);

// Whether an allocation has failed since then.
bool failed();

}  // namespace quire::testing::allocations
