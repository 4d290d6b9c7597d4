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
    ("cudnn", "^-", "PyTorch, cuDNN"),
    ("flash", "s--", "PyTorch, FlashAttention-2"),
    ("flash, deterministic", "x:", "the same, deterministic"),
)


def rates(rows, key, per_score):
    """TFLOP/s on useful operations against length, of the largest batch of each."""
    best = {}
    for r in rows:
        scores = r["B"] * 32 * r["L"] * (r["L"] + 1) / 2
        best.setdefault(r["L"], (0, 0))
        best[r["L"]] = max(best[r["L"]], (r["B"], per_score * 64 * scores / r[key] * 1e-9))
    return sorted(best), [best[n][1] for n in sorted(best)]


def main(figures, folder):
    rows = [json.loads(line) for line in open(figures)]
    ours = [r for r in rows if r.get("op") == "attention" and r["dtype"] == "bf16" and r["d"] == 64 and r["Hq"] == r["Hkv"] == 32 and r["causal"]]
    peak = next(r["mma_bf16_TFLOPs"] for r in rows if "mma_bf16_TFLOPs" in r)
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.9), sharey=True)
    for panel, key, case, per_score, title in (
        (panels[0], "forward_ms", "sdpa_fwd", 4, "forward"),
        (panels[1], "both_ms", "sdpa_fwdbwd", 14, "forward + backward"),
    ):
        panel.plot(*rates(ours, key, per_score), "o-", label="attention.cuda.tiled")
        for backend, style, label in PEERS:
            points = [r for r in rows if r.get("case") == case and r.get("backend") == backend and "ms" in r and r["H"] == 32 and r["d"] == 64]
            if points:
                panel.plot(*rates(points, "ms", per_score), style, label=label)
        panel.axhline(peak, color="k", linestyle=":", label="products from registers, mma.sync")
        panel.set(xlabel="length", title=title)
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("TFLOP/s (bf16, causal, 32 heads of 64)")
    figure.legend(*panels[1].get_legend_handles_labels(), fontsize=8, ncols=3, loc="lower center")
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(f"{folder}/attention_length.svg", metadata={"Date": None})


main(*sys.argv[1:])
