"""What the tests of quire.compat share: devices, paged problems, and attention by vLLM's definitions in float64."""

import math

import pytest
from conftest import cuda_is_there

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

DEVICES = ["cpu"] + (["cuda:0"] if cuda_is_there() and torch.cuda.is_available() else [])


class Batch:
    """A paged batch: rows of K and V, the caches that hold them in order, and what a call needs beside them."""

    def __init__(
        self,
        device="cpu",
        lens=((3, 40), (1, 17), (7, 7)),
        heads=(4, 2),
        head_size=64,
        head_size_v=None,
        block_size=16,
        dtype=torch.float32,
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)
        head_size_v = head_size_v or head_size
        self.lens, self.heads, self.block_size, self.dtype = lens, heads, block_size, dtype
        self.head_size, self.head_size_v, self.device = head_size, head_size_v, device

        def random(*shape):
            return torch.randn(shape, generator=generator).to(dtype).to(device)

        pages = [math.ceil(keys / block_size) for _, keys in lens]
        self.num_blocks = sum(pages) + 1
        order = (torch.randperm(self.num_blocks - 1, generator=generator) + 1).tolist()
        table = torch.zeros((len(lens), max(pages)), dtype=torch.int32)
        slots = []
        for row, (count, (_, keys)) in enumerate(zip(pages, lens)):
            own = [order.pop() for _ in range(count)]
            table[row, :count] = torch.tensor(own, dtype=torch.int32)
            slots += [own[j // block_size] * block_size + j % block_size for j in range(keys)]
        self.block_table = table.to(device)
        self.slots = torch.tensor(slots, dtype=torch.int64, device=device)
        self.key = random(len(slots), heads[1], head_size)
        self.value = random(len(slots), heads[1], head_size_v)
        self.query = random(sum(q for q, _ in lens), heads[0], head_size)
        self.out = torch.full((self.query.shape[0], heads[0], head_size_v), float("nan"), dtype=dtype, device=device)
        starts = [0]
        for count, _ in lens:
            starts.append(starts[-1] + count)
        self.cu_seqlens_q = torch.tensor(starts, dtype=torch.int32, device=device)
        self.seq_lens = torch.tensor([keys for _, keys in lens], dtype=torch.int32, device=device)
        self.scale = head_size**-0.5

    def caches(self, dtype=None, row=None, row_v=None):
        """Two caches of noise, and scale caches."""
        shape = (self.num_blocks, self.block_size, self.heads[1])
        dtype = dtype or self.dtype
        bytes_ = [
            torch.randint(0, 40, (*shape, width * dtype.itemsize), dtype=torch.uint8, device=self.device)
            for width in (row or self.head_size, row_v or row or self.head_size_v)
        ]
        scales = [torch.full(shape, float("nan"), device=self.device) for _ in range(2)]
        return [cache.view(dtype) for cache in bytes_] + scales

    def plain_caches(self, dtype=None):
        """The rows as they are, in caches of a float dtype."""
        key_cache, value_cache, _, _ = self.caches(dtype)
        for rows, cache in ((self.key, key_cache), (self.value, value_cache)):
            cache.view(-1, *cache.shape[2:])[self.slots] = rows.to(cache.dtype)
        return key_cache, value_cache

    def args(
        self,
        key_cache,
        value_cache,
        out=None,
        query=None,
        causal=True,
        window_size=(-1, -1),
        softcap=0.0,
        q_descale=None,
        k_descale=None,
        v_descale=None,
    ):
        """The positional arguments of vLLM's unified_attention."""
        return (
            self.query if query is None else query,
            key_cache,
            value_cache,
            self.out if out is None else out,
            self.cu_seqlens_q,
            max(q for q, _ in self.lens),
            self.seq_lens,
            max(keys for _, keys in self.lens),
            self.scale,
            causal,
            window_size,
            self.block_table,
            softcap,
            q_descale,
            k_descale,
            v_descale,
        )

    def expected(
        self,
        key=None,
        value=None,
        query=None,
        visible=None,
        softcap=0.0,
        sinks=None,
        alibi_slopes=None,
        use_alibi_sqrt=False,
        qq_bias=None,
    ):
        """Attention in float64. visible(b, p, j): which keys j the positions p of sequence b see, causal by default."""
        key, value, query = (
            x.double().cpu()
            for x in (
                self.key if key is None else key,
                self.value if value is None else value,
                self.query if query is None else query,
            )
        )
        group = self.heads[0] // self.heads[1]
        outs, first_key, first_query = [], 0, 0
        for b, (queries, keys) in enumerate(self.lens):
            k = key[first_key : first_key + keys].repeat_interleave(group, 1)
            v = value[first_key : first_key + keys].repeat_interleave(group, 1)
            q = query[first_query : first_query + queries]
            j, p = torch.arange(keys)[None], torch.arange(keys - queries, keys)[:, None]
            logits = self.scale * torch.einsum("qhd,khd->hqk", q, k)
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            seen = j <= p if visible is None else visible(b, p, j)
            if alibi_slopes is not None:
                slopes = alibi_slopes.detach().double().cpu()[:, None, None]
                linear = (j - (keys - queries)).double()
                root = torch.where(j <= p, -torch.sqrt((p - j).clamp(min=0).double()), 0.0)
                logits = logits + slopes * (root if use_alibi_sqrt else linear)
            if qq_bias is not None:
                logits[..., keys - queries :] += qq_bias.double().cpu()[:queries, :queries]
            logits = logits.masked_fill(~seen, -math.inf)
            if sinks is not None:
                sink = sinks.detach().double().cpu()[:, None, None].expand(-1, queries, 1)
                weights = torch.softmax(torch.cat([logits, sink], -1), -1)[..., :-1]
            else:
                weights = torch.softmax(logits, -1)
            outs.append(torch.einsum("hqk,khd->qhd", weights, v))
            first_key, first_query = first_key + keys, first_query + queries
        return torch.cat(outs)


def assert_near(out, expected, bound):
    """Relative to the norm of what is expected; NaN is far from everything."""
    error = (out.double().cpu() - expected).norm() / expected.norm()
    assert error <= bound, f"relative error {error:.2e}, at most {bound:.2e}"


# fp32 rows on the CPU: sums of some hundred products, each with the rounding of fp32 and of exp. On CUDA, where
# products may be of 16-bit numbers: four roundings of 2**-9, to query, key, weight and value.
BOUND = {"cpu": 2e-6, "cuda:0": 4 * 2**-9}


def assert_same(out, expected, device):
    """The same bits on the CPU; on CUDA, where another layout may get another kernel, the same numbers."""
    if device == "cpu":
        assert torch.equal(out, expected)
    else:
        assert_near(out, expected.double().cpu(), BOUND[device])
