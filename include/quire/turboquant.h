// TurboQuant by vLLM's entry points: one uint8 tensor whose slots hold a key row and a value row. These are thin forms
// of reshape_and_cache and unified_attention over the turboquant_* formats, for code that was written against vLLM's
// launchers; new code names a mode and calls the ops. All tensors of a call are on one device, cpu or cuda. On cuda
// the four named modes run on tensor cores (docs/formats/turboquant.md); the other pairs of key and value bits, and
// e4b15 keys, in fp32 arithmetic, which is slower.
#pragma once

#include <cstdint>
#include <vector>

#include "quire/export.h"
#include "quire/layout.h"
#include "quire/ops.h"
#include "quire/status.h"

namespace quire {

// A configuration holds what vLLM's launchers pass as separate integers.
struct TurboQuantConfig {
  int key_bits = 4;             // 3 or 4: Lloyd-Max codes of the rotated key; 8: fp8 keys
  int value_bits = 4;           // 3 or 4
  bool norm_correction = true;  // the reader's, of 3- and 4-bit keys: quire reads them with it only, stores either way
  bool key_e4b15 = false;       // fp8 keys as e4b15 instead of e4m3fn
};

// Whether vLLM keeps fp8 keys as e4b15 on a GPU of this compute capability: below 8.9, where Triton has no e4m3fn. For
// callers who read or write vLLM's caches; quire itself asks no GPU and does what key_e4b15 says.
QUIRE_API bool turboquant_uses_e4b15(int major, int minor);

// Finds the mode of a configuration. Refused are other bit widths, and 3- or 4-bit keys without norm correction,
// because a mode is also read.
QUIRE_API Result<ModeId> turboquant_mode(const TurboQuantConfig& config);

struct TurboQuantStoreArgs {
  TurboQuantConfig config;
  ConstTensor key;    // [T, Hk, d] Float
  ConstTensor value;  // [T, Hk, d]
  // [num_blocks, block_size, Hk, slot bytes] uint8, last stride 1. A slot may be wider than the format's (vLLM's
  // padded_slot), not narrower; what lies behind the value row is not touched.
  Tensor kv_cache;
  ConstTensor slot_mapping;  // [<= T] int64 or int32
  // Optional, as vLLM passes them; quire derives both, honours these values and refuses others. Dense; on the cpu,
  // where every call compares them, or on cuda with the call's other tensors.
  //
  // On cuda a table is copied to the host and compared in the first call that names its pointer, and trusted from then
  // on. That call waits for the stream, so it is refused inside a graph capture: make it before. If the memory later
  // holds another matrix at the same address, nobody notices: leave the tables out, or keep them where they are.
  ConstTensor rotation;   // [d, d] float32: the Hadamard matrix over sqrt(d), symmetric
  ConstTensor midpoints;  // [2^key_bits - 1] float32: of the centroids for N(0, 1/d)
};
// Writes the same bytes with and without norm_correction.
QUIRE_API Status turboquant_store(const TurboQuantStoreArgs& args, void* stream);

struct TurboQuantDecodeArgs {
  TurboQuantConfig config;
  ConstTensor query;           // [B, Hq, d] Float, one token a sequence
  Tensor out;                  // [B, Hq, d] Float
  ConstTensor kv_cache;        // as above
  ConstTensor block_table;     // [B, max_blocks] int32
  ConstTensor seq_lens;        // [B] int32
  float softmax_scale = 0.0F;  // required, usually 1 / sqrt(d)
  ConstTensor rotation;        // optional, as above
  ConstTensor centroids;       // optional [2^key_bits] float32, of N(0, 1/d)
  Tensor lse;                  // optional [B, Hq] float32
  // CUDA: a bound on seq_lens; 0: all that block_table has room for, as vLLM's launcher plans.
  std::int64_t max_seq_len = 0;
};
// 3- or 4-bit keys without norm_correction are refused. On cuda cu_seqlens_q is allocated, filled and freed in stream
// order, without waiting, so the call can be captured in a graph.
QUIRE_API Status turboquant_decode_attention(const TurboQuantDecodeArgs& args, void* stream);

// The key and value views of a slot tensor, for calling the ops with all their semantics; there are no scale caches.
// norm_correction, which no byte shows, does not matter here.
QUIRE_API Result<KVCacheViews> turboquant_views(const TurboQuantConfig& config, const Tensor& kv_cache, int head_size);
QUIRE_API Result<ConstKVCacheViews> turboquant_views(const TurboQuantConfig& config, const ConstTensor& kv_cache,
                                                     int head_size);

// The layers that a TurboQuant model usually keeps in its own dtype: the first n and the last n, ascending. n is capped
// at num_layers / 2, and at 65536; n <= 0 gives none.
QUIRE_API std::vector<int> boundary_skip_layers(int num_layers, int n = 2);

}  // namespace quire
