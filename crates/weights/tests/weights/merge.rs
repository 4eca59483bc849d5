//! Merged models as written and read back, against base and live adapter, and against bitsandbytes' own files.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn_flex::Flex;
use buzzer_model::{Llama, LlamaConfig, LoraSettings, Target, Weight, block_tensor};
use buzzer_weights::{
    Adapter, BaseForm, BlockType, Checkpoint, FloatType, GgufFormat, Merge, NewFolder, Nf4Format, Nf4Stored,
    Quantization, attach_adapter, extract_adapter, read_config, write_gguf, write_merged, write_nf4,
};
use safetensors::SafeTensors;
use serde_json::Value;
use tempfile::TempDir;

use crate::forms::form;
use crate::load::{IDS, close, correct, load, logits, lora, small, written};
use crate::support::{INDEX, expect, shared};

/// A file that is never cut.
const WHOLE: u64 = 1 << 40;

/// Grouped heads, rows of whole blocks of 32 in all linears but `down_proj`.
fn config() -> LlamaConfig {
    LlamaConfig::new(1024, 64, 80, 2, 4, 2, 16)
}

/// A base in a folder and an adapter for it.
struct Pair {
    base: TempDir,
    adapter: Adapter,
}

impl Pair {
    fn new(targets: &[Target]) -> Self {
        Self::with(&config(), &lora(3, targets))
    }

    fn with(config: &LlamaConfig, settings: &LoraSettings) -> Self {
        let mut model = small(config);
        let base = written(&model, FloatType::F32);
        correct(&mut model, settings);
        Self { base, adapter: extract_adapter(&model, settings, 0.0, None) }
    }

    fn merge(&self, quantization: Quantization) -> Merge<'_> {
        let adapter = Some((&self.adapter, Path::new("adapter")));
        Merge::open(self.base.path(), adapter, quantization).unwrap()
    }

    /// Base and live adapter.
    fn live(&self, quantization: Quantization) -> Llama<Flex> {
        live(self.base.path(), &self.adapter, quantization)
    }
}

fn live(base: &Path, adapter: &Adapter, quantization: Quantization) -> Llama<Flex> {
    let mut model = load(base, quantization).unwrap();
    attach_adapter(&mut model, adapter, Path::new("adapter")).unwrap();
    model
}

fn merged(merge: &Merge<'_>, float_type: FloatType) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut count = 0;
    write_merged(folder.path(), merge, float_type, WHOLE, || count += 1).unwrap();
    assert_eq!(count, merge.tensors());
    folder
}

fn in_nf4(merge: &Merge<'_>, double: bool, float_type: FloatType) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_nf4(folder.path(), merge, Nf4Format { double, float_type }, WHOLE, || {}).unwrap();
    folder
}

fn in_gguf(merge: &Merge<'_>, block_type: BlockType) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    let format = GgufFormat { block_type, tokenizer: &tokenizer, name: "small" };
    write_gguf(&folder.path().join("model.gguf"), merge, format, || {}).unwrap();
    folder
}

/// A tokenizer of 1,024 tokens.
pub(crate) fn tokenizer() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/tiny-llama/tokenizer.json")
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn a_merged_folder_gives_the_logits_of_the_live_adapter() {
    let rslora = LoraSettings { rslora: true, ..lora(3, &Target::ALL) };
    let settings = [lora(3, &Target::ALL), rslora, lora(1, &[Target::K, Target::Down])];
    for (settings, tied) in settings.iter().zip([false, true, false]) {
        let pair = Pair::with(&config().with_tie_word_embeddings(tied), settings);
        let expected = logits(&pair.live(Quantization::None), &IDS);
        assert_ne!(expected, logits(&load(pair.base.path(), Quantization::None).unwrap(), &IDS));
        for (float_type, bound) in [(FloatType::F32, 1e-5), (FloatType::F16, 1e-2), (FloatType::Bf16, 8e-2)] {
            let folder = merged(&pair.merge(Quantization::None), float_type);
            let model = load(folder.path(), Quantization::None).unwrap();
            close(&logits(&model, &IDS), &expected, bound);
            assert_eq!(model.config(), &read_config(pair.base.path()).unwrap());
            assert_eq!(json(&folder.path().join("config.json"))["torch_dtype"], float_type.to_string());
        }
    }
}

#[test]
fn a_base_that_bitsandbytes_packed_in_part_is_written_as_it_is_loaded() {
    // Two linears are dense in it, and its head is packed.
    let base = form("bnb-skip-bf16");
    let merge = Merge::open(&base, None, Quantization::Nf4Double).unwrap();
    assert_eq!(merge.base_form(), BaseForm::Nf4);
    let folder = merged(&merge, FloatType::F32);
    let ids = [1, 5, 30, 7, 7, 2, 39, 0, 11];
    let found = logits(&load(folder.path(), Quantization::None).unwrap(), &ids);
    close(&found, &logits(&load(&base, Quantization::Nf4Double).unwrap(), &ids), 1e-5);
}

