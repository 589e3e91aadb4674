"""The attention backends of quire.compat.vllm_quant_kv: contracts of the documents, and results."""

import inspect
from types import SimpleNamespace

import pytest
from compat import BOUND, DEVICES, Batch, assert_near, torch

from quire.compat.vllm_quant_kv import (
    AttentionSpec,
    FullAttentionSpec,
    KVQuantMode,
    TritonAttentionBackend,
    TritonAttentionDiffKVBackend,
    TritonAttentionDiffKVImpl,
    TritonAttentionDiffKVMetadataBuilder,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)
from quire.compat.vllm_quant_kv.spec import _effective_head_size

LAYER = SimpleNamespace(_q_scale=torch.tensor(1.0), _k_scale=torch.tensor(0.5), _v_scale=torch.tensor(0.25))


@pytest.fixture(autouse=True)
def head_size_v(monkeypatch):
    monkeypatch.setattr(TritonAttentionDiffKVBackend, "head_size_v", 128)


def config(heads=(4, 2), head_size=96, mode="NONE", sizes=()):
    model = SimpleNamespace(
        get_num_attention_heads=lambda parallel: heads[0],
        get_num_kv_heads=lambda parallel: heads[1],
        get_head_size=lambda: head_size,
    )
    return SimpleNamespace(
        model_config=model,
        parallel_config=None,
        compilation_config=SimpleNamespace(
            cudagraph_mode=SimpleNamespace(name=mode), cudagraph_capture_sizes=list(sizes)
        ),
    )


def metadata(batch, builder=TritonAttentionMetadataBuilder, prefix=0, **fields):
    common = SimpleNamespace(
        num_actual_tokens=batch.query.shape[0],
        max_query_len=max(q for q, _ in batch.lens),
        max_seq_len=max(keys for _, keys in batch.lens),
        query_start_loc=batch.cu_seqlens_q,
        seq_lens=batch.seq_lens,
        block_table_tensor=batch.block_table,
        slot_mapping=batch.slots,
        **fields,
    )
    made = builder(
        SimpleNamespace(block_size=batch.block_size),
        ["layer"],
        config(batch.heads, batch.head_size),
        torch.device(batch.device),
    )
    return made.build(prefix, common)


def impl(batch, cls=TritonAttentionImpl, kv_cache_dtype="auto", sliding_window=None, **options):
    return cls(
        batch.heads[0], batch.head_size, batch.scale, batch.heads[1], None, sliding_window, kv_cache_dtype, **options
    )


def layer(device):
    return SimpleNamespace(**{name: scale.to(device) for name, scale in vars(LAYER).items()})


# ---- pages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode, size",
    [
        ("NONE", 128),
        ("INT8_PER_TOKEN_HEAD", 128),
        ("FP8_PER_TOKEN_HEAD", 128),
        ("INT4_PER_TOKEN_HEAD", 64),
        ("INT2_PER_TOKEN_HEAD", 32),
    ],
)
def test_page_formulas(mode, size):
    """block * heads * (row of K + row of V) * itemsize, and 2 * block * heads * 4 for the scales."""
    mode = KVQuantMode[mode]
    assert _effective_head_size(128, mode) == size
    dtype = torch.bfloat16 if mode == KVQuantMode.NONE else torch.uint8
    spec = AttentionSpec(block_size=16, num_kv_heads=8, head_size=128, dtype=dtype, kv_quant_mode=mode)
    scales = 2 * 16 * 8 * 4 if mode.is_per_token_head else 0
    assert spec._effective_head_size == size
    assert spec.page_size_bytes == 16 * 8 * 2 * size * dtype.itemsize + scales
    wide = FullAttentionSpec(
        block_size=16,
        num_kv_heads=8,
        head_size=128,
        head_size_v=64,
        dtype=dtype,
        kv_quant_mode=mode,
        page_size_padded=1 << 20,
    )
    assert wide.real_page_size_bytes == 16 * 8 * (size + size // 2) * dtype.itemsize + scales
    assert wide.page_size_bytes == 1 << 20
    with pytest.raises(AssertionError, match="page_size_padded"):
        AttentionSpec(block_size=16, num_kv_heads=8, head_size=128, dtype=dtype, page_size_padded=8).page_size_bytes


def test_cache_shapes(monkeypatch):
    plain, diffkv = TritonAttentionBackend, TritonAttentionDiffKVBackend
    assert plain.get_kv_cache_shape(5, 16, 8, 128) == (5, 2, 16, 8, 128)
    rows = {"int8_per_token_head": 132, "fp8_per_token_head": 132, "int4_per_token_head": 68, "int2_per_token_head": 36}
    for name, row in rows.items():
        assert plain.get_kv_cache_shape(5, 16, 8, 128, name) == (5, 2, 16, 8, row)
    assert diffkv.get_kv_cache_shape(5, 16, 8, 192) == (5, 16, 8, 320)
    for backend in (plain, diffkv):
        with pytest.raises(ValueError, match="16"):
            backend.get_kv_cache_shape(5, 24, 8, 128)
    orders = {
        "NHD": ((0, 1, 2, 3, 4), (1, 0, 2, 3, 4, 5), (0, 1, 2, 3), (1, 0, 2, 3, 4)),
        "HND": ((0, 1, 3, 2, 4), (1, 2, 4, 0, 3, 5), (0, 2, 1, 3), (1, 3, 0, 2, 4)),
    }
    for name, expected in orders.items():
        monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", name)
        assert (
            plain.get_kv_cache_stride_order(),
            plain.get_kv_cache_stride_order(True),
            diffkv.get_kv_cache_stride_order(),
            diffkv.get_kv_cache_stride_order(True),
        ) == expected
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "DNH")
    with pytest.raises(ValueError, match="DNH"):
        plain.get_kv_cache_stride_order()


