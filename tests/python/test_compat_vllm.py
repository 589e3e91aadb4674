"""quire.compat.vllm: vLLM's conventions against vLLM's definitions, computed here in float64."""

import enum
import inspect

import pytest
from compat import BOUND, DEVICES, Batch, assert_near, assert_same, torch

import quire
from quire.compat import _call, vllm
from quire.compat.vllm import KVQuantMode

pytestmark = pytest.mark.parametrize("device", DEVICES)

# vLLM 0.33.0's, in its order.
SIGNATURES = {
    "unified_attention": """
        q k v out cu_seqlens_q max_seqlen_q seqused_k max_seqlen_k softmax_scale causal window_size block_table softcap
        q_descale k_descale v_descale seq_threshold_3D num_par_softmax_segments softmax_segm_output softmax_segm_max
        softmax_segm_expsum alibi_slopes output_scale qq_bias sinks mm_prefix_range rswa_prefix_lens rswa_window
        use_alibi_sqrt kv_quant_mode k_scale_cache v_scale_cache chunk_lookback use_td
        mm_prefix_clamp_sliding_window""",
    "unified_attention_diffkv": """
        q k v out cu_seqlens_q seqused_k softmax_scale causal window_size block_table softcap max_seqlen_q alibi_slopes
        sinks use_alibi_sqrt seq_threshold_3D num_par_softmax_segments softmax_segm_output softmax_segm_max
        softmax_segm_expsum k_descale v_descale q_descale""",
    "triton_reshape_and_cache_flash": """
        key value key_cache value_cache slot_mapping kv_cache_dtype k_scale v_scale interleaved_v_pack_factor""",
    "triton_reshape_and_cache_flash_diffkv": "key value kv_cache slot_mapping kv_cache_dtype k_scale v_scale",
    "triton_reshape_and_cache_flash_per_token_head_quant": """
        key value key_cache value_cache k_scale_cache v_scale_cache slot_mapping kv_quant_mode""",
    "triton_turboquant_store": """
        key value kv_cache slot_mapping PiT midpoints mse_bits key_packed_size value_quant_bits key_fp8""",
    "triton_turboquant_decode_attention": """
        query kv_cache block_table seq_lens Pi centroids scale mse_bits key_packed_size value_quant_bits key_fp8
        norm_correction PiT mid_o_buf output_buf lse_buf buf_holder max_num_kv_splits""",
    "single_rht": "x inverse",
    "fast_hadamard_transform": "x",
}


def test_signatures(device):
    for name, names in SIGNATURES.items():
        assert list(inspect.signature(getattr(vllm, name)).parameters) == names.split(), name


def window(width):
    return lambda b, p, j: (j <= p) & (p - j < width)


