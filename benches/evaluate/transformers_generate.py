#!/usr/bin/env python3
"""Answers clues with transformers' `generate` on an NF4 base of bitsandbytes with a live PEFT adapter, to set beside `evaluate`.

    benches/evaluate/transformers_generate.py MODEL ADAPTER PREDICTIONS [--batch 32] [--new 24] [--limit N] [--site DIR]

MODEL is a folder of a Hugging Face checkpoint with its tokenizer, PREDICTIONS the `predictions.jsonl` that `evaluate` wrote for the
same clues: prompts are made of its questions in the same template. Prompts are sorted by length, so that little is padded, and
answers are the likeliest tokens. Loading is not counted. `--make-adapter` writes a random adapter of rank 64 on all linears to ADAPTER
first. Needs torch, transformers, peft and bitsandbytes; a folder with the latter may be given by `--site`.
"""
import argparse
import json
import pathlib
import sys
import time


def make_adapter(folder, config):
    """Small random factors, because zeros could be left out of a computation."""
    import torch
    from safetensors.torch import save_file

    rank, hidden, inner = 64, config["hidden_size"], config["intermediate_size"]
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: (0.01 * torch.randn(*shape, generator=generator)).to(torch.bfloat16)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (rows, columns) in shapes.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = draw(rank, columns)
            tensors[f"{key}.lora_B.weight"] = draw(rows, rank)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [name.split(".")[1] for name in shapes],
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def answer(arguments):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(
        arguments.model, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": 0}
    )
    model = PeftModel.from_pretrained(base, arguments.adapter).eval()
    lines = arguments.predictions.read_text().splitlines()[: arguments.limit]
    prompts = [f"### Question: {json.loads(line)['question']}\n ### Answer:" for line in lines]
    prompts.sort(key=lambda prompt: len(tokenizer(prompt)["input_ids"]))

    def generate(some):
        inputs = tokenizer(some, return_tensors="pt", padding=True).to("cuda")
        with torch.no_grad():
            return model.generate(**inputs, max_new_tokens=arguments.new, do_sample=False)

    generate(prompts[: arguments.batch])
    torch.cuda.synchronize()
    begin = time.time()
    for first in range(0, len(prompts), arguments.batch):
        some = prompts[first : first + arguments.batch]
        generate(some)
    torch.cuda.synchronize()
    seconds = time.time() - begin
    print(f"transformers: {len(prompts)} clues, {arguments.batch} at a time, in {seconds:.1f} s; at most {arguments.new} tokens each")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("adapter", type=pathlib.Path)
    parser.add_argument("predictions", type=pathlib.Path, nargs="?")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--site")
    parser.add_argument("--make-adapter", action="store_true")
    arguments = parser.parse_args()
    if arguments.site:
        sys.path.insert(0, arguments.site)
    if arguments.make_adapter:
        make_adapter(arguments.adapter, json.loads((arguments.model / "config.json").read_text()))
    if arguments.predictions:
        answer(arguments)


if __name__ == "__main__":
    main()
