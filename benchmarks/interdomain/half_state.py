"""What a decoding state in float16 would cost in precision: outputs of a head whose state is rounded after each of 16,384 tokens to
float16 with a float32 scale a row (a mode), against the same in float64. docs/benchmarks/interdomain.md has the table.

usage: half_state.py      (needs numpy)
"""
import numpy as np

MODES = FEATURES = VALUES = 64
TOKENS, LAST = 16384, 64


def rounded(state):
    """`state` as float16 with a scale for each row."""
    scale = np.maximum(np.abs(state.real), np.abs(state.imag)).max(axis=1, keepdims=True)
    scale[scale == 0.0] = 1.0
    half = (state.real / scale).astype(np.float16) + 1j * (state.imag / scale).astype(np.float16)
    return scale * half


def error(step_size, mean):
    """Relative 2-norm of the last outputs' error, for tokens of a given mean and unit variance."""
    random = np.random.default_rng(0)
    m = np.arange(MODES)
    a = -0.5 + 1j * MODES / np.pi * (MODES / (2 * m + 1) - 1)  # eq. 13
    decay = np.exp(step_size * a)[:, None]
    b = (decay - 1) / a[:, None]
    c = random.normal(size=(MODES, MODES, 2)) @ [1, 1j] / np.sqrt(2 * MODES)
    g = c.T @ c
    exact = np.zeros((MODES, FEATURES + VALUES), complex)
    half = exact.copy()
    wrong = norm = 0.0
    for t in range(TOKENS):
        z = mean + random.normal(size=FEATURES + VALUES)
        z[:FEATURES] /= np.linalg.norm(z[:FEATURES])
        q = random.normal(size=FEATURES)
        exact = decay * exact + b * z
        half = rounded(decay * half + b * z)
        if t >= TOKENS - LAST:
            o, of_half = (((g @ (x[:, :FEATURES] @ q)) @ x[:, FEATURES:]).real for x in (exact, half))
            wrong += np.sum((o - of_half) ** 2)
            norm += np.sum(o**2)
    return np.sqrt(wrong / norm)


for step_size in (1e-4, 1e-3, 1e-2, 1e-1):
    print(f"dt = {step_size:g}: " + ", ".join(f"mean {mean:g} {error(step_size, mean):.1e}" for mean in (0.0, 1.0)), flush=True)
