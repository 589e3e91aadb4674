#!/usr/bin/env python3
"""Times what else is installed on the shapes of `quire bench`, and prints JSON rows like its, one a line.

    bench/peers.py decode|prefill --shapes 64x8192,1x131072 [--peer NAME,..] [--mode bfloat16,fp8|all] [--q-len N]

A shape is BATCHxCONTEXT. Peers, each with its modes (a mode it lacks is left out):

    torch sdpa flash, torch sdpa cudnn   torch's scaled_dot_product_attention over contiguous K and V: bfloat16
    flashinfer paged                     FlashInfer's paged decode and prefill: bfloat16, fp8 (bf16 queries)
    fa3 paged                            FlashAttention 3 as vLLM builds it: bfloat16, fp8 (queries in fp8 too)
    vllm triton                          vLLM's Triton kernels over vLLM's own pages, every mode that vLLM has

A peer that cannot be imported is one row with the reason; a mode and shape that it refuses is a row with the reason.
Nothing fails.

Measured as `quire bench` measures: calls that take their pages in turn from a pool of more than 256 MiB, so that none
finds them in the L2, are captured into one CUDA graph; the time is the median over replays, divided by the calls. Block
tables are random, pages have 16 tokens in [token, head] order. Plans (FlashInfer) are made before the capture, as
quire's are. FA3 is timed with several numbers of splits and the best is reported, with that number.

How to have the peers, beside torch 2.11 with Triton 3.6:

    FlashInfer  pip install --no-deps flashinfer-python==0.6.4 apache-tvm-ffi; it compiles its kernels with nvcc
    vLLM        the *.py files of the vLLM 0.33.0 wheel on PYTHONPATH, with the folder vllm-0.33.0.dist-info and an
                empty vllm/_C_stable_libtorch.py; nothing of it has to be compiled
    FA3         vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so of that wheel, in its place or named by $FA3_LIBRARY
"""
import argparse
import importlib
import importlib.util
import itertools
import json
import math
import os
import pathlib
import statistics
import sys
import time

BLOCK_SIZE = 16
POOL_BYTES = 256 << 20

# Bytes a row of one KV head takes: codes of an element, and what lies behind them.
ROWS = {
    "bfloat16": (2, 0),
    "fp8": (1, 0),
    "int8_per_token_head": (1, 4),
    "fp8_per_token_head": (1, 4),
    "int4_per_token_head": (0.5, 4),
}
TURBOQUANT = ["turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc"]


