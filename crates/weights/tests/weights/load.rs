//! Folders to models and back: against the activations and four-bit codes of other programs, and against themselves.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Int, Tensor, TensorData};
use burn_flex::Flex;
use buzzer_kernels::{PageFormat, PagedIndex, PagedSequence};
use buzzer_model::{
    AdapterRows, BlockContext, Llama, LlamaConfig, LoraSettings, PagedCache, PagedPass, Target, Weight,
    block_tensor,
};
use buzzer_weights::{
    Absmax, Adapter, Checkpoint, FloatType, Nf4Stored, Quantization, TensorToWrite, WeightsError,
    adapter_settings, attach_adapter, extract_adapter, load_llama, model_tensors, read_config, write_model,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{INDEX, Raw, expect, floats, folder_with, index, raw_file, shared};

pub(crate) const IDS: [i32; 9] = [1, 5, 30, 7, 7, 2, 49, 0, 11];

pub(crate) fn load(dir: &Path, quantization: Quantization) -> Result<Llama<Flex>, WeightsError> {
    load_llama(dir, quantization, DType::F32, &Default::default())
}

pub(crate) fn line(ids: &[i32]) -> Tensor<Flex, 2, Int> {
    Tensor::from_data(TensorData::new(ids.to_vec(), [1, ids.len()]), &Default::default())
}

pub(crate) fn host<const D: usize>(tensor: Tensor<Flex, D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// Documents and positions of one text.
fn text(from: usize, tokens: usize) -> [Tensor<Flex, 2, Int>; 2] {
    let positions: Vec<i32> = (from..from + tokens).map(|position| position as i32).collect();
    [line(&vec![0; tokens]), line(&positions)]
}

fn context(config: &LlamaConfig, tokens: usize) -> BlockContext<Flex> {
    let [documents, positions] = text(0, tokens);
    BlockContext::rows(config, documents, positions)
}

/// Logits `[t, v]` of one text.
pub(crate) fn logits(model: &Llama<Flex>, ids: &[i32]) -> Vec<f32> {
    host(model.logits(model.hidden(line(ids), &context(model.config(), ids.len()), None)))
}

#[track_caller]
pub(crate) fn close(found: &[f32], expected: &[f32], bound: f32) {
    assert_eq!(found.len(), expected.len());
    for (place, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (found - expected).abs();
        assert!(error <= bound * (1.0 + expected.abs()), "at {place}: {found} where {expected} is expected");
    }
}

/// Adds something of its own to every element, so that no two tensors can be taken for each other.
struct Roughen(f32);

impl ModuleMapper<Flex> for Roughen {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<Flex, D>>) -> Param<Tensor<Flex, D>> {
        param.map(|old| {
            let dims = old.dims();
            let mut wave = || {
                self.0 += 1.0;
                0.2 * (self.0 * self.0 * 0.37).sin()
            };
            let values: Vec<f32> = (0..dims.iter().product()).map(|_| wave()).collect();
            old + Tensor::from_data(TensorData::new(values, dims), &Default::default())
        })
    }
}

/// Grouped heads, and no width a power of two.
fn small_config() -> LlamaConfig {
    LlamaConfig::new(50, 24, 40, 2, 4, 2, 6)
}

pub(crate) fn small(config: &LlamaConfig) -> Llama<Flex> {
    Llama::<Flex>::init(config, 0, &Default::default()).map(&mut Roughen(0.0))
}

pub(crate) fn written(model: &Llama<Flex>, float_type: FloatType) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let config = model.config().to_hugging_face(1, 2, "?");
    write_model(folder.path(), &config, &model_tensors(model), float_type).unwrap();
    folder
}

pub(crate) fn lora(rank: usize, targets: &[Target]) -> LoraSettings {
    LoraSettings { rank, alpha: 6.0, rslora: false, targets: targets.to_vec() }
}

/// Gives a model corrections that do something.
pub(crate) fn correct(model: &mut Llama<Flex>, settings: &LoraSettings) {
    model.add_lora(settings, 3);
    let mut roughen = Roughen(0.5);
    for block in &mut model.blocks {
        for target in Target::ALL {
            if let Some(lora) = &mut block.linear_mut(target).lora {
                lora.b = roughen.map_float(lora.b.clone());
            }
        }
    }
}

// Real folders.

