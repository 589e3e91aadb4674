#!/usr/bin/env python3
"""A Hugging Face model with its KV cache in each mode of quire: bytes, time per token, perplexity, a continuation.

    python python/examples/hf_generate.py --model models/tiny-lm
    python python/examples/hf_generate.py --model DIRECTORY --text book.txt --device cuda --dtype bfloat16

The tokens come from --text and the model's tokenizer, or from heldout_tokens.npy in the model's folder. Perplexity is
that of the first --windows windows of --context tokens, each fed to the model --piece tokens at a time, so that every
piece attends to what the cache has made of those before it. Milliseconds are the median of --new decoding steps after
--context tokens; the caches take turns, step by step, so that they share whatever else the machine does.

--quantized-cache adds transformers' own QuantizedCache, which needs optimum-quanto.
"""

import argparse
import math
import statistics
import time
from pathlib import Path

import quire.hf
import torch
import transformers

MODES = "auto,fp8,int8_per_token_head,int4_per_token_head,turboquant_3bit_nc,int2_per_token_head"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/tiny-lm", help="a folder or the name of a model")
    parser.add_argument("--text", help="a text file; default: heldout_tokens.npy of the model's folder")
    parser.add_argument("--modes", default=MODES, help=f"kv_cache_dtypes, separated by commas ({MODES})")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--context", type=int, default=1984)
    parser.add_argument("--piece", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="the model's dtype")
    parser.add_argument("--quantized-cache", action="store_true")
    return parser.parse_args()


def tokens_of(options):
    if options.text:
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
        return torch.tensor(tokenizer(Path(options.text).read_text())["input_ids"])
    import numpy as np

    return torch.from_numpy(np.load(Path(options.model) / "heldout_tokens.npy").astype(np.int64))


def tensor_bytes(tensor):
    """The bytes of a tensor, or of the tensors that a quantized one is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


def cache_bytes(cache):
    if isinstance(cache, quire.hf.QuireCache):
        return cache.num_bytes
    names = ("keys", "values", "_quantized_keys", "_quantized_values")
    return sum(
        tensor_bytes(t) for layer in cache.layers for t in (getattr(layer, n, None) for n in names) if t is not None
    )


class Cache:
    """One row of the table: a way to make a cache, and the attention that goes with it."""

    def __init__(self, name, make, attention):
        self.name, self.make, self.attention = name, make, attention
        self.losses, self.seconds, self.num_bytes = [], [], 0

    def forward(self, model, ids, cache):
        model.set_attn_implementation(self.attention)
        with torch.no_grad():
            return model(ids, past_key_values=cache).logits

    def read(self, model, window, piece):
        """Feeds a window and notes the losses of its tokens; answers the cache."""
        cache = self.make()
        for begin in range(0, len(window), piece):
            part = window[begin : begin + piece]
            logits = self.forward(model, part[None], cache)[0]
            wanted = window[begin + 1 : begin + piece + 1]
            self.losses.append(
                torch.nn.functional.cross_entropy(logits[: len(wanted)].float(), wanted, reduction="sum").item()
            )
        return cache


def main():
    options = arguments()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    model.eval().to(options.device)
    config = model.config
    windows = tokens_of(options)[: options.windows * options.context].view(-1, options.context).to(options.device)

    rows = [Cache("DynamicCache", lambda: transformers.DynamicCache(config=config), "sdpa")]
    if options.quantized_cache:
        for bits in (4, 2):
            rows.append(
                Cache(
                    f"QuantizedCache {bits} bits",
                    lambda bits=bits: transformers.QuantizedCache("quanto", config, nbits=bits),
                    "sdpa",
                )
            )
    for mode in options.modes.split(","):
        rows.append(Cache(mode, lambda mode=mode: quire.hf.QuireCache(config, mode), "quire"))

    caches = []
    for row in rows:
        for window in windows:
            cache = row.read(model, window, options.piece)
        row.num_bytes = cache_bytes(cache)
        caches.append(cache)
    token = windows[-1:, -1:]
    for _ in range(options.new):
        for row, cache in zip(rows, caches):
            begin = time.perf_counter()
            row.forward(model, token, cache).argmax(-1).tolist()  # which waits for a GPU
            row.seconds.append(time.perf_counter() - begin)

    print(f"{'cache':<24} {'bytes per token':>16} {'ms per token':>13} {'perplexity':>11}")
    for row in rows:
        perplexity = math.exp(sum(row.losses) / (len(windows) * (options.context - 1)))
        print(
            f"{row.name:<24} {row.num_bytes / options.context:>16.0f} {1000 * statistics.median(row.seconds):>13.2f} "
            f"{perplexity:>11.4f}"
        )

    # What a program does:
    model.set_attn_implementation("quire")
    cache = quire.hf.QuireCache(config, mode="int4_per_token_head")
    answer = model.generate(windows[:1, :32], past_key_values=cache, max_new_tokens=16, do_sample=False)
    print("continuation in int4_per_token_head:", answer[0, 32:].tolist())


if __name__ == "__main__":
    main()
