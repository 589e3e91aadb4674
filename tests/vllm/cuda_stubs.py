"""Lets vLLM's Python files alone run on a CUDA device: empty modules in the place of its compiled ones, and the few ops
that a Llama with `custom_ops: none` reaches. Call install() before anything of vLLM is imported."""

import sys
import types


def install():
    import torch

    for name in ("_C", "_C_stable_libtorch", "_moe_C", "_moe_C_stable_libtorch"):
        sys.modules[f"vllm.{name}"] = types.ModuleType(f"vllm.{name}")
    ops = torch.library.Library("_C", "FRAGMENT")
    for name in ("fp4", "fp8", "block_fp8"):
        ops.define(f"cutlass_scaled_mm_supports_{name}(int capability) -> bool")
        ops.impl(f"cutlass_scaled_mm_supports_{name}", lambda capability: False, "CompositeExplicitAutograd")
    ops.define("cutlass_group_gemm_supported(int capability) -> bool")
    ops.impl("cutlass_group_gemm_supported", lambda capability: False, "CompositeExplicitAutograd")
    # A CUDA graph's output is kept by a tensor that does not own it; this one does, which only costs memory.
    ops.define("weak_ref_tensor(Tensor tensor) -> Tensor")
    ops.impl("weak_ref_tensor", lambda tensor: tensor.view_as(tensor), "CUDA")
    install.library = ops