def test_what_the_backends_say():
    plain, diffkv = TritonAttentionBackend, TritonAttentionDiffKVBackend
    assert (plain.get_name(), diffkv.get_name()) == ("TRITON_ATTN", "TRITON_ATTN_DIFFKV")
    assert diffkv.get_impl_cls() is TritonAttentionDiffKVImpl and issubclass(
        TritonAttentionDiffKVImpl, TritonAttentionImpl
    )
    assert diffkv.get_builder_cls() is TritonAttentionDiffKVMetadataBuilder
    assert issubclass(TritonAttentionDiffKVMetadataBuilder, TritonAttentionMetadataBuilder)
    assert plain.supports_head_size(32) and not plain.supports_head_size(31)
    for name in ("mm_prefix", "sink", "alibi_sqrt", "non_causal", "batch_invariance"):
        assert getattr(diffkv, f"supports_{name}")() is True
    kinds = ("decoder", "encoder", "encoder_only", "encoder_decoder")
    assert all(map(plain.supports_attn_type, kinds)) and list(map(diffkv.supports_attn_type, kinds)) == [1, 0, 0, 0]
    assert plain.supported_dtypes == [torch.float16, torch.bfloat16, torch.float32]
    assert diffkv.supported_kv_cache_dtypes == ["auto", "bfloat16"]
    diffkv.set_head_size_v(64)
    assert diffkv.head_size_v == 64


# ---- the builder ----------------------------------------------------------------------------------------------------


def test_builder_buffers():
    spec, device = SimpleNamespace(block_size=16), torch.device("cpu")
    plain = TritonAttentionMetadataBuilder(spec, ["a"], config(head_size=96), device)
    assert plain.seq_threshold_3D == 64 and plain.num_par_softmax_segments == 16
    assert plain.softmax_segm_output.shape == (64, 4, 16, 128) and plain.softmax_segm_max.shape == (64, 4, 16)
    TritonAttentionDiffKVBackend.set_head_size_v(40)
    wide = TritonAttentionDiffKVMetadataBuilder(spec, ["a"], config(head_size=192), device)
    assert wide.softmax_segm_output.shape == (64, 4, 16, 64) and wide.softmax_segm_output.dtype == torch.float32
    assert wide.softmax_segm_max.shape == wide.softmax_segm_expsum.shape == (64, 4, 16)
    graphs = TritonAttentionMetadataBuilder(spec, ["a"], config(mode="FULL", sizes=(1, 8, 48, 96)), device)
    assert graphs.seq_threshold_3D == 48 and graphs.softmax_segm_output.shape[0] == 48
    with pytest.raises(AssertionError, match="cudagraph_capture_sizes"):
        TritonAttentionMetadataBuilder(spec, ["a"], config(mode="FULL_DECODE_ONLY"), device)