def chunks(width, lookback):
    size = width // (lookback + 1)
    return lambda b, p, j: (j <= p) & (p // size - j // size <= lookback)


def r_swa(lens, width):
    return lambda b, p, j: (j <= p) & ((j < lens[b]) | (p - j < width))


def spans(spans_of, inner, clamp=10**6):
    def visible(b, p, j):
        seen = inner(b, p, j)
        for first, last in spans_of[b]:
            if first < last:
                seen = seen | ((p >= first) & (p <= last) & (j >= first) & (j <= last) & (p - j < clamp))
        return seen

    return visible


SPANS = [[(4, 12), (37, 39)], [(0, 0), (0, 0)], [(1, 5), (0, 0)]]
CAUSAL = window(10**6)
# name: (keywords of the call, keywords of the definition)
CASES = {
    "plain": ({}, {}),
    "softcap None": ({"softcap": None}, {}),
    "softcap below 0": ({"softcap": -1.0}, {}),
    "softcap": ({"softcap": 2.0}, {"softcap": 2.0}),
    "window": ({"window_size": (7, 0)}, {"visible": window(8)}),
    "a window of one": ({"window_size": (0, 0)}, {"visible": window(1)}),
    "not causal": ({"causal": False}, {"visible": lambda b, p, j: (j >= 0) & (p > -1)}),
    "not causal, window": ({"causal": False, "window_size": (4, 4)}, {"visible": lambda b, p, j: abs(p - j) < 5}),
    "lookback without a window": ({"chunk_lookback": 1}, {}),
    "chunks": ({"chunk_lookback": 1, "window_size": (11, 0)}, {"visible": chunks(12, 1)}),
    "square roots without slopes": ({"use_alibi_sqrt": True}, {}),
    "R-SWA": ({"rswa_window": 3, "rswa_prefix_lens": [5, 0, 2]}, {"visible": r_swa((5, 0, 2), 3)}),
    "R-SWA in a window's place": (
        {"rswa_window": 3, "rswa_prefix_lens": [5, 0, 2], "window_size": (1, 0)},
        {"visible": r_swa((5, 0, 2), 3)},
    ),
    "half of R-SWA": ({"rswa_window": 3}, {}),
    "spans": ({"mm_prefix_range": SPANS}, {"visible": spans(SPANS, CAUSAL)}),
    "spans that the window limits": (
        {"mm_prefix_range": SPANS, "window_size": (3, 0), "mm_prefix_clamp_sliding_window": True},
        {"visible": spans(SPANS, window(4), clamp=4)},
    ),
    "spans and a window": ({"mm_prefix_range": SPANS, "window_size": (3, 0)}, {"visible": spans(SPANS, window(4))}),
}


@pytest.mark.parametrize("case", CASES)
def test_masks(device, case):
    batch = Batch(device)
    given, definition = (dict(part) for part in CASES[case])
    positional = {name: given.pop(name) for name in ("causal", "window_size", "softcap") if name in given}
    for name in ("mm_prefix_range", "rswa_prefix_lens"):
        if name in given:
            given[name] = torch.tensor(given[name], dtype=torch.int32, device=device)
    vllm.unified_attention(*batch.args(*batch.plain_caches(), **positional), **given)
    assert_near(batch.out, batch.expected(**definition), BOUND[device])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8])
def test_causal_per_sequence(device, dtype):
    batch = Batch(device)
    causal = torch.tensor([True, True, False], device=device).to(dtype)
    vllm.unified_attention(*batch.args(*batch.plain_caches(), causal=causal))
    expected = batch.expected(visible=lambda b, p, j: (j <= p) | torch.tensor(b == 2))
    assert_near(batch.out, expected, BOUND[device])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_small_tensors_of_any_float(device, dtype):
    batch = Batch(device)
    sinks, slopes = (torch.nn.Parameter(torch.randn(4, device=device).to(dtype)) for _ in range(2))
    bias = torch.randn(7, 7, device=device).to(dtype)
    vllm.unified_attention(*batch.args(*batch.plain_caches()), sinks=sinks, alibi_slopes=slopes, qq_bias=bias)
    assert_near(batch.out, batch.expected(sinks=sinks, alibi_slopes=slopes, qq_bias=bias), BOUND[device])
    vllm.unified_attention(*batch.args(*batch.plain_caches()), alibi_slopes=slopes, use_alibi_sqrt=True)
    assert_near(batch.out, batch.expected(alibi_slopes=slopes, use_alibi_sqrt=True), BOUND[device])


def test_integers_of_64_bits(device):
    batch = Batch(device)
    args = list(batch.args(*batch.plain_caches()))
    for at in (4, 6, 11):
        args[at] = args[at].long()
    vllm.unified_attention(*args)
    assert_near(batch.out, batch.expected(), BOUND[device])


def test_scratch_and_descriptors_are_ignored(device):
    batch = Batch(device)
    scratch = {f"softmax_segm_{name}": torch.empty(0, 4, 16, device=device) for name in ("output", "max", "expsum")}
    vllm.unified_attention(
        *batch.args(*batch.plain_caches()), seq_threshold_3D=0, num_par_softmax_segments=16, use_td=True, **scratch
    )
    assert_near(batch.out, batch.expected(), BOUND[device])


