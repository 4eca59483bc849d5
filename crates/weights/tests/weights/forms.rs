//! One small model in every form that people have, each written by the library that owns it (`forms/generate.py`).
//!
//! A form of the same numbers must give the same logits to the last bit; what is computed from other numbers (four bits,
//! adapters) is held to the logits of the library that wrote it.

use std::fs;
use std::path::{Path, PathBuf};

use burn_flex::Flex;
use buzzer_model::{Llama, Target, Weight, block_tensor};
use buzzer_weights::{
    Adapter, Checkpoint, Dtype, Nf4Stored, Quantization, attach_adapter, describe, read_config,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::load::{close, load, logits};
use crate::support::{expect, floats, folder_with, raw_file, shared};

/// Rounding of two programs in f32 over two blocks, on logits of up to some tens.
const ROUNDING: f32 = 2e-5;

pub(crate) fn form(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/weights/forms").join(name)
}

/// A folder with the files of several forms.
fn folder_of(names: &[&str]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for path in names.iter().map(|name| form(name)) {
        let files = if path.is_dir() {
            fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()).collect()
        } else {
            vec![path]
        };
        for file in files {
            fs::copy(&file, folder.path().join(file.file_name().unwrap())).unwrap();
        }
    }
    folder
}

struct Golden(Checkpoint);

impl Golden {
    fn open() -> Self {
        Self(Checkpoint::open_for(&form("logits.safetensors"), "--golden").unwrap())
    }

    fn ids(&self) -> Vec<i32> {
        self.0.read_i64("ids").unwrap().1.iter().map(|&id| id as i32).collect()
    }

