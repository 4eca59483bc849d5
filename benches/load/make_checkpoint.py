#!/usr/bin/env python3
"""Writes a checkpoint of Llama-2-7B's shape with random weights in bf16, as Hugging Face shards one: safetensors files and an index.

    benches/load/make_checkpoint.py DIR [--layers N] [--shard-gb 2]

For the bench `load`. Needs numpy. The weights are one pool of normal numbers (sigma 0.02), read from another place
for every tensor, because drawing 6.7 billion would take longer than writing them; loading does not depend on their values. One
tensor is in memory at a time. There is no tokenizer.
"""
import argparse
import json
import math
import os

import numpy as np

HIDDEN, MLP, VOCABULARY = 4096, 11008, 32000
POOL = 1 << 24
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": MLP,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": VOCABULARY,
}


def shapes(layers):
    """Names and shapes of all tensors, in the order in which Hugging Face writes them."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        block = f"model.layers.{layer}"
        yield f"{block}.input_layernorm.weight", (HIDDEN,)
        for name in "qkvo":
            yield f"{block}.self_attn.{name}_proj.weight", (HIDDEN, HIDDEN)
        yield f"{block}.mlp.gate_proj.weight", (MLP, HIDDEN)
        yield f"{block}.mlp.up_proj.weight", (MLP, HIDDEN)
        yield f"{block}.mlp.down_proj.weight", (HIDDEN, MLP)
        yield f"{block}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def cut(layers, shard_bytes):
    """The tensors in shards of at most so many bytes, in order."""
    shard, size = [], 0
    for name, shape in shapes(layers):
        bytes_of_tensor = 2 * math.prod(shape)
        if shard and size + bytes_of_tensor > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append((name, shape))
        size += bytes_of_tensor
    yield shard


def bf16(values):
    """The bits of f32 numbers rounded to bf16; none is near enough to infinity to overflow."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def tensor(pool, number, shape):
    if len(shape) == 1:
        bits = bf16(np.ones(shape))
    else:
        bits = np.resize(np.roll(pool, -(number * 1_000_003 % POOL)), shape)
    return bits.tobytes()


def write(path, shard, pool, number):
    """A safetensors file (https://github.com/huggingface/safetensors#format): length of the header, header, tensors."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shard:
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for place, (_, shape) in enumerate(shard):
            file.write(tensor(pool, number + place, shape))
    return end


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shard-gb", type=float, default=2.0)
    arguments = parser.parse_args()
    os.makedirs(arguments.folder, exist_ok=True)
    pool = bf16(np.random.default_rng(0).normal(0, 0.02, POOL))
    shards = list(cut(arguments.layers, int(arguments.shard_gb * 1e9)))
    weight_map, total, number = {}, 0, 0
    for place, shard in enumerate(shards, 1):
        file = f"model-{place:05}-of-{len(shards):05}.safetensors"
        total += write(os.path.join(arguments.folder, file), shard, pool, number)
        number += len(shard)
        weight_map |= {name: file for name, _ in shard}
        print(f"{file}: {len(shard)} tensors", flush=True)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    for name, content in (("model.safetensors.index.json", index), ("config.json", CONFIG | {"num_hidden_layers": arguments.layers})):
        with open(os.path.join(arguments.folder, name), "w") as file:
            json.dump(content, file, indent=2)
            file.write("\n")
    print(f"{total} bytes in {len(shards)} files")


if __name__ == "__main__":
    main()
