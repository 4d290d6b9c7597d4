"""Draws docs/benchmarks/s4d_{length,modes}.svg from the figures.jsonl of a run of tools/gpu_check.sh, as it is: lines of
our benchmarks and of the peers, those of other operators and of the machine among them.

usage: plot.py figures.jsonl docs/benchmarks      (needs matplotlib)
"""
import json
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

plt.rcParams["svg.hashsalt"] = "s4d"  # the same file from the same figures


def read(path):
    ours, peers = [], []
    for line in open(path):
        row = json.loads(line)
        if row.get("op") == "s4d" and row["dtype"] == "f32" and row["B"] == 8 and row["H"] == 512:
            ours.append(row)
        if row.get("case", "").startswith("s4d_") and "ms" in row and row["B"] == 8:
            peers.append(row | {"modes": row["N"] // 2})  # PyTorch's N is the real state size
    return ours, peers


def draw(ours, peers, axis, fixed, x_label, path):
    """Milliseconds against one axis, the other held: forward on the left, both directions on the right."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.9), sharey=True)
    for panel, ours_key, floor_key, peer_case, title in (
        (panels[0], "forward_ms", "floor_bytes_ms", "s4d_fwd", "forward"),
        (panels[1], "both_ms", "both_floor_bytes_ms", "s4d_fwdbwd", "forward + backward"),
    ):
        for kernel, style in (("s4d.cuda.chunked", "o-"), ("s4d.cuda.scan", "s--"), ("s4d.cuda.fft", "d-.")):
            points = sorted((r[axis], r[ours_key], r[floor_key]) for r in ours
                            if r["kernel"] == kernel and all(r[k] == v for k, v in fixed.items()))
            if points:
                panel.plot([p[0] for p in points], [p[1] for p in points], style, label=kernel)
            if kernel.endswith("chunked"):
                floors = [p for p in points if p[2] > 0]  # a few bytes are rounded to no time
                panel.plot([p[0] for p in floors], [p[2] for p in floors], "k:", label="bytes at copy speed")
        key = {"N": "modes", "L": "L"}
        points = sorted((r[key[axis]], r["ms"]) for r in peers
                        if r["case"] == peer_case and all(r[key[k]] == v for k, v in fixed.items()))
        panel.plot([p[0] for p in points], [p[1] for p in points], "^-", label="PyTorch, Vandermonde + FFT")
        panel.set(xscale="log", yscale="log", xlabel=x_label, title=title)
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("milliseconds")
    figure.legend(*panels[1].get_legend_handles_labels(), loc="lower center", ncols=5, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, metadata={"Date": None})


def main():
    ours, peers = read(sys.argv[1])
    draw(ours, peers, "L", {"N": 32}, "length (B=8, 512 channels, 32 modes, float32)", f"{sys.argv[2]}/s4d_length.svg")
    draw(ours, peers, "N", {"L": 16384}, "modes (B=8, 512 channels, L=16,384, float32)", f"{sys.argv[2]}/s4d_modes.svg")


main()
