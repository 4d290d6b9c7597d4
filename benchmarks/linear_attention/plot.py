"""Draws docs/benchmarks/linear_attention_length.svg: time of both passes against length, one batch row of 32 heads of 64 in bfloat16.

usage: plot.py linear_attention.jsonl attention.jsonl docs/benchmarks      (needs matplotlib; lines of cuda_bench, and of
                                                                            attention's with its peers)
"""
import json
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

plt.rcParams["svg.hashsalt"] = "linear_attention"  # the same file from the same figures


def main(figures, attention, folder):
    rows = [r for r in map(json.loads, open(figures)) if r.get("kernel") == "linear_attention.cuda.chunked"]
    softmax = [json.loads(line) for line in open(attention)]
    figure, panel = plt.subplots(figsize=(5.5, 4))
    for name, marker in (("elu1", "o"), ("identity", "s")):
        points = sorted((r["L"], r["both_ms"]) for r in rows if r["feature_map"] == name and r["B"] == 1 and r["dtype"] == "bf16")
        panel.plot(*zip(*points), marker + "-", markersize=4, linewidth=1, label=f"linear attention, {name}")
    points = sorted((r["L"], r["both_ms"]) for r in softmax if r.get("op") == "attention" and r["dtype"] == "bf16" and r.get("causal")
                    and (r["B"], r["Hq"], r["Hkv"], r["d"]) == (1, 32, 32, 64))
    panel.plot(*zip(*points), "^-", color="C2", markersize=4, linewidth=1, label="our softmax attention (2026-11-22)")
    panel.set(xlabel="length", ylabel="forward and backward, ms", title="B = 1, 32 heads of 64, bfloat16, H100")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(f"{folder}/linear_attention_length.svg", metadata={"Date": None})


main(*sys.argv[1:])
