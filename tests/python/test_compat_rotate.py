"""vLLM's rotations and TurboQuant launchers in quire.compat."""

import math

import pytest
from compat import DEVICES, Batch, assert_near, assert_same, torch

import quire
from quire.compat import _turboquant, vllm

pytestmark = pytest.mark.parametrize("device", DEVICES)


def sylvester(d):
    """The Walsh-Hadamard matrix in blocks of the largest power of two that divides d."""
    block = d & -d
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < block:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return torch.block_diag(*[h] * (d // block))


def signs(d):
    """vLLM's: of one block, drawn by PyTorch's own generator with vLLM's seed, the same in every block."""
    block = d & -d
    generator = torch.Generator(device="cpu")
    generator.manual_seed(0x9E3779B9)
    drawn = 2.0 * torch.bernoulli(torch.full((block,), 0.5), generator=generator) - 1.0
    return drawn.double().repeat(d // block)


@pytest.mark.parametrize("d", [1, 2, 16, 64, 80, 96, 112, 128, 192, 256, 512])
def test_single_rht(device, d):
    x = torch.randn(3, 5, d)
    forward = (x.double() * signs(d)) @ sylvester(d)
    inverse = (x.double() @ sylvester(d)) * signs(d)
    bound = 4e-7 * (1 + math.log2(d & -d))  # a rounding for each step of the butterfly
    assert_near(vllm.single_rht(x.to(device)), forward, bound)
    assert_near(vllm.single_rht(x.to(device), inverse=True), inverse, bound)
    assert_near(vllm.single_rht(vllm.single_rht(x.to(device)), True) / (d & -d), x.double(), 2 * bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_hadamard_keeps_shape_and_dtype(device, dtype):
    for shape in ((64,), (0, 64), (3, 64), (2, 1, 2, 1, 2, 1, 64)):
        x = torch.randn(shape).to(dtype).to(device)
        before = x.clone()
        out = vllm.fast_hadamard_transform(x)
        assert out.shape == x.shape and out.dtype == dtype and out.is_contiguous() and torch.equal(x, before)
        if x.numel():
            assert_near(
                out, x.cpu().double() @ sylvester(64), {torch.float32: 3e-6, torch.float16: 5e-4}.get(dtype, 4e-3)
            )
    strided = torch.randn(64, 6, device=device).t()[::2]
    assert_near(vllm.fast_hadamard_transform(strided), strided.cpu().double() @ sylvester(64), 3e-6)
    with pytest.raises(AssertionError, match="96"):
        vllm.fast_hadamard_transform(torch.zeros(2, 96, device=device))


def test_the_codebook_is_lloyd_maxs(device):
    """Each centroid is the mean of its cell, and each boundary is halfway: by sums over a grid, to what 200 steps
    leave."""
    for bits in (3, 4):
        centroids, boundaries = vllm.solve_lloyd_max(128, bits)
        grid = torch.linspace(-1, 1, 2000001, dtype=torch.float64)
        weight = torch.exp(-64 * grid * grid)
        cell = torch.bucketize(grid, boundaries.double())
        sums = [torch.zeros(2**bits, dtype=torch.float64).index_add_(0, cell, x) for x in (weight * grid, weight)]
        assert (sums[0] / sums[1] - centroids).abs().max() < 1e-3 * 128**-0.5
        torch.testing.assert_close(boundaries, (centroids[1:] + centroids[:-1]) / 2, rtol=1e-6, atol=1e-9)
        assert vllm.get_centroids(128, bits) is vllm.get_centroids(128, bits)


def tables(bits, d, device):
    """What vLLM's callers pass: the rotation, centroids and midpoints."""
    rotation = (sylvester(d) / math.sqrt(d & -d)).float().to(device)
    centroids = vllm.get_centroids(d, max(bits, 3))
    return rotation, centroids.to(device), ((centroids[1:] + centroids[:-1]) / 2).to(device)


CONFIGS = [(8, 4), (8, 3), (4, 4), (4, 3), (3, 4), (3, 3)]  # bits of keys and values


def turboquant(batch, key_bits, value_bits, extra=0):
    """A batch of one query token a sequence, stored; and the arguments that both launchers share."""
    d, key_fp8 = batch.head_size, key_bits == 8
    key_bytes = d if key_fp8 else math.ceil(d * key_bits / 8) + 2
    slot = key_bytes + math.ceil(d * value_bits / 8) + 4
    cache = torch.full(
        (batch.num_blocks, batch.block_size, batch.heads[1], slot + slot % 2 + extra),
        55,
        dtype=torch.uint8,
        device=batch.device,
    )
    shared = {
        "mse_bits": 0 if key_fp8 else key_bits,
        "key_packed_size": key_bytes,
        "value_quant_bits": value_bits,
        "key_fp8": key_fp8,
    }
    rotation, centroids, midpoints = tables(key_bits if not key_fp8 else 3, d, batch.device)
    vllm.triton_turboquant_store(
        batch.key, batch.value, cache, batch.slots.to(torch.int32), rotation, midpoints, **shared
    )
    return cache, slot, rotation, centroids, shared


@pytest.mark.parametrize("key_bits, value_bits", CONFIGS)
def test_turboquant(device, key_bits, value_bits):
    batch = Batch(device, lens=((1, 40), (1, 17), (1, 1)), head_size=128, dtype=torch.float16)
    cache, slot, rotation, centroids, shared = turboquant(batch, key_bits, value_bits, extra=6)
    rows = cache.view(-1, *cache.shape[2:])
    assert (rows[..., slot:] == 55).all()  # padding behind a slot is not written

    def decode(**options):
        return vllm.triton_turboquant_decode_attention(
            batch.query,
            cache,
            batch.block_table,
            batch.seq_lens,
            rotation,
            centroids,
            batch.scale,
            **shared,
            norm_correction=key_bits != 8,
            **options,
        )

    out = decode()
    assert out.dtype == torch.float16 and out.shape == batch.query.shape
    assert_near(out, batch.expected(), {8: 0.1, 4: 0.2, 3: 0.3}[key_bits] + {4: 0.1, 3: 0.2}[value_bits])

    buffers = {
        "output_buf": torch.zeros(5, 4, 128, dtype=torch.float16, device=device),
        "mid_o_buf": None,
        "lse_buf": torch.full((5, 4), float("nan"), device=device),
    }
    same = decode(**buffers, PiT=rotation, max_num_kv_splits=4)
    assert torch.equal(same, out) and same.data_ptr() == buffers["output_buf"].data_ptr()
    assert buffers["lse_buf"][:3].isfinite().all() and buffers["lse_buf"][3:].isnan().all()

    class Holder:
        pass

    holder = Holder()
    assert torch.equal(decode(buf_holder=holder), out)
    assert torch.equal(holder._tq_output_buf, out) and torch.equal(holder._tq_lse_buf, buffers["lse_buf"][:3])

    # The same rows by the ops, in a slot without room behind it.
    views = quire.turboquant_views(cache, 128, 8 if shared["key_fp8"] else key_bits, value_bits)
    by_ops = torch.empty_like(out)
    quire.unified_attention(
        batch.query,
        by_ops,
        views,
        batch.cu_seqlens_q,
        batch.seq_lens,
        batch.block_table,
        batch.scale,
        max_query_len=1,
        max_seq_len=cache.shape[1] * batch.block_table.shape[1],
    )
    assert_same(by_ops, out, device)


def test_turboquant_refuses_other_tables(device):
    batch = Batch(device, lens=((1, 20),), head_size=64, dtype=torch.float16)
    cache, _, rotation, centroids, shared = turboquant(batch, 4, 4)
    midpoints = (centroids[1:] + centroids[:-1]) / 2
    store = (batch.key, batch.value, cache, batch.slots.to(torch.int32))
    other = torch.linalg.qr(torch.randn(64, 64)).Q.to(device)
    with pytest.raises(quire.UnsupportedError, match="rotation"):
        vllm.triton_turboquant_store(*store, other, midpoints, **shared)
    with pytest.raises(quire.UnsupportedError, match="midpoints"):
        vllm.triton_turboquant_store(*store, rotation, midpoints * 1.1, **shared)
    with pytest.raises(quire.InvalidArgumentError, match="key_packed_size is 40; .* has 34 bytes"):
        vllm.triton_turboquant_store(*store, rotation, midpoints, **{**shared, "key_packed_size": 40})
    decode = (batch.query, cache, batch.block_table, batch.seq_lens, rotation)
    with pytest.raises(quire.UnsupportedError, match="centroids"):
        vllm.triton_turboquant_decode_attention(*decode, centroids * 1.1, batch.scale, **shared, norm_correction=True)
    with pytest.raises(quire.Error, match="norm_correction"):
        vllm.triton_turboquant_decode_attention(*decode, centroids, batch.scale, **shared)


def test_which_fp8_keys(device):
    assert _turboquant._use_fp8_e4b15(0) == (device != "cpu" and torch.cuda.get_device_capability(0) < (8, 9))


def test_fp8_keys_are_pytorchs_cast(device):
    if device != "cpu" and _turboquant._use_fp8_e4b15(0):
        pytest.skip("this GPU's keys are e4b15")
    batch = Batch(device, lens=((1, 20),), head_size=64, dtype=torch.float16)
    cache, _, _, _, _ = turboquant(batch, 8, 4)
    stored = cache.view(-1, 2, cache.shape[-1])[batch.slots][..., :64].contiguous().view(torch.float8_e4m3fn)
    assert torch.equal(stored.float(), batch.key.to(torch.float8_e4m3fn).float())
