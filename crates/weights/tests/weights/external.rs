//! Files and logits of ours for the scripts in `tests/external`, which hold them against PEFT, transformers, bitsandbytes and
//! llama.cpp. `tests/external/run.sh` runs both; by itself this test is passed over.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Int, Tensor, TensorData};
use burn_flex::Flex;
use buzzer_model::{BlockContext, Llama, LlamaConfig, LoraSettings, Target};
use buzzer_weights::{
    Adapter, BlockType, Checkpoint, FloatType, GgufFormat, Merge, Nf4Format, Quantization, TensorToWrite,
    adapter_settings, attach_adapter, extract_adapter, write_gguf, write_json, write_merged, write_nf4,
    write_safetensors,
};
use serde_json::Value;

use crate::load::{correct, load, lora, small, written};
use crate::support::shared;

/// Tokens that greedy continuations have.
const NEW: usize = 16;

#[test]
#[ignore = "writes what tests/external/run.sh reads"]
fn files_for_other_libraries() {
    let Some(golden) = shared("golden/small") else { return };
    let out = PathBuf::from(std::env::var_os("BUZZER_EXTERNAL_DIR").expect("set by run.sh"));
    let folder = |name: &str| {
        let path = out.join(name);
        fs::create_dir_all(&path).unwrap();
        path
    };
    // The adapter goes through a model of ours, as a trained one does.
    let base = golden.join("model");
    let read = Adapter::read(&golden.join("adapter-final")).unwrap();
    let mut live = load(&base, Quantization::None).unwrap();
    attach_adapter(&mut live, &read, &golden).unwrap();
    let ours =
        extract_adapter(&live, &adapter_settings(&read.config), 0.05, Some(base.display().to_string()));
    ours.write(&folder("adapter")).unwrap();

    let merge = Merge::open(&base, Some((&ours, &golden)), Quantization::None).unwrap();
    write_merged(&folder("merged-f16"), &merge, FloatType::F16, 3 << 20, || {}).unwrap();
    write_merged(&folder("merged-bf16"), &merge, FloatType::Bf16, 1 << 30, || {}).unwrap();
    for (name, double, float_type) in [
        ("nf4", false, FloatType::F32),
        ("nf4-double", true, FloatType::F32),
        ("nf4-double-bf16", true, FloatType::Bf16),
    ] {
        write_nf4(&folder(name), &merge, Nf4Format { double, float_type }, 3 << 20, || {}).unwrap();
    }
    let plain = Merge::open(&base, None, Quantization::None).unwrap();
    let tokenizer = base.join("tokenizer.json");
    for (name, block_type, merge) in [
        ("base-f16", BlockType::F16, &plain),
        ("merged-gguf-f16", BlockType::F16, &merge),
        ("merged-gguf-q8_0", BlockType::Q8_0, &merge),
        ("merged-gguf-q4_0", BlockType::Q4_0, &merge),
    ] {
        let format = GgufFormat { block_type, tokenizer: &tokenizer, name };
        write_gguf(&folder(name).join("model.gguf"), merge, format, || {}).unwrap();
    }
    // Another kind of adapter: few targets, and scaled by the root of the rank.
    let settings = LoraSettings { rslora: true, ..lora(3, &[Target::Q, Target::Down]) };
    let mut few = load(&base, Quantization::None).unwrap();
    correct(&mut few, &settings);
    extract_adapter(&few, &settings, 0.0, None).write(&folder("adapter-rslora")).unwrap();

    let mut models = vec![("live", live), ("rslora", few)];
    for name in ["merged-f16", "merged-bf16", "nf4", "nf4-double", "nf4-double-bf16"] {
        models.push((name, load(&out.join(name), Quantization::None).unwrap()));
    }
    dump_logits(&golden, &out, &models);
    dump_continuations(&golden, &out);
    if let Some(tokenizer) = shared("tokenizer/llama2/tokenizer.json") {
        // The smallest model with as many rows as Llama 2 has tokens.
        let small = written(&small(&LlamaConfig::new(32_000, 32, 32, 1, 1, 1, 32)), FloatType::F32);
        let merge = Merge::open(small.path(), None, Quantization::None).unwrap();
        let format = GgufFormat { block_type: BlockType::Q8_0, tokenizer: &tokenizer, name: "vocabulary" };
        write_gguf(&folder("llama2-vocabulary").join("model.gguf"), &merge, format, || {}).unwrap();
    }
}

/// Logits of the golden run's four rows, plain causal.
fn dump_logits(golden: &Path, out: &Path, models: &[(&str, Llama<Flex>)]) {
    let values = Checkpoint::open_for(&golden.join("golden.safetensors"), "--golden").unwrap();
    let (shape, ids) = values.read_i64("input_ids").unwrap();
    let ids: Vec<i32> = ids.into_iter().map(|id| id as i32).collect();
    let tensors: Vec<TensorToWrite<'_>> = models
        .iter()
        .map(|(name, model)| {
            let logits: Vec<f32> = ids.chunks(shape[1]).flat_map(|row| logits(model, row)).collect();
            let shape = vec![shape[0], shape[1], model.config().vocab_size];
            TensorToWrite { name: (*name).into(), shape, values: logits.into() }
        })
        .collect();
    write_safetensors(&out.join("logits.safetensors"), &tensors, FloatType::F32, &BTreeMap::new()).unwrap();
}

/// Greedy continuations of the golden prompts, past the end token too.
fn dump_continuations(golden: &Path, out: &Path) {
    let prompts: Value = serde_json::from_slice(&fs::read(golden.join("greedy_base.json")).unwrap()).unwrap();
    let mut continuations = BTreeMap::new();
    for name in ["base-f16", "merged-gguf-f16", "merged-gguf-q8_0", "merged-gguf-q4_0"] {
        let model = load(&out.join(name), Quantization::None).unwrap();
        let width = model.config().vocab_size;
        let continuation = |prompt: &Value| {
            let ids = prompt["input_ids"].as_array().unwrap().iter();
            let mut ids: Vec<i32> = ids.map(|id| id.as_u64().unwrap() as i32).collect();
            let start = ids.len();
            while ids.len() < start + NEW {
                let all = logits(&model, &ids);
                let last = &all[all.len() - width..];
                let best = (0..width).fold(0, |best, id| if last[id] > last[best] { id } else { best });
                ids.push(best as i32);
            }
            ids.split_off(start)
        };
        let all: Vec<Vec<i32>> = prompts.as_array().unwrap().iter().map(continuation).collect();
        continuations.insert(name, all);
    }
    write_json(&out.join("continuations.json"), &continuations).unwrap();
}

fn logits(model: &Llama<Flex>, ids: &[i32]) -> Vec<f32> {
    let row = |values: Vec<i32>| {
        Tensor::<Flex, 2, Int>::from_data(TensorData::new(values, [1, ids.len()]), &Default::default())
    };
    let positions = (0..ids.len() as i32).collect();
    let context = BlockContext::rows(model.config(), row(vec![0; ids.len()]), row(positions));
    model.logits(model.hidden(row(ids.to_vec()), &context, None)).into_data().iter::<f32>().collect()
}
