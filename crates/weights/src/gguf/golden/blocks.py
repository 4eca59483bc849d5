"""Blocks of Q8_0 and Q4_0 as llama.cpp's own `gguf` package makes them.

usage: python blocks.py > blocks.json        (gguf 0.19.0, numpy 2.4.6)

Values are given as the bits of f32, blocks as hexadecimal. Among them: zeros, one number, equal magnitudes of both signs,
numbers whose quotient is a half, tiny and large ones, and seeded normal ones.
"""
import json

import numpy as np
from gguf import GGMLQuantizationType, quants

rng = np.random.default_rng(7)
rows = [
    np.zeros(32),
    np.eye(1, 32, 9)[0] * -3.5,
    np.where(np.arange(32) % 2 == 0, 1.25, -1.25),
    np.where(np.arange(32) % 2 == 0, -1.25, 1.25),
    (np.arange(32) - 16) * 127.0 / 32,
    np.concatenate([[127.0], np.arange(31) - 15.5]),
    np.concatenate([[-8.0], (np.arange(31) - 15) / 2]),
    rng.normal(0, 1e-6, 32),
    rng.normal(0, 2e4, 32),
] + [rng.normal(0, 0.02, 32) for _ in range(15)]
values = np.concatenate(rows).astype(np.float32).reshape(len(rows), 32)
out = {"values": values.view(np.uint32).reshape(-1).tolist()}
for kind in ("Q8_0", "Q4_0"):
    blocks = quants.quantize(values, GGMLQuantizationType[kind])
    back = quants.dequantize(blocks, GGMLQuantizationType[kind]).astype(np.float32)
    out[kind] = {"blocks": blocks.tobytes().hex(), "restored": back.view(np.uint32).reshape(-1).tolist()}
print(json.dumps(out))
