// What a probe's process gets from operator new and aligned_alloc: never more than 256 MiB at once, and on request
// nothing at all from the n-th allocation on. (malloc: RLIMIT_AS or AddressSanitizer's limit.) Every build then sees
// what a machine without memory would show, std::bad_alloc or a null pointer, where AddressSanitizer's own allocator
// would end the process.
#pragma once

namespace quire::testing::allocations {

// From here on no single allocation above 256 MiB, and all smaller ones succeed.
void limit();

// Of the allocations from here on, the first n succeed.
void fail_after(int n);

// Whether one has failed since.
bool failed();

}  // namespace quire::testing::allocations
