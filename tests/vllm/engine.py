#!/usr/bin/env python3
"""Runs a model through vLLM's own engine with quire's plugin and says what came out.

    engine.py --model FOLDER --mode MODE [--quire PROGRAM] [--quick] [--json FILE]
              [--tensor-parallel N [--context-parallel N [--interleave I]]]

What it does, with float32 weights and greedy sampling:
  plain        prompts one after the other; where PROGRAM is given, the tokens are compared with `quire generate`
  batch        16 prompts at once, of other lengths
  chunks       the same 16 with 32 tokens a step (chunked prefill)
  prefix       the same again, in the engine that has seen them: cached tokens are counted
  preemption   the same in a cache that cannot hold them all
  speculation  n-gram proposals of 4 tokens, verified in one step
  skip         the first layer keeps the model's own dtype
Each has to give the tokens of `plain`. Where one differs, the two best logits of `plain` at that place may differ by
1e-2 at most; such places are counted, and the rest of that sequence is not compared.
With --tensor-parallel, `plain` runs on one device and the other steps on N, in a process each; --context-parallel adds
decode context parallelism, for which a model needs fewer KV heads than N (one_kv_head.py writes one).

Exits 1 where a step failed. scripts/vllm-engine makes the environment and calls this for every mode.
"""
import argparse
import json
import os
import subprocess
import sys
import time

NEW_TOKENS = 12
NEAR = 1e-2


def prompts(model):
    import numpy as np

    tokens = np.load(os.path.join(model, "heldout_tokens.npy")).ravel()
    return [tokens[300 * i: 300 * i + 20 + 9 * i].tolist() for i in range(16)]


class Engine:
    """An LLM, and what differs from one run to the next."""

    def __init__(self, model, mode, **options):
        import torch
        from vllm import LLM

        defaults = {"model": model, "skip_tokenizer_init": True, "enforce_eager": not torch.cuda.is_available(),
                    "dtype": "float32", "max_model_len": 512, "max_num_seqs": 16, "kv_cache_dtype": mode,
                    "block_size": 16, "enable_prefix_caching": False, "disable_log_stats": False,
                    "compilation_config": {"custom_ops": ["none"], "mode": 0}}
        if torch.cuda.is_available():
            defaults |= {"attention_backend": "QUIRE", "kv_cache_memory_bytes": 1 << 28}
            defaults["compilation_config"] |= {"cudagraph_mode": "FULL", "cudagraph_capture_sizes": [1, 4, 16, 64]}
        self.llm = LLM(**(defaults | options))

    def generate(self, batch, together=True):
        """[(token ids, gap between the two best logits at each)] and the seconds it took."""
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, detokenize=False, logprobs=2)
        requests = [{"prompt_token_ids": prompt} for prompt in batch]
        start = time.perf_counter()
        groups = [requests] if together else [[request] for request in requests]
        outputs = [output for group in groups for output in self.llm.generate(group, sampling, use_tqdm=False)]
        seconds = time.perf_counter() - start
        self.cached_tokens = [output.num_cached_tokens for output in outputs]
        self.preemptions = self.metric("vllm:num_preemptions")
        self.accepted = self.metric("vllm:spec_decode_num_accepted_tokens")
        return [(list(output.outputs[0].token_ids), [gap(step) for step in output.outputs[0].logprobs])
                for output in outputs], seconds

    def metric(self, name):
        return next((int(metric.value) for metric in self.llm.get_metrics() if metric.name == name), 0)

    def close(self):
        import gc

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()


def gap(step):
    best = sorted((logprob.logprob for logprob in step.values()), reverse=True)
    return best[0] - best[1] if len(best) > 1 else float("inf")


def compare(reference, tokens):
    """(places where two logits were too close to tell, the first real difference or None)."""
    near = 0
    for index, ((wanted, gaps), got) in enumerate(zip(reference, tokens, strict=True)):
        for place, (a, b) in enumerate(zip(wanted, got, strict=True)):
            if a != b:
                if gaps[place] > NEAR:
                    return near, f"sequence {index}, token {place}: {b} for {a}, ahead by {gaps[place]:.3g}"
                near += 1
                break
    return near, None


