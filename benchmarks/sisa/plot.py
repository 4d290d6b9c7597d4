"""Draws docs/ops/sisa_published.svg: what the clamped offset of `published` does to decay, to results and to causality, in
float64 by numpy, of one head that starts as a layer does: log_alpha = -softplus(-5), lambda = softplus(-1). Prints the
figures that docs/ops/sisa.md quotes.

usage: plot.py docs/ops      (needs numpy and matplotlib)
"""
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

plt.rcParams["svg.hashsalt"] = "sisa"  # the same file every time

DIM = 16  # dh, dv and ds
CLAMP = 11.0
START = -np.log1p(np.exp(-5.0))
LAMBDA = np.log1p(np.exp(-1.0))
LENGTH = 4096  # of the left and right panels
LENGTHS = (512, 1024, 1536, 2048, 2560, 3072, 3328, 3584, 4096, 5120, 6144, 8192, 12288, 16384)


def channels(length):
    """q, k, v and the rotated C and B of one head."""
    random = np.random.default_rng(1)
    q, k, v, c, b = (random.normal(size=(length, DIM)) for _ in range(5))
    phase = np.exp(1j * np.cumsum(0.1 * random.normal(size=(length, DIM // 2)), axis=0))
    c, b = ((x[:, ::2] + 1j * x[:, 1::2]) * phase for x in (c, b))
    return q, k, v, c, b


def log_decay(log_alpha, published):
    """Per token, so that decay[i, j] is exp of a difference (eq. 3, or eq. 10 to 12)."""
    g = np.cumsum(log_alpha)
    return np.clip(g - (g.max() + g.min()) / 2, -CLAMP, CLAMP) if published else g


def outputs(log_alpha, published):
    q, k, v, c, b = channels(len(log_alpha))
    g = log_decay(log_alpha, published)
    o = np.empty_like(v)
    for at in range(0, len(q), 512):
        rows = np.arange(at, min(at + 512, len(q)))
        decay = np.exp(np.minimum(g[rows, None] - g[None, :], 0.0))
        score = q[rows] @ k.T / np.sqrt(DIM) + LAMBDA * decay * (c[rows] @ b.conj().T).real
        score[rows[:, None] < np.arange(len(q))[None, :]] = -np.inf
        p = np.exp(score - score.max(axis=1, keepdims=True))
        o[rows] = p @ v / p.sum(axis=1, keepdims=True)
    return o


def constant(length):
    return np.full(length, START)


def draw(path):
    figure, panels = plt.subplots(1, 3, figsize=(11.5, 3.6))
    distance = np.arange(0, LENGTH, 16)
    for published, style, label in ((False, "-", "exact"), (True, "--", "published")):
        g = log_decay(constant(LENGTH), published)
        panels[0].plot(distance, np.exp(g[-1] - g[LENGTH - 1 - distance]), style, label=label)
    panels[0].set(xlabel="tokens back from the last", ylabel="decay", title=f"what the last of {LENGTH:,} tokens sees", yscale="log")
    panels[0].set_xlim(0, 3000)
    panels[0].set_ylim(1e-8, 3)

    errors = []
    for length in LENGTHS:
        exact, published = (outputs(constant(length), mode) for mode in (False, True))
        errors.append(np.linalg.norm(published - exact) / np.linalg.norm(exact))
        print(f"L = {length:6}: relative error of published {errors[-1]:.2e}", flush=True)
    panels[1].plot(LENGTHS, errors, "o--", color="C1")
    full = 2 * CLAMP / -START
    panels[1].axvline(full, color="k", linestyle=":", label=f"g spans {2 * CLAMP:g}\n({full:,.0f} tokens)")
    panels[1].set(xlabel="length", ylabel="relative error of o", title="published against the definition", yscale="log", ylim=(1e-16, 3))
    panels[1].set_xscale("log", base=2)

    moved = constant(LENGTH)
    moved[-1] = -8.0
    for published, style, label in ((False, "-", "exact"), (True, "--", "published")):
        change = np.abs(outputs(moved, published) - outputs(constant(LENGTH), published)).max(axis=1)[:-1]
        print(f"{label}: the last log_alpha moves earlier outputs by up to {change.max():.3g}", flush=True)
        panels[2].plot(np.arange(8, LENGTH, 16), np.append(change, 0.0).reshape(-1, 16).max(axis=1), style, label=label, linewidth=0.9)
    panels[2].set(xlabel="position", ylabel="largest change of o in 16 tokens", title="moved by the last token's log_alpha")
    for panel, corner in zip(panels, ("upper right", "center left", "upper right")):
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, frameon=False, loc=corner)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


draw(f"{sys.argv[1]}/sisa_published.svg")
