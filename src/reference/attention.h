// The oracle: both operations once more, in double precision and in the order of their definitions (docs/semantics.md),
// with plain loops, no tiles, no splits and no online softmax. It shares nothing with src/cpu and src/attention but the
// formats' unpack and read_meta, so that a disagreement points at one side.
//
// A key is decoded only when some query sees it: like the library, the oracle never reads what is not written. Its
// arguments are taken as valid (the library's ops check theirs); only what it cannot read is refused.
#pragma once

#include <cstdint>
#include <string_view>

#include "format/formats.h"
#include "quire/ops.h"
#include "quire/status.h"
#include "quire/tensor.h"

namespace quire::reference {

// out, and lse where given, computed in double and rounded once to their dtypes. CPU tensors; modes of the table.
Status unified_attention(const UnifiedAttentionArgs& args);

// The store, row by row through format::encode_row. Both layouts, every mode of the table.
Status reshape_and_cache(const ReshapeAndCacheArgs& args);

// The format called `name` in the mode table; "auto" is the cache's own float type. kNone where there is none.
format::FormatId resolve_format(std::string_view name, DType cache_dtype);

// The values of one stored row, rotated back: x [head_size]. `meta` is null for formats without a scale cache.
void decode_row(format::FormatId format, const std::uint8_t* data, const std::uint8_t* meta,
                const format::SideInputs& side, int head_size, double* x);

// The tensors of K or of V; all but the first may be undefined.
struct StoredRows {
  const ConstTensor& cache;        // [num_blocks, block_size, Hk, row]
  const ConstTensor& scale_cache;  // [num_blocks, block_size, Hk]
  const ConstTensor& page_meta;    // [num_blocks, Hk, page bytes]
  const ConstTensor& head_vector;  // [Hk, head_size]
};

// The same, found in a cache: row (block, slot, head). k_scale and v_scale are not applied.
Status decode_cache_row(format::FormatId format, const StoredRows& rows, std::int64_t block, std::int64_t slot,
                        std::int64_t head, int head_size, double* x);

// Element [i], [i, j] or [i, j, k] of a float tensor of any dtype and strides.
double element(const ConstTensor& tensor, std::int64_t i, std::int64_t j = 0, std::int64_t k = 0);

}  // namespace quire::reference
