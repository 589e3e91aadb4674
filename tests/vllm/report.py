#!/usr/bin/env python3
"""The tables of scripts/vllm-engine: report.py STEM RESULTS.json...   writes STEM.json and STEM.md.

RESULTS are those of engine.py (rows with a "step") and of cpu_speed.py (rows with a "side").
"""
import json
import os
import platform
import sys

from engine import NOISY_RUNS, STEPS


def cell(row):
    if row is None or "difference" not in row:
        return "-"  # not run, or not compared with anything
    if row["difference"]:
        return "**differs**: " + row["difference"]
    facts = [f"{row[name]} {name}" for name in ("near", "rounding") if row[name]]
    names = {"cached_tokens": "cached", "preemptions": "preempted", "accepted_tokens": "accepted"}
    facts += [f"{row[key]} {name}" for key, name in names.items() if key in row]
    return "same" + (f" ({', '.join(facts)})" if facts else "")


def processor():
    with open("/proc/cpuinfo") as file:
        return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "unknown")


def table(head, rows):
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)] + ["| " + " | ".join(row) + " |" for row in rows]


def tokens_section(rows):
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    find = {(row["mode"], row["step"]): row for row in rows}
    return [
        "## Tokens", "",
        "The model is models/tiny-lm with float32 weights and float32 activations on both sides; 16 prompts, 12 new "
        "tokens each, greedy.",
        "`plain` and `skip` are compared with `quire generate`, the other steps with `plain` "
        "([tests/vllm/engine.py](../../tests/vllm/engine.py) says what each does).",
        "`skip` keeps layer 2 in float32; in the TurboQuant modes vLLM keeps the first two and the last two of the six "
        "layers in float32 in every step.",
        "`bfloat16` and `float16` are not in the table, because vLLM takes them only with weights of that dtype, where "
        "they are `auto`.", "",
        "A place where two runs give different tokens is counted, and the rest of its sequence is not compared.",
        "It is \"near\" where the two best logits differ by less than 1e-2.",
        f"It is \"rounding\" where vLLM's engine itself gave both tokens in at most {NOISY_RUNS[1]} runs whose float32 "
        "embeddings varied by half a unit in their last place: a code of the cache is then so close to the middle "
        "between two levels that the last bit of a sum decides it.",
        "A step with any other difference fails, and the table says so.", "",
        *table(["mode", *STEPS], [[f"`{mode}`", *(cell(find.get((mode, step))) for step in STEPS)] for mode in modes])]


def generate_section(rows):
    def figures(row):
        return [f"{row['tokens_per_s'][step]:.0f}" for step in ("plain", "batch")]

    lines = [[f"`{row['mode']}`", row["side"], *figures(row)] for row in rows]
    return [
        "## Tokens a second of the small model", "",
        "The same prompts, one by one and all 16 at once, in one process: for each prompt, and for the batch, every "
        "engine had its turn in each of five rounds, and the fastest counts, since others used the machine too.",
        "vLLM's own side is its CPU backend's attention, compiled from its sources; everything else is the same on "
        "both sides, and most of such a small step is Python.", "",
        *table(["mode", "attention by", "tokens/s, one by one", "tokens/s, 16 at once"], lines)]


def decode_section(rows):
    first = rows[0]
    own = next((row["step_ms"] for row in rows if (row["side"], row["mode"]) == ("vllm", "auto")), None)
    lines = [[f"`{row['mode']}`", row["side"], f"{row['step_ms']:.1f}", f"{row['fastest_step_ms']:.1f}",
              f"{row['tokens_per_s']:.0f}", f"{own / row['step_ms']:.2f}" if own else "-"] for row in rows]
    return [
        "## Decode over a long context", "",
        f"{first['batch']} sequences of {first['context']} tokens, {first['layers']} layers with 32 query heads and 8 "
        f"KV heads of size 128, a hidden size of 1024, random weights in {first['dtype']}, which `auto` stores too.",
        "The engines took turns step by step, on a machine that others used too; tokens/s are those of the median "
        "step, and the last column compares it with that of vLLM's own `auto`.", "",
        *table(["mode", "attention by", "ms a step", "the fastest", "tokens/s", "times as fast"], lines)]


def main():
    stem, files = sys.argv[1], sys.argv[2:]
    rows = [row for name in files for row in json.load(open(name))]
    for row in rows:
        if "step" in row:  # its speed is that of engines one after the other: cpu_speed.py compares
            row.pop("tokens_per_s", None)
    with open(stem + ".json", "w") as file:
        json.dump({"machine": f"{os.cpu_count()} cores, {processor()}", "rows": rows}, file, indent=1)
    lines = ["# vLLM's engine on a CPU, with quire's plugin", "",
             f"vLLM 0.33.0 from its Python files, Python {platform.python_version()}, {os.cpu_count()} cores of "
             f"{processor()}; made by `scripts/vllm-engine` and `scripts/vllm-engine --speed`, with threads of OpenMP "
             "that wait passively."]
    for section, some in ((tokens_section, [row for row in rows if "step" in row]),
                          (generate_section, [row for row in rows if "side" in row and "step_ms" not in row]),
                          (decode_section, [row for row in rows if "step_ms" in row])):
        lines += ["", *section(some)] if some else []
    with open(stem + ".md", "w") as file:
        file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