def fp8_caches(batch, k_scale, v_scale):
    key_cache, value_cache, _, _ = batch.caches(torch.uint8)
    vllm.triton_reshape_and_cache_flash(
        batch.key, batch.value, key_cache, value_cache, batch.slots, "fp8_e5m2", k_scale, v_scale
    )
    decoded = [
        (rows / scale).to(torch.float8_e4m3fn).float() * scale
        for rows, scale in ((batch.key, k_scale), (batch.value, v_scale))
    ]
    return key_cache, value_cache, decoded


@pytest.mark.parametrize("form", ["no dimension", "one element", "number", "of each head"])
def test_fp8_per_tensor_and_its_names(device, form):
    batch = Batch(device)
    k_scale, v_scale = (torch.tensor(x, device=device) for x in (0.5, 0.3))
    key_cache, value_cache, (key, value) = fp8_caches(batch, k_scale, v_scale)
    # Every name of fp8 means e4m3fn: PyTorch's own cast is the witness.
    stored = key_cache.view(torch.float8_e4m3fn).view(-1, *key_cache.shape[2:])[batch.slots].float() * k_scale
    assert torch.equal(stored, key)
    descales = [
        {
            "no dimension": lambda s: s,
            "one element": lambda s: s[None],
            "number": float,
            "of each head": lambda s: s.expand(3, 2),
        }[form](scale)
        for scale in (k_scale, v_scale)
    ]
    for caches in ((key_cache, value_cache), [cache.view(torch.float8_e4m3fn) for cache in (key_cache, value_cache)]):
        vllm.unified_attention(
            *batch.args(*caches, k_descale=descales[0], v_descale=descales[1]), kv_quant_mode=KVQuantMode.FP8_PER_TENSOR
        )
        assert_near(batch.out, batch.expected(key, value), BOUND[device])


def test_fp8_query(device):
    batch = Batch(device)
    q_scale = torch.tensor(0.25, device=device)
    query = (batch.query / q_scale).to(torch.float8_e4m3fn)
    key_cache, value_cache, (key, value) = fp8_caches(
        batch, torch.tensor(0.5, device=device), torch.tensor(0.3, device=device)
    )
    vllm.unified_attention(
        *batch.args(key_cache, value_cache, query=query, q_descale=q_scale, k_descale=0.5, v_descale=0.3),
        kv_quant_mode=KVQuantMode.FP8_PER_TENSOR,
    )
    assert_near(batch.out, batch.expected(key, value, query.float() * q_scale), 2 * BOUND[device])


def test_descales_are_of_fp8_per_tensor_alone(device):
    batch = Batch(device)
    random = torch.rand(3, 2, device=device)
    vllm.unified_attention(*batch.args(*batch.plain_caches(), q_descale=random, k_descale=random, v_descale=random))
    assert_near(batch.out, batch.expected(), BOUND[device])
    caches = batch.plain_caches(torch.float8_e4m3fn)
    vllm.unified_attention(*batch.args(*caches, k_descale=random, v_descale=random))  # fp8 in mode NONE
    key, value = batch.key.to(torch.float8_e4m3fn).float(), batch.value.to(torch.float8_e4m3fn).float()
    assert_near(batch.out, batch.expected(key, value), BOUND[device])


# mode, dtype of the cache, elements of a row for each of the cache, bound on the error of 4-, 8- and 2-bit rows
MODES = [
    ("INT8_PER_TOKEN_HEAD", torch.int8, 1, 0.02),
    ("FP8_PER_TOKEN_HEAD", torch.float8_e4m3fn, 1, 0.06),
    ("FP8_PER_TOKEN_HEAD", torch.uint8, 1, 0.06),
    ("INT4_PER_TOKEN_HEAD", torch.uint8, 2, 0.25),
    ("INT2_PER_TOKEN_HEAD", torch.uint8, 4, 0.75),
]


class Elsewhere(enum.IntEnum):
    """An enum of another version, with numbers of its own."""

    INT8_PER_TOKEN_HEAD = 9
    FP8_PER_TOKEN_HEAD = 3
    INT4_PER_TOKEN_HEAD = 1
    INT2_PER_TOKEN_HEAD = 5


