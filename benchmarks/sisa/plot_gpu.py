"""Draws docs/benchmarks/sisa_gpu.svg from the figures.jsonl of a run of tools/gpu_check.sh, as it is: lines of our benchmarks and of
the peers, those of other operators and of the machine among them.

usage: plot_gpu.py figures.jsonl docs/benchmarks      (needs matplotlib)
"""
import json
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

plt.rcParams["svg.hashsalt"] = "sisa"  # the same file from the same figures

PEERS = (
    ("best_of_all", "^-", "as published, PyTorch's best backend"),
    ("efficient", "s--", "as published, memory-efficient backend"),
)


def main(figures, folder):
    rows = [json.loads(line) for line in open(figures)]
    ours = [r for r in rows if r.get("op") == "sisa" and r.get("mode") == "exact" and r["dtype"] == "bf16" and r["d"] == 64 and r["Hkv"] == 32 and r["half_life"] == 100]
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.9))
    for panel, key, case, title in ((panels[0], "forward_ms", "sisa_fwd", "forward"), (panels[1], "both_ms", "sisa_fwdbwd", "forward + backward")):
        points = sorted((r["ds"], r[key]) for r in ours if r["B"] == 4 and r["L"] == 4096)
        panel.plot(*zip(*points), "o-", label="ours, exact (0: attention)")
        for backend, style, label in PEERS:
            peer = sorted((r["ds"], r["ms"]) for r in rows if r.get("case") == case and r.get("backend") == backend and "ms" in r and (r["B"], r["L"], r["d"]) == (4, 4096, 64))
            panel.plot(*zip(*peer), style, label=label)
        panel.set(xlabel="ds (B = 4, L = 4,096, 32 heads of 64, bf16)", title=title)
        panel.set_yscale("log")
        panel.set_yticks([t for t in (1, 2, 5, 10, 20, 50) if panel.get_ylim()[0] <= t <= panel.get_ylim()[1]], minor=False)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("")
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("milliseconds")
    lengths = sorted({r["L"] for r in ours if r["ds"] == 16 and r["B"] == 1})
    for key, style, label in (("forward_ratio", "o-", "forward"), ("both_ratio", "s--", "forward + backward")):
        panels[2].plot(lengths, [next(r[key] for r in ours if (r["ds"], r["B"], r["L"]) == (16, 1, n)) for n in lengths], style, label=label)
    panels[2].set(xlabel="length (ds = 16, B = 1)", title="times attention without channels")
    panels[2].set_xscale("log", base=2)
    panels[2].set_ylim(bottom=1.0)
    panels[2].grid(alpha=0.3)
    panels[2].legend(fontsize=8)
    figure.legend(*panels[1].get_legend_handles_labels(), fontsize=8, ncols=3, loc="lower center")
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(f"{folder}/sisa_gpu.svg", metadata={"Date": None})


main(*sys.argv[1:])
