"""Decode context parallelism of the vLLM plugin, without vLLM: the ranks in turn in one process."""

import numpy as np
import pytest
import quire

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from quire.vllm import dcp  # noqa: E402

HEAD_SIZE, BLOCK_SIZE = 64, 16
# (context, new tokens) of each sequence: what a rank sees of them may be nothing, or fewer keys than query rows.
BATCHES = {
    "decode": [(40, 1), (0, 1), (1, 1), (133, 1)],
    "prefill": [(0, 37), (0, 2), (0, 1)],
    "mixed": [(90, 1), (0, 20), (64, 33), (1, 2), (3, 5)],
}


class Buffers:
    """What quire.vllm.metadata.Workspaces does, each time anew."""

    def get(self, device, num_bytes):
        return torch.full((num_bytes,), 255, dtype=torch.uint8, device=device)


def cache_of(mode, tokens):
    blocks = -(-tokens // BLOCK_SIZE) + 1
    spec = quire.KVCacheSpec(
        mode, head_size=HEAD_SIZE, num_kv_heads=1, block_size=BLOCK_SIZE, model_dtype="float32", packing="kv_in_row"
    )
    return quire.allocate_cache(spec, blocks)


class Step:
    """One step of a batch: the keys and values of all its tokens, the queries of the new ones."""

    def __init__(self, batch, num_heads, padding=0):
        rng = np.random.default_rng(5)
        self.contexts, self.new = (np.array(column, np.int32) for column in zip(*batch))
        self.lens = self.contexts + self.new
        self.num_tokens = int(self.new.sum()) + padding
        self.keys, self.values = rng.standard_normal((2, int(self.lens.sum()), 1, HEAD_SIZE), np.float32)
        self.query = torch.from_numpy(rng.standard_normal((self.num_tokens, num_heads, HEAD_SIZE), np.float32))
        self.starts = np.concatenate(([0], np.cumsum(self.new))).astype(np.int32)

    def stored(self, mode, size=1, rank=0, interleave=1):
        """A rank's cache with all tokens of its own, and the block table: sequence after sequence, in whole blocks."""
        width = int(self.lens.max()) // BLOCK_SIZE + 2
        table = np.arange(len(self.lens) * width, dtype=np.int32).reshape(-1, width)
        slots = []
        for row, length in enumerate(self.lens):
            positions = np.arange(length)
            mine = positions // interleave % size == rank
            slots.append(np.where(mine, np.cumsum(mine) - 1 + table[row, 0] * BLOCK_SIZE, -1))
        cache = cache_of(mode, table.size * BLOCK_SIZE)
        quire.reshape_and_cache(self.keys, self.values, cache, np.concatenate(slots))
        return cache, torch.from_numpy(table)

    def tensors(self, table):
        return torch.from_numpy(self.starts), torch.from_numpy(self.lens), table, int(self.new.max())


def attend(query, out, cache, starts, lens, table, max_query_len, lse=None):
    quire.unified_attention(query, out, cache, starts, lens, table, HEAD_SIZE**-0.5, lse=lse)


def across_ranks(step, mode, num_heads, size, interleave, sinks=None):
    """The outputs of all ranks, by heads, as QuireImpl.attend_across_ranks makes them."""
    exchanges = []
    for rank in range(size):
        cache, table = step.stored(mode, size, rank, interleave)
        starts, lens, table, longest = step.tensors(table)
        rows = None
        if longest == 1:
            lens = dcp.local_lens(lens, size, rank, interleave)
        else:
            batch = dcp.local_batch(starts, lens, table, longest, step.num_tokens, size, rank, interleave)
            starts, lens, table, longest, rows = vars(batch).values()
            assert longest >= (starts[1:] - starts[:-1]).max()
        exchange = dcp.exchange_of(Buffers(), step.num_tokens, num_heads, size, HEAD_SIZE, torch.float32,
                                   torch.device("cpu"))
        query = step.query if rows is None else step.query[rows]
        attend(query, exchange.out, cache, starts, lens, table, longest, exchange.lse)
        exchanges.append((exchange, rows))
    outputs = []
    for rank, (exchange, rows) in enumerate(exchanges):
        for source, (other, _) in enumerate(exchanges):
            exchange.received[source * num_heads:(source + 1) * num_heads] = \
                other.send[rank * num_heads:(rank + 1) * num_heads]
        out = torch.full((step.num_tokens, num_heads, HEAD_SIZE), torch.nan)
        dcp.merge(out, exchange.parts)
        outputs.append(out if rows is None else torch.empty_like(out).index_copy_(0, rows, out))
    return torch.cat(outputs, 1)[:int(step.starts[-1])]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("size", "interleave"), [(2, 1), (2, 4), (2, 16), (3, 1), (4, 2)])
@pytest.mark.parametrize("mode", ["auto", "int4_per_token_head", "turboquant_4bit_nc"])
def test_ranks_together_attend_as_one(mode, size, interleave, batch):
    num_heads = 2
    step = Step(BATCHES[batch], num_heads * size, padding=3)
    cache, table = step.stored(mode)
    whole = torch.empty_like(step.query)
    attend(step.query, whole, cache, *step.tensors(table))
    together = across_ranks(step, mode, num_heads, size, interleave)
    # Both are averages of the same decoded rows, whose weights and sums are fp32 in another order: some 2^-24 for each
    # of 150 keys, of values up to 5.
    torch.testing.assert_close(together, whole[:together.shape[0]], rtol=0, atol=5 * 150 * 2**-24)


@pytest.mark.parametrize("interleave", [1, 2, 8])
@pytest.mark.parametrize("size", [2, 3])
def test_local_lens_count_what_a_rank_stores(size, interleave):
    lens = torch.arange(100, dtype=torch.int32)
    for rank in range(size):
        mine = (torch.arange(100) // interleave % size == rank).long().cumsum(0)
        wanted = torch.cat((torch.zeros(1, dtype=torch.long), mine))[lens.long()]
        assert torch.equal(dcp.local_lens(lens, size, rank, interleave).long(), wanted)


def test_rows_of_a_batch_are_each_there_once():
    starts = torch.tensor([0, 1, 8, 8, 11], dtype=torch.int32)
    lens = torch.tensor([4, 7, 0, 30], dtype=torch.int32)
    table = torch.zeros(4, 8, dtype=torch.int32)
    batch = dcp.local_batch(starts, lens, table, 7, 13, 3, 1, 1)
    # Sequence 1 has rows 1 to 7, every third of which is one sequence of the rank's; 11 and 12 are padding.
    assert batch.rows.tolist() == [0, 1, 4, 7, 2, 5, 3, 6, 8, 9, 10, 11, 12]
    assert batch.query_start_loc.tolist() == [0, 1, 1, 1, 4, 6, 8, 8, 8, 8, 9, 10, 11]
    # Position 3 alone of sequence 0; of sequence 1 positions 0 to 6, of sequence 3 positions 27 to 29: rank 1 stores 1,
    # 4, 7... so the last rows, at positions 6, 4, 5 and 27, 28, 29, see this many keys.
    assert batch.seq_lens.tolist() == [1, 0, 0, 2, 2, 2, 0, 0, 0, 9, 10, 10]
    assert batch.max_query_len == 3
