"""Our files in PEFT, transformers and bitsandbytes, against our logits. usage: hugging_face.py OUR_DIR GOLDEN_DIR

One line per check with the largest difference of any logit and its bound; exit status 1 if one is over.

bitsandbytes 0.50.2 computes 4-bit linears wrongly on the processor when a row is no whole number of blocks, as in the golden
model's down_proj (its own folder then misses its own logits from a card by more than 10), and rounds to bf16 where the
processor has AVX-512 bf16. So the weights are loaded by transformers into bitsandbytes' layers, restored by bitsandbytes in rows of
one block, and multiplied by torch. Its own folders go the same way, as a control.
"""
import copy
import importlib.metadata
import sys

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ours, golden = sys.argv[1:3]
reference = load_file(f"{golden}/golden.safetensors")
expected = reference | load_file(f"{ours}/logits.safetensors")
ids = reference["input_ids"]
failed = 0


def check(name, model, key, bound):
    global failed
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits.float()
    difference = (logits - expected[key]).abs()
    over = "" if difference.max() <= bound else "  OVER"
    failed += bool(over)
    print(f"{name:<62} largest {difference.max():.2e}  mean {difference.mean():.2e}  bound {bound:.0e}{over}")


def forward(linear, x):
    state = copy.copy(linear.weight.quant_state)
    shape, state.shape = state.shape, torch.Size([state.shape.numel() // state.blocksize, state.blocksize])
    weight = dequantize_4bit(linear.weight.data, state).reshape(shape)
    return torch.nn.functional.linear(x, weight.to(x.dtype))


Linear4bit.forward = forward


def load(path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")


for package in ("torch", "transformers", "peft", "bitsandbytes"):
    print(f"{package} {importlib.metadata.version(package)}")
base = load(f"{golden}/model")
check("PEFT: our adapter on the base", PeftModel.from_pretrained(base, f"{ours}/adapter"), "live", 2e-3)
base = load(f"{golden}/model")
check("PEFT: rsLoRA on two targets", PeftModel.from_pretrained(base, f"{ours}/adapter-rslora"), "rslora", 2e-3)
check("transformers: merged, f16 in 3 files", load(f"{ours}/merged-f16"), "merged-f16", 2e-3)
check("transformers: merged, bf16", load(f"{ours}/merged-bf16"), "merged-bf16", 2e-3)
check("control: bitsandbytes' own folder, its logits on a card", load(f"{golden}/bnb-nf4"), "logits_nf4", 2e-3)
check("control: the same, double quantized", load(f"{golden}/bnb-nf4-dq"), "logits_nf4_dq", 2e-3)
for name, double in (("nf4", False), ("nf4-double", True)):
    model = load(f"{ours}/{name}")
    linear = model.model.layers[0].self_attn.q_proj
    assert isinstance(linear, Linear4bit), type(linear)
    assert linear.weight.quant_state.nested == double
    check(f"transformers and bitsandbytes: {name}, f32", model, name, 2e-3)
model = load(f"{ours}/nf4-double-bf16", dtype="auto")
assert model.dtype == torch.bfloat16, model.dtype
check("the same computed in bf16, against ours in f32", model, "nf4-double-bf16", 2.0)
print("failed" if failed else "all passed")
sys.exit(bool(failed))
