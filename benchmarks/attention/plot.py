"""Draws docs/benchmarks/attention_length.svg from the figures.jsonl of a run of tools/gpu_check.sh, as it is: lines of our
benchmarks and of the peers, those of other operators and of the machine among them.

usage: plot.py figures.jsonl docs/benchmarks      (needs matplotlib)
"""
import json
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

plt.rcParams["svg.hashsalt"] = "attention"  # the same file from the same figures

PEERS = (
    ("cudnn", "^", "C1", "PyTorch, cuDNN"),
    ("flash", "s", "C2", "PyTorch, FlashAttention-2"),
    ("flash, deterministic", "x", "C3", "the same, deterministic"),
)


def rate(row, key, per_score):
    """TFLOP/s on useful operations."""
    return per_score * 64 * row["B"] * 32 * row["L"] * (row["L"] + 1) / 2 / row[key] * 1e-9


def draw(panel, rows, key, per_score, marker, colour, label):
    """One batch row as a line, batches as markers."""
    single = sorted((r["L"], rate(r, key, per_score)) for r in rows if r["B"] == 1)
    panel.plot(*zip(*single), marker + "-", color=colour, markerfacecolor="none", markersize=5, linewidth=1, label=label)
    for r in rows:
        if r["B"] in (2, 4, 64):  # the three that every backend was measured on
            panel.plot(r["L"], rate(r, key, per_score), marker, color=colour)


def main(figures, folder):
    rows = [json.loads(line) for line in open(figures)]
    ours = [r for r in rows if r.get("op") == "attention" and r["dtype"] == "bf16" and r["d"] == 64 and r["Hq"] == r["Hkv"] == 32 and r.get("causal")]
    peak = next(r["mma_bf16_TFLOPs"] for r in rows if "mma_bf16_TFLOPs" in r)
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.9), sharey=True)
    for panel, key, case, per_score, title in (
        (panels[0], "forward_ms", "sdpa_fwd", 4, "forward"),
        (panels[1], "both_ms", "sdpa_fwdbwd", 14, "forward + backward"),
    ):
        draw(panel, ours, key, per_score, "o", "C0", "attention.cuda.tiled")
        for backend, marker, colour, label in PEERS:
            points = [r for r in rows if r.get("case") == case and r.get("backend") == backend and "ms" in r and r["H"] == 32 and r["d"] == 64]
            if points:
                draw(panel, points, "ms", per_score, marker, colour, label)
        for batch, length in ((64, 256), (4, 4096), (2, 16384)):
            panel.annotate(f"B={batch}", (length, 25), ha="center", fontsize=8)
            panel.axvline(length, color="k", alpha=0.15)
        panel.axhline(peak, color="k", linestyle=":", label="products from registers, mma.sync")
        panel.set(xlabel="length", title=title)
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("TFLOP/s (bf16, causal, 32 heads of 64)")
    figure.legend(*panels[1].get_legend_handles_labels(), fontsize=8, ncols=3, loc="lower center")
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(f"{folder}/attention_length.svg", metadata={"Date": None})


main(*sys.argv[1:])
