#!/usr/bin/env python3
"""The table of scripts/vllm-engine: report.py STEM RESULTS.json...   writes STEM.json and STEM.md."""
import json
import os
import platform
import sys

STEPS = ("plain", "batch", "chunks", "prefix", "preemption", "speculation", "skip")


def cell(row):
    if row is None:
        return "-"
    if row["difference"]:
        return "**differs**: " + row["difference"]
    facts = [f"{row[name]} {name}" for name in ("near", "rounding") if row[name]]
    names = {"cached_tokens": "cached", "preemptions": "preempted", "accepted_tokens": "accepted",
             "sequences_that_differ": "other"}
    facts += [f"{row[key]} {name}" for key, name in names.items() if key in row]
    return "same" + (f" ({', '.join(facts)})" if facts else "")


def processor():
    with open("/proc/cpuinfo") as file:
        return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "unknown")


def main():
    stem, files = sys.argv[1], sys.argv[2:]
    rows = [row for name in files for row in json.load(open(name))]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    find = {(row["mode"], row["step"]): row for row in rows}
    with open(stem + ".json", "w") as file:
        json.dump({"machine": f"{os.cpu_count()} cores, {processor()}", "rows": rows}, file, indent=1)
    lines = ["# vLLM's engine on a CPU, with quire's plugin", "",
             f"vLLM 0.33.0 from its Python files, Python {platform.python_version()}, {os.cpu_count()} cores of "
             f"{processor()}; made by `scripts/vllm-engine`.",
             "The model is models/tiny-lm with float32 weights on both sides, 16 prompts, greedy.",
             "`plain` is compared with `quire generate`, the other steps with `plain` "
             "([tests/vllm/engine.py](../../tests/vllm/engine.py) says what each does).",
             "Places are \"near\" where the two best logits differ by less than 1e-2, so that either is right.",
             "`skip` keeps the first layer in the model's dtype, and counts the sequences that this changes.", "",
             "| mode | " + " | ".join(STEPS) + " | tokens/s, one by one | batch of 16 |",
             "|" + "---|" * (len(STEPS) + 3)]
    for mode in modes:
        cells = [cell(find.get((mode, step))) for step in STEPS]
        speeds = [str(find[mode, step]["tokens_per_s"]) if (mode, step) in find else "-" for step in ("plain", "batch")]
        lines.append(f"| `{mode}` | " + " | ".join(cells + speeds) + " |")
    with open(stem + ".md", "w") as file:
        file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
