"""Both ops through the whole path, from every library of arrays."""

import numpy as np
import pytest
import quire

MODES = [mode.name for mode in quire.modes() if mode.compiled]


def softmax_attention(query, key, value, scale):
    """Causal attention of one sequence in float64: query [N, Hq, d] are its last tokens."""
    num_queries, num_q_heads, _ = query.shape
    num_keys, num_kv_heads, _ = key.shape
    out = np.empty((num_queries, num_q_heads, value.shape[2]))
    for head in range(num_q_heads):
        kv = head // (num_q_heads // num_kv_heads)
        logits = scale * query[:, head].astype(float) @ key[:, kv].astype(float).T
        position = np.arange(num_queries)[:, None] + num_keys - num_queries
        logits = np.where(np.arange(num_keys)[None] <= position, logits, -np.inf)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ value[:, kv].astype(float)
    return out


@pytest.mark.parametrize("mode", MODES)
def test_store_and_read(library, rng, mode):
    spec = quire.KVCacheSpec(mode, head_size=64, num_kv_heads=2, block_size=16, model_dtype="float32")
    cache = quire.allocate_cache(spec, num_blocks=4, device=library.device)
    key, value = (rng.standard_normal((40, 2, 64), dtype=np.float32) for _ in range(2))
    query = rng.standard_normal((3, 4, 64), dtype=np.float32)
    quire.reshape_and_cache(library.array(key), library.array(value), cache, library.array(np.arange(16, 56)))
    out = library.array(np.zeros_like(query))
    quire.unified_attention(
        library.array(query),
        out,
        cache,
        library.array(np.array([0, 3], np.int32)),
        library.array(np.array([40], np.int32)),
        library.array(np.array([[1, 2, 3]], np.int32)),
        softmax_scale=0.125,
        max_query_len=3,
        max_seq_len=40,
    )
    expected = softmax_attention(query, key, value, 0.125)
    error = np.linalg.norm(library.numpy(out) - expected) / np.linalg.norm(expected)
    # The formats' own errors, far above the kernels': half a step of the coarsest code, and fp16 or bf16 rounding.
    limit = 0.75 if "int2" in mode or "3" in mode else 0.35 if "4" in mode else 0.15
    assert error < limit