#[test]
fn many_files_hold_what_one_does() {
    let pair = Pair::new(&Target::ALL);
    let merge = pair.merge(Quantization::None);
    let expected = logits(&load(merged(&merge, FloatType::F16).path(), Quantization::None).unwrap(), &IDS);
    let folder = tempfile::tempdir().unwrap();
    write_merged(folder.path(), &merge, FloatType::F16, 40_000, || {}).unwrap();
    let index = json(&folder.path().join(INDEX));
    let files: std::collections::BTreeSet<&str> =
        index["weight_map"].as_object().unwrap().values().map(|file| file.as_str().unwrap()).collect();
    assert!(files.len() > 3 && !folder.path().join("model.safetensors").exists());
    assert_eq!(index["metadata"]["total_size"], 2 * config().parameters());
    // The embedding alone is larger than a file should be; all others keep to it.
    let size = |file: &&str| fs::metadata(folder.path().join(file)).unwrap().len();
    assert_eq!(files.iter().filter(|file| size(file) > 42_000).count(), 2);
    assert_eq!(logits(&load(folder.path(), Quantization::None).unwrap(), &IDS), expected);
}

#[test]
fn merging_into_rounded_weights_gives_the_model_that_was_trained() {
    let pair = Pair::new(&[Target::Q, Target::V, Target::Up]);
    let dense = logits(&pair.live(Quantization::None), &IDS);
    for quantization in [Quantization::Nf4, Quantization::Nf4Double] {
        let expected = logits(&pair.live(quantization), &IDS);
        let folder = merged(&pair.merge(quantization), FloatType::F32);
        let found = logits(&load(folder.path(), Quantization::None).unwrap(), &IDS);
        close(&found, &expected, 1e-5);
        let off = found.iter().zip(&dense).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off > 1e-2, "{off}");
    }
}

#[test]
fn a_base_in_four_bits_is_merged_as_it_is_stored() {
    let pair = Pair::new(&[Target::Q, Target::V]);
    let plain = Merge::open(pair.base.path(), None, Quantization::None).unwrap();
    assert_eq!(plain.base_form(), BaseForm::Dense);
    for double in [false, true] {
        let base = in_nf4(&plain, double, FloatType::F32);
        let expected = logits(&live(base.path(), &pair.adapter, Quantization::None), &IDS);
        let adapter = Some((&pair.adapter, Path::new("adapter")));
        let merge = Merge::open(base.path(), adapter, Quantization::None).unwrap();
        assert_eq!(merge.base_form(), BaseForm::Nf4);
        let folder = merged(&merge, FloatType::F32);
        let config = json(&folder.path().join("config.json"));
        assert!(config.get("quantization_config").is_none());
        let found = load(folder.path(), Quantization::None).unwrap();
        assert!(matches!(found.blocks[0].linear(Target::O).weight, Weight::Dense(_)));
        close(&logits(&found, &IDS), &expected, 1e-5);

        // In four bits again: what the adapter left alone keeps its codes and, in the same form, its scales.
        for double_again in [false, true] {
            let again = in_nf4(&merge, double_again, FloatType::F32);
            let [before, after] = [base.path(), again.path()].map(|path| Checkpoint::open(path).unwrap());
            for target in Target::ALL {
                let name = block_tensor(1, &format!("{}.weight", target.hf_path()));
                let [before, after] =
                    [&before, &after].map(|file| Nf4Stored::read_any_shape(file, &name).unwrap());
                let changed = [Target::Q, Target::V].contains(&target);
                assert_eq!(before.codes != after.codes, changed, "{name}");
                if !changed && double == double_again {
                    assert_eq!(before.absmax, after.absmax);
                }
                if !changed && !double_again {
                    assert_eq!(before.absmax.to_f32(), after.absmax.to_f32());
                }
            }
        }
    }
}

#[test]
fn a_folder_in_four_bits_says_what_it_is() {
    let pair = Pair::new(&Target::ALL);
    for (double, float_type) in [(false, FloatType::Bf16), (true, FloatType::F16)] {
        let folder = tempfile::tempdir().unwrap();
        let merge = pair.merge(Quantization::None);
        write_nf4(folder.path(), &merge, Nf4Format { double, float_type }, 30_000, || {}).unwrap();
        let config = json(&folder.path().join("config.json"));
        let settings = &config["quantization_config"];
        assert_eq!(settings["quant_method"], "bitsandbytes");
        assert_eq!(settings["bnb_4bit_use_double_quant"], double);
        assert_eq!(settings["bnb_4bit_compute_dtype"], float_type.to_string());
        assert!(folder.path().join(INDEX).exists());
        let stored = load(folder.path(), Quantization::None).unwrap();
        // Merged in f32 and quantized once is quantizing the merged weights.
        let dense = merged(&merge, FloatType::F32);
        let quantization = if double { Quantization::Nf4Double } else { Quantization::Nf4 };
        let expected = load(dense.path(), quantization).unwrap();
        for (block, expected) in stored.blocks.iter().zip(&expected.blocks) {
            for target in Target::ALL {
                let [found, expected] = [block, expected].map(|block| match &block.linear(target).weight {
                    Weight::Nf4(weight) => (weight.host_codes(), weight.host_absmax()),
                    Weight::Dense(_) => panic!("{target} is dense"),
                });
                assert_eq!(found, expected, "{target}");
            }
        }
        close(&logits(&stored, &IDS), &logits(&expected, &IDS), 8e-2);
    }
}