#[test]
fn real_activations_are_those_of_hugging_face() {
    let Some(dir) = shared("weights/tiny-llama") else { return };
    let expected = Checkpoint::open_for(&dir.join("expected/activations.safetensors"), "--golden").unwrap();
    let read = |name: &str| expected.read_f32_any_shape(name).unwrap().1;
    let ids: Vec<i32> = expected.read_i64("input_ids").unwrap().1.iter().map(|&id| id as i32).collect();
    let single = load(&dir, Quantization::None).unwrap();
    let config = single.config().clone();
    let context = context(&config, ids.len());
    let mut x = single.embed(line(&ids));
    close(&host(x.clone()), &read("embeddings"), 0.0);
    for (layer, block) in single.blocks.iter().enumerate() {
        x = block.forward(x, &context, None);
        close(&host(x.clone()), &read(&format!("layers.{layer}")), 1e-5);
    }
    assert!(!expected.contains(&format!("layers.{}", single.blocks.len())));
    let hidden = single.normed(x);
    // The norm makes the rounding of the layers, both theirs and ours, forty times as large.
    close(&host(hidden.clone()), &read("final_norm"), 5e-5);
    close(&host(single.logits(hidden)), &read("logits"), 1e-5);

    let sharded = load(&dir.join("sharded"), Quantization::None);
    // The configuration lies one folder up; a model's folder has its own.
    expect(sharded, &["sharded", "config.json", "--model"]);
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(dir.join("sharded")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    fs::copy(dir.join("config.json"), folder.path().join("config.json")).unwrap();
    let sharded = load(folder.path(), Quantization::None).unwrap();
    assert_eq!(sharded.config(), &config);
    assert_eq!(logits(&sharded, &ids), logits(&single, &ids));
}

#[test]
fn real_greedy_tokens_are_those_of_hugging_face() {
    let Some(dir) = shared("weights/tiny-llama") else { return };
    let model = load(&dir, Quantization::None).unwrap();
    let loras = model.lora_set();
    let golden = fs::read_to_string(dir.join("expected/generate.json")).unwrap();
    let golden: Value = serde_json::from_str(&golden).unwrap();
    let ids = |value: &Value| -> Vec<i32> { serde_json::from_value(value.clone()).unwrap() };
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 3);
    for case in cases {
        let (prompt, expected) = (ids(&case["prompt_ids"]), ids(&case["generated_ids"]));
        let mut cache =
            PagedCache::new(model.config(), 2, 512, PageFormat::Float(DType::F32), &Default::default());
        let (mut next, mut found, mut length) = (prompt, Vec::<i32>::new(), 0);
        while found.len() < expected.len() {
            let rows = next.len();
            length += rows;
            let sequence = PagedSequence { pages: vec![1], length, rows };
            let pass = PagedPass {
                ids: next.iter().map(|&id| id as u32).collect(),
                index: PagedIndex::new(vec![sequence], 512, &Default::default()),
                adapters: vec![AdapterRows { rows, loras: &loras }],
            };
            let last = model.hidden_paged(&pass, &mut cache).narrow(0, rows - 1, 1);
            next = model.logits(last).argmax(1).into_data().iter::<i32>().collect();
            found.extend(&next);
        }
        assert_eq!(found, expected, "{}", case["name"]);
    }
}

#[test]
fn real_weights_get_the_codes_of_bitsandbytes() {
    let Some(dir) = shared("golden/small") else { return };
    let ids: Vec<i32> = (0..40).map(|place| place * place % 2048).collect();
    for (folder, quantization) in [("bnb-nf4", Quantization::Nf4), ("bnb-nf4-dq", Quantization::Nf4Double)] {
        let ours = load(&dir.join("model"), quantization).unwrap();
        let theirs = Checkpoint::open(&dir.join(folder)).unwrap();
        // What is stored in four bits is taken as it is, whatever was asked for.
        let stored = load(&dir.join(folder), Quantization::None).unwrap();
        for (layer, block) in ours.blocks.iter().enumerate() {
            for target in Target::ALL {
                let name = block_tensor(layer, &format!("{}.weight", target.hf_path()));
                let expected = Nf4Stored::read_any_shape(&theirs, &name).unwrap();
                for block in [block, &stored.blocks[layer]] {
                    let Weight::Nf4(found) = &block.linear(target).weight else { panic!("{name} is dense") };
                    assert_eq!(found.dims(), expected.shape);
                    assert!(found.host_codes() == expected.codes, "codes of {name} in {folder}");
                    assert!(found.host_absmax() == expected.absmax.to_f32(), "scales of {name} in {folder}");
                    let Absmax::Double(scales) = &expected.absmax else {
                        assert!(!found.is_double());
                        continue;
                    };
                    assert!(found.host_double().unwrap() == *scales, "scales of {name} in {folder}");
                }
            }
        }
        assert_eq!(logits(&stored, &ids), logits(&ours, &ids), "{folder}");
    }
}