def test_builder_build():
    batch = Batch()
    made = metadata(batch)
    assert made.use_cascade is False and made.seq_lens is batch.seq_lens and made.num_actual_tokens == 11
    cascade = metadata(batch, prefix=5)
    assert cascade.use_cascade is True and cascade.suffix_kv_lens.tolist() == [35, 12, 2]
    assert cascade.cu_prefix_query_lens.tolist() == [0, 11] and cascade.prefix_kv_lens.tolist() == [5]
    builder = TritonAttentionMetadataBuilder(SimpleNamespace(block_size=16), [], config(), torch.device("cpu"))
    common = SimpleNamespace(
        **{
            name: getattr(made, name)
            for name in (
                "num_actual_tokens",
                "max_query_len",
                "max_seq_len",
                "query_start_loc",
                "seq_lens",
                "slot_mapping",
            )
        },
        block_table_tensor=made.block_table,
    )
    assert builder.build_for_cudagraph_capture(common).seq_lens.tolist() == [1, 1, 1]
    made.mm_prefix_range = {0: [(1, 3), (5, 6)], 1: [], 2: [(0, 2)]}
    assert made.mm_prefix_range_tensor.tolist() == [[[1, 3], [5, 6]], [[0, 0], [0, 0]], [[0, 2], [0, 0]]]


# ---- DiffKV ---------------------------------------------------------------------------------------------------------


def test_diffkv_refuses():
    batch = Batch(head_size=96, head_size_v=64)
    for name in ("fp8", "fp8_e5m2", "int8_per_token_head", "int4_per_token_head"):
        with pytest.raises(NotImplementedError, match=name):
            impl(batch, TritonAttentionDiffKVImpl, name)
    with pytest.raises(NotImplementedError, match="chunk"):
        impl(batch, TritonAttentionDiffKVImpl, chunk_lookback=1, sliding_window=8)
    layer_impl = impl(batch, TritonAttentionDiffKVImpl)
    assert layer_impl.fused_rope_kvcache_supported() is False
    forward = inspect.signature(TritonAttentionDiffKVImpl.forward)
    assert list(forward.parameters) == [
        "self",
        "layer",
        "query",
        "key",
        "value",
        "kv_cache",
        "attn_metadata",
        "output",
        "output_scale",
        "output_block_scale",
    ]
    nothing = (None, batch.query, None, None, None)
    for scales in ((1.0, None), (None, 1.0)):  # before the metadata is looked at
        with pytest.raises(NotImplementedError, match="output scale"):
            layer_impl.forward(*nothing, None, batch.out, *scales)
    assert layer_impl.forward(*nothing, None, batch.out) is batch.out and not batch.out.any()
    for cascade in (True, 0, None):
        with pytest.raises(AssertionError, match="cascade"):
            layer_impl.forward(*nothing, SimpleNamespace(use_cascade=cascade), batch.out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads_first", [False, True])
def test_diffkv_stores_and_reads(device, heads_first):
    TritonAttentionDiffKVBackend.set_head_size_v(64)
    batch = Batch(device, head_size=96, head_size_v=64)
    shape = TritonAttentionDiffKVBackend.get_kv_cache_shape(batch.num_blocks, 16, 2, 96)
    order = (0, 2, 1, 3) if heads_first else (0, 1, 2, 3)
    cache = torch.zeros([shape[i] for i in order], device=device).permute(order)
    layer_impl = impl(batch, TritonAttentionDiffKVImpl, sliding_window=8, sinks=torch.ones(4, device=device))
    TritonAttentionDiffKVBackend.set_head_size_v(32)  # another layer's
    assert layer_impl.do_kv_cache_update(layer(device), batch.key, batch.value, cache, batch.slots) is None
    out = torch.full((batch.out.shape[0] + 3, *batch.out.shape[1:]), 9.0, device=device)
    query = torch.cat([batch.query, batch.query[:3]])
    made = metadata(batch, TritonAttentionDiffKVMetadataBuilder)
    assert layer_impl.forward(layer(device), query, None, None, cache, made, out) is out
    expected = batch.expected(visible=lambda b, p, j: (j <= p) & (p - j < 8), sinks=torch.ones(4))
    assert_near(out[:-3], expected, BOUND[device])
    assert (out[-3:] == 9).all()


@pytest.mark.parametrize("device", DEVICES)
def test_diffkv_of_fp8_where_it_is_allowed(device, monkeypatch):
    monkeypatch.setattr(TritonAttentionDiffKVImpl, "allow_fp8", True)
    TritonAttentionDiffKVBackend.set_head_size_v(64)
    batch = Batch(device, head_size=96, head_size_v=64)
    cache = torch.zeros(batch.num_blocks, 16, 2, 160, dtype=torch.uint8, device=device)
    layer_impl = impl(batch, TritonAttentionDiffKVImpl, "fp8")
    layer_impl.do_kv_cache_update(layer(device), batch.key, batch.value, cache, batch.slots)
    layer_impl.forward(layer(device), batch.query, None, None, cache, metadata(batch), batch.out)
    assert_near(batch.out, batch.expected(), 0.06)
    with pytest.raises(NotImplementedError, match="int8"):
        impl(batch, TritonAttentionDiffKVImpl, "int8_per_token_head")


# ---- the parent -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize(
    "kv_cache_dtype, dtype, bound",
    [
        ("auto", torch.float32, None),
        ("fp8", torch.uint8, 0.06),
        ("fp8_e5m2", torch.uint8, 0.06),
        ("int8_per_token_head", torch.int8, 0.02),
        ("fp8_per_token_head", torch.uint8, 0.06),
        ("int4_per_token_head", torch.uint8, 0.25),
        ("int2_per_token_head", torch.uint8, 0.75),
    ],
)
def test_the_plain_backend(device, heads_first, kv_cache_dtype, dtype, bound):
    batch = Batch(device)
    shape = TritonAttentionBackend.get_kv_cache_shape(batch.num_blocks, 16, 2, 64, kv_cache_dtype)
    order = (0, 1, 3, 2, 4) if heads_first else (0, 1, 2, 3, 4)
    cache = torch.zeros([shape[i] for i in order], dtype=dtype, device=device).permute(order)
    writer, reader = impl(batch, kv_cache_dtype=kv_cache_dtype), impl(batch, kv_cache_dtype=kv_cache_dtype)
    writer.do_kv_cache_update(layer(device), batch.key, batch.value, cache, batch.slots)
    # A second layer that shares the cache sees it first here, and must not wipe out its scales.
    for one in (reader, writer):
        batch.out.fill_(float("nan"))
        one.forward(layer(device), batch.query, None, None, cache, metadata(batch), batch.out)
        assert_near(batch.out, batch.expected(), bound or BOUND[device])
    assert writer.fused_rope_kvcache_supported() is False


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [None, 3])
def test_an_encoder(device, window):
    batch = Batch(device, lens=((3, 3), (9, 9), (1, 1)))
    encoder = impl(batch, sliding_window=window, attn_type="encoder_only")
    assert encoder.do_kv_cache_update(None, None, None, None, None) is None
    encoder.forward(None, batch.query, batch.key, batch.value, None, metadata(batch), batch.out)
    expected = batch.expected(visible=lambda b, p, j: abs(p - j) < (window or 100))
    assert_near(batch.out, expected, BOUND[device])
    with pytest.raises(NotImplementedError, match="int8"):
        impl(batch, kv_cache_dtype="int8_per_token_head", attn_type="encoder").forward(
            None, batch.query, batch.key, batch.value, None, metadata(batch), batch.out
        )


