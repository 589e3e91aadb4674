"""Decode context parallelism of the layers: processes with a part of the tokens each, in vLLM's own groups, give what
one attention over the whole cache gives. `pytest tests/vllm/test_dcp.py` where vLLM can be imported; with a GPU for
each process on those, otherwise on the CPU."""

import itertools
import os
from types import SimpleNamespace

import pytest
import quire
import torch

HEAD_SIZE, BLOCK_SIZE, NUM_HEADS, NUM_BLOCKS = 64, 16, 4, 12
# (tokens in the cache before, new tokens) of two sequences: a prompt in chunks, beside one that decodes, then decodes.
STEPS = [[(0, 37), (0, 3)], [(37, 20), (3, 1)], [(57, 1), (4, 1)], [(58, 5), (5, 2)]]
MODES = ["auto", "fp8", "int8_per_token_head", "int4_per_token_head", "turboquant_4bit_nc", "int2_per_token_head"]


def slots_of(contexts, new, size, rank, interleave):
    """Where a rank stores the new tokens: sequence b has the blocks from 1 + 5 b on."""
    slots = []
    for row, (context, count) in enumerate(zip(contexts, new)):
        positions = torch.arange(context, context + count)
        local = positions // (size * interleave) * interleave + positions % interleave
        mine = positions // interleave % size == rank
        slots.append(torch.where(mine, (1 + 5 * row) * BLOCK_SIZE + local, -1))
    return torch.cat(slots)


def run_case(device, size, rank, mode, dtype, interleave, sinks, softcap):
    from quire.vllm import metadata, modes
    from quire.vllm.impl import QuireImpl
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    torch.manual_seed(11)
    quire_mode = modes.use(mode)
    all_sinks = torch.randn(size * NUM_HEADS) if sinks else None
    layout = modes.layout_of(quire_mode, 1, HEAD_SIZE, HEAD_SIZE, BLOCK_SIZE, str(dtype).partition(".")[2])
    cache_dtype = dtype if mode == "auto" else torch.uint8

    def empty_cache():
        cache = torch.full((NUM_BLOCKS, 1, BLOCK_SIZE, layout.bytes_per_token_head), 255, dtype=torch.uint8)
        return cache.view(cache_dtype)

    whole, part = empty_cache(), empty_cache()
    heads = slice(rank * NUM_HEADS, (rank + 1) * NUM_HEADS)
    layer = SimpleNamespace(_k_scale=torch.tensor(0.5), _v_scale=torch.tensor(0.25), _q_scale=torch.tensor(1.0))
    impl = QuireImpl(NUM_HEADS, HEAD_SIZE, HEAD_SIZE**-0.5, 1, None, None, mode, softcap,
                     sinks=None if all_sinks is None else all_sinks[heads])
    assert impl.need_to_return_lse_for_decode and impl.dcp_world_size == size
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=64),
        model_config=SimpleNamespace(max_model_len=BLOCK_SIZE * 5, dtype=dtype),
        parallel_config=SimpleNamespace(cp_kv_cache_interleave_size=interleave),
        compilation_config=SimpleNamespace(static_forward_context={}))
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=HEAD_SIZE, dtype=dtype)
    builder = metadata.QuireMetadataBuilder(spec, [], config, device)
    table = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]], dtype=torch.int32)
    views = modes.views_of(whole, quire_mode, HEAD_SIZE, HEAD_SIZE)
    scales = (dict(k_scale=layer._k_scale, v_scale=layer._v_scale),
              dict(k_descale=layer._k_scale, v_descale=layer._v_scale)) if mode == "fp8" else ({}, {})
    for step in STEPS:
        contexts, new = zip(*step)
        num_tokens = sum(new)
        lens = torch.tensor([context + count for context, count in step], dtype=torch.int32)
        starts = torch.tensor([0, *itertools.accumulate(new)], dtype=torch.int32)
        query = torch.randn(num_tokens, size * NUM_HEADS, HEAD_SIZE).to(dtype)
        key, value = torch.randn(2, num_tokens, 1, HEAD_SIZE).to(dtype)

        quire.reshape_and_cache(key, value, views, slots_of(contexts, new, 1, 0, 1), **scales[0])
        expected = torch.empty_like(query)
        quire.unified_attention(query, expected, views, starts, lens, table, HEAD_SIZE**-0.5, softcap=softcap,
                                sinks=all_sinks, max_query_len=max(new), max_seq_len=BLOCK_SIZE * 5, **scales[1])

        common = CommonAttentionMetadata(
            query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=lens, num_reqs=2, num_actual_tokens=num_tokens,
            max_query_len=max(new), max_seq_len=int(lens.max()), block_table_tensor=table,
            slot_mapping=slots_of(contexts, new, size, rank, interleave), causal=True)
        impl.do_kv_cache_update(layer, key, value, part, common.slot_mapping)
        # Two rows of padding behind the batch, as for a graph that runs the rest of the model.
        padded = torch.cat((query[:, heads], torch.full((2, NUM_HEADS, HEAD_SIZE), torch.nan, dtype=dtype)))
        output = torch.full_like(padded, torch.nan)
        impl.forward(layer, padded, key, value, part, builder.build(0, common), output)
        assert output[num_tokens:].isnan().all()
        # For 4, the largest of these values. fp32: another order of sums of 60 keys. 16 bits: both ranks' parts and the
        # sum are rounded to 8 bits; on a GPU, where fp32 may be multiplied in 16 bits, each has another kernel.
        exact = dtype == torch.float32 and device.type == "cpu"
        tolerance = 4 * (60 * 2**-24 if exact else 3 * 2**-9)
        torch.testing.assert_close(output[:num_tokens], expected[:, heads], rtol=0, atol=tolerance)