@pytest.mark.parametrize("mode, dtype, factor, bound", MODES)
def test_pages_with_inline_scales(device, mode, dtype, factor, bound):
    """[K | fp32 | V | fp32] for each token and head, as vLLM's engine has it, in both orders of tokens and heads."""
    batch = Batch(device)
    row = batch.head_size // factor
    separate = batch.caches(dtype, row)
    stored = {"key": batch.key, "value": batch.value, "slot_mapping": batch.slots, "kv_quant_mode": Elsewhere[mode]}
    names = ("key_cache", "value_cache", "k_scale_cache", "v_scale_cache")
    vllm.triton_reshape_and_cache_flash_per_token_head_quant(**stored, **dict(zip(names, separate)))
    vllm.unified_attention(
        *batch.args(*separate[:2], k_descale=3.0, v_descale=3.0),
        kv_quant_mode=Elsewhere[mode],
        k_scale_cache=separate[2],
        v_scale_cache=separate[3],
    )
    assert_near(batch.out, batch.expected(), bound)
    expected = batch.out.clone()

    for heads_first in (False, True):
        shape = (batch.num_blocks, *((2, 16) if heads_first else (16, 2)), 2 * (row + 4))
        page = torch.full(shape, 77, dtype=torch.uint8, device=device)
        if heads_first:
            page = page.transpose(1, 2)
        key_cache, value_cache = page.view(dtype).split(row + 4, dim=-1)  # wider than the row
        scales = [part[..., row:].view(torch.float32)[..., 0] for part in page.split(row + 4, dim=-1)]
        views = dict(zip(names, (key_cache, value_cache, *scales)))
        vllm.triton_reshape_and_cache_flash_per_token_head_quant(**stored, **views)
        batch.out.fill_(float("nan"))
        vllm.unified_attention(
            *batch.args(key_cache, value_cache),
            kv_quant_mode=Elsewhere[mode],
            k_scale_cache=scales[0],
            v_scale_cache=scales[1],
        )
        assert_same(batch.out, expected, device)
        untouched = (
            page.view(torch.uint8).reshape(-1, page.shape[-1])
            if not heads_first
            else page.contiguous().view(-1, page.shape[-1])
        )
        free = torch.ones(untouched.shape[0], dtype=torch.bool, device=device)
        free.view(-1, 2)[batch.slots] = False
        assert (untouched[free] == 77).all()


@pytest.mark.parametrize(
    "mode, dtype", [("INT8_PER_TOKEN_HEAD", torch.int8), ("FP8_PER_TOKEN_HEAD", torch.float8_e4m3fn)]
)
def test_narrow_heads(device, mode, dtype):
    """Head sizes below those of quire's ops, as in vLLM's tests."""
    key = torch.tensor([[[-127.0, -2.6, -2.4, -1.6, -1.4, -0.6, -0.4, 127.0]]] * 3, dtype=torch.bfloat16, device=device)
    caches = [torch.zeros(2, 4, 1, 8, dtype=torch.uint8, device=device).view(dtype) for _ in range(2)]
    scales = [torch.ones(2, 4, 1, device=device) for _ in range(2)]
    slots = torch.tensor([2, -1, 5], device=device)
    vllm.triton_reshape_and_cache_flash_per_token_head_quant(key, -key, *caches, *scales, slots, KVQuantMode[mode])
    largest = 127.0 if dtype == torch.int8 else 448.0
    codes = key.float() / (127.0 / largest)
    expected = (codes.round() if dtype == torch.int8 else codes).to(dtype)
    for block, offset, token in ((0, 2, 0), (1, 1, 2)):
        assert torch.equal(caches[0][block, offset].float(), expected[token].float())
        assert torch.equal(caches[1][block, offset].float(), -expected[token].float())
        torch.testing.assert_close(scales[0][block, offset, 0].item(), 127.0 / largest)
    assert (caches[0].view(torch.uint8)[0, :2] == 0).all() and (scales[1][1, 2:] == 1).all()