def of_quire(program, model, mode, batch):
    """The tokens of `quire generate`, or those that are kept in a .json file by mode. Its "auto" cache is bfloat16, so
    float32 is asked for by name."""
    if program.endswith(".json"):
        with open(program) as file:
            return json.load(file)[mode]
    result = []
    for prompt in batch:
        output = subprocess.run([program, "generate", "--model", model, "-m", "float32" if mode == "auto" else mode,
                                 "--token-ids", ",".join(map(str, prompt)), "-n", str(NEW_TOKENS), "--ignore-eos"],
                                capture_output=True, text=True, check=True).stdout
        result.append([int(token) for token in output.replace(",", " ").split()][-NEW_TOKENS:])
    return result


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--mode", required=True)
    parser.add_argument("--quire", help="the program, or a .json file with what it generated in each mode")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--platform", default="", help="a vllm.platform_plugins entry point to allow")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--context-parallel", type=int, default=1)
    parser.add_argument("--interleave", type=int, default=1, help="neighbouring tokens of one rank")
    arguments = parser.parse_args()
    # On one host, without what needs compiled kernels or more of the links between GPUs than NCCL does.
    ranks = {"tensor_parallel_size": arguments.tensor_parallel, "disable_custom_all_reduce": True,
             "decode_context_parallel_size": arguments.context_parallel,
             "cp_kv_cache_interleave_size": arguments.interleave}
    import torch

    if torch.cuda.is_available():
        os.environ.update(VLLM_USE_V2_MODEL_RUNNER="0", VLLM_USE_FLASHINFER_SAMPLER="0")
    if arguments.tensor_parallel > 1:
        os.environ.update(VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_ALLREDUCE_USE_SYMM_MEM="0",
                          VLLM_ALLREDUCE_USE_FLASHINFER="0", NCCL_NVLS_ENABLE="0", OMP_NUM_THREADS="1",
                          VLLM_HOST_IP="127.0.0.1", TORCH_SYMM_MEM_DISABLE_MULTICAST="1")
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1",
                      TORCHDYNAMO_DISABLE="1", VLLM_PLUGINS=",".join(filter(None, (arguments.platform, "quire"))))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    mode, batch = arguments.mode, prompts(arguments.model)
    weights = os.path.join(arguments.model, "weights")  # config.json and model.safetensors alone
    weights = weights if os.path.isdir(weights) else arguments.model
    rows, failed = [], False

    def row(step, near, difference, **facts):
        nonlocal failed
        failed |= difference is not None
        rows.append({"mode": mode, "step": step, "near": near, "difference": difference, **facts})
        if arguments.tensor_parallel > 1 and step != "plain":
            rows[-1] |= {"tensor_parallel": arguments.tensor_parallel, "context_parallel": arguments.context_parallel,
                         "interleave": arguments.interleave}
        print(json.dumps(rows[-1]), flush=True)

    engine = Engine(weights, mode)
    reference, seconds = engine.generate(batch, together=False)
    facts = {"tokens_per_s": round(16 * NEW_TOKENS / seconds, 1)}
    if arguments.quire:
        row("plain", *compare(reference, of_quire(arguments.quire, arguments.model, mode, batch)), **facts)
    else:
        row("plain", 0, None, **facts)

    def check(step, engine, **facts):
        results, seconds = engine.generate(batch)
        row(step, *compare(reference, [tokens for tokens, _ in results]),
            tokens_per_s=round(16 * NEW_TOKENS / seconds, 1), **{name: fact(engine) for name, fact in facts.items()})

    if arguments.tensor_parallel > 1:
        engine.close()
        engine = Engine(weights, mode, **ranks)
    check("batch", engine)
    engine.close()
    if not arguments.quick:
        engine = Engine(weights, mode, **ranks, max_num_batched_tokens=32, enable_prefix_caching=True)
        check("chunks", engine)
        check("prefix", engine, cached_tokens=lambda e: sum(e.cached_tokens))
        engine.close()
        engine = Engine(weights, mode, **ranks, num_gpu_blocks_override=40, max_num_batched_tokens=512)
        check("preemption", engine, preemptions=lambda e: e.preemptions)
        engine.close()
        engine = Engine(weights, mode, **ranks,
                        speculative_config={"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3,
                                            "prompt_lookup_min": 1})
        check("speculation", engine, accepted_tokens=lambda e: e.accepted)
        engine.close()
        skip = {"kv_cache_dtype_skip_layers": ["0"]}
        near, difference = 0, None
        if arguments.tensor_parallel > 1:  # which then is compared with one device's
            engine = Engine(weights, mode, **skip)
            alone, _ = engine.generate(batch)
            engine.close()
        engine = Engine(weights, mode, **ranks, **skip)
        results, seconds = engine.generate(batch)
        if arguments.tensor_parallel > 1:
            near, difference = compare(alone, [tokens for tokens, _ in results])
        row("skip", near, difference, tokens_per_s=round(16 * NEW_TOKENS / seconds, 1),
            sequences_that_differ=sum(tokens != wanted for (tokens, _), (wanted, _) in zip(results, reference)))
        engine.close()
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)
    sys.exit(failed)


if __name__ == "__main__":
    main()