class Problem:
    """One shape in one mode: inputs every peer has, and how many copies of the pages calls take in turn."""

    def __init__(self, args, mode, batch, context):
        self.mode, self.batch, self.context = mode, batch, context
        self.q_len = min(args.q_len, context) if args.q_len else context if args.op == "prefill" else 1
        self.q_heads, self.kv_heads, self.head_size = args.num_q_heads, args.num_kv_heads, args.head_size
        self.scale = self.head_size**-0.5
        self.blocks = math.ceil(context / BLOCK_SIZE)  # of a sequence
        page_bytes = BLOCK_SIZE * self.kv_heads * self.bytes_per_token_head()
        self.copies = max(1, min(64, POOL_BYTES // (page_bytes * self.blocks * batch) + 1))
        self.num_pages = self.copies * batch * self.blocks

    def bytes_per_token_head(self):
        if self.mode in TURBOQUANT:
            return turboquant_config(self).slot_size_aligned
        element, scale = ROWS[self.mode]
        return 2 * (int(self.head_size * element) + scale)

    def query(self):
        import torch

        return torch.randn(self.batch * self.q_len, self.q_heads, self.head_size, device="cuda", dtype=torch.bfloat16)

    def cu_seqlens(self):
        import torch

        return torch.arange(0, self.batch * self.q_len + 1, self.q_len, dtype=torch.int32, device="cuda")

    def seq_lens(self):
        import torch

        return torch.full((self.batch,), self.context, dtype=torch.int32, device="cuda")

    def tables(self):
        """[copies, batch, blocks] int32: the pool's pages in random order."""
        import torch

        return torch.randperm(self.num_pages, device="cuda").to(torch.int32).view(self.copies, self.batch, self.blocks)

    def rows(self, dtype, *shape):
        """Random elements of a cache: Gaussian where they are floats, any code where they are not."""
        import torch

        if dtype.is_floating_point:
            out = torch.empty(shape, device="cuda", dtype=dtype)
            for page in out.split(max(1, (1 << 26) // math.prod(shape[1:]))):
                page.copy_(torch.randn(page.shape, device="cuda", dtype=torch.bfloat16))
            return out
        return torch.randint(0, 256, shape, device="cuda", dtype=torch.uint8).view(dtype)

    def facts(self):
        """What `quire bench` says of a row, but the time."""
        return {
            "mode": self.mode, "batch": self.batch, "context": self.context, "q_len": self.q_len,
            "num_q_heads": self.q_heads, "num_kv_heads": self.kv_heads, "head_size": self.head_size,
            "head_size_v": self.head_size, "block_size": BLOCK_SIZE,
        }  # fmt: skip

    def speeds(self, ms):
        visible = self.q_len * (self.context - (self.q_len - 1) / 2)
        flops = 4 * visible * self.batch * self.q_heads * self.head_size
        cache_bytes = self.batch * self.context * self.kv_heads * self.bytes_per_token_head()
        return {"ms": ms, "cache_gbps": cache_bytes / ms * 1e-6, "tflops": flops / ms * 1e-9}


def median_ms(call, copies, budget_ms):
    """The time of one call: the median over replays of a graph of call(0) .. call(copies - 1), as bench/measure.cu."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for index in range(copies):
            call(index)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for index in range(copies):
            call(index)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    begin = time.monotonic()
    with torch.cuda.stream(stream):
        while len(times) < 5 or ((time.monotonic() - begin) * 1e3 < budget_ms and len(times) < 200):
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / copies)
    return statistics.median(times)


# Each peer: probe() imports what it needs; calls(problem) gives {what was chosen: call(copy)}, the fastest of which
# counts. layout is the name that `quire bench` has for its pages, where it has one.


class Sdpa:
    modes, layout = ["bfloat16"], "contiguous"

    def __init__(self, backend):
        self.backend = backend

    def probe(self):
        from torch.nn.attention import SDPBackend

        getattr(SDPBackend, self.backend)

    def calls(self, problem):
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if 1 < problem.q_len < problem.context:
            raise ValueError("no mask for some new tokens of a longer context")
        shape = (problem.copies, problem.batch, problem.kv_heads, problem.context, problem.head_size)
        k, v = (problem.rows(torch.bfloat16, *shape) for _ in range(2))
        q = problem.query().view(problem.batch, problem.q_len, problem.q_heads, -1).transpose(1, 2).contiguous()
        causal = problem.q_len == problem.context and problem.q_len > 1

        def call(copy):
            with sdpa_kernel([getattr(SDPBackend, self.backend)]):
                torch.nn.functional.scaled_dot_product_attention(q, k[copy], v[copy], is_causal=causal, enable_gqa=True)

        return {"": call}


class FlashInfer:
    modes, layout = ["bfloat16", "fp8"], "nhd"

    def probe(self):
        importlib.import_module("flashinfer")

    def calls(self, problem):
        import flashinfer
        import torch

        dtype = torch.bfloat16 if problem.mode == "bfloat16" else torch.float8_e4m3fn
        q, tables = problem.query(), problem.tables()
        cache = problem.rows(dtype, problem.num_pages, 2, BLOCK_SIZE, problem.kv_heads, problem.head_size)
        pages = problem.batch * problem.blocks
        indptr = torch.arange(0, pages + 1, problem.blocks, dtype=torch.int32, device="cuda")
        last = torch.full((problem.batch,), (problem.context - 1) % BLOCK_SIZE + 1, dtype=torch.int32, device="cuda")
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")  # of one call at a time
        heads = (problem.q_heads, problem.kv_heads, problem.head_size)
        dtypes = {"q_data_type": torch.bfloat16, "kv_data_type": dtype}
        wrappers = []
        for copy in range(problem.copies):  # a wrapper holds one block table
            if problem.q_len == 1:
                wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                    workspace, "NHD", use_tensor_cores=problem.q_heads // problem.kv_heads >= 4
                )
                wrapper.plan(indptr, tables[copy].flatten(), last, *heads, BLOCK_SIZE, **dtypes)
            else:
                wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
                table = tables[copy].flatten()
                wrapper.plan(problem.cu_seqlens(), indptr, table, last, *heads, BLOCK_SIZE, causal=True, **dtypes)
            wrappers.append(wrapper)
        return {"": lambda copy: wrappers[copy].run(q, cache)}


class Fa3:
    modes, layout = ["bfloat16", "fp8"], "nhd"

    def probe(self):
        import torch

        library = os.environ.get("FA3_LIBRARY")
        if not library:
            vllm = importlib.util.find_spec("vllm")  # is not imported
            if vllm is None:
                raise ModuleNotFoundError("no module vllm, and FA3_LIBRARY is not set")
            library = str(pathlib.Path(vllm.submodule_search_locations[0]) / "vllm_flash_attn" / "_vllm_fa3_C.abi3.so")
        torch.ops.load_library(library)

    def calls(self, problem):
        import torch

        dtype = torch.bfloat16 if problem.mode == "bfloat16" else torch.float8_e4m3fn
        shape = (problem.num_pages, BLOCK_SIZE, problem.kv_heads, problem.head_size)
        q, k, v = problem.query().to(dtype), problem.rows(dtype, *shape), problem.rows(dtype, *shape)
        tables, cu, lens = problem.tables(), problem.cu_seqlens(), problem.seq_lens()
        ones = torch.ones(problem.batch, problem.kv_heads, device="cuda") if problem.mode == "fp8" else None
        no = None

        def call(copy, splits):
            torch.ops._vllm_fa3_C.fwd(
                q, k, v, no, no, no, no,  # k_new, v_new, q_v, out
                cu, no, no, no, lens,  # cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k
                problem.q_len, problem.context, tables[copy],
                no, no, no, no, no,  # kv_batch_idx, leftpad_k, rotary cos, sin, lengths
                ones, ones, ones, problem.scale,
                True, -1, -1, 0.0, True,  # causal, window, softcap, rotary_interleaved
                no, splits, no, 0, no,  # scheduler_metadata, num_splits, pack_gqa, sm_margin, s_aux
                1, 0, no,  # context parallelism
            )  # fmt: skip

        splits = [0] if problem.q_len > 64 else [0, 1, 16, 32]  # 0: its own choice
        return {f"{n} splits": lambda copy, n=n: call(copy, n) for n in splits}


def turboquant_config(problem):
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

    return TurboQuantConfig.from_cache_dtype(problem.mode, problem.head_size)


class VllmTriton:
    """vLLM's pages: one tensor [page, token, head, K | scale of K | V | scale of V] or a TurboQuant slot."""

    modes, layout = [*ROWS, *TURBOQUANT], "vllm"

    def probe(self):
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        importlib.import_module("vllm.v1.attention.ops.triton_unified_attention")

    def calls(self, problem):
        return {"": self.turboquant(problem) if problem.mode in TURBOQUANT else self.unified(problem)}

    def unified(self, problem):
        import torch
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention
        from vllm.v1.kv_cache_interface import KVQuantMode

        quant_mode, dtype = {
            "bfloat16": (KVQuantMode.NONE, torch.bfloat16),
            "fp8": (KVQuantMode.FP8_PER_TENSOR, torch.float8_e4m3fn),
            "int8_per_token_head": (KVQuantMode.INT8_PER_TOKEN_HEAD, torch.int8),
            "fp8_per_token_head": (KVQuantMode.FP8_PER_TOKEN_HEAD, torch.float8_e4m3fn),
            "int4_per_token_head": (KVQuantMode.INT4_PER_TOKEN_HEAD, torch.uint8),
        }[problem.mode]
        shape = (problem.num_pages, BLOCK_SIZE, problem.kv_heads)
        row = problem.bytes_per_token_head() // 2 // dtype.itemsize  # elements of K, or of V, with the scale
        cache = problem.rows(dtype, *shape, 2 * row)
        extra = {}
        if ROWS[problem.mode][1]:
            words = cache.view(torch.float32)
            at = words.shape[-1] // 2
            extra = {"k_scale_cache": words[..., at - 1], "v_scale_cache": words[..., 2 * at - 1]}
            for scales in extra.values():
                scales.fill_(0.01)
        elif problem.mode == "fp8":
            ones = torch.ones(1, device="cuda").expand(problem.batch, problem.kv_heads)
            extra = {"k_descale": ones, "v_descale": ones}
        # As vLLM's builder has it: split below 128 / num_kv_heads sequences (rounded to the size of a captured batch,
        # a power of two), into 16 segments; int4 only where each has one query token.
        limit = 1 << max(0, round(math.log2(128 / problem.kv_heads)))
        q = problem.query()
        tokens = max(q.shape[0], 1) if problem.batch <= limit and problem.q_len <= 8 else 1
        segments = (tokens, problem.q_heads, 16)
        head = 1 << (problem.head_size - 1).bit_length()
        out, cu, lens, tables = torch.empty_like(q), problem.cu_seqlens(), problem.seq_lens(), problem.tables()
        extra |= {
            "seq_threshold_3D": limit, "num_par_softmax_segments": 16,
            "softmax_segm_output": torch.empty(*segments, head, device="cuda"),
            "softmax_segm_max": torch.empty(segments, device="cuda"),
            "softmax_segm_expsum": torch.empty(segments, device="cuda"),
        }  # fmt: skip
        extra = {"q_descale": None, "k_descale": None, "v_descale": None} | extra
        return lambda copy: unified_attention(
            q=q, k=cache[..., :row], v=cache[..., row:], out=out, cu_seqlens_q=cu, max_seqlen_q=problem.q_len,
            seqused_k=lens, max_seqlen_k=problem.context, softmax_scale=problem.scale, causal=True,
            window_size=(-1, -1), block_table=tables[copy], softcap=0.0, kv_quant_mode=quant_mode, **extra,
        )  # fmt: skip

    def turboquant(self, problem):
        import torch
        from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
        from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention

        if problem.q_len > 1:
            raise ValueError("vLLM's TurboQuant kernel decodes one query token")
        config, d = turboquant_config(problem), problem.head_size
        hadamard = torch.ones(1, 1, device="cuda")
        while hadamard.shape[0] < d:
            hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)], 0)
        hadamard /= math.sqrt(d)
        shape = (problem.num_pages, BLOCK_SIZE, problem.kv_heads, config.slot_size_aligned)
        cache, q = problem.rows(torch.uint8, *shape), problem.query()
        tables, lens = problem.tables(), problem.seq_lens()
        centroids = get_centroids(d, config.key_mse_bits or 4).to("cuda", torch.float32)
        options = {
            "Pi": hadamard, "PiT": hadamard, "centroids": centroids, "scale": problem.scale,
            "mse_bits": config.key_mse_bits, "key_packed_size": config.key_packed_size,
            "value_quant_bits": config.effective_value_quant_bits, "key_fp8": config.key_fp8,
            "norm_correction": config.norm_correction, "max_num_kv_splits": 32,
        }  # fmt: skip
        return lambda copy: triton_turboquant_decode_attention(
            query=q, kv_cache=cache, block_table=tables[copy], seq_lens=lens, **options
        )


PEERS = {
    "torch sdpa flash": Sdpa("FLASH_ATTENTION"),
    "torch sdpa cudnn": Sdpa("CUDNN_ATTENTION"),
    "flashinfer paged": FlashInfer(),
    "fa3 paged": Fa3(),
    "vllm triton": VllmTriton(),
}


def reason(error):
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:120]}"


