"""Lets vLLM's Python files alone run on a CUDA device: `cuda_stubs.py TREE` puts empty modules into the tree in the
place of its compiled ones, and with them the few ops that a Llama with `custom_ops: none` reaches."""

import os
import sys

EMPTY = ("_C.py", "_moe_C.py", "_moe_C_stable_libtorch.py", "vllm_flash_attn/_vllm_fa2_C.py",
         "vllm_flash_attn/_vllm_fa3_C.py")
OPS = '''import torch

library = torch.library.Library("_C", "FRAGMENT")
for name in ("cutlass_scaled_mm_supports_fp4", "cutlass_scaled_mm_supports_fp8",
             "cutlass_scaled_mm_supports_block_fp8", "cutlass_group_gemm_supported"):
    library.define(f"{name}(int capability) -> bool")
    library.impl(name, lambda capability: False, "CompositeExplicitAutograd")
# A CUDA graph's output is kept by a tensor that does not own it; this one does, which only costs memory.
library.define("weak_ref_tensor(Tensor tensor) -> Tensor")
library.impl("weak_ref_tensor", lambda tensor: tensor.view_as(tensor), "CUDA")


def silu_and_mul(out, x):
    gate, up = x.chunk(2, -1)
    torch.mul(torch.nn.functional.silu(gate), up, out=out)


def rms_norm(out, x, weight, epsilon):
    out.copy_(torch.nn.functional.rms_norm(x, x.shape[-1:], weight, epsilon))


def fused_add_rms_norm(x, residual, weight, epsilon):
    residual.add_(x)
    rms_norm(x, residual, weight, epsilon)


def vocab_parallel_embedding(out, ids, weight, start, end, padding, added_start, added_end):
    """Rows of this rank's part of the vocabulary, which nothing was added to; zeros for other tokens."""
    mine = (ids >= start) & (ids < end)
    out.copy_(weight[torch.where(mine, ids - start, 0)] * mine[:, None])


for signature, function in (("silu_and_mul(Tensor(a!) out, Tensor x) -> ()", silu_and_mul),
                            ("rms_norm(Tensor(a!) out, Tensor x, Tensor? weight, float epsilon) -> ()", rms_norm),
                            ("fused_add_rms_norm(Tensor(a!) x, Tensor(b!) residual, Tensor? weight, float epsilon)"
                             " -> ()", fused_add_rms_norm),
                            ("vocab_parallel_embedding(Tensor(a!) out, Tensor ids, Tensor weight, int start, int end,"
                             " int padding, int added_start, int added_end) -> ()", vocab_parallel_embedding)):
    library.define(signature)
    library.impl(signature.partition("(")[0], function, "CUDA")
'''


def main():
    for name in EMPTY:
        with open(os.path.join(sys.argv[1], "vllm", name), "w"):
            pass
    with open(os.path.join(sys.argv[1], "vllm", "_C_stable_libtorch.py"), "w") as file:
        file.write(OPS)


if __name__ == "__main__":
    main()
