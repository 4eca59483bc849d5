"""One tiny Llama in every form that people have, each written by the library that owns the form.

usage: python generate.py      (torch, transformers, peft, bitsandbytes, safetensors; versions go to versions.json)

Everything here is made from seed 0; no text of anyone's is in it. The logits beside it are those of transformers, PEFT
and bitsandbytes in float32 on the CPU, so that a reader is held to what the form means and not to what it says itself.
Meta's form has no library that writes it: it is written here from its key names and its pairing of neighbouring
columns in the rotary embedding, and proved by a forward pass that follows that pairing (`meta_logits`) before it is kept.
"""

import json
import os
import shutil
from pathlib import Path

import bitsandbytes as bnb
import huggingface_hub
import peft
import torch
import transformers
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
D, F, L, H, G, V = 32, 36, 2, 4, 2, 40
IDS = torch.tensor([[1, 5, 30, 7, 7, 2, 39, 0, 11, 23, 33, 12]])
out = {"ids": IDS[0].to(torch.int64)}


def fresh(name):
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits[0].float().contiguous()


def base():
    model = LlamaForCausalLM.from_pretrained(HERE / "hf", dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def make_base():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=H,
        num_key_value_heads=G, max_position_embeddings=128, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    for name, value in model.named_parameters():
        value.data = 1 + 0.2 * torch.randn_like(value) if "norm" in name else 0.25 * torch.randn_like(value)
    model.to(torch.bfloat16).save_pretrained(fresh("hf"))
    os.remove(HERE / "hf" / "generation_config.json")
    out["logits"] = logits(base())


def make_pytorch():
    state = LlamaForCausalLM.from_pretrained(HERE / "hf", dtype=torch.bfloat16).state_dict()
    torch.save(state, fresh("bin") / "pytorch_model.bin")
    huggingface_hub.save_torch_state_dict(
        state, fresh("bin-sharded"), filename_pattern="pytorch_model{suffix}.bin", max_shard_size="16KB",
        safe_serialization=False,
    )
    # What the reader must not take for a row-major tensor, and the format before 1.6.
    torch.save({"w": torch.arange(6.0).view(2, 3).t()}, fresh("bin-odd") / "transposed.bin")
    legacy = {"w": torch.arange(6.0).view(2, 3)}
    torch.save(legacy, HERE / "bin-odd" / "legacy.bin", _use_new_zipfile_serialization=False)
    # Views into one storage, a parameter, an empty tensor and a scalar, in pickle's protocol 4.
    whole = torch.arange(12, dtype=torch.float16)
    odd = {
        "rows": whole.view(4, 3)[1:3], "again": whole.view(4, 3)[1:3], "scalar": whole[7], "empty": whole[:0].view(0, 5),
        "parameter": torch.nn.Parameter(torch.tensor([[1.5, -2.0]])), "step": 7, "long": torch.tensor([3, -4]),
    }
    torch.save(odd, HERE / "bin-odd" / "views.bin", pickle_protocol=4)


def interleaved(weight, heads):
    """Rows of a head from halves (Hugging Face) to neighbours (Meta)."""
    return weight.view(heads, 2, -1, D).transpose(1, 2).reshape(-1, D).contiguous()


def meta_state():
    state = LlamaForCausalLM.from_pretrained(HERE / "hf", dtype=torch.bfloat16).state_dict()
    meta = {
        "tok_embeddings.weight": state["model.embed_tokens.weight"], "norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"], "rope.freqs": 10000.0 ** (-torch.arange(0, 1, 2 * H / D)),
    }
    for i in range(L):
        old, new = f"model.layers.{i}.", f"layers.{i}."
        meta[new + "attention.wq.weight"] = interleaved(state[old + "self_attn.q_proj.weight"], H)
        meta[new + "attention.wk.weight"] = interleaved(state[old + "self_attn.k_proj.weight"], G)
        meta[new + "attention.wv.weight"] = state[old + "self_attn.v_proj.weight"]
        meta[new + "attention.wo.weight"] = state[old + "self_attn.o_proj.weight"]
        meta[new + "feed_forward.w1.weight"] = state[old + "mlp.gate_proj.weight"]
        meta[new + "feed_forward.w2.weight"] = state[old + "mlp.down_proj.weight"]
        meta[new + "feed_forward.w3.weight"] = state[old + "mlp.up_proj.weight"]
        meta[new + "attention_norm.weight"] = state[old + "input_layernorm.weight"]
        meta[new + "ffn_norm.weight"] = state[old + "post_attention_layernorm.weight"]
    return meta


