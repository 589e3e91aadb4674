#!/usr/bin/env python3
"""Decode tokens per second of vLLM's engine with one KV cache, on a CUDA device, with CUDA graphs.

    speed.py MODE quire|vllm [--batch 64] [--context 8192] [--layers 24] [--steps 64]

A Llama of random weights with 32 query heads and 8 KV heads of 128, and a hidden size of 1024, so that a step is mostly
attention. The attention of the prompts is left out on both sides (its output is zeros), because only decode is timed;
their keys and values are stored. TurboQuant serves all layers, also those at the model's ends, which vLLM would keep in
bf16. `vllm` runs vLLM's Triton backends, quire's plugin switched off.
Prints one line of JSON: tokens_per_s over the steps after the first, and the milliseconds of a step.
"""
import argparse
import json
import os
import tempfile
import time

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024, "intermediate_size": 1024,
          "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 1024,
          "max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "bfloat16",
          "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2}


def without_prompt_attention(impl):
    """Wraps a layer's forward: zeros for batches that are no decode."""
    attend = impl.forward

    def forward(self, layer, query, key, value, kv_cache, metadata, output, *args, **kwargs):
        if metadata is not None and metadata.max_query_len > 1:
            return output.zero_()
        return attend(self, layer, query, key, value, kv_cache, metadata, output, *args, **kwargs)

    impl.forward = forward


def add_requests(engine, batch, length, new_tokens):
    """Prompts of so many tokens, no two alike, each of which is continued greedily by so many new ones."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True, detokenize=False)
    for i in range(batch):
        prompt = {"prompt_token_ids": [(7 * i + 13 * j) % 1021 + 3 for j in range(length)]}
        engine.add_request(str(i), prompt, sampling)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("mode")
    parser.add_argument("side", choices=("quire", "vllm"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--steps", type=int, default=64)
    arguments = parser.parse_args()
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", TORCHDYNAMO_DISABLE="1",
                      VLLM_PLUGINS="quire" if arguments.side == "quire" else "", VLLM_USE_V2_MODEL_RUNNER="0",
                      VLLM_USE_FLASHINFER_SAMPLER="0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

    folder = tempfile.mkdtemp()
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(CONFIG | {"num_hidden_layers": arguments.layers}, file)
    TurboQuantConfig.get_boundary_skip_layers = staticmethod(lambda *_: [])
    backend = "TURBOQUANT" if arguments.mode.startswith("turboquant") else "TRITON_ATTN"
    llm = LLM(model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
              max_model_len=arguments.context + arguments.steps + 16, max_num_seqs=arguments.batch,
              max_num_batched_tokens=16384, kv_cache_dtype=arguments.mode, block_size=16, enable_prefix_caching=False,
              gpu_memory_utilization=0.85,
              compilation_config={"custom_ops": ["none"], "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY",
                                  "cudagraph_capture_sizes": [arguments.batch]},
              attention_backend="QUIRE" if arguments.side == "quire" else backend)
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    kinds = {type(layer.impl) for layer in layers.values() if hasattr(layer, "impl")}
    for kind in kinds:
        without_prompt_attention(kind)
    engine = llm.llm_engine
    add_requests(engine, arguments.batch, arguments.context - arguments.steps // 2, arguments.steps)
    times = []
    while engine.has_unfinished_requests():
        start = time.perf_counter()
        outputs = engine.step()
        times.append((time.perf_counter() - start, len(outputs)))
    # Steps in which every sequence gained a token, the first few and the last left out.
    decode = [seconds for seconds, count in times if count == arguments.batch][4:-1]
    step = sorted(decode)[len(decode) // 2]
    print(json.dumps({"side": arguments.side, "mode": arguments.mode, "batch": arguments.batch,
                      "context": arguments.context, "layers": arguments.layers, "step_ms": round(step * 1e3, 3),
                      "tokens_per_s": round(arguments.batch / step), "steps": len(decode),
                      "layer_kinds": sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)}), flush=True)


if __name__ == "__main__":
    main()
