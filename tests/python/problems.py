"""Small, valid calls of both ops, for tests that change one thing about them."""

import numpy as np
import quire


class Problem:
    """One cache with some sequences in it, and the arguments that read it: `store` and `read` are keyword arguments of
    reshape_and_cache and unified_attention, NumPy's arrays unless `array` makes others."""

    def __init__(
        self,
        mode="int8_per_token_head",
        head_size=32,
        heads=(4, 2),
        lengths=(20, 7),
        query_lens=(1, 3),
        seed=7,
        block_size=16,
        array=np.asarray,
        device="cpu",
    ):
        rng = np.random.default_rng(seed)
        num_q_heads, num_kv_heads = heads
        blocks = [-(-length // block_size) for length in lengths]
        spec = quire.KVCacheSpec(
            mode, head_size=head_size, num_kv_heads=num_kv_heads, block_size=block_size, model_dtype="float32"
        )
        self.cache = quire.allocate_cache(spec, sum(blocks) + 1, device=device)
        table = np.zeros((len(lengths), max(blocks)), np.int32)
        slots, first = [], 1  # block 0 is never used
        for row, (length, count) in enumerate(zip(lengths, blocks)):
            table[row, :count] = np.arange(first, first + count)
            slots.append(np.arange(length) + first * block_size)
            first += count
        tokens = sum(lengths)
        key, value = (rng.standard_normal((tokens, num_kv_heads, head_size), dtype=np.float32) for _ in range(2))
        query = rng.standard_normal((sum(query_lens), num_q_heads, head_size), dtype=np.float32)
        self.store = dict(
            key=array(key), value=array(value), cache=self.cache, slot_mapping=array(np.concatenate(slots))
        )
        self.read = dict(
            query=array(query),
            out=array(np.full_like(query, np.nan)),
            cache=self.cache,
            cu_seqlens_q=array(np.cumsum([0, *query_lens]).astype(np.int32)),
            seq_lens=array(np.array(lengths, np.int32)),
            block_table=array(table),
            softmax_scale=head_size**-0.5,
            max_query_len=max(query_lens),
            max_seq_len=max(lengths),
        )

    def run(self):
        """Stores, reads, and gives the output."""
        quire.reshape_and_cache(**self.store)
        quire.unified_attention(**self.read)
        return self.read["out"]
