#!/usr/bin/env python3
"""Times what else is installed on the same shapes as `quire bench`, in one process, and prints JSON rows like its.

    bench/peers.py prefill|decode [--batch 1 --context 16384 --q-len 16384 --num-q-heads 32 --num-kv-heads 8 --head-size 128]

Peers: torch's scaled_dot_product_attention over contiguous bf16 K and V (flash, cuDNN), and, where the packages are
there, FlashInfer's paged decode and prefill and vLLM's unified attention kernel over a bf16 paged cache. A peer that is
not installed or refuses the shape is reported with its reason, not left out.
"""
import argparse
import json
import math


def median_ms(call):
    from triton.testing import do_bench

    return do_bench(call, warmup=20, rep=100, return_mode="median")


def torch_sdpa(args, backend):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape = lambda heads, length: (args.batch, heads, length, args.head_size)
    q = torch.randn(shape(args.num_q_heads, args.q_len), device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(shape(args.num_kv_heads, args.context), device="cuda", dtype=torch.bfloat16) for _ in range(2))
    causal = args.q_len == args.context and args.q_len > 1
    with sdpa_kernel([getattr(SDPBackend, backend)]):
        return median_ms(
            lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        )


def paged_inputs(args, block_size=16):
    import torch

    pages = args.batch * math.ceil(args.context / block_size)
    table = torch.randperm(pages, device="cuda", dtype=torch.int64).to(torch.int32).view(args.batch, -1)
    q = torch.randn(args.batch * args.q_len, args.num_q_heads, args.head_size, device="cuda", dtype=torch.bfloat16)
    cache = torch.randn(pages, 2, block_size, args.num_kv_heads, args.head_size, device="cuda", dtype=torch.bfloat16)
    return q, cache, table, pages


def flashinfer(args, block_size=16):
    import flashinfer
    import torch

    q, cache, table, pages = paged_inputs(args, block_size)
    per = table.shape[1]
    indptr = torch.arange(0, pages + 1, per, dtype=torch.int32, device="cuda")
    last = torch.full((args.batch,), (args.context - 1) % block_size + 1, dtype=torch.int32, device="cuda")
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
    common = (args.num_q_heads, args.num_kv_heads, args.head_size, block_size)
    if args.q_len == 1:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        wrapper.plan(indptr, table.flatten(), last, *common, q_data_type=torch.bfloat16)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        q_indptr = torch.arange(0, q.shape[0] + 1, args.q_len, dtype=torch.int32, device="cuda")
        wrapper.plan(q_indptr, indptr, table.flatten(), last, *common, causal=True, q_data_type=torch.bfloat16)
    return median_ms(lambda: wrapper.run(q, cache))


def vllm(args, block_size=16):
    import torch
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    q, cache, table, _ = paged_inputs(args, block_size)
    out = torch.empty_like(q)
    cu = torch.arange(0, q.shape[0] + 1, args.q_len, dtype=torch.int32, device="cuda")
    lens = torch.full((args.batch,), args.context, dtype=torch.int32, device="cuda")
    return median_ms(
        lambda: unified_attention(
            q=q, k=cache[:, 0], v=cache[:, 1], out=out, cu_seqlens_q=cu, max_seqlen_q=args.q_len, seqused_k=lens,
            max_seqlen_k=args.context, softmax_scale=args.head_size**-0.5, causal=True, window_size=(-1, -1),
            block_table=table, softcap=0.0, q_descale=None, k_descale=None, v_descale=None,
        )
    )


PEERS = {
    "torch sdpa flash": lambda args: torch_sdpa(args, "FLASH_ATTENTION"),
    "torch sdpa cudnn": lambda args: torch_sdpa(args, "CUDNN_ATTENTION"),
    "flashinfer paged": flashinfer,
    "vllm triton unified": vllm,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=["decode", "prefill"])
    for name, default in [("batch", 1), ("context", 16384), ("q-len", 0), ("num-q-heads", 32), ("num-kv-heads", 8), ("head-size", 128)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.q_len == 0:
        args.q_len = args.context if args.op == "prefill" else 1
    visible = args.q_len * (args.context - (args.q_len - 1) / 2)
    flops = 4 * visible * args.batch * args.num_q_heads * args.head_size
    cache_bytes = 4 * args.batch * args.context * args.num_kv_heads * args.head_size
    rows = []
    for name, run in PEERS.items():
        row = {"peer": name, "mode": "bfloat16", **vars(args)}
        try:
            ms = run(args)
            row |= {"ms": ms, "tflops": flops / ms * 1e-9, "cache_gbps": cache_bytes / ms * 1e-6}
        except Exception as error:  # a peer's own refusal, whatever its type
            row["reason"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        rows.append(row)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
