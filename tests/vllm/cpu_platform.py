"""vLLM's CPU platform from its Python files alone: the compiled ops that a greedy run reaches, in PyTorch."""

import functools
import os

import torch


def platform() -> str:
    return "cpu_platform.CpuPlatformWithoutKernels"


def __getattr__(name: str):
    if name != "CpuPlatformWithoutKernels":
        raise AttributeError(name)
    from vllm.platforms.cpu import CpuPlatform

    class CpuPlatformWithoutKernels(CpuPlatform):
        @classmethod
        def import_kernels(cls) -> None:
            if "VLLM_CPU_KERNELS" in os.environ:  # a library of tests/vllm/cpu_peer.py
                torch.ops.load_library(os.environ["VLLM_CPU_KERNELS"])

        @classmethod
        @functools.cache
        def register_triton_kernel_overrides(cls) -> None:
            """Once for all engines of a process: it looks through every module there is."""
            from vllm.utils import cpu_triton_utils

            cpu_triton_utils._compute_slot_mapping_kernel_impl = _slot_mapping
            super().register_triton_kernel_overrides()

    _define_ops()
    globals()[name] = CpuPlatformWithoutKernels
    return CpuPlatformWithoutKernels


def _slot_mapping(num_tokens, max_num_tokens, query_start_loc, positions, block_table, block_table_stride, slot_mapping,
                  KV_CACHE_BLOCK_SIZE, TOTAL_CP_WORLD_SIZE=1, TOTAL_CP_RANK=0, CP_KV_CACHE_INTERLEAVE_SIZE=1, PAD_ID=-1,
                  BLOCK_SIZE=1024):
    """vLLM's kernel of this name, with its parameters. (The CPU op in its place refuses context parallelism.)"""
    size, interleave = TOTAL_CP_WORLD_SIZE, CP_KV_CACHE_INTERLEAVE_SIZE
    for row in range(query_start_loc.numel() - 1):
        begin, end = int(query_start_loc[row]), int(query_start_loc[row + 1])
        at = positions[begin:end]
        block, offset = block_table[row][at // (KV_CACHE_BLOCK_SIZE * size)], at % (KV_CACHE_BLOCK_SIZE * size)
        slots = block.long() * KV_CACHE_BLOCK_SIZE + offset // (interleave * size) * interleave + offset % interleave
        slot_mapping[begin:end] = torch.where(offset // interleave % size == TOTAL_CP_RANK, slots, PAD_ID)
    slot_mapping[int(query_start_loc[-1]):] = PAD_ID


def _rejection_greedy_sample(output, cu_num_draft_tokens, draft, target, bonus, is_greedy, max_spec_len):
    """Proposed tokens are kept up to the first that the model would not have chosen; its choice follows."""
    begin = 0
    for row, end in enumerate(cu_num_draft_tokens.tolist()):
        if is_greedy is None or bool(is_greedy.view(-1)[0 if is_greedy.numel() == 1 else row]):
            proposed, chosen = draft[begin:end], target[begin:end]
            accepted = int((proposed == chosen).long().cumprod(0).sum())
            kept = min(accepted + 1, end - begin)
            output[row, :kept] = chosen[:kept]
            if accepted == end - begin:
                output[row, accepted] = bonus.view(-1)[row]
        begin = end


def _define_ops():
    ops = torch.library.Library("_C", "FRAGMENT")
    ops.define("init_cpu_memory_env(int[] nodes) -> str")
    ops.impl("init_cpu_memory_env", lambda nodes: "", "CompositeExplicitAutograd")
    ops.define("greedy_argmax(Tensor logits) -> Tensor")
    ops.impl("greedy_argmax", lambda logits: logits.argmax(-1), "CPU")
    ops.define("rejection_greedy_sample_kernel_impl(Tensor(a0!) output, Tensor cu_num_draft_tokens, Tensor draft, "
               "Tensor target, Tensor bonus, Tensor? is_greedy, SymInt max_spec_len) -> ()")
    ops.impl("rejection_greedy_sample_kernel_impl", _rejection_greedy_sample, "CPU")
    _define_ops.library = ops