def measure(peer, args, mode, batch, context):
    """A row, with its time or the reason why there is none."""
    facts = {"mode": mode, "batch": batch, "context": context}
    try:
        problem = Problem(args, mode, batch, context)
        facts = problem.facts()
        calls = peer.calls(problem)
        times = {choice: median_ms(call, problem.copies, args.budget_ms) for choice, call in calls.items()}
        choice = min(times, key=times.get)
        return facts | problem.speeds(times[choice]) | ({"choice": choice} if choice else {})
    except Exception as error:  # a peer's own refusal, whatever its type
        return facts | {"reason": reason(error)}


def free_memory():
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()


def shapes_of(text):
    return [tuple(int(number) for number in shape.split("x")) for shape in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=["decode", "prefill"])
    parser.add_argument("--shapes", type=shapes_of, default="1x16384")
    parser.add_argument("--peer", default=",".join(PEERS), help="names, or what they begin with")
    parser.add_argument("--mode", default="bfloat16", help="modes, or all that a peer has")
    for name, default in [("q-len", 0), ("num-q-heads", 32), ("num-kv-heads", 8), ("head-size", 128)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--budget-ms", type=float, default=40.0, help="time spent measuring one row")
    args = parser.parse_args()
    rows = os.fdopen(os.dup(1), "w", buffering=1)  # stdout is for rows; what packages print there goes to stderr
    os.dup2(2, 1)
    for name, peer in PEERS.items():
        if not any(name.startswith(wanted) for wanted in args.peer.split(",")):
            continue
        row = {"op": args.op, "peer": name, "layout": peer.layout}
        try:
            import torch

            if not torch.cuda.is_available():
                raise RuntimeError("torch sees no CUDA device")
            peer.probe()
        except Exception as error:
            print(json.dumps(row | {"reason": reason(error)}), file=rows)
            continue
        modes = [mode for mode in peer.modes if args.mode == "all" or mode in args.mode.split(",")]
        for (batch, context), mode in itertools.product(args.shapes, modes):
            print(json.dumps(row | measure(peer, args, mode, batch, context)), file=rows)
            free_memory()


if __name__ == "__main__":
    sys.exit(main())
