"""vLLM's own inputs, bytes and outputs, through Python: every argument that a case has reaches the op it belongs to.

`quire check` holds the same files to finer gates on writing (tests/golden/README.md); reading has the same gates here.
"""

import golden
import numpy as np
import pytest
import quire
from conftest import CARRIERS, bfloat16_values

READS = golden.cases("attention_per_token_head", "attention_wide", "vllm033_attention", "diffkv", "vllm033_diffkv")
WRITES = golden.cases("write", "vllm033_write")
OPTIONS = ("softcap", "sliding_window", "chunk_lookback", "rswa_window", "use_alibi_sqrt")
ARRAYS = {
    "sinks": "sinks",
    "alibi_slopes": "alibi_slopes",
    "qq_bias": "qq_bias",
    "mm_prefix_range": "mm_prefix_range",
    "rswa_prefix_lens": "rswa_prefix_lens",
    "q_scale": "q_descale",
    "k_scale": "k_descale",
    "v_scale": "v_descale",
}

# The values of e4m3's codes: sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinities, NaN at the end.
_MAGNITUDES = [m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)]
_MAGNITUDES[-1] = np.nan
E4M3 = np.array(_MAGNITUDES + [-value for value in _MAGNITUDES])


def as_float(values, dtype):
    return bfloat16_values(values) if dtype == "bfloat16" else np.asarray(values, np.float32)


def read_gate(mode, query_dtype):
    """The gate of reading against the file's output, by mode: tests/golden/README.md."""
    if mode.startswith("fp8") and "head" not in mode:
        return 3e-2
    if mode in ("int4_per_token_head", "int2_per_token_head"):
        return 2.5e-2
    return 7e-4 if query_dtype == "float16" else 6e-3


def worst_row_error(mine, theirs):
    difference, norm = np.linalg.norm(mine - theirs, axis=-1), np.linalg.norm(theirs, axis=-1)
    return float(np.max(np.where(difference == 0, 0, difference / np.where(norm == 0, 1e-30, norm))))


def views_of(case, library, mode, head_size):
    if "kv_cache" not in case.tensors:
        return quire.KVCacheViews(
            *(case.array(library, name) for name in ("key_cache", "value_cache", "k_scale_cache", "v_scale_cache")),
            mode=mode,
        )
    values, dtype = case.tensors["kv_cache"]
    both = case.array(library, "kv_cache")
    if isinstance(both, quire.Tensor):  # K and V of a dtype that NumPy has not: two views of the integers
        both = library.array(values)
        return quire.KVCacheViews(
            quire.Tensor(both[..., :head_size], dtype), quire.Tensor(both[..., head_size:], dtype), mode=mode
        )
    return quire.KVCacheViews(both[..., :head_size], both[..., head_size:], mode=mode)


@pytest.mark.parametrize("file, name", READS, ids=[f"{file}:{name}" for file, name in READS])
def test_reads_as_vllm_does(library, file, name):
    case = golden.Case(file, name)
    theirs, out_dtype = case.tensors["out"]
    query, query_dtype = case.tensors["query"]
    mode = case.params.get("mode", "auto")
    cache = views_of(case, library, mode, query.shape[2])
    out = library.array(np.full(theirs.shape, np.nan, np.float32))
    options = {name: case.params[name] for name in OPTIONS if name in case.params}
    options |= {argument: case.array(library, tensor) for tensor, argument in ARRAYS.items()}
    seq_lens, ends = case.tensors["seq_lens"][0], case.tensors["cu_seqlens_q"][0]
    quire.unified_attention(
        case.array(library, "query"),
        out,
        cache,
        case.array(library, "cu_seqlens_q"),
        case.array(library, "seq_lens"),
        case.array(library, "block_table"),
        case.params["softmax_scale"],
        max_query_len=int(np.diff(ends).max()),
        max_seq_len=int(seq_lens.max()),
        **options,
    )
    mine = library.numpy(out)
    if out_dtype in CARRIERS and out_dtype != "bfloat16":
        # The file's output is codes of fp8: `quire check` holds those. Here, the same call writes codes too.
        codes = library.array(np.full(theirs.shape, 0x7F, np.uint8), out_dtype)
        quire.unified_attention(
            case.array(library, "query"),
            codes,
            cache,
            case.array(library, "cu_seqlens_q"),
            case.array(library, "seq_lens"),
            case.array(library, "block_table"),
            case.params["softmax_scale"],
            max_query_len=int(np.diff(ends).max()),
            max_seq_len=int(seq_lens.max()),
            output_scale=case.array(library, "output_scale"),
            **options,
        )
        # e4m3: half a step is 2**-4 of a normal number, 2**-10 below; the kernel's own error is far under both.
        exact = np.clip(mine / case.tensors["output_scale"][0], -448, 448)
        error = np.abs(E4M3[library.numpy(codes)] - exact)
        assert (error <= 1.01 * np.maximum(np.abs(exact) * 2**-4, 2**-10)).all()
    else:
        assert worst_row_error(mine, as_float(theirs, out_dtype)) <= read_gate(mode, query_dtype)


@pytest.mark.parametrize("file, name", WRITES, ids=[f"{file}:{name}" for file, name in WRITES])
def test_writes_as_vllm_does(library, file, name):
    case = golden.Case(file, name)
    mode = case.params["mode"]
    slots, _ = case.tensors["slot_mapping"]
    arrays = {}
    for part in ("key_cache", "value_cache", "k_scale_cache", "v_scale_cache"):
        if part in case.tensors:
            values, dtype = case.tensors[part]
            poison = np.frombuffer(b"\xff" * values.nbytes, values.dtype).reshape(values.shape)
            arrays[part] = library.array(poison, dtype)
    quire.reshape_and_cache(
        case.array(library, "key"),
        case.array(library, "value"),
        quire.KVCacheViews(**arrays, mode=mode),
        case.array(library, "slot_mapping"),
        k_scale=case.array(library, "k_scale"),
        v_scale=case.array(library, "v_scale"),
    )
    used = np.zeros(case.tensors["key_cache"][0].shape[:2], bool)
    used.reshape(-1)[slots[slots >= 0]] = True
    for part, array in arrays.items():
        theirs, _ = case.tensors[part]
        mine = library.numpy(array)
        as_bytes = lambda values: np.ascontiguousarray(values).view(np.uint8).reshape(*used.shape, -1)
        assert (as_bytes(mine)[~used] == 0xFF).all(), f"{part}: a slot that no token maps to has changed"
        equal = (as_bytes(mine)[used] == as_bytes(theirs)[used]).mean()
        # floats and fp8 per tensor: every byte. int8, fp8 and their scales: but for ties. int4, int2: 98 % of the
        # codes, two and four to a byte; their scales may differ by 1 %.
        if mode in ("int4_per_token_head", "int2_per_token_head"):
            if "scale" in part:
                continue
            assert equal >= 0.9, part
        else:
            assert equal == 1 if "head" not in mode else equal >= 0.99, part