// Folders made here.

#[test]
fn a_written_model_loads_again_with_equal_logits() {
    for tied in [false, true] {
        let model = small(&small_config().with_tie_word_embeddings(tied));
        let folder = written(&model, FloatType::F32);
        assert_eq!(Checkpoint::open(folder.path()).unwrap().contains("lm_head.weight"), !tied);
        let again = load(folder.path(), Quantization::None).unwrap();
        assert_eq!(again.config(), model.config());
        assert_eq!(again.head.is_none(), tied);
        assert_eq!(logits(&again, &IDS), logits(&model, &IDS));
    }
}

#[test]
fn a_tied_model_does_not_look_at_a_head_in_its_file() {
    let model = small(&small_config().with_tie_word_embeddings(true));
    let mut tensors = model_tensors(&model);
    tensors.push(TensorToWrite { name: "lm_head.weight".into(), shape: vec![1], values: vec![9.0].into() });
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path(), &model.config().to_hugging_face(1, 2, "?"), &tensors, FloatType::F32).unwrap();
    assert_eq!(logits(&load(folder.path(), Quantization::None).unwrap(), &IDS), logits(&model, &IDS));
}

#[test]
fn halves_are_read_as_they_are_written() {
    let model = small(&small_config());
    for float_type in [FloatType::Bf16, FloatType::F16] {
        let folder = written(&model, float_type);
        let rounded = load(folder.path(), Quantization::None).unwrap();
        close(&logits(&rounded, &IDS), &logits(&model, &IDS), 0.05);
        let twice = written(&rounded, float_type);
        let bytes = |folder: &TempDir| fs::read(folder.path().join("model.safetensors")).unwrap();
        assert!(bytes(&twice) == bytes(&folder), "{float_type} is rounded once");
    }
    // Computing in halves is another matter than storing them.
    let folder = written(&model, FloatType::Bf16);
    let device = Default::default();
    let half: Llama<Flex> = load_llama(folder.path(), Quantization::Nf4Double, DType::BF16, &device).unwrap();
    assert_eq!(half.dtype(), DType::BF16);
    let full = load(folder.path(), Quantization::Nf4Double).unwrap();
    close(&logits(&half, &IDS), &logits(&full, &IDS), 0.1);
}

#[test]
fn a_quantized_model_is_written_dense() {
    let folder = written(&small(&small_config()), FloatType::F32);
    let dense = load(folder.path(), Quantization::None).unwrap();
    for quantization in [Quantization::Nf4, Quantization::Nf4Double] {
        let packed = load(folder.path(), quantization).unwrap();
        assert!(packed.weight_bytes() < dense.weight_bytes());
        let again = load(written(&packed, FloatType::F32).path(), Quantization::None).unwrap();
        let found = logits(&again, &IDS);
        close(&found, &logits(&packed, &IDS), 1e-5);
        assert_ne!(found, logits(&dense, &IDS));
    }
}

#[test]
fn an_adapter_goes_out_and_in_with_identical_logits() {
    let folder = written(&small(&small_config()), FloatType::F32);
    let base = || load(folder.path(), Quantization::Nf4Double).unwrap();
    let plain = logits(&base(), &IDS);
    let rslora = LoraSettings { rslora: true, ..lora(3, &Target::ALL) };
    for settings in [lora(3, &Target::ALL), rslora, lora(1, &[Target::Q, Target::Down])] {
        let mut model = base();
        correct(&mut model, &settings);
        let expected = logits(&model, &IDS);
        assert_ne!(expected, plain);

        let dir = tempfile::tempdir().unwrap();
        extract_adapter(&model, &settings, 0.1, Some("some/base".into())).write(dir.path()).unwrap();
        let adapter = Adapter::read(dir.path()).unwrap();
        assert_eq!(adapter_settings(&adapter.config), settings);
        assert_eq!(adapter.config.dropout, 0.1);

        let mut fresh = base();
        attach_adapter(&mut fresh, &adapter, dir.path()).unwrap();
        assert_eq!(logits(&fresh, &IDS), expected);
        // Whatever corrections were there are gone, those of other linears too.
        let mut used = base();
        correct(&mut used, &lora(5, &Target::ALL));
        attach_adapter(&mut used, &adapter, dir.path()).unwrap();
        assert_eq!(logits(&used, &IDS), expected);
        assert_eq!(used.loras().count(), 2 * settings.targets.len());
        used.merge_lora();
        close(&logits(&used, &IDS), &expected, 1e-5);
    }
}