def test_stores_of_floats(device):
    batch = Batch(device)
    key_cache, value_cache, _, _ = batch.caches(torch.bfloat16)
    slots = batch.slots.to(torch.int32)
    slots[::3] = -1
    before = key_cache.clone()
    for name in ("auto", "bfloat16"):
        vllm.triton_reshape_and_cache_flash(batch.key, batch.value, key_cache, value_cache, slots, name, 2.0, 2.0)
    rows, old = (cache.view(-1, *cache.shape[2:]) for cache in (key_cache, before))
    assert torch.equal(rows[batch.slots][slots >= 0], batch.key.bfloat16()[slots >= 0])
    assert torch.equal(rows[batch.slots][slots < 0].view(torch.int16), old[batch.slots][slots < 0].view(torch.int16))


def test_float8_rows_are_copied(device):
    batch = Batch(device)
    key_cache, value_cache, _, _ = batch.caches(torch.uint8)
    key, value = batch.key.to(torch.float8_e4m3fn), batch.value.to(torch.float8_e4m3fn)
    vllm.triton_reshape_and_cache_flash(key, value, key_cache, value_cache, batch.slots, "fp8", 3.0, 3.0)
    assert torch.equal(key_cache.view(-1, 2, 64)[batch.slots], key.view(torch.uint8))