/// Every tensor of a file: dtype, shape, bytes.
fn tensors(file: &[u8]) -> BTreeMap<String, (String, Vec<usize>, Vec<u8>)> {
    let file = SafeTensors::deserialize(file).unwrap();
    let parts = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        (name, (format!("{:?}", view.dtype()), view.shape().to_vec(), view.data().to_vec()))
    };
    file.tensors().into_iter().map(parts).collect()
}

#[test]
fn four_bits_are_bitsandbytes_bit_for_bit() {
    let Some(golden) = shared("golden/small") else { return };
    let merge = Merge::open(&golden.join("model"), None, Quantization::None).unwrap();
    for (name, double) in [("bnb-nf4", false), ("bnb-nf4-dq", true)] {
        let folder = in_nf4(&merge, double, FloatType::F32);
        let [found, expected] = [folder.path().to_owned(), golden.join(name)]
            .map(|folder| tensors(&fs::read(folder.join("model.safetensors")).unwrap()));
        assert!(found.keys().eq(expected.keys()), "{name}");
        for (tensor, expected) in &expected {
            assert!(&found[tensor] == expected, "{tensor} of {name}");
        }
        let [found, expected] =
            [folder.path().to_owned(), golden.join(name)].map(|folder| json(&folder.join("config.json")));
        assert_eq!(found["quantization_config"], expected["quantization_config"]);
        assert_eq!(found["dtype"], expected["dtype"]);
    }
}

#[test]
fn a_gguf_file_gives_the_logits_of_the_live_adapter() {
    for tied in [false, true] {
        let config = config().with_tie_word_embeddings(tied).with_max_position_embeddings(77);
        let pair = Pair::with(&config, &lora(3, &Target::ALL));
        let merge = pair.merge(Quantization::None);
        let expected = logits(&pair.live(Quantization::None), &IDS);
        let size = expected.iter().map(|logit| logit.abs()).sum::<f32>();
        for (block_type, bound) in
            [(BlockType::F32, 1e-5), (BlockType::F16, 2e-3), (BlockType::Q8_0, 0.03), (BlockType::Q4_0, 0.5)]
        {
            let folder = in_gguf(&merge, block_type);
            let model = load(folder.path(), Quantization::None).unwrap();
            assert_eq!(model.config(), &config);
            let found = logits(&model, &IDS);
            if block_type == BlockType::F32 {
                let folder = merged(&merge, FloatType::F32);
                assert_eq!(found, logits(&load(folder.path(), Quantization::None).unwrap(), &IDS));
            }
            let error = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).sum::<f32>() / size;
            assert!(error <= bound, "{block_type:?}: {error}");
            let by_file = load(&folder.path().join("model.gguf"), Quantization::Nf4).unwrap();
            assert!(matches!(by_file.blocks[1].linear(Target::K).weight, Weight::Nf4(_)));
            assert_eq!(read_config(folder.path()).unwrap(), config);
        }
    }
}

#[test]
fn an_adapter_of_another_base_is_not_merged() {
    let pair = Pair::new(&Target::ALL);
    let mut other = config();
    other.intermediate_size = 88;
    let base = written(&small(&other), FloatType::F32);
    let adapter = Some((&pair.adapter, Path::new("runs/some/adapter")));
    let refused = Merge::open(base.path(), adapter, Quantization::None);
    expect(refused, &["runs/some/adapter", "gate_proj", "[80, 64]", "[88, 64]", "--model"]);
}

#[test]
fn numbers_that_a_format_does_not_hold_leave_no_folder() {
    let mut pair = Pair::new(&Target::ALL);
    pair.adapter.tensors.get_mut(&(1, Target::Up)).unwrap().b[0] = 1e10;
    let merge = pair.merge(Quantization::None);
    let parent = tempfile::tempdir().unwrap();
    let folder = NewFolder::create(&parent.path().join("out")).unwrap();
    let refused = write_merged(folder.path(), &merge, FloatType::F16, WHOLE, || {});
    expect(refused, &["model.layers.1.mlp.up_proj.weight", "float16", "element "]);
    let tokenizer = tokenizer();
    for block_type in [BlockType::F16, BlockType::Q8_0, BlockType::Q4_0] {
        let format = GgufFormat { block_type, tokenizer: &tokenizer, name: "x" };
        let refused = write_gguf(&folder.path().join("x.gguf"), &merge, format, || {});
        expect(refused, &["blk.1.ffn_up.weight", "--format"]);
    }
    drop(folder);
    assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
}
