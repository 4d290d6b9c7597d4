#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Makes a small BERT with random weights, and what it must give, by code that shares nothing with ours:

    pip install numpy safetensors tokenizers && python3 tests/tools/decompose/make_bert.py tests/tools/decompose

tokens come from Hugging Face's tokenizers, hidden states, queries and keys from numpy in float64.
"""
import json
import math
import pathlib
import sys

import numpy as np
from safetensors.numpy import save_file
from tokenizers import BertWordPieceTokenizer

out = pathlib.Path(sys.argv[1])
D, LAYERS, HEADS, INNER, POSITIONS, EPS = 16, 3, 2, 24, 20, 1e-12
PIECES = """[PAD] [UNK] [CLS] [SEP] [MASK] the a of and in lord is my shepherd i shall not want ##s ##ed ##ing walk
wal ##k ##king un ##aff ##able ##ab ##le cafe nai ##ve resume ! , . ? - ' " ( ) $ 中 文 字 国 e ##e ##a ##i c ##c ##t
straße über uber strasse и мир 1 2 ##1 ##2 。 「 」 … — ss ᄒ ##ᅡ ##ᆫ ο ##δο ##ς οδος oδoς 例 x ##x ij ǆ""".split()
(out / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
(out / "config.json").write_text(json.dumps({
    "architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu", "hidden_size": D, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "intermediate_size": INNER, "max_position_embeddings": POSITIONS, "type_vocab_size": 2,
    "vocab_size": len(PIECES), "layer_norm_eps": EPS, "position_embedding_type": "absolute"}, indent=1) + "\n")

rng = np.random.default_rng(5)
normal = lambda *shape, scale=1.0: (scale * rng.standard_normal(shape)).astype(np.float32)
W = {"embeddings.word_embeddings.weight": normal(len(PIECES), D), "embeddings.position_embeddings.weight": normal(POSITIONS, D),
     "embeddings.token_type_embeddings.weight": normal(2, D)}


def norm_weights(name):
    W[name + ".weight"] = 1 + normal(D, scale=0.2)
    W[name + ".bias"] = normal(D, scale=0.2)


def linear_weights(name, n_in, n_out):
    W[name + ".weight"] = normal(n_out, n_in, scale=1.5 / math.sqrt(n_in))
    W[name + ".bias"] = normal(n_out, scale=0.3)


norm_weights("embeddings.LayerNorm")
for n in range(LAYERS):
    at = f"encoder.layer.{n}."
    for name in ("query", "key", "value"):
        linear_weights(at + "attention.self." + name, D, D)
    linear_weights(at + "attention.output.dense", D, D)
    norm_weights(at + "attention.output.LayerNorm")
    linear_weights(at + "intermediate.dense", D, INNER)
    linear_weights(at + "output.dense", INNER, D)
    norm_weights(at + "output.LayerNorm")
save_file(W, out / "model.safetensors")
W = {k: v.astype(np.float64) for k, v in W.items()}


def linear(name, x):
    return x @ W[name + ".weight"].T + W[name + ".bias"]


def layer_norm(name, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * W[name + ".weight"] + W[name + ".bias"]


def encode(ids):
    """Hidden states at the end, and Q and K of every layer."""
    x = W["embeddings.word_embeddings.weight"][ids] + W["embeddings.position_embeddings.weight"][: len(ids)]
    x = layer_norm("embeddings.LayerNorm", x + W["embeddings.token_type_embeddings.weight"][0])
    qs, ks = [], []
    for n in range(LAYERS):
        at = f"encoder.layer.{n}."
        q, k, v = (linear(at + "attention.self." + name, x) for name in ("query", "key", "value"))
        qs.append(q), ks.append(k)
        heads = lambda m: m.reshape(len(ids), HEADS, D // HEADS).transpose(1, 0, 2)
        s = heads(q) @ heads(k).transpose(0, 2, 1) / math.sqrt(D // HEADS)
        p = np.exp(s - s.max(-1, keepdims=True))
        o = (p / p.sum(-1, keepdims=True)) @ heads(v)
        o = o.transpose(1, 0, 2).reshape(len(ids), D)
        x = layer_norm(at + "attention.output.LayerNorm", x + linear(at + "attention.output.dense", o))
        y = linear(at + "intermediate.dense", x)
        y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        x = layer_norm(at + "output.LayerNorm", x + linear(at + "output.dense", y))
    return x, np.stack(qs), np.stack(ks)


TEXTS = ["The LORD is my shepherd; I shall not want.", "Walking, walks; walked - unaffable!", "Café naïve RÉSUMÉ cafe\u0301", "中文字x国",
         "word zzz the", "the\u00a0lord\u2003is\tmy\r\nshepherd\u2028and\u0000 a\u200bnd\ufffdof", "straße Über ÜBER STRASSE ẞ",
         "Мир и МИР", "「中国」。…— \"(the)\" $1 12", "한 하", "ΟΔΟΣ İi ĳ Ǆ", "豈\U0002F800例", "[CLS] a[SEP]b", "x" * 100 + " " + "x" * 101,
         "a\u0301\u0327\u0323 e", " \t\n", "e\U0001F600e", "in-the...my' 'of", "e\u0903a", "the " * 40]
BAD = {"continuation alone": b"a\x80", "overlong": b"\xc0\xaf", "surrogate": b"\xed\xa0\x80", "cut off": b"ab\xe4\xb8", "too large": b"\xf4\x90\x80\x80"}
cases, expected = [], {}
tokenizer = lambda lower, accents: BertWordPieceTokenizer(str(out / "vocab.txt"), lowercase=lower, strip_accents=accents)
for lower, accents in ((True, True), (False, False), (True, False), (False, True)):
    hf = tokenizer(lower, accents)
    for i, text in enumerate(TEXTS):
        ids = hf.encode(text, add_special_tokens=False).ids
        if "[CLS]" in text:  # there, names of special tokens are special; for us they are text
            ids = [t for part in ("[", "CLS", "]", " a", "[", "SEP", "]", "b") for t in hf.encode(part, add_special_tokens=False).ids]
        cases.append({"text": text, "lower_case": lower, "strip_accents": accents, "ids": ids})
        if lower and accents and 0 < len(ids) <= POSITIONS - 2:
            hidden, q, k = encode([2] + ids + [3])
            expected |= {f"{i}.ids": np.array([2] + ids + [3]), f"{i}.hidden": hidden, f"{i}.q": q, f"{i}.k": k}
(out / "tokens.json").write_text(json.dumps({"cases": cases, "bad": {k: list(v) for k, v in BAD.items()}}, indent=0) + "\n")
save_file({k: np.ascontiguousarray(v) for k, v in expected.items()}, out / "expected.safetensors")
