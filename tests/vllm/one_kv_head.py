#!/usr/bin/env python3
"""Writes a small Llama of random weights with one KV head, for engine.py: `one_kv_head.py FOLDER`.

vLLM serves decode context parallelism of a model with grouped queries only where there are more ranks than KV heads.
Queries and keys are scaled up, so that a query attends to a few keys and the tokens depend on each of them. There are
six layers, because TurboQuant leaves the first and the last two to the model's dtype.
"""

import json
import os
import sys

import numpy as np

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
          "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 128,
          "vocab_size": 1024, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu",
          "torch_dtype": "float32", "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2}
SHARPNESS = 2.0  # of queries and of keys


def weights(rng):
    hidden, heads, head_size = CONFIG["hidden_size"], CONFIG["num_attention_heads"], CONFIG["head_dim"]

    def matrix(rows, columns, scale=1.0):
        return rng.standard_normal((rows, columns), np.float32) * np.float32(scale / columns**0.5)

    yield "model.embed_tokens.weight", matrix(CONFIG["vocab_size"], hidden, scale=hidden**0.5 / 4)
    yield "model.norm.weight", np.ones(hidden, np.float32)
    for layer in range(CONFIG["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        yield name + "input_layernorm.weight", np.ones(hidden, np.float32)
        yield name + "post_attention_layernorm.weight", np.ones(hidden, np.float32)
        yield name + "self_attn.q_proj.weight", matrix(heads * head_size, hidden, SHARPNESS)
        yield name + "self_attn.k_proj.weight", matrix(head_size, hidden, SHARPNESS)
        yield name + "self_attn.v_proj.weight", matrix(head_size, hidden)
        yield name + "self_attn.o_proj.weight", matrix(hidden, heads * head_size)
        yield name + "mlp.gate_proj.weight", matrix(CONFIG["intermediate_size"], hidden)
        yield name + "mlp.up_proj.weight", matrix(CONFIG["intermediate_size"], hidden)
        yield name + "mlp.down_proj.weight", matrix(hidden, CONFIG["intermediate_size"])


def main():
    from safetensors.numpy import save_file

    folder = sys.argv[1]
    os.makedirs(os.path.join(folder, "weights"), exist_ok=True)
    rng = np.random.default_rng(2026)
    with open(os.path.join(folder, "weights", "config.json"), "w") as file:
        json.dump(CONFIG, file, indent=1)
    save_file(dict(weights(rng)), os.path.join(folder, "weights", "model.safetensors"), {"format": "pt"})
    np.save(os.path.join(folder, "heldout_tokens.npy"), rng.integers(3, CONFIG["vocab_size"], 8192).astype(np.uint16))


if __name__ == "__main__":
    main()
