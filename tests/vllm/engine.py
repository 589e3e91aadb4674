#!/usr/bin/env python3
"""Runs a model through vLLM's own engine with quire's plugin and says what came out.

    engine.py --model FOLDER --mode MODE [--quire PROGRAM] [--quick] [--json FILE] [--longer N]
              [--tensor-parallel N [--context-parallel N [--interleave I]]]
    engine.py --list        the modes there are

What it does, with float32 weights and greedy sampling:
  plain        prompts one after the other; where PROGRAM is given, the tokens are compared with `quire generate`
  batch        16 prompts at once, of other lengths
  chunks       the same 16 with 32 tokens a step (chunked prefill)
  prefix       the same again, in the engine that has seen them: cached tokens are counted
  preemption   the same in a cache that cannot hold them all
  speculation  n-gram proposals of 4 tokens, verified in one step
  skip         layer 2 keeps the model's own dtype; compared with `quire generate` likewise
Each of the others has to give the tokens of `plain`. Where one differs, the rest of that sequence is not compared, and
the place is counted under one of two names, or the step has failed:
  near         the two best logits there differ by 1e-2 at most
  rounding     vLLM's own engine gives both tokens, the one and the other, when its embeddings vary by the precision of
               the device's attention. A quantized cache rounds to codes, so the last bit of a sum, which two programs
               need not have in common, may move a code by a whole step, and logits by much more than 1e-2.
With --longer, the prompts and what follows them are N times as long. vLLM makes blocks of up to 176 tokens for TurboQuant
on a GPU, where some layers keep the model's dtype, and such a block has no place in a prompt of 155.
With --tensor-parallel, `plain` runs on one device and the other steps on N, in a process each, where `skip` is compared
with one device's; --context-parallel adds decode context parallelism, for which a model needs fewer KV heads than N
(one_kv_head.py writes one).

Exits 1 where a step failed. scripts/vllm-engine makes the environment and calls this for every mode.
"""
import argparse
import collections
import json
import os
import subprocess
import sys
import time

NEW_TOKENS = 12
NEAR = 1e-2
# Half a unit in the last place of what attention multiplies: float32 on a CPU, 16-bit weights and levels on tensor
# cores.
NOISE = {"cpu": 2.0**-24, "cuda": 2.0**-9}
# As many as it takes for both tokens, in steps of the first number, up to the second: a place that is three deviations
# of the noise away is seen once in 700 runs.
NOISY_RUNS = (32, 1024)
STEPS = ("plain", "batch", "chunks", "prefix", "preemption", "speculation", "skip")

# A token that is not the wanted one: where, which, and how far the wanted one's logit is ahead of the second best.
Place = collections.namedtuple("Place", "sequence index token wanted gap")


