"""The PyTorch operators: the same results as the functions, what torch.library asks of an operator, torch.compile."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import quire  # noqa: E402
import quire.torch_ops  # noqa: E402
from conftest import cuda_is_there  # noqa: E402

DEVICES = ["cpu"] + (["cuda:0"] if cuda_is_there() and torch.cuda.is_available() else [])
pytestmark = pytest.mark.parametrize("device", DEVICES)
ops = torch.ops.quire


def problem(device, mode="int4_per_token_head"):
    """A store of 40 tokens, and a read of two sequences of 25 and 15 keys by 3 and 1 query rows."""
    generator = torch.Generator().manual_seed(3)
    spec = quire.KVCacheSpec(mode, head_size=64, num_kv_heads=2, model_dtype="float32")
    empty = lambda num_bytes: torch.zeros(num_bytes, dtype=torch.uint8, device=device)  # noqa: E731
    views = quire.allocate_cache(spec, 8, empty=empty)
    as_torch = lambda part: None if part is None else torch.from_dlpack(part)  # noqa: E731
    rows = lambda count, heads: torch.randn(count, heads, 64, generator=generator).to(device)  # noqa: E731
    integers = lambda values, dtype: torch.tensor(values, dtype=dtype, device=device)  # noqa: E731
    store = dict(
        key=rows(40, 2),
        value=rows(40, 2),
        key_cache=as_torch(views.key_cache),
        value_cache=as_torch(views.value_cache),
        kv_cache_dtype=mode,
        k_scale_cache=as_torch(views.k_scale_cache),
        v_scale_cache=as_torch(views.v_scale_cache),
        slot_mapping=integers([*range(16, 41), *range(64, 79)], torch.int64),
    )
    read = {
        name: store[name] for name in ("key_cache", "value_cache", "k_scale_cache", "v_scale_cache", "kv_cache_dtype")
    }
    read.update(
        query=rows(4, 4),
        cu_seqlens_q=integers([0, 3, 4], torch.int32),
        seq_lens=integers([25, 15], torch.int32),
        block_table=integers([[1, 2], [4, 0]], torch.int32),
        softmax_scale=0.125,
        softcap=20.0,
        sinks=rows(1, 1)[0, 0, :4].contiguous(),
        max_query_len=3,
        max_seq_len=32,
    )
    return store, read, views


def plain(read, views):
    """The same call as the function."""
    out, lse = torch.empty(4, 4, 64, device=read["query"].device), torch.empty(4, 4, device=read["query"].device)
    kept = {name: value for name, value in read.items() if "cache" not in name}
    quire.unified_attention(cache=views, out=out, lse=lse, **kept)
    return out, lse


@pytest.mark.parametrize("bounds", [True, False])
def test_the_same_bits(device, bounds):
    store, read, views = problem(device)
    if not bounds:
        if device != "cpu":
            pytest.skip("CUDA requires bounds on the lengths")
        read.update(max_query_len=0, max_seq_len=0)
    ops.reshape_and_cache(**store)
    out, lse = plain(read, views)
    assert torch.equal(ops.unified_attention(**read), out)
    found, found_lse = ops.unified_attention_lse(**read)
    assert torch.equal(found, out) and torch.equal(found_lse, lse)
    into = torch.empty_like(out)
    assert ops.unified_attention_out(into, None, **read) is None
    assert torch.equal(into, out)
    merged, merged_lse = ops.merge_attn_states(out, lse, out, lse)
    assert torch.allclose(merged, out, atol=1e-5) and torch.allclose(merged_lse, lse + np.log(2), atol=1e-5)
    x = read["query"]
    assert torch.allclose(ops.hadamard(ops.hadamard(x)), 64 * x, atol=1e-3)


def opcheck(op, arguments=(), **keywords):
    torch.library.opcheck(op.default, arguments, keywords)


@pytest.mark.parametrize("name", quire.torch_ops.__all__)
def test_what_torch_asks_of_an_operator(name, device):
    """Schema, aliasing, fake kernel, and torch.compile with dynamic shapes, by torch.library.opcheck."""
    store, read, views = problem(device)
    ops.reshape_and_cache(**store)
    out, lse = plain(read, views)
    if name == "reshape_and_cache":
        opcheck(ops.reshape_and_cache, **store)
    elif name in ("unified_attention", "unified_attention_lse"):
        opcheck(getattr(ops, name), **read)
    elif name == "unified_attention_out":
        opcheck(ops.unified_attention_out, (torch.empty_like(out), lse.clone()), **read)
        opcheck(ops.unified_attention_out, (torch.empty_like(out), None), **read)
    elif name == "merge_attn_states":
        opcheck(ops.merge_attn_states, (out, lse, out + 1, lse - 1))
    elif name == "merge_attn_states_out":
        opcheck(ops.merge_attn_states_out, (torch.empty_like(out), lse.clone(), out, lse, out + 1, lse - 1))
    elif name == "hadamard":
        opcheck(ops.hadamard, (out,), signs=True)
    else:
        opcheck(ops.hadamard_out, (torch.empty_like(out), out))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mode", ["int4_per_token_head", "auto", "turboquant_4bit_nc"])
def test_torch_compile(mode, dynamic, device):
    """A store and a read in one graph: the read sees what the store wrote."""
    store, read, views = problem(device, mode)

    def layer(store, read):
        ops.reshape_and_cache(**{**store, "key": store["key"] * 2})
        out, lse = ops.unified_attention_lse(**read)
        merged, _ = ops.merge_attn_states(out + 1, lse, out - 1, lse)
        return ops.hadamard(merged) / 64

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    found = compiled(store, read)
    stored = [store[name].clone() for name in ("key_cache", "value_cache")]
    for name in ("key_cache", "value_cache"):
        store[name].zero_()
    assert torch.equal(layer(store, read), found)
    assert all(torch.equal(a, store[name]) for a, name in zip(stored, ("key_cache", "value_cache")))


def test_results_of_other_shapes_and_dtypes(device):
    store, read, _ = problem(device)
    ops.reshape_and_cache(**store)
    half = ops.unified_attention(**read, out_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.shape == (4, 4, 64)
    with pytest.raises(
        quire.InvalidArgumentError, match=r"value_cache is \[8, 16, 2, 32\] uint8.*; expected \[8, 16, 2, 16\]"
    ):
        ops.unified_attention(**read, head_size_v=32)


def test_a_cuda_graph_replays_with_other_lengths(device):
    if device == "cpu":
        pytest.skip("needs a GPU and a build of quire for it")
    store, read, views = problem(device)
    ops.reshape_and_cache(**store)
    expected = ops.unified_attention(**read).clone()
    shorter = dict(read, seq_lens=read["seq_lens"] - 4)
    expected_shorter = ops.unified_attention(**shorter).clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.reshape_and_cache(**store)
        out = ops.unified_attention(**read)
    graph.replay()
    assert torch.equal(out, expected)
    read["seq_lens"].sub_(4)
    graph.replay()
    assert torch.equal(out, expected_shorter)