def test_the_plain_implementation():
    batch = Batch()
    plain = impl(batch)
    assert plain.sliding_window == (-1, -1) and plain.logits_soft_cap == 0 and plain.chunk_lookback == -1
    assert impl(batch, sliding_window=8).sliding_window == (7, 0)
    assert impl(batch, sliding_window=8, attn_type="encoder").sliding_window == (7, 7)
    with pytest.raises(AssertionError, match="sinks"):
        impl(batch, sinks=torch.zeros(3))
    with pytest.raises(NotImplementedError, match="output_block_scale"):
        plain.forward(None, batch.query, None, None, None, None, batch.out, output_block_scale=1.0)
    assert plain.forward(None, batch.query, None, None, None, None, batch.out) is batch.out and not batch.out.any()
    with pytest.raises(AssertionError, match="cascade"):
        plain.forward(None, batch.query, None, None, None, SimpleNamespace(use_cascade=True), batch.out)
    static = SimpleNamespace(
        dtype=torch.float8_e4m3fn, symmetric=True, scale2=None, scale=SimpleNamespace(static=True, group_shape=(-1, -1))
    )
    dynamic = SimpleNamespace(**{**vars(static), "scale": SimpleNamespace(static=False, group_shape=(-1, -1))})
    assert plain.fused_output_quant_supported(static) and not plain.fused_output_quant_supported(dynamic)
