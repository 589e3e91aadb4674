// What a probe's process gets from operator new and aligned_alloc: never more than 256 MiB at once, and on request
// nothing large at all from the n-th allocation on. (malloc: RLIMIT_AS or AddressSanitizer's limit.) Every build then sees what a machine without memory would show,
// std::bad_alloc or a null pointer, where AddressSanitizer's own allocator would end the process.
#pragma once

namespace quire::testing::allocations {

// From here on no single allocation above 256 MiB, and all smaller ones succeed.
void limit();

// Of the allocations of 512 bytes and more from here on, the first n succeed. (A sentence about it takes less.)
void fail_after(int n);

}  // namespace quire::testing::allocations