def check_refusals():
    """What a rank cannot tell from its own keys."""
    from quire.vllm.impl import QuireImpl
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym

    def layer(num_kv_heads=1, alibi_slopes=None, sliding_window=None, **options):
        return QuireImpl(NUM_HEADS, HEAD_SIZE, 1.0, num_kv_heads, alibi_slopes, sliding_window, "auto", **options)

    for options in ({"num_kv_heads": 2}, {"alibi_slopes": [0.5] * NUM_HEADS}, {"sliding_window": 4},
                    {"sliding_window": 4, "chunk_lookback": 1}):
        with pytest.raises(NotImplementedError, match=next(iter(options))):
            layer(**options)
    assert not layer().fused_output_quant_supported(kFp8StaticTensorSym)
    assert not layer().supports_quant_query_input


def run_rank(rank, size, store, cases):
    torch.set_num_threads(1)
    quire.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    device = torch.device("cpu")
    if torch.cuda.device_count() >= size:
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    parallel = ParallelConfig(tensor_parallel_size=size, decode_context_parallel_size=size,
                              distributed_executor_backend="mp")
    with set_current_vllm_config(VllmConfig(parallel_config=parallel)):
        init_distributed_environment(size, rank, f"file://{store}", rank,
                                     "gloo" if device.type == "cpu" else "nccl")
        initialize_model_parallel(size, decode_context_model_parallel_size=size)
        check_refusals()
        for case in cases:
            try:
                with torch.device(device):
                    run_case(device, size, rank, *case)
            except Exception as error:
                raise AssertionError(f"rank {rank} of {size}, mode and options {case}") from error


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_together_attend_as_one(size, tmp_path):
    if 0 < torch.cuda.device_count() < size:
        pytest.skip(f"vLLM gives each of the {size} ranks a GPU")
    cases = [(mode, torch.float32, interleave, False, 0.0) for mode in MODES for interleave in (1, 4)]
    cases += [("int4_per_token_head", dtype, interleave, True, softcap)
              for dtype, interleave, softcap in ((torch.bfloat16, 1, 0.0), (torch.float32, 16, 9.0))]
    torch.multiprocessing.spawn(run_rank, (size, tmp_path / "store", cases), nprocs=size)


def test_backends_say_so():
    from quire.vllm import backend
    from vllm.v1.attention.backend import AttentionCGSupport

    config = SimpleNamespace(parallel_config=SimpleNamespace(decode_context_parallel_size=2))
    for kind in (backend.QuireBackend, backend.QuireTritonAttentionBackend, backend.QuireTurboQuantBackend,
                 backend.QuireCPUAttentionBackend):
        assert kind.supports_dcp()
        for sharded, support in ((True, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE),
                                 (False, AttentionCGSupport.ALWAYS)):
            spec = SimpleNamespace(dcp_sharded=sharded)
            assert kind.get_builder_cls().get_cudagraph_support(config, spec) == support