def meta_logits(meta):
    """Llama with the rotary embedding as a product of complex numbers made of neighbouring columns."""
    w = {name: value.float() for name, value in meta.items()}
    norm = lambda x, g: g * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    t, k = IDS.shape[1], D // H
    angles = torch.outer(torch.arange(t).float(), 10000.0 ** (-torch.arange(0, k, 2).float() / k))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    rotate = lambda x: torch.view_as_real(torch.view_as_complex(x.reshape(t, -1, k // 2, 2)) * turn).flatten(2)
    mask = torch.full((t, t), float("-inf")).triu(1)
    x = w["tok_embeddings.weight"][IDS[0]]
    for i in range(L):
        p = f"layers.{i}."
        a = norm(x, w[p + "attention_norm.weight"])
        q = rotate(a @ w[p + "attention.wq.weight"].T)
        key = rotate(a @ w[p + "attention.wk.weight"].T).repeat_interleave(H // G, 1)
        v = (a @ w[p + "attention.wv.weight"].T).view(t, G, k).repeat_interleave(H // G, 1)
        p_ = torch.softmax(torch.einsum("qhk,shk->hqs", q, key) / k**0.5 + mask, -1)
        x = x + torch.einsum("hqs,shk->qhk", p_, v).flatten(1) @ w[p + "attention.wo.weight"].T
        a = norm(x, w[p + "ffn_norm.weight"])
        gate = torch.nn.functional.silu(a @ w[p + "feed_forward.w1.weight"].T)
        x = x + (gate * (a @ w[p + "feed_forward.w3.weight"].T)) @ w[p + "feed_forward.w2.weight"].T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


def make_meta():
    meta = meta_state()
    difference = (meta_logits(meta) - out["logits"]).abs().max().item()
    assert difference < 1e-4, difference
    by_columns = ("attention.wo.weight", "feed_forward.w2.weight", "tok_embeddings.weight")
    folder = fresh("meta")
    for shard in range(2):
        part = {}
        for name, value in meta.items():
            dim = 1 if name.endswith(by_columns) else 0
            whole = "norm" in name or name == "rope.freqs"
            part[name] = value if whole else value.chunk(2, dim)[shard].clone().contiguous()
        torch.save(part, folder / f"consolidated.{shard:02}.pth")
    params = {"dim": D, "multiple_of": 16, "n_heads": H, "n_kv_heads": G, "n_layers": L, "norm_eps": 1e-05, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(params) + "\n")


def unpacked(model):
    """A dense model of bitsandbytes' weights, unpacked by its generic implementation: for rows shorter than a block, as
    here, the CPU kernel of 0.50.2 takes other blocks than the generic implementation and than its own quantization."""
    dense = base()
    for name, value in model.state_dict().items():
        if name in dict(dense.named_parameters()) and value.is_floating_point() and "quant_state" not in name:
            if value.shape == dense.get_parameter(name).shape:
                dense.get_parameter(name).data = value.float()
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state, codes = module.weight.quant_state, module.weight.data.view(torch.uint8).flatten()
            absmax = state.absmax
            if state.nested:
                absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
            shape = tuple(state.shape)
            weight = _dequantize_4bit_compute(codes, absmax, state.code, state.blocksize, shape, torch.float32)
            dense.get_submodule(name).weight.data = weight
    return dense


def make_bitsandbytes():
    forms = {
        "bnb-nf4": dict(bnb_4bit_quant_type="nf4"),
        "bnb-nf4-dq": dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        "bnb-skip-bf16": dict(
            bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.bfloat16,
            llm_int8_skip_modules=["o_proj", "model.layers.1.mlp.gate_proj"],
        ),
    }
    for name, form in forms.items():
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **form)
        model = AutoModelForCausalLM.from_pretrained(
            HERE / "hf", quantization_config=config, dtype=torch.float32, attn_implementation="eager", device_map="cpu"
        ).eval()
        model.save_pretrained(fresh(name))
        (HERE / name / "generation_config.json").unlink(missing_ok=True)
        out[f"logits.{name}"] = logits(unpacked(model))
    for kind in ("fp4", "int8"):
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
        config = BitsAndBytesConfig(**(four if kind == "fp4" else {"load_in_8bit": True}))
        model = AutoModelForCausalLM.from_pretrained(
            HERE / "hf", quantization_config=config, dtype=torch.float16, device_map="cpu"
        )
        state = {name: value for name, value in model.state_dict().items() if "layers.0.self_attn.q_proj" in name}
        fresh(f"bnb-{kind}")
        save_file(state, HERE / f"bnb-{kind}" / "model.safetensors")
        model.config.save_pretrained(HERE / f"bnb-{kind}")


def name_base(path):
    """Puts a name where PEFT leaves the path of this folder."""
    saved = json.loads(path.read_text())
    saved["base_model_name_or_path"] = "some/tiny-llama"
    path.write_text(json.dumps(saved, indent=1) + "\n")


def adapter(name, config, safe=True):
    torch.manual_seed(1)
    model = peft.get_peft_model(base(), config)
    for key, value in model.named_parameters():
        if value.requires_grad:
            value.data = 0.3 * torch.randn_like(value)
    folder = fresh(f"adapters/{name}")
    model.save_pretrained(folder, safe_serialization=safe)
    (folder / "README.md").unlink(missing_ok=True)
    name_base(folder / "adapter_config.json")
    # What is saved is what counts, so the logits are those of the adapter as PEFT reads it back.
    again = peft.PeftModel.from_pretrained(base(), folder).eval()
    out[f"logits.{name}"] = logits(again)


def make_adapters():
    lora = lambda **k: peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1, **k)
    adapter("patterns", lora(
        r=2, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 4, "down_proj": 1}, alpha_pattern={r"layers\.\d.self_attn.v_proj": 9, "v_proj": 1},
    ))
    adapter("rslora-regex", lora(
        r=3, lora_alpha=4, use_rslora=True, target_modules=r".*layers\.(0\.self_attn|1\.mlp)\.(q|k|o|up|gate)_proj",
    ))
    adapter("all-linear-bin", lora(r=1, lora_alpha=2, target_modules="all-linear"), safe=False)
    adapter("some-layers", lora(
        r=2, lora_alpha=2, target_modules=["q_proj", "k_proj", "up_proj"], layers_to_transform=[1], exclude_modules=["k_proj"],
    ))
    for name, config in {
        "dora": lora(r=1, use_dora=True, target_modules=["q_proj"]),
        "ia3": peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
        "loha": peft.LoHaConfig(task_type="CAUSAL_LM", r=1, target_modules=["q_proj"]),
        "lokr": peft.LoKrConfig(task_type="CAUSAL_LM", r=1, target_modules=["q_proj"]),
        "prompt-tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1),
        "prefix-tuning": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1),
        "adalora": peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=1, init_r=1, target_modules=["q_proj"]),
        "vera": peft.VeraConfig(task_type="CAUSAL_LM", r=1, target_modules=["q_proj"]),
        "oft": peft.OFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], oft_block_size=8),
        "saved-head": lora(r=1, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        "bias": lora(r=1, target_modules=["q_proj"], bias="all"),
    }.items():
        folder = fresh(f"refused/{name}")
        peft.get_peft_model(base(), config).save_pretrained(folder)
        for file in folder.iterdir():
            if file.name != "adapter_config.json":
                file.unlink()
        name_base(folder / "adapter_config.json")


make_base()
make_pytorch()
make_meta()
make_bitsandbytes()
make_adapters()
save_file(out, HERE / "logits.safetensors")
versions = {m.__name__: m.__version__ for m in (torch, transformers, peft, bnb, huggingface_hub)}
(HERE / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")
