// TurboQuant by vLLM's entry points: one uint8 tensor whose slots hold a key row and a value row. These are thin forms
// of reshape_and_cache and unified_attention over the turboquant_* formats, for code that was written against vLLM's
// launchers; new code names a mode and calls the ops.
#pragma once

#include <vector>

#include "quire/ops.h"
#include "quire/status.h"

namespace quire {

// What vLLM's launchers pass as separate integers.
struct TurboQuantConfig {
  int key_bits = 4;             // 3 or 4: Lloyd-Max codes of the rotated key; 8: fp8 keys
  int value_bits = 4;           // 3 or 4
  bool norm_correction = true;  // of 3- and 4-bit keys; quire reads them with it only. fp8 keys have none
  bool key_e4b15 = false;       // fp8 keys as e4b15 instead of e4m3fn
};

// The mode of a configuration. Refused: other bit widths, 3- or 4-bit keys without norm correction.
Result<ModeId> turboquant_mode(const TurboQuantConfig& config);

struct TurboQuantStoreArgs {
  TurboQuantConfig config;
  Tensor key;           // [T, Hk, d] Float
  Tensor value;         // [T, Hk, d]
  Tensor kv_cache;      // [num_blocks, block_size, Hk, slot bytes] uint8; the slot's padding is not touched
  Tensor slot_mapping;  // [<= T] int64 or int32
  // Optional, as vLLM passes them; quire derives both, honours these values and refuses others (CPU tensors only).
  Tensor rotation;   // [d, d] float32: the Hadamard matrix over sqrt(d), symmetric
  Tensor midpoints;  // [2^key_bits - 1] float32: of the centroids for N(0, 1/d)
};
Status turboquant_store(const TurboQuantStoreArgs& args, void* stream = nullptr);

struct TurboQuantDecodeArgs {
  TurboQuantConfig config;
  Tensor query;        // [B, Hq, d] Float, one token a sequence
  Tensor out;          // [B, Hq, d] Float
  Tensor kv_cache;     // as above
  Tensor block_table;  // [B, max_blocks] int32
  Tensor seq_lens;     // [B] int32
  float softmax_scale = 1.0F;
  Tensor rotation;   // optional, as above
  Tensor centroids;  // optional [2^key_bits] float32, of N(0, 1/d)
  Tensor lse;        // optional [B, Hq] float32
};
Status turboquant_decode_attention(const TurboQuantDecodeArgs& args, void* stream = nullptr);

// The key and value views of a slot tensor, for calling the ops with all their semantics.
struct SlotViews {
  Tensor key_cache, value_cache;
};
Result<SlotViews> turboquant_views(const TurboQuantConfig& config, const Tensor& kv_cache, int head_size);

// The layers that a TurboQuant model usually keeps in its own dtype: the first n and the last n, ascending. n is capped
// at num_layers / 2; n <= 0 gives none.
std::vector<int> boundary_skip_layers(int num_layers, int n = 2);

}  // namespace quire