#[test]
fn an_adapter_of_another_base_is_refused_with_both_shapes() {
    let config = small_config();
    let mut model = small(&config);
    let settings = lora(2, &Target::ALL);
    correct(&mut model, &settings);
    let adapter = extract_adapter(&model, &settings, 0.0, None);
    let dir = Path::new("runs/some/adapter");
    let refuse = |config: LlamaConfig, pieces: &[&str]| {
        let mut other = small(&config);
        let before = logits(&other, &IDS);
        let pieces = [&["runs/some/adapter", "--model"], pieces].concat();
        expect(attach_adapter(&mut other, &adapter, dir), &pieces);
        assert_eq!(logits(&other, &IDS), before);
    };
    let change = |change: &dyn Fn(&mut LlamaConfig)| {
        let mut config = config.clone();
        change(&mut config);
        config
    };
    refuse(change(&|config| config.num_hidden_layers = 3), &["has 2 layers, the model 3"]);
    refuse(change(&|config| config.num_hidden_layers = 1), &["has 2 layers, the model 1"]);
    refuse(
        change(&|config| config.intermediate_size = 41),
        &["gate_proj", "layer 0", "[40, 24]", "[41, 24]"],
    );
    refuse(change(&|config| config.num_key_value_heads = 4), &["k_proj", "layer 0", "[12, 24]", "[24, 24]"]);
    refuse(change(&|config| config.hidden_size = 26), &["q_proj", "layer 0", "[24, 24]", "[24, 26]"]);
}

/// The small model's tensors as they stand in a file.
struct Parts(BTreeMap<String, (Vec<usize>, Vec<u8>)>);

impl Parts {
    fn new() -> Self {
        let entry = |tensor: TensorToWrite<'static>| (tensor.name, (tensor.shape, floats(&tensor.values)));
        Self(model_tensors(&small(&small_config())).into_iter().map(entry).collect())
    }

    /// A file of those tensors whose names are wanted.
    fn file(&self, wanted: impl Fn(&str) -> bool) -> Vec<u8> {
        let wanted = self.0.iter().filter(|(name, _)| wanted(name));
        let raw: Vec<Raw<'_>> = wanted
            .map(|(name, (shape, bytes))| (name.as_str(), "F32", shape.as_slice(), bytes.as_slice()))
            .collect();
        raw_file(&raw)
    }
}

fn config_json(changes: Value) -> Vec<u8> {
    let mut config = small_config().to_hugging_face(1, 2, "float32");
    let fields = config.as_object_mut().unwrap();
    fields.extend(changes.as_object().unwrap().clone());
    config.to_string().into_bytes()
}

/// Every way to load a folder refuses it alike.
#[track_caller]
fn refuse(files: &[(&str, &[u8])], pieces: &[&str]) {
    let folder = folder_with(files);
    for quantization in [Quantization::None, Quantization::Nf4, Quantization::Nf4Double] {
        expect(load(folder.path(), quantization), &[pieces, &["--model"]].concat());
    }
}

const TENSORS: [&str; 6] = [
    "model.embed_tokens.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.1.post_attention_layernorm.weight",
    "model.layers.1.self_attn.k_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
];

#[test]
fn a_missing_tensor_is_named() {
    let (parts, config) = (Parts::new(), config_json(json!({})));
    for tensor in TENSORS.into_iter().chain(["model.layers.0.mlp.down_proj.weight"]) {
        let file = parts.file(|name| name != tensor);
        let files: [(&str, &[u8]); 2] = [("model.safetensors", &file), ("config.json", &config)];
        refuse(&files, &["model.safetensors", &format!("no tensor `{tensor}` among its 20")]);
    }
    // A configuration with more blocks than the file has.
    let (file, config) = (parts.file(|_| true), config_json(json!({"num_hidden_layers": 3})));
    refuse(
        &[("model.safetensors", &file), ("config.json", &config)],
        &["`model.layers.2.input_layernorm.weight`"],
    );
}

