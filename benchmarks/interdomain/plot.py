"""Draws docs/benchmarks/interdomain_{length,decode}.svg from the figures.jsonl of a run of tools/gpu_check.sh, as it is: lines of
our benchmarks and of the peers, those of other operators and of the machine among them.

usage: plot.py figures.jsonl docs/benchmarks      (needs matplotlib)
"""
import json
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

plt.rcParams["svg.hashsalt"] = "interdomain"  # the same file from the same figures

PEERS = (
    ("interdomain", "literal", "s--", "PyTorch, literal (f32)"),
    ("interdomain", "chunked", "d-.", "PyTorch, chunked (f32)"),
    ("softmax_beside_interdomain", "cudnn", "^-", "cuDNN, softmax attention (bf16)"),
)


def read(path):
    rows = [json.loads(line) for line in open(path)]
    ours = [r for r in rows if r.get("op") == "interdomain"]
    peers = [r for r in rows if "case" in r and "ms" in r and r.get("H") == 32 and r.get("d") == 64]
    return ours, peers


def tensors_gb(row):
    """Inputs, outputs and gradients in bf16: q, k, v, o and what belongs to each."""
    return 8 * row["B"] * row["L"] * row["H"] * row["d"] * 2 / 1e9


def draw_length(ours, peers, path):
    """Time and memory of a batch row against length."""
    figure, panels = plt.subplots(1, 3, figsize=(11.5, 3.9))
    rows = {}
    for row in ours:
        if row.get("kernel") == "interdomain.cuda.chunked" and row["dtype"] == "bf16" and row["M"] == 64 and row["B"] == 1:
            rows[row["L"]] = row
    lengths = sorted(rows)
    for panel, key, suffix, title in ((panels[0], "forward_ms", "_fwd", "forward"), (panels[1], "both_ms", "_fwdbwd", "forward + backward")):
        panel.plot(lengths, [rows[length][key] for length in lengths], "o-", label="interdomain.cuda.chunked (bf16)")
        for case, implementation, style, label in PEERS:
            points = {}
            for row in peers:
                if row["case"] == case + suffix and implementation in (row.get("impl"), row.get("backend")):
                    points[row["L"]] = row["ms"] / row["B"]  # the largest batch of a length comes last
            panel.plot(sorted(points), [points[length] for length in sorted(points)], style, label=label)
        panel.set(xlabel="length", ylabel="milliseconds / B", title=title, yscale="log")
    panel = panels[2]
    panel.plot(lengths, [rows[length]["memory_ratio"] * tensors_gb(rows[length]) for length in lengths], "o-")
    for case, implementation, style, label in PEERS:
        points = {}
        for row in peers:
            if row["case"] == case + "_fwdbwd" and implementation in (row.get("impl"), row.get("backend")):
                points[row["L"]] = row["peak_gb"] / row["B"]
        panel.plot(sorted(points), [points[length] for length in sorted(points)], style)
    panel.plot(lengths, [tensors_gb(rows[length]) for length in lengths], "k:", label="inputs, outputs, gradients (bf16)")
    panel.set(xlabel="length", ylabel="GB / B", title="memory of both", yscale="log")
    for panel in panels:
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    more = panels[2].get_legend_handles_labels()
    figure.legend(handles + more[0], labels + more[1], loc="lower center", ncols=5, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, metadata={"Date": None})


def draw_decode(ours, peers, path):
    """A step against the batch."""
    figure, panel = plt.subplots(figsize=(5.6, 3.9))
    rows = {r["B"]: r for r in ours if r.get("case") == "decode" and r["dtype"] == "bf16" and r["M"] == 64}
    batches = sorted(rows)
    panel.plot(batches, [1e3 * rows[b]["step_ms"] for b in batches], "o-", label="interdomain.cuda.step.fast")
    panel.plot(batches, [1e3 * rows[b]["step_ms_after_20000"] for b in batches], "x", label="the same after 20,000 tokens")
    for implementation, style in (("literal", "s--"), ("associative", "d-.")):
        points = {r["B"]: r["ms"] for r in peers if r["case"] == "interdomain_decode" and r["impl"] == implementation}
        panel.plot(sorted(points), [1e3 * points[b] for b in sorted(points)], style, label=f"PyTorch, {implementation}, graph")
    panel.plot(batches, [1e3 * rows[b]["floor_bytes_ms"] for b in batches], "k:", label="the state at copy speed")
    panel.set(xlabel="batch (32 heads, M = R = d = 64)", ylabel="microseconds a token", xscale="log", yscale="log")
    panel.set_xscale("log", base=2)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main():
    ours, peers = read(sys.argv[1])
    draw_length(ours, peers, f"{sys.argv[2]}/interdomain_length.svg")
    draw_decode(ours, peers, f"{sys.argv[2]}/interdomain_decode.svg")


if __name__ == "__main__":
    main()