def test_head_major_caches(device):
    batch = Batch(device)
    key_cache = torch.zeros(batch.num_blocks, 2, 64 // 8, 16, 8, device=device)
    value_cache = torch.zeros(batch.num_blocks, 2, 64, 16, device=device)
    vllm.triton_reshape_and_cache_flash(batch.key, batch.value, key_cache, value_cache, batch.slots, "auto", 1.0, 1.0)
    block, offset = batch.slots // 16, batch.slots % 16
    assert torch.equal(key_cache[block, :, :, offset].reshape(-1, 2, 64), batch.key)
    assert torch.equal(value_cache[block, :, :, offset], batch.value)
    with pytest.raises(NotImplementedError):
        vllm.triton_reshape_and_cache_flash(
            batch.key, batch.value, key_cache, value_cache, batch.slots, "auto", 1.0, 1.0, 4
        )


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_diffkv(device, kv_cache_dtype):
    batch = Batch(device, head_size=96, head_size_v=64)
    dtype = torch.uint8 if kv_cache_dtype == "fp8" else torch.float32
    # Heads before tokens, which vLLM's kernel, that takes a head's stride for d + dv, does not serve.
    cache = torch.zeros(batch.num_blocks, 2, 16, 160, dtype=dtype, device=device).transpose(1, 2)
    scale = torch.tensor(0.5, device=device)
    vllm.triton_reshape_and_cache_flash_diffkv(batch.key, batch.value, cache, batch.slots, kv_cache_dtype, scale, scale)
    key, value, descales = batch.key, batch.value, {}
    if kv_cache_dtype == "fp8":
        cache = cache.view(torch.float8_e4m3fn)
        key, value = ((rows / scale).to(torch.float8_e4m3fn).float() * scale for rows in (key, value))
        descales = {"k_descale": scale, "v_descale": scale}
    vllm.unified_attention_diffkv(
        batch.query,
        cache[..., :96],
        cache[..., 96:],
        batch.out,
        batch.cu_seqlens_q,
        batch.seq_lens,
        batch.scale,
        True,
        (7, 0),
        batch.block_table,
        0,
        max_seqlen_q=7,
        **descales,
    )
    assert_near(batch.out, batch.expected(key, value, visible=window(8)), BOUND[device])
    with pytest.raises(AssertionError):
        vllm.unified_attention_diffkv(
            batch.query,
            cache[..., :96],
            cache[..., 96:],
            batch.out,
            batch.cu_seqlens_q,
            batch.seq_lens,
            batch.scale,
            False,
            (7, 0),
            batch.block_table,
            0,
        )


def test_output_scale(device):
    batch = Batch(device, dtype=torch.bfloat16)
    scale = torch.tensor(0.004, device=device)
    expected = (batch.expected() / 0.004).clamp(-448, 448)
    caches = batch.plain_caches()
    vllm.unified_attention(*batch.args(*caches), output_scale=scale)  # vLLM divides whatever the dtype
    assert (expected.abs() == 448).any() and batch.out.float().abs().max() == 448
    assert_near(batch.out, expected, max(5e-3, BOUND[device]))
    out = torch.empty_like(batch.out, dtype=torch.float8_e4m3fn)
    vllm.unified_attention(*batch.args(*caches, out=out), output_scale=scale)
    assert_near(out.float(), expected, 0.05)
    vllm.unified_attention(*batch.args(*caches, out=out))
    assert_near(out.float(), batch.expected(), 0.05)


def test_int4_by_its_own_functions(device):
    batch = Batch(device)
    caches = batch.caches(torch.uint8, 32)
    vllm.reshape_and_cache_int4(
        batch.key, batch.value, *caches[:2], batch.slots, k_scale_cache=caches[2], v_scale_cache=caches[3]
    )
    vllm.unified_attention_int4(
        batch.query,
        *caches[:2],
        batch.out,
        cu_seqlens_q=batch.cu_seqlens_q,
        max_seqlen_q=7,
        seqused_k=batch.seq_lens,
        max_seqlen_k=40,
        softmax_scale=batch.scale,
        window_size=(-1, -1),
        block_table=batch.block_table,
        softcap=0.0,
        sinks=None,
        alibi_slopes=None,
        use_alibi_sqrt=False,
        qq_bias=None,
        output_scale=None,
        mm_prefix_range=None,
        k_scale_cache=caches[2],
        v_scale_cache=caches[3],
    )
    assert_near(batch.out, batch.expected(), 0.25)


def test_refusals(device):
    batch = Batch(device)
    caches = batch.plain_caches()
    with pytest.raises(AssertionError, match="sinks"):
        vllm.unified_attention(*batch.args(*caches), sinks=torch.zeros(3, device=device))
    with pytest.raises(AssertionError, match="k_scale_cache"):
        vllm.unified_attention(
            *batch.args(*batch.caches(torch.int8)[:2]), kv_quant_mode=KVQuantMode.INT8_PER_TOKEN_HEAD
        )
    with pytest.raises(ValueError, match="mm_prefix_range"):
        vllm.unified_attention(
            *batch.args(*caches), mm_prefix_range=torch.zeros(3, 2, dtype=torch.int32, device=device)
        )
    with pytest.raises(AssertionError, match="lookback"):
        vllm.unified_attention(*batch.args(*caches, window_size=(1, 0)), chunk_lookback=4)
    for mode in (KVQuantMode.NVFP4, 5, KVQuantMode.CUSTOM):
        with pytest.raises(quire.UnsupportedError, match="none of quire's modes"):
            vllm.unified_attention(*batch.args(*caches), kv_quant_mode=mode)
    with pytest.raises(quire.InvalidArgumentError):
        vllm.unified_attention(*batch.args(*batch.caches(torch.int8)[:2]))  # int8 rows of mode NONE
    for name in ("int8_per_token_head", "nvfp4", "int4"):
        with pytest.raises(AssertionError, match=name):
            vllm.triton_reshape_and_cache_flash(batch.key, batch.value, *caches, batch.slots, name, None, None)
    with pytest.raises(ValueError, match="torch.float32"):
        vllm.triton_reshape_and_cache_flash_per_token_head_quant(
            batch.key, batch.value, *batch.caches(), batch.slots, KVQuantMode.NONE
        )


def test_batch_invariance(device, monkeypatch):
    """A sequence's bits do not depend on the rest of the batch where vLLM's environment variable asks for that."""
    monkeypatch.setattr(_call, "BATCH_INVARIANT", True)
    whole = Batch(device, lens=((1, 700), (1, 300), (5, 60)))
    caches = whole.plain_caches()
    vllm.unified_attention(*whole.args(*caches))
    alone = torch.empty_like(whole.out[:1])
    vllm.unified_attention(
        whole.query[:1],
        *caches,
        alone,
        whole.cu_seqlens_q[:2],
        1,
        whole.seq_lens[:1],
        700,
        whole.scale,
        True,
        (-1, -1),
        whole.block_table[:1],
        0,
        None,
        None,
        None,
    )
    assert torch.equal(alone, whole.out[:1])
    assert_near(whole.out, whole.expected(), BOUND[device])
