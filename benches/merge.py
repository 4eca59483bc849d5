#!/usr/bin/env python3
"""Times `merge` for every format: a base of the shape of TinyLlama 1.1B with random bf16 weights, and an adapter.

    python3 benches/merge.py PROGRAM ADAPTER TOKENIZER JSON      from the repository's root

PROGRAM is target/release/examples/merge, ADAPTER a PEFT folder for that shape, TOKENIZER a folder with Llama 2's. Makes the base in a
temporary folder (2.2 GB, and as much for what is merged), runs the program once for each format without comparing, and writes rows as
the other benches do. The base was just written, so it is read from memory.
"""
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import tempfile

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16",
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}
FORMATS = ["safetensors-f16", "safetensors-bf16", "nf4", "nf4-double", "gguf-f16", "gguf-q8_0", "gguf-q4_0"]
# The upper byte of a bf16 between 2^-7 and 2^-4 in magnitude, of either sign, by a random byte.
UPPER = bytes((0x3C if byte % 2 else 0x3D) | (0x80 if byte & 2 else 0) for byte in range(256))


def shapes():
    d, f, v, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"], 256
    yield "model.embed_tokens.weight", [v, d]
    for layer in range(CONFIG["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        for linear, rows in (("q_proj", d), ("k_proj", kv), ("v_proj", kv), ("o_proj", d)):
            yield f"{name}.self_attn.{linear}.weight", [rows, d]
        for linear, shape in (("gate_proj", [f, d]), ("up_proj", [f, d]), ("down_proj", [d, f])):
            yield f"{name}.mlp.{linear}.weight", shape
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{name}.{norm}.weight", [d]
    yield "model.norm.weight", [d]
    yield "lm_head.weight", [v, d]


def count(shape):
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def make_base(folder, tokenizer):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for file in ("tokenizer.json", "tokenizer.model"):
        shutil.copy(tokenizer / file, folder)
    header, end = {}, 0
    for name, shape in shapes():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * count(shape)]}
        end += 2 * count(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, shape in shapes():
            values = bytearray(os.urandom(2 * count(shape)))
            values[1::2] = bytes(values[1::2]).translate(UPPER)
            file.write(values)


def merge(program, base, adapter, form, work):
    """Seconds, peak bytes of the process, and the size of what was written."""
    out = work / "merged"
    command = [program, "--base", base, "--adapter", adapter, "--format", form, "--eval-limit", "0", "--device", "cpu", "--out", out]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"merge --format {form}: status {os.waitstatus_to_exitcode(status)}")
    report = json.loads((out / "report.json").read_text())
    written = sum(path.stat().st_size for path in out.iterdir())
    shutil.rmtree(out)
    return report["seconds"], usage.ru_maxrss * 1024, written


def main():
    program, adapter, tokenizer, target = (pathlib.Path(argument) for argument in sys.argv[1:])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        make_base(work / "base", tokenizer)
        for form in FORMATS:
            seconds, peak, written = merge(program, work / "base", adapter, form, work)
            row = {"name": f"merge.{form}", "device": "cpu", "shape": "TinyLlama 1.1B", "dtype": "bf16", "peak_memory_bytes": peak, "commit": commit}
            rows += [row | {"value": seconds, "unit": "s"}, row | {"name": f"merge.{form}.written", "value": written, "unit": "bytes"}]
            print(f"{form:<18} {seconds:>8.2f} s {peak / 2**20:>8.0f} MiB {written / 1e9:>8.2f} GB written", flush=True)
    target.write_text(json.dumps(rows, indent=2) + "\n")


main()