    fn logits(&self, name: &str) -> Vec<f32> {
        self.0.read_f32_any_shape(name).unwrap().1
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn linear(model: &Llama<Flex>, layer: usize, target: Target) -> &Weight<Flex> {
    &model.blocks[layer].linear(target).weight
}

#[test]
fn safetensors_give_the_logits_of_transformers() {
    let golden = Golden::open();
    let model = load(&form("hf"), Quantization::None).unwrap();
    close(&logits(&model, &golden.ids()), &golden.logits("logits"), ROUNDING);
}

#[test]
fn pytorch_files_and_metas_shards_are_the_same_numbers() {
    let ids = Golden::open().ids();
    let hf = Checkpoint::open(&form("hf")).unwrap();
    let forms = [
        folder_of(&["bin", "hf/config.json"]),
        folder_of(&["bin-sharded", "hf/config.json"]),
        folder_of(&["meta"]),
    ];
    for folder in &forms {
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        assert!(checkpoint.names().eq(hf.names()));
        for name in hf.names() {
            assert_eq!(checkpoint.dtype(name).unwrap(), Dtype::BF16, "{name}");
            let (shape, expected) = hf.read_f32_any_shape(name).unwrap();
            assert_eq!(bits(&checkpoint.read_f32(name, &shape).unwrap()), bits(&expected), "{name}");
            let bytes = hf.read_bytes(name).unwrap();
            assert_eq!(checkpoint.read_bytes(name).unwrap(), bytes, "{name}");
            // From the middle of a row on.
            let first = expected.len() / 3 + 1;
            let mut values = vec![0; bytes.len() - 2 * first];
            checkpoint.read_values(name, first, false, &mut values).unwrap();
            assert_eq!(values, bytes[2 * first..], "{name}");
        }
    }
    for quantization in [Quantization::None, Quantization::Nf4Double] {
        let expected = bits(&logits(&load(&form("hf"), quantization).unwrap(), &ids));
        for folder in &forms {
            assert_eq!(bits(&logits(&load(folder.path(), quantization).unwrap(), &ids)), expected);
        }
    }
}

#[test]
fn a_folder_of_several_forms_is_taken_in_order() {
    let folder = folder_of(&["meta", "bin", "bin-sharded", "hf"]);
    for name in ["model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin"] {
        assert_eq!(Checkpoint::open(folder.path()).unwrap().path(), folder.path().join(name));
        fs::remove_file(folder.path().join(name)).unwrap();
    }
    assert_eq!(Checkpoint::open(folder.path()).unwrap().path(), folder.path());
    // A file can be named itself.
    assert!(Checkpoint::open(&form("bin/pytorch_model.bin")).unwrap().contains("lm_head.weight"));
}

#[test]
fn views_parameters_and_other_entries_are_read_as_pytorch_means_them() {
    let odd = Checkpoint::open(&form("bin-odd/views.bin")).unwrap();
    assert_eq!(odd.names().collect::<Vec<_>>(), ["again", "empty", "long", "parameter", "rows", "scalar"]);
    for name in ["rows", "again"] {
        assert_eq!(odd.read_f32(name, &[2, 3]).unwrap(), [3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
    }
    assert_eq!(odd.read_f32("scalar", &[]).unwrap(), [7.0]);
    assert!(odd.read_f32("empty", &[0, 5]).unwrap().is_empty());
    assert_eq!(odd.read_f32("parameter", &[1, 2]).unwrap(), [1.5, -2.0]);
    assert_eq!(odd.read_i64("long").unwrap(), (vec![2], vec![3, -4]));
    expect(Checkpoint::open(&form("bin-odd/transposed.bin")), &["`w`", "strides", "contiguous"]);
    expect(Checkpoint::open(&form("bin-odd/legacy.bin")), &["legacy.bin", "before PyTorch 1.6"]);
}

#[test]
fn an_index_of_pytorch_files_is_followed_only_inside_its_folder() {
    let folder = folder_of(&["bin-sharded"]);
    let index = folder.path().join("pytorch_model.bin.index.json");
    let mut json: Value = serde_json::from_slice(&fs::read(&index).unwrap()).unwrap();
    json["weight_map"]["lm_head.weight"] = "../pytorch_model.bin".into();
    let whole = fs::read(&index).unwrap();
    fs::write(&index, json.to_string()).unwrap();
    expect(Checkpoint::open(folder.path()), &["pytorch_model.bin.index.json", "outside this folder"]);
    fs::write(&index, whole).unwrap();
    fs::remove_file(folder.path().join("pytorch_model-00001-of-00002.bin")).unwrap();
    expect(Checkpoint::open(folder.path()), &["pytorch_model-00001-of-00002.bin", "download"]);
}

#[test]
fn metas_configuration_is_put_together_from_numbers_and_shapes() {
    let hf = read_config(&form("hf")).unwrap();
    let meta = read_config(&form("meta")).unwrap();
    assert_eq!(meta, hf.with_max_position_embeddings(4096));
}

#[test]
fn metas_shards_must_agree() {
    let folder = folder_of(&["meta"]);
    let second = folder.path().join("consolidated.01.pth");
    let whole = fs::read(&second).unwrap();
    fs::write(&second, &whole[..whole.len() - 1]).unwrap();
    expect(Checkpoint::open(folder.path()), &["consolidated.01.pth", "cut short", "--model"]);
    fs::write(&second, raw_file(&[("norm.weight", "BF16", &[1], &[0, 0])])).unwrap();
    expect(Checkpoint::open(folder.path()), &["`layers.0.attention.wk.weight` is in 1 of its 2 shards"]);
    // Without the second shard the halves do not fill the configuration, whatever that is taken from.
    fs::remove_file(&second).unwrap();
    expect(load(folder.path(), Quantization::None), &["`model.embed_tokens.weight`", "[40, 16]", "[40, 32]"]);
    let foreign = raw_file(&[("layers.0.attention.wq.bias", "F32", &[1], &floats(&[1.0]))]);
    let params = fs::read(form("meta/params.json")).unwrap();
    let foreign = folder_with(&[("params.json", &params), ("consolidated.00.pth", &foreign)]);
    expect(Checkpoint::open(foreign.path()), &["`layers.0.attention.wq.bias`", "none of Llama 2's"]);
    expect(read_config(folder_with(&[("params.json", b"{}")]).path()), &["config.json"]);
    let cut = folder_with(&[("params.json", b"{}"), ("consolidated.00.pth", b"PK\x03\x04")]);
    expect(read_config(cut.path()), &["params.json", "`dim` is missing", "--model"]);
}

#[test]
fn four_bits_are_used_as_stored_and_give_the_logits_of_bitsandbytes() {
    let golden = Golden::open();
    for name in ["bnb-nf4", "bnb-nf4-dq", "bnb-skip-bf16"] {
        let stored = Checkpoint::open(&form(name)).unwrap();
        for quantization in [Quantization::None, Quantization::Nf4, Quantization::Nf4Double] {
            let model = load(&form(name), quantization).unwrap();
            close(&logits(&model, &golden.ids()), &golden.logits(&format!("logits.{name}")), ROUNDING);
            for (layer, target) in (0..2).flat_map(|layer| Target::ALL.map(|target| (layer, target))) {
                let tensor = block_tensor(layer, &format!("{}.weight", target.hf_path()));
                match linear(&model, layer, target) {
                    Weight::Nf4(found) => {
                        let parts = Nf4Stored::read_any_shape(&stored, &tensor).unwrap();
                        assert_eq!(found.host_codes(), parts.codes, "{name} {tensor}");
                        assert_eq!(
                            bits(&found.host_absmax()),
                            bits(&parts.absmax.to_f32()),
                            "{name} {tensor}"
                        );
                        assert_eq!(found.is_double(), name == "bnb-nf4-dq");
                    }
                    Weight::Dense(_) => {
                        // What the checkpoint left dense is not quantized behind its back.
                        let skipped = target == Target::O || (layer, target) == (1, Target::Gate);
                        assert!(name == "bnb-skip-bf16" && skipped, "{name} {tensor} is dense");
                        assert_eq!(stored.dtype(&tensor).unwrap(), Dtype::F32);
                    }
                }
            }
        }
    }
    // Here bitsandbytes packed the head as well, and stored all codes as bf16 numbers.
    let skip = Checkpoint::open(&form("bnb-skip-bf16")).unwrap();
    assert!(Nf4Stored::is_stored(&skip, "lm_head.weight"));
    assert_eq!(skip.dtype("lm_head.weight").unwrap(), Dtype::BF16);
}

#[test]
fn other_quantizations_are_refused_by_name() {
    for kind in ["fp4", "int8"] {
        let checkpoint = Checkpoint::open(&form(&format!("bnb-{kind}"))).unwrap();
        let name = "model.layers.0.self_attn.q_proj.weight";
        assert!(Nf4Stored::is_stored(&checkpoint, name));
        let kind = format!("its type is {kind}");
        expect(Nf4Stored::read_any_shape(&checkpoint, name), &["q_proj", &kind, "nf4 with block size 64"]);
    }
    let config: Value = serde_json::from_slice(&fs::read(form("hf/config.json")).unwrap()).unwrap();
    for (quantization, piece) in [
        (json!({"quant_method": "gptq", "bits": 4}), "`gptq`"),
        (json!({"quant_method": "awq"}), "`awq`"),
        (json!({"bits": 2}), "`null`"),
    ] {
        let mut config = config.clone();
        config["quantization_config"] = quantization;
        let folder = folder_with(&[("config.json", config.to_string().as_bytes())]);
        expect(read_config(folder.path()), &["config.json", piece, "bitsandbytes", "--model"]);
    }
    let mut old = config.clone();
    old["quantization_config"] = json!({"load_in_4bit": true});
    assert!(read_config(folder_with(&[("config.json", old.to_string().as_bytes())]).path()).is_ok());
}

#[test]
fn other_architectures_are_refused_by_name() {
    let llama: Value = serde_json::from_slice(&fs::read(form("hf/config.json")).unwrap()).unwrap();
    let with = |changes: Value| {
        let mut config = llama.clone();
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        config
    };
    let cases = [
        (
            json!({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 768}),
            "`model_type` is \"gpt2\"",
        ),
        (with(json!({"model_type": "mistral"})), "`model_type` is \"mistral\""),
        (
            with(json!({"architectures": ["LlamaForSequenceClassification"]})),
            "LlamaForSequenceClassification",
        ),
        (with(json!({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}})), "`rope_parameters`"),
        (with(json!({"rope_scaling": {"type": "linear", "factor": 2.0}})), "`rope_scaling`"),
    ];
    for (config, piece) in cases {
        let folder = folder_of(&["bin"]);
        fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        expect(
            load(folder.path(), Quantization::None),
            &["config.json", piece, "this program runs only", "--model"],
        );
    }
}

#[test]
fn tensors_that_llama_does_not_have_are_refused_by_name() {
    let config = fs::read(form("hf/config.json")).unwrap();
    let weights = fs::read(form("bin/pytorch_model.bin")).unwrap();
    let extra = |name: &str| {
        let extra = raw_file(&[(name, "F32", &[1], &floats(&[1.0]))]);
        let hf = Checkpoint::open(&form("hf")).unwrap();
        let map: serde_json::Map<String, Value> = hf
            .names()
            .map(|name| (name.to_owned(), json!("a.bin")))
            .chain([(name.to_owned(), json!("b.safetensors"))])
            .collect();
        let index = json!({ "weight_map": map }).to_string();
        let folder = folder_with(&[
            ("config.json", &config),
            ("a.bin", &weights),
            ("b.safetensors", &extra),
            ("model.safetensors.index.json", index.as_bytes()),
        ]);
        load(folder.path(), Quantization::None).map(drop)
    };
    expect(
        extra("model.layers.0.self_attn.q_proj.bias"),
        &["b.safetensors", "q_proj.bias", "none of Llama's"],
    );
    expect(extra("model.layers.1.self_attn.q_norm.weight"), &["q_norm", "none of Llama's", "Llama 2"]);
    expect(extra("model.layers.2.input_layernorm.weight"), &["beyond the 2 layers"]);
    extra("model.layers.1.self_attn.rotary_emb.inv_freq").unwrap();
    extra("score.weight").unwrap();
}

#[test]
fn adapters_give_the_logits_of_peft() {
    let golden = Golden::open();
    let cases = [
        ("patterns", "rank 1 to 4, scaling 1.5 to 6, q_proj v_proj down_proj in 2 layers, 712 parameters"),
        ("rslora-regex", "(rsLoRA), q_proj k_proj o_proj gate_proj up_proj in some of layers 0 to 1, "),
        (
            "all-linear-bin",
            "rank 1, scaling 2, q_proj k_proj v_proj o_proj gate_proj up_proj down_proj in 2 layers, ",
        ),
        ("some-layers", "rank 2, scaling 1, q_proj up_proj in layer 1, "),
    ];
    let plain = golden.logits("logits");
    for (name, description) in cases {
        let dir = form(&format!("adapters/{name}"));
        let adapter = Adapter::read(&dir).unwrap();
        let found = describe(&adapter);
        assert!(found.starts_with("LoRA of some/tiny-llama: ") && found.contains(description), "{found}");
        let mut model = load(&form("hf"), Quantization::None).unwrap();
        attach_adapter(&mut model, &adapter, &dir).unwrap();
        let expected = golden.logits(&format!("logits.{name}"));
        assert!(expected.iter().zip(&plain).any(|(with, without)| (with - without).abs() > 0.1), "{name}");
        close(&logits(&model, &golden.ids()), &expected, ROUNDING);
        // What goes out again is the same adapter.
        let folder = tempfile::tempdir().unwrap();
        adapter.write(folder.path()).unwrap();
        assert_eq!(Adapter::read(folder.path()).unwrap(), adapter, "{name}");
    }
}

#[test]
fn other_methods_are_refused_by_name() {
    let cases = [
        ("dora", "`use_dora` is true: DoRA"),
        ("ia3", "`peft_type` is \"IA3\""),
        ("loha", "`peft_type` is \"LOHA\""),
        ("lokr", "`peft_type` is \"LOKR\""),
        ("prompt-tuning", "`peft_type` is \"PROMPT_TUNING\""),
        ("prefix-tuning", "`peft_type` is \"PREFIX_TUNING\""),
        ("adalora", "`peft_type` is \"ADALORA\""),
        ("vera", "`peft_type` is \"VERA\""),
        ("oft", "`peft_type` is \"OFT\""),
        ("saved-head", "`modules_to_save` is [\"lm_head\"]"),
        ("bias", "`bias` is \"all\""),
    ];
    for (name, piece) in cases {
        expect(
            Adapter::read(&form(&format!("refused/{name}"))),
            &["adapter_config.json", piece, "--adapter"],
        );
    }
    assert_eq!(fs::read_dir(form("refused")).unwrap().count(), cases.len());
}

#[test]
fn a_real_adapter_is_refused_on_another_base_with_both_shapes() {
    let Some(dir) = shared("adapters/tinyllama1.1b_r4_qv") else { return };
    let adapter = Adapter::read(&dir).unwrap();
    assert_eq!(
        describe(&adapter),
        "LoRA of TinyLlama/TinyLlama-1.1B-Chat-v1.0: rank 4, scaling 2, q_proj v_proj in 22 layers, 563200 parameters"
    );
    let mut model = load(&form("hf"), Quantization::None).unwrap();
    let pieces = ["tinyllama1.1b_r4_qv", "q_proj in layer 0", "[2048, 2048]", "[32, 32]", "--model"];
    expect(attach_adapter(&mut model, &adapter, &dir), &pieces);
}
