"""Draws docs/benchmarks/sd_decomposition.svg from the lines of cuda_bench and of benchmarks/peers/sd_decomposition_peers.py of one run
on a GPU, and, a line a case, the medians of the repetitions of cpu_bench.

usage: plot.py h100.jsonl cpu.jsonl docs/benchmarks      (needs matplotlib)
"""
import json
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

plt.rcParams["svg.hashsalt"] = "sd_decomposition"  # the same file from the same figures


def main(gpu_figures, cpu_figures, folder):
    rows = [json.loads(line) for line in open(gpu_figures)]
    ours = [r for r in rows if r.get("op") == "sd_decomposition" and r["dtype"] == "f32"]
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.9))

    at_64 = sorted((r for r in ours if r["d"] == 64), key=lambda r: r["L"])
    lengths = [r["L"] for r in at_64]
    for style, label, of in (
        ("o-", "whole call", lambda r: r["forward_ms"]),
        ("s--", "norms alone", lambda r: r["norms_ms"]),
        ("^:", "floor of arithmetic", lambda r: r["floor_arithmetic_ms"]),
    ):
        panels[0].plot(lengths, [1e3 * of(r) / r["heads"] for r in at_64], style, label=label)
    panels[0].set(xlabel="L (d = 64, float32, H100)", ylabel="microseconds a head", title="time against length", yscale="log")
    panels[0].set_xscale("log", base=2)
    panels[0].legend(fontsize=8)

    whole = next(r for r in at_64 if r["L"] == 512)
    bars = [("ours: spectra\nand ranks", 1e3 * (whole["forward_ms"] - whole["norms_ms"]) / (2 * whole["heads"]))]
    bars += [(f"svdvals\n{r['driver']}", 1e3 * r["ms"] / r["matrices"]) for r in rows if r.get("case") == "sd_svdvals"]
    bars += [("eigvalsh\n(F alone)", 1e3 * r["ms"] / r["matrices"]) for r in rows if r.get("case") == "sd_eigvalsh"]
    panels[1].barh([name for name, _ in bars], [us for _, us in bars], color=["C0"] + ["C1"] * (len(bars) - 1))
    for i, (_, us) in enumerate(bars):
        panels[1].text(us * 1.15, i, f"{us:,.3g}" if us < 1000 else f"{us:,.0f}", va="center", fontsize=8)
    panels[1].invert_yaxis()
    panels[1].set(xlabel="microseconds a matrix of 128 x 128 (float32, H100)", title="singular values, reduced matrices", xscale="log")
    panels[1].set_xlim(0.5, 60000)
    panels[1].tick_params(axis="y", labelsize=8)

    measured = {r["name"]: r["median_ms"] / r["heads"] for r in map(json.loads, open(cpu_figures)) if "name" in r}
    sizes = [n for n in (64, 128, 256) if f"eigen_bdcsvd/L:{n}/d:{n // 2}/threads:1" in measured]
    for name, style, label in (
        ("forward_of<interstate::f64>", "o-", "ours, whole call, float64"),
        ("forward_of<interstate::f32>", "s--", "ours, whole call, float32"),
        ("eigen_bdcsvd", "^:", "Eigen BDCSVD, float64"),
    ):
        panels[2].plot(sizes, [measured[f"{name}/L:{n}/d:{n // 2}/threads:1"] for n in sizes], style, label=label)
    panels[2].set(xlabel="n = L = 2 d (CPU, one thread)", ylabel="milliseconds a head", title="beside Eigen", yscale="log")
    panels[2].set_xscale("log", base=2)
    panels[2].legend(fontsize=8)
    for panel in panels:
        panel.grid(alpha=0.3, which="major")
    figure.tight_layout()
    figure.savefig(f"{folder}/sd_decomposition.svg", metadata={"Date": None})


main(*sys.argv[1:])