#[test]
fn a_missing_shard_is_named() {
    let (parts, config) = (Parts::new(), config_json(json!({})));
    let names = || parts.0.keys().map(String::as_str);
    let shard_of = |name: &str| if name.contains("layers.1.") { "b.safetensors" } else { "a.safetensors" };
    let index = index(&names().map(|name| (name, shard_of(name))).collect::<Vec<_>>());
    let [a, b] = ["a.safetensors", "b.safetensors"].map(|shard| parts.file(|name| shard_of(name) == shard));
    let whole: [(&str, &[u8]); 4] =
        [("config.json", &config), (INDEX, &index), ("a.safetensors", &a), ("b.safetensors", &b)];
    let model = load(folder_with(&whole).path(), Quantization::None).unwrap();
    assert_eq!(logits(&model, &IDS), logits(&small(&small_config()), &IDS));
    refuse(&whole[..3], &[INDEX, "the shard `b.safetensors`", "download"]);
    let cut: [(&str, &[u8]); 4] = [whole[0], whole[1], whole[2], ("b.safetensors", &b[..b.len() - 9])];
    refuse(&cut, &["b.safetensors: cut short", "download"]);
}

#[test]
fn a_wrong_shape_is_shown_beside_the_right_one() {
    let config = config_json(json!({}));
    for tensor in TENSORS {
        let mut parts = Parts::new();
        let shape = &mut parts.0.get_mut(tensor).unwrap().0;
        let right = format!("expected {shape:?}");
        shape.insert(0, 1);
        let wrong = format!("shape {shape:?}");
        let file = parts.file(|_| true);
        let files: [(&str, &[u8]); 2] = [("model.safetensors", &file), ("config.json", &config)];
        refuse(&files, &["model.safetensors", &format!("`{tensor}`"), &wrong, &right, "config.json"]);
    }
    // The other way about: a vocabulary that is not the weights'.
    let (file, config) = (Parts::new().file(|_| true), config_json(json!({"vocab_size": 51})));
    let files: [(&str, &[u8]); 2] = [("model.safetensors", &file), ("config.json", &config)];
    refuse(&files, &["`model.embed_tokens.weight`", "[50, 24]", "[51, 24]", "config.json"]);
}

#[test]
fn a_weight_that_is_no_number_is_found_at_its_place() {
    let config = config_json(json!({}));
    for tensor in TENSORS {
        for (value, shown) in [(f32::NAN, "NaN"), (f32::NEG_INFINITY, "-inf")] {
            let mut parts = Parts::new();
            let bytes = &mut parts.0.get_mut(tensor).unwrap().1;
            bytes[4 * 17..4 * 18].copy_from_slice(&value.to_le_bytes());
            let file = parts.file(|_| true);
            let files: [(&str, &[u8]); 2] = [("model.safetensors", &file), ("config.json", &config)];
            let place = format!("`{tensor}` holds {shown} at element 17 ");
            refuse(&files, &["model.safetensors", &place, "damaged"]);
        }
    }
}

#[test]
fn a_folder_without_a_usable_configuration_is_refused_before_its_weights() {
    let file = Parts::new().file(|_| true);
    refuse(&[("model.safetensors", &file)], &["config.json", "check the path"]);
    let with = |config: &[u8], pieces: &[&str]| {
        let pieces = [&["config.json"], pieces].concat();
        refuse(&[("model.safetensors", &file), ("config.json", config)], &pieces);
    };
    with(b"", &["not a model configuration"]);
    with(b"[1, 2]", &["not a model configuration"]);
    let change = |changes: Value, pieces: &[&str]| with(&config_json(changes), pieces);
    change(json!({"model_type": "mistral"}), &["`model_type` is \"mistral\"", "\"llama\""]);
    change(json!({"model_type": null}), &["`model_type` is null", "\"llama\""]);
    change(json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}), &["`rope_scaling`", "null"]);
    change(json!({"attention_bias": true}), &["`attention_bias` is true", "false"]);
    change(json!({"num_key_value_heads": 3}), &["`num_key_value_heads`", "divide"]);
    change(json!({"hidden_size": null}), &["`hidden_size` is missing"]);
    let folder = folder_with(&[("config.json", &config_json(json!({})))]);
    assert_eq!(read_config(folder.path()).unwrap(), small_config());
    expect(load(folder.path(), Quantization::None), &["no model.safetensors", "--model"]);
}
