#!/usr/bin/env python3
"""Tokens per second of vLLM's engine on a CPU: quire's plugin and vLLM's own CPU backend, taking turns in one process.

    cpu_speed.py generate [MODE]... --model FOLDER   the prompts of tests/vllm/engine.py, one by one and 16 at once
    cpu_speed.py decode [MODE]...                    steps of a model that is mostly attention, batch 4, context 4096

VLLM_CPU_KERNELS names the library of tests/vllm/cpu_peer.py, with which vLLM's own backend runs; without it quire runs
alone. Every engine is made before anything is timed; then they have turns of one prompt, one batch or one step, round
after round. Prints a line of JSON for each engine: of the fastest turns, and for steps of the median too.
"""
import argparse
import json
import os
import statistics
import sys
import tempfile
import time

DECODE_MODES = ("auto", "int8_per_token_head", "int4_per_token_head", "turboquant_4bit_nc")
ROUNDS = {"generate": 5, "decode": 48}


def engines(modes, make):
    """{(side, mode): what make(mode, block_size) gives}. vLLM's own comes first: the plugin stays once it is there."""
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.selector import _cached_get_attn_backend

    import quire.vllm

    result = {}
    load_general_plugins()  # none: VLLM_PLUGINS does not name quire
    if "VLLM_CPU_KERNELS" in os.environ:
        result["vllm", "auto"] = make("auto", 32)
        result["vllm", "fp8"] = make("fp8", 32)
    quire.vllm.register()
    _cached_get_attn_backend.cache_clear()
    for mode in modes:
        result["quire", mode] = make(mode, 16)
    return result


def attention_of(llm):
    """The classes that serve the attention layers, as they are called."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return {type(layer.impl) for layer in layers.values() if hasattr(layer, "impl")}


def generate(arguments):
    from engine import NEW_TOKENS, Engine, prompts

    batch = prompts(arguments.model)
    weights = os.path.join(arguments.model, "weights")
    found = engines(arguments.modes, lambda mode, block_size: Engine(weights, mode, block_size=block_size,
                                                                     num_gpu_blocks_override=320))
    turns = {f"prompt {i}": [prompt] for i, prompt in enumerate(batch)} | {"batch": batch}
    fastest = {(name, turn): float("inf") for name in found for turn in turns}
    tokens = {}
    for _ in range(ROUNDS["generate"]):
        for turn, prompts_of_turn in turns.items():
            for name, engine in found.items():
                outputs, seconds = engine.generate(prompts_of_turn)
                tokens[name, turn] = [ids for ids, _ in outputs]
                fastest[name, turn] = min(fastest[name, turn], seconds)
    for name in found:
        plain = sum(fastest[name, turn] for turn in turns if turn != "batch")
        speeds = {"plain": plain, "batch": fastest[name, "batch"]}
        row = {"side": name[0], "mode": name[1],
               "tokens_per_s": {step: round(len(batch) * NEW_TOKENS / took, 1) for step, took in speeds.items()}}
        if ("vllm", "auto") in found:
            row["sequences_of_vllm_auto"] = sum(
                a == b for a, b in zip(tokens[name, "batch"], tokens[("vllm", "auto"), "batch"], strict=True))
        yield row


def decode(arguments):
    from speed import CONFIG, add_requests, without_prompt_attention
    from vllm import LLM
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

    TurboQuantConfig.get_boundary_skip_layers = staticmethod(lambda *_: [])  # they would be all of the layers there are
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "config.json"), "w") as file:
            json.dump(CONFIG | {"num_hidden_layers": arguments.layers}, file)

        def make(mode, block_size):
            length = arguments.context + ROUNDS["decode"] + 32
            return LLM(model=folder, load_format="dummy", skip_tokenizer_init=True, dtype=arguments.dtype,
                       enforce_eager=True, max_model_len=length, max_num_seqs=arguments.batch,
                       max_num_batched_tokens=8192, kv_cache_dtype=mode, block_size=block_size,
                       num_gpu_blocks_override=arguments.batch * (length // block_size + 2),
                       enable_prefix_caching=False, compilation_config={"custom_ops": ["none"], "mode": 0})

        found = engines(arguments.modes, make)
    for kind in set().union(*map(attention_of, found.values())):
        without_prompt_attention(kind)
    for llm in found.values():
        add_requests(llm.llm_engine, arguments.batch, arguments.context, ROUNDS["decode"] + 16)
        while len(llm.llm_engine.step()) < arguments.batch:
            pass
    seconds = {name: [] for name in found}
    for _ in range(ROUNDS["decode"]):
        for name, llm in found.items():
            start = time.perf_counter()
            outputs = llm.llm_engine.step()
            seconds[name].append(time.perf_counter() - start)
            assert len(outputs) == arguments.batch, "a step was no decode of every sequence"
    for (side, mode), times in seconds.items():
        step = statistics.median(times)
        yield {"side": side, "mode": mode, "dtype": arguments.dtype, "batch": arguments.batch,
               "context": arguments.context, "layers": arguments.layers, "step_ms": round(step * 1e3, 2),
               "fastest_step_ms": round(min(times) * 1e3, 2), "tokens_per_s": round(arguments.batch / step, 1),
               "attention": sorted(kind.__module__ for kind in attention_of(found[side, mode]))}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("generate", "decode"))
    parser.add_argument("modes", nargs="*")
    parser.add_argument("--model")
    parser.add_argument("--json")
    parser.add_argument("--platform", default="quire_test", help="a vllm.platform_plugins entry point to allow")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1",
                      TORCHDYNAMO_DISABLE="1", VLLM_PLUGINS=arguments.platform)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    arguments.modes = arguments.modes or list(DECODE_MODES)
    rows = []
    for row in {"generate": generate, "decode": decode}[arguments.what](arguments):
        rows.append(row)
        print(json.dumps(row), flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