def prompts(model, longer=1):
    import numpy as np

    tokens = np.load(os.path.join(model, "heldout_tokens.npy")).ravel()
    return [tokens[300 * i: 300 * i + longer * (20 + 9 * i)].tolist() for i in range(16)]


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
            # A part of the device, so that several engines have room.
            defaults |= {"attention_backend": "QUIRE", "kv_cache_memory_bytes": 1 << 28, "gpu_memory_utilization": 0.1}
            defaults["compilation_config"] |= {"cudagraph_mode": "FULL", "cudagraph_capture_sizes": [1, 4, 16, 64]}
        self.llm = LLM(**(defaults | options))

    def generate(self, batch, new_tokens=NEW_TOKENS, together=True):
        """[(token ids, gap between the two best logits at each)] and the seconds it took."""
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True, detokenize=False, logprobs=2)
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

    @property
    def skip_layers(self):
        """Those that keep the model's dtype: what was asked for, and what vLLM adds for TurboQuant."""
        return self.llm.llm_engine.vllm_config.cache_config.kv_cache_dtype_skip_layers

    def next_tokens_with_noise(self, prompt, awaited):
        """The next token after a prompt, as often as each came, with embeddings that vary by NOISE; in as many of
        NOISY_RUNS as it takes for both of `awaited` to come."""
        import torch
        from vllm import SamplingParams

        def vary(module, arguments, embeddings):
            return embeddings * (1 + NOISE[embeddings.device.type] * torch.randn_like(embeddings))

        hooks = self.llm.apply_model(lambda model: model.model.embed_tokens.register_forward_hook(vary))
        sampling = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)
        step, most = NOISY_RUNS
        given = collections.Counter()
        while given.total() < most and not all(given[token] for token in awaited):
            outputs = self.llm.generate([{"prompt_token_ids": prompt}] * step, sampling, use_tqdm=False)
            given.update(output.outputs[0].token_ids[0] for output in outputs)
        for hook in hooks:
            hook.remove()
        return given

    def blocks_for(self, num_tokens):
        """How many blocks hold so many tokens; each group of layers has its own."""
        groups = self.llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
        return sum(-(-num_tokens // group.kv_cache_spec.block_size) for group in groups)

    def close(self):
        import gc

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()


def gap(step):
    best = sorted((logprob.logprob for logprob in step.values()), reverse=True)
    return best[0] - best[1] if len(best) > 1 else float("inf")


def compare(reference, tokens):
    """The first place of each sequence where another token was given, as a list of Place."""
    places = []
    for sequence, ((wanted, gaps), got) in enumerate(zip(reference, tokens, strict=True)):
        index = next((index for index, (a, b) in enumerate(zip(wanted, got, strict=True)) if a != b), None)
        if index is not None:
            places.append(Place(sequence, index, got[index], wanted[index], gaps[index]))
    return places


def settle(engine, batch, reference, places):
    """What a row says of the places: how many are near, how many are rounding, and the first that is neither."""
    near = rounding = 0
    difference = None
    for place in places:
        if place.gap <= NEAR:
            near += 1
            continue
        prompt = batch[place.sequence] + reference[place.sequence][0][:place.index]
        given = engine.next_tokens_with_noise(prompt, (place.token, place.wanted))
        print(f"{place}: with noise {dict(given)}", file=sys.stderr, flush=True)
        if given[place.token] and given[place.wanted]:
            rounding += 1
        elif difference is None:
            difference = (f"sequence {place.sequence}, token {place.index}: {place.token} for {place.wanted}, "
                          f"ahead by {place.gap:.3g}")
    return {"near": near, "rounding": rounding, "difference": difference}


def of_quire(arguments, mode, skip_layers, batch, num_tokens):
    """The tokens of `quire generate`: those that the file of --tokens has, or new ones, which it then has too."""
    kept = {}
    if arguments.tokens and os.path.exists(arguments.tokens):
        with open(arguments.tokens) as file:
            kept = json.load(file)
    key = " ".join([mode, *skip_layers])
    if key in kept:
        return kept[key]
    result = []
    for prompt in batch:
        command = [arguments.quire, "generate", "--model", arguments.model, "-m", mode, "-n", str(num_tokens),
                   "--ignore-eos", "--token-ids", ",".join(map(str, prompt))]
        if skip_layers:
            command += ["--kv-cache-dtype-skip-layers", ",".join(skip_layers)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        result.append([int(token) for token in output.replace(",", " ").split()][-num_tokens:])
    if arguments.tokens:
        with open(arguments.tokens, "w") as file:
            json.dump(kept | {key: result}, file)
    return result


def distinct_modes():
    """The kv_cache_dtypes to run: of several names for one mode the first. vLLM takes bfloat16 and float16 only with
    weights of that dtype, where they are "auto"."""
    from quire.vllm.modes import MODES

    modes = list(MODES.values())
    return [name for i, name in enumerate(MODES) if modes.index(MODES[name]) == i and name not in ("bfloat16", "float16")]


def main():
    if sys.argv[1:] == ["--list"]:
        print(*distinct_modes(), sep="\n")
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--mode", required=True)
    parser.add_argument("--quire", help="the program")
    parser.add_argument("--tokens", help="a .json file that keeps what it generated, for machines that lack it")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--longer", type=int, default=1)
    parser.add_argument("--json")
    parser.add_argument("--platform", default="", help="a vllm.platform_plugins entry point to allow")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--context-parallel", type=int, default=1)
    parser.add_argument("--interleave", type=int, default=1, help="neighbouring tokens of one rank")
    arguments = parser.parse_args()
    if arguments.longer > 1 and arguments.tokens:
        parser.error("--tokens keeps what `quire generate` gave for the prompts without --longer")
    longer, new_tokens = arguments.longer, NEW_TOKENS * arguments.longer
    one = {"max_model_len": 512 * longer}
    # On one host, without what needs compiled kernels or more of the links between GPUs than NCCL does.
    ranks = one | {"tensor_parallel_size": arguments.tensor_parallel, "disable_custom_all_reduce": True,
             "decode_context_parallel_size": arguments.context_parallel,
             "cp_kv_cache_interleave_size": arguments.interleave}
    several = arguments.tensor_parallel > 1
    import torch

    if torch.cuda.is_available():
        os.environ.update(VLLM_USE_V2_MODEL_RUNNER="0", VLLM_USE_FLASHINFER_SAMPLER="0")
    if several:
        os.environ.update(VLLM_WORKER_MULTIPROC_METHOD="spawn", VLLM_CPU_OMP_THREADS_BIND="nobind",
                          VLLM_ALLREDUCE_USE_SYMM_MEM="0", VLLM_ALLREDUCE_USE_FLASHINFER="0", NCCL_NVLS_ENABLE="0",
                          OMP_NUM_THREADS="1", VLLM_HOST_IP="127.0.0.1", TORCH_SYMM_MEM_DISABLE_MULTICAST="1")
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1",
                      TORCHDYNAMO_DISABLE="1", VLLM_PLUGINS=",".join(filter(None, (arguments.platform, "quire"))))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from quire.vllm.modes import MODES

    mode, batch = arguments.mode, prompts(arguments.model, longer)
    weights = os.path.join(arguments.model, "weights")  # config.json and model.safetensors alone
    weights = weights if os.path.isdir(weights) else arguments.model
    outputs, facts, verdicts = {}, {}, {}

    def run(step, engine, together=True, **more):
        outputs[step], seconds = engine.generate(batch, new_tokens, together)
        facts[step] = {"tokens_per_s": round(16 * new_tokens / seconds, 1)}
        facts[step] |= {name: fact(engine) for name, fact in more.items()}

    def judge(step, engine, reference, tokens):
        verdicts[step] = settle(engine, batch, reference, compare(reference, tokens))

    def judge_by_quire(step, engine):
        if arguments.quire or arguments.tokens:
            judge(step, engine, outputs[step], of_quire(arguments, MODES[mode], engine.skip_layers, batch, new_tokens))

    if not arguments.quick:
        engine = Engine(weights, mode, **ranks, max_num_batched_tokens=32, enable_prefix_caching=True)
        run("chunks", engine)
        run("prefix", engine, cached_tokens=lambda e: sum(e.cached_tokens))
        num_blocks = engine.blocks_for(640 * longer)
        engine.close()
        engine = Engine(weights, mode, **ranks, num_gpu_blocks_override=num_blocks, max_num_batched_tokens=512)
        run("preemption", engine, preemptions=lambda e: e.preemptions)
        engine.close()
        engine = Engine(weights, mode, **ranks,
                        speculative_config={"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3,
                                            "prompt_lookup_min": 1})
        run("speculation", engine, accepted_tokens=lambda e: e.accepted)
        engine.close()
        engine = Engine(weights, mode, **ranks, kv_cache_dtype_skip_layers=["2"])
        run("skip", engine)
        if several:
            engine.close()
            engine = Engine(weights, mode, **one, kv_cache_dtype_skip_layers=["2"])
            judge("skip", engine, engine.generate(batch, new_tokens)[0], [tokens for tokens, _ in outputs["skip"]])
        else:
            judge_by_quire("skip", engine)
        engine.close()
    if several:
        engine = Engine(weights, mode, **ranks)
        run("batch", engine)
        engine.close()
    engine = Engine(weights, mode, **one)
    run("plain", engine, together=False)
    if not several:
        run("batch", engine)
    judge_by_quire("plain", engine)
    reference = outputs["plain"]
    for step in set(outputs) - {"plain", "skip"}:
        judge(step, engine, reference, [tokens for tokens, _ in outputs[step]])
    engine.close()
    if "skip" in outputs:
        facts["skip"]["sequences_that_differ"] = sum(
            tokens != wanted for (tokens, _), (wanted, _) in zip(outputs["skip"], reference, strict=True))

    rows = [{"mode": mode, "step": step} | verdicts.get(step, {}) | facts[step] for step in STEPS if step in outputs]
    if longer > 1:
        rows = [row | {"longer": longer} for row in rows]
    if several:
        rows = [row | {name: getattr(arguments, name) for name in ("tensor_parallel", "context_parallel", "interleave")}
                if row["step"] != "plain" else row for row in rows]
    for row in rows:
        print(json.dumps(row), flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)
    sys.exit(any(row.get("difference") for row in rows))


if __name__ == "__main__":
    main()
