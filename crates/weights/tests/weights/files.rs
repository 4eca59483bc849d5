//! Files as they really come: damaged, hostile, and those of other programs.
//!
//! The bad ones are made in temporary folders; the real ones lie beside the workspace and are passed over, with a
//! printed line, where they do not.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use buzzer_model::Target;
use buzzer_weights::{
    Absmax, Adapter, AdapterConfig, Checkpoint, Dtype, Factors, FloatType, Nf4Stored, TensorToWrite,
    WeightsError, describe, write_atomic, write_model, write_safetensors,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{INDEX, Raw, expect, floats, folder_with, index, raw_file, shared};

/// Dtype, shape and bytes of a part.
type Part<'a> = (&'a str, &'a [usize], Vec<u8>);

#[test]
fn a_folder_without_weights_says_what_is_there() {
    let folder = folder_with(&[("model.gguf", b"x")]);
    expect(
        Checkpoint::open(folder.path()),
        &["model.safetensors", "pytorch_model.bin", "consolidated.00.pth", "there is model.gguf", "--model"],
    );
    expect(Checkpoint::open(&folder.path().join("nowhere")), &["nowhere", "--model"]);
    expect(Checkpoint::open_for(&folder.path().join("x"), "--golden"), &["--golden"]);
    expect(Checkpoint::open(Path::new("/dev/null")), &["/dev/null", "no regular file"]);
    let empty = folder_with(&[("model.safetensors", b"")]);
    expect(Checkpoint::open(empty.path()), &["0 bytes", "model.safetensors"]);
}

#[test]
fn a_file_cut_in_the_middle_is_refused_when_it_is_opened() {
    let whole = raw_file(&[("w", "F32", &[64], &floats(&[1.0; 64]))]);
    for end in [1, 8, 20, whole.len() - 200, whole.len() - 1] {
        let folder = folder_with(&[("model.safetensors", &whole[..end])]);
        expect(Checkpoint::open(folder.path()), &["model.safetensors", "--model"]);
    }
    let cut = &whole[..whole.len() - 1];
    let folder = folder_with(&[("model.safetensors", cut)]);
    let sizes = format!("promises {} bytes and it has {}", whole.len(), cut.len());
    expect(Checkpoint::open(folder.path()), &["cut short", &sizes]);
}

#[test]
fn numbers_that_are_none_are_found_at_their_place() {
    for (dtype, good, bad) in [
        ("F32", 1.0_f32.to_le_bytes().to_vec(), f32::NAN.to_le_bytes().to_vec()),
        ("F16", vec![0x00, 0x3C], vec![0x00, 0x7C]),
        ("BF16", vec![0x80, 0x3F], vec![0x80, 0xFF]),
    ] {
        // Longer than a window, so that the place is counted over more than one.
        let count = 3 << 20;
        let mut bytes = good.repeat(count);
        let place = count - 2;
        bytes[place * good.len()..][..good.len()].copy_from_slice(&bad);
        let folder = folder_with(&[("model.safetensors", &raw_file(&[("w", dtype, &[3, 1 << 20], &bytes)]))]);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let place = format!("element {place} ");
        let message = ["`w`", &place, "model.safetensors", "--model"];
        expect(checkpoint.read_f32("w", &[3, 1 << 20]), &message);
        for as_f32 in [false, true] {
            let size = if as_f32 { 4 } else { good.len() };
            expect(checkpoint.read_values("w", count - 500, as_f32, &mut vec![0; 500 * size]), &message);
            checkpoint.read_values("w", count - 500, as_f32, &mut vec![0; 400 * size]).unwrap();
        }
    }
}

#[test]
fn values_come_in_the_dtype_of_the_file_or_in_f32() {
    let values: Vec<f32> = (0..300_000).map(|i| (i % 2001) as f32 - 1000.0).collect();
    let halves = |bits: fn(f32) -> u16| values.iter().flat_map(|&value| bits(value).to_le_bytes()).collect();
    let stored: [(_, Vec<u8>); 3] = [
        ("F32", floats(&values)),
        ("F16", halves(|value| half::f16::from_f32(value).to_bits())),
        ("BF16", halves(|value| half::bf16::from_f32(value).to_bits())),
    ];
    for (dtype, bytes) in stored {
        let folder = folder_with(&[("model.safetensors", &raw_file(&[("w", dtype, &[3, 100_000], &bytes)]))]);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let size = bytes.len() / values.len();
        let wide = floats(&checkpoint.read_f32("w", &[3, 100_000]).unwrap());
        for (first, count) in [(0, 300_000), (7_001, 1), (65_537, 200_003), (299_999, 1), (300_000, 0)] {
            let mut found = vec![0; count * size];
            checkpoint.read_values("w", first, false, &mut found).unwrap();
            assert!(found == bytes[first * size..][..count * size], "{dtype}, {count} from {first} on");
            let mut found = vec![0; count * 4];
            checkpoint.read_values("w", first, true, &mut found).unwrap();
            assert!(found == wide[first * 4..][..count * 4], "{dtype}, {count} from {first} on in f32");
        }
        let beyond = checkpoint.read_values("w", 299_999, false, &mut vec![0; 2 * size]);
        expect(beyond, &["`w`", "300000 values", "2 from number 299999", "model.safetensors"]);
    }
}

#[cfg(unix)]
#[test]
fn a_file_that_was_cut_after_it_was_opened_is_named() {
    let bytes = floats(&[1.0; 1000]);
    let folder = folder_with(&[("model.safetensors", &raw_file(&[("w", "F32", &[1000], &bytes)]))]);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    fs::OpenOptions::new()
        .write(true)
        .open(folder.path().join("model.safetensors"))
        .unwrap()
        .set_len(2000)
        .unwrap();
    expect(checkpoint.read_values("w", 0, false, &mut vec![0; 4000]), &["model.safetensors", "--model"]);
}

#[test]
fn shapes_and_types_are_checked() {
    let bytes = floats(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let file = raw_file(&[
        ("empty", "F32", &[0, 5], &[]),
        ("w", "F32", &[2, 3], &bytes),
        ("wide", "F64", &[3], &bytes),
        ("bytes", "U8", &[24], &bytes),
        ("long", "I64", &[2], &[1, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255]),
        ("short", "I32", &[2], &[7, 0, 0, 0, 254, 255, 255, 255]),
    ]);
    let folder = folder_with(&[("model.safetensors", &file)]);
    let checkpoint = Checkpoint::open(&folder.path().join("model.safetensors")).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["bytes", "empty", "long", "short", "w", "wide"]);
    assert_eq!(checkpoint.read_f32("w", &[2, 3]).unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let mut buffer = vec![9.0; 9];
    checkpoint.read_f32_into("w", &[2, 3], &mut buffer).unwrap();
    assert_eq!(buffer, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    assert_eq!(checkpoint.read_f32_any_shape("empty").unwrap(), (vec![0, 5], vec![]));
    assert_eq!(checkpoint.read_u8("bytes").unwrap(), (vec![24], bytes));
    assert_eq!(checkpoint.read_i64("long").unwrap(), (vec![2], vec![1, -1]));
    assert_eq!(checkpoint.read_i64("short").unwrap(), (vec![2], vec![7, -2]));
    assert_eq!(checkpoint.dtype("wide").unwrap(), Dtype::F64);
    assert!(checkpoint.contains("w") && !checkpoint.contains("v"));
    expect(checkpoint.read_f32("w", &[3, 2]), &["`w`", "[2, 3]", "[3, 2]", "--model"]);
    expect(checkpoint.read_f32("wide", &[3]), &["`wide`", "F64", "F32, F16 or BF16"]);
    expect(checkpoint.read_u8("w"), &["`w`", "F32", "U8"]);
    expect(checkpoint.read_i64("w"), &["`w`", "F32", "I64 or I32"]);
    expect(checkpoint.shape("v"), &["`v`", "among its 6", "--model"]);
}

#[test]
fn an_index_is_followed_only_inside_its_folder() {
    let shard = raw_file(&[("w", "F32", &[1], &floats(&[1.0])), ("unlisted", "F32", &[1], &floats(&[1.0]))]);
    let outer = folder_with(&[("secret.safetensors", &shard)]);
    let folder = outer.path().join("model");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("a.safetensors"), &shard).unwrap();
    // The index wins over a single file, which here is not even one.
    fs::write(folder.join("model.safetensors"), "rubbish").unwrap();
    let open = |index: &[u8]| {
        fs::write(folder.join(INDEX), index).unwrap();
        Checkpoint::open(&folder)
    };
    let checkpoint = open(&index(&[("w", "a.safetensors")])).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["w"]);
    assert_eq!(checkpoint.file_of("w").unwrap(), folder.join("a.safetensors"));

    let absolute = outer.path().join("secret.safetensors").display().to_string();
    for outside in
        ["../secret.safetensors", "x/../../secret.safetensors", &absolute, "", ".", "./a.safetensors"]
    {
        expect(open(&index(&[("w", outside)])), &[INDEX, "`w`", outside, "outside", "--model"]);
    }
    expect(open(&index(&[("w", "b.safetensors")])), &[INDEX, "`b.safetensors`", "not in the folder"]);
    expect(open(&index(&[("v", "a.safetensors")])), &[INDEX, "`v`", "`a.safetensors`", "different versions"]);
    let twice = br#"{"weight_map":{"w":"a.safetensors","w":"a.safetensors"}}"#;
    expect(open(twice), &[INDEX, "`w`", "twice"]);
    expect(open(b"{}"), &[INDEX, "weight_map"]);
    expect(open(br#"{"weight_map":{"w":["a.safetensors"]}}"#), &[INDEX, "invalid type"]);
    expect(open(&[b'['; 100_000]), &[INDEX]);
    expect(open(&index(&[("w", INDEX)])), &[INDEX]);
}

#[test]
fn a_write_that_fails_leaves_what_was_there() {
    let folder = folder_with(&[("model.safetensors", b"old")]);
    let path = folder.path().join("model.safetensors");
    let names = || fs::read_dir(folder.path()).unwrap().count();
    let tensor =
        |values: &'static [f32]| TensorToWrite { name: "w".into(), shape: vec![2], values: values.into() };
    let write = |tensors: &[TensorToWrite<'_>], float_type| {
        write_safetensors(&path, tensors, float_type, &BTreeMap::new())
    };
    expect(write(&[tensor(&[1.0, f32::NAN])], FloatType::F32), &["`w`", "element 1 is NaN", "kept"]);
    expect(write(&[tensor(&[1.0, 1e6])], FloatType::F16), &["`w`", "element 1 is 1000000", "float16"]);
    expect(write(&[tensor(&[1.0])], FloatType::F32), &["`w`", "1 elements", "[2]"]);
    expect(write(&[tensor(&[1.0, 2.0]), tensor(&[1.0, 2.0])], FloatType::F32), &["`w`", "taken"]);
    let cause = || WeightsError::write(&path, std::io::Error::other("disk full"));
    expect(
        write_atomic(&path, |file| {
            file.write_all(b"half").map_err(|error| WeightsError::write(&path, error))?;
            Err::<(), _>(cause())
        }),
        &["disk full", "--out"],
    );
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(names(), 1, "the temporary files are gone");

    write(&[tensor(&[1.0, 2.0])], FloatType::F16).unwrap();
    assert_eq!(Checkpoint::open(&path).unwrap().read_f32("w", &[2]).unwrap(), [1.0, 2.0]);
    assert_eq!(names(), 1);
    let nowhere = folder.path().join("nowhere/model.safetensors");
    expect(write_safetensors(&nowhere, &[], FloatType::F32, &BTreeMap::new()), &["nowhere", "--out"]);
}

#[test]
fn a_model_folder_is_read_back_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let values: Vec<f32> = (0..70_000).map(|i| (i as f32 - 35_000.0) / 64.0).collect();
    let tensors = [
        TensorToWrite { name: "z.weight".into(), shape: vec![7, 10_000], values: Cow::Borrowed(&values) },
        TensorToWrite {
            name: "a.weight".into(),
            shape: vec![2],
            values: vec![-0.0, f32::MIN_POSITIVE].into(),
        },
    ];
    let config = json!({"model_type": "llama", "torch_dtype": "float16"});
    for (float_type, name) in [(FloatType::F32, "float32"), (FloatType::Bf16, "bfloat16")] {
        let dir = folder.path().join(name);
        write_model(&dir, &config, &tensors, float_type).unwrap();
        let written: Value = serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
        assert_eq!(written, json!({"model_type": "llama", "torch_dtype": name}));
        let checkpoint = Checkpoint::open(&dir).unwrap();
        for tensor in &tensors {
            let read = checkpoint.read_f32(&tensor.name, &tensor.shape).unwrap();
            let bits = |value: &f32| match float_type {
                FloatType::Bf16 => half::bf16::from_f32(*value).to_f32().to_bits(),
                _ => value.to_bits(),
            };
            assert!(read.iter().map(|value| value.to_bits()).eq(tensor.values.iter().map(bits)));
        }
        let bytes = fs::read(dir.join("model.safetensors")).unwrap();
        let place = |name: &str| bytes.windows(name.len()).position(|part| part == name.as_bytes()).unwrap();
        assert!(place("z.weight") < place("a.weight"), "the order is the caller's");
    }
}

/// A complete adapter of two layers on two linears, with a value of every kind that f32 has.
fn small_adapter() -> Adapter {
    let (rank, in_features) = (2, 3);
    let values = |count: usize, start: usize| -> Vec<f32> {
        let special = [-0.0, f32::MIN_POSITIVE, 1e-45, f32::MAX, -1.0 / 3.0];
        (0..count).map(|i| special[(i + start) % special.len()] * (1.0 - i as f32 / 64.0)).collect()
    };
    let targets = BTreeSet::from([Target::Q, Target::Up]);
    let keys = (0..2).flat_map(|layer| [(layer, Target::Q, 3), (layer, Target::Up, 5)]);
    let tensors = keys.map(|(layer, target, out_features)| {
        let (a, b) = (values(rank * in_features, layer), values(out_features * rank, layer + 1));
        ((layer, target), Factors { a, b, rank, alpha: 16.0, in_features, out_features })
    });
    let config = AdapterConfig {
        base_model: Some("some/base".into()),
        rank,
        alpha: 16.0,
        dropout: 0.1,
        targets,
        every_layer: true,
        use_rslora: false,
    };
    Adapter { config, tensors: tensors.collect() }
}

/// Every bit of every factor.
fn bits(adapter: &Adapter) -> Vec<u32> {
    let all = adapter.tensors.values().flat_map(|factors| factors.a.iter().chain(&factors.b));
    all.map(|value| value.to_bits()).collect()
}

/// Changes fields of a written adapter's configuration.
fn set(dir: &Path, changes: &Value) {
    let path = dir.join("adapter_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    fs::write(path, config.to_string()).unwrap();
}

#[test]
fn an_adapter_comes_back_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("new/adapter");
    let mut adapter = small_adapter();
    adapter.write(&dir).unwrap();
    let read = Adapter::read(&dir).unwrap();
    assert_eq!(read, adapter);
    assert_eq!(bits(&read), bits(&adapter));
    let first = fs::read(dir.join("adapter_model.safetensors")).unwrap();
    read.write(&dir).unwrap();
    assert_eq!(fs::read(dir.join("adapter_model.safetensors")).unwrap(), first, "same adapter, same bytes");
    assert_eq!(
        describe(&adapter),
        "LoRA of some/base: rank 2, scaling 8, q_proj up_proj in 2 layers, 56 parameters"
    );

    adapter.config.base_model = None;
    adapter.config.alpha = 0.5;
    adapter.config.use_rslora = true;
    adapter.tensors.values_mut().for_each(|factors| factors.alpha = 0.5);
    adapter.write(&dir).unwrap();
    assert_eq!(Adapter::read(&dir).unwrap(), adapter);
    let factors = &adapter.tensors[&(1, Target::Up)];
    assert!((adapter.config.scaling(factors) - 0.5 / 2.0_f64.sqrt()).abs() < 1e-15);
}

#[test]
fn numbers_of_single_modules_and_missing_layers_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let mut adapter = small_adapter();
    let up = adapter.tensors.get_mut(&(1, Target::Up)).unwrap();
    (up.alpha, up.rank) = (2.5, 1);
    up.a.truncate(3);
    up.b.truncate(5);
    adapter.write(folder.path()).unwrap();
    let read = Adapter::read(folder.path()).unwrap();
    assert_eq!(read, adapter);
    assert_eq!(read.config.scaling(&read.tensors[&(1, Target::Up)]), 2.5);
    assert_eq!(
        describe(&read),
        "LoRA of some/base: rank 1 to 2, scaling 2.5 to 8, q_proj up_proj in 2 layers, 48 parameters"
    );
    adapter.tensors.remove(&(0, Target::Q));
    adapter.config.every_layer = false;
    adapter.write(folder.path()).unwrap();
    let read = Adapter::read(folder.path()).unwrap();
    assert_eq!(read, adapter);
    assert!(describe(&read).contains("q_proj up_proj in some of layers 0 to 1, 36 parameters"));
}

#[test]
fn an_adapter_that_contradicts_itself_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let refuse = |change: &dyn Fn(&mut Adapter), pieces: &[&str]| {
        let mut adapter = small_adapter();
        change(&mut adapter);
        expect(adapter.write(folder.path()), pieces);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    };
    let up = (1, Target::Up);
    refuse(&|adapter| drop(adapter.tensors.remove(&up)), &["layers.1.mlp.up_proj.lora_A", "missing"]);
    refuse(&|adapter| adapter.tensors.clear(), &["adapter_config.json", "no factors"]);
    refuse(&|adapter| adapter.config.rank = 0, &["no factors"]);
    refuse(
        &|adapter| adapter.config.targets.retain(|&target| target == Target::Q),
        &["up_proj of layer 0 is not among"],
    );
    refuse(
        &|adapter| adapter.tensors.get_mut(&up).unwrap().a.truncate(5),
        &["lora_A", "5 elements", "[2, 3]"],
    );
    refuse(
        &|adapter| adapter.tensors.get_mut(&up).unwrap().out_features = 4,
        &["layers.1.mlp.up_proj.lora_B", "[4, 2]", "[5, 2]", "layer 0"],
    );
    refuse(&|adapter| adapter.tensors.get_mut(&up).unwrap().b[3] = f32::NAN, &["lora_B", "element 3 is NaN"]);
    let far = |adapter: &mut Adapter| {
        let factors = adapter.tensors.remove(&up).unwrap();
        adapter.tensors.insert((usize::MAX, Target::Up), factors);
    };
    refuse(&far, &["layers.1.mlp.up_proj.lora_A", "missing"]);
    let of_another_rank = |adapter: &mut Adapter| adapter.tensors.get_mut(&up).unwrap().rank = 3;
    refuse(&of_another_rank, &["layers.1.mlp.up_proj.lora_A", "6 elements", "[3, 3]"]);
}

#[test]
fn keys_that_change_what_an_adapter_computes_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let refused = [
        ("peft_type", json!("IA3")),
        ("peft_type", Value::Null),
        ("bias", json!("all")),
        ("init_lora_weights", json!("pissa_niter_4")),
        ("init_lora_weights", json!("olora")),
        ("use_dora", json!(true)),
        ("modules_to_save", json!(["lm_head"])),
        ("layer_replication", json!([[0, 1]])),
        ("lora_bias", json!(true)),
        ("trainable_token_indices", json!([1])),
        ("kasa_config", json!({"beta": 1})),
    ];
    for (field, value) in refused {
        small_adapter().write(dir).unwrap();
        set(dir, &json!({ field: value }));
        expect(Adapter::read(dir), &["adapter_config.json", &format!("`{field}`"), "--adapter"]);
    }
    small_adapter().write(dir).unwrap();
    let names = json!(["model.layers.self_attn.q_proj", "mlp.up_proj", "q_proj"]);
    let harmless = json!({"from_the_future": {"x": 1}, "eva_config": null, "target_modules": names,
        "init_lora_weights": "gaussian", "use_rslora": true, "bias": null, "layers_pattern": [],
        "fan_in_fan_out": true, "layers_to_transform": [], "exclude_modules": ""});
    set(dir, &harmless);
    let mut adapter = small_adapter();
    adapter.config.use_rslora = true;
    assert_eq!(Adapter::read(dir).unwrap(), adapter);
}

#[test]
fn values_of_the_wrong_kind_are_shown() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let unusable = [
        ("r", json!("eight"), "`r` is \"eight\""),
        ("r", json!(0), "no rank"),
        ("r", json!(-1), "wrong type"),
        ("lora_alpha", json!([]), "`lora_alpha`"),
        ("base_model_name_or_path", json!(7), "`base_model_name_or_path`"),
        ("target_modules", json!(["q_proj", "lm_head"]), "lm_head"),
        ("target_modules", json!(["q_proj", 3]), "no name"),
        ("target_modules", json!("(?!x).*_proj"), "`(?!x).*_proj` cannot be matched"),
        ("target_modules", json!("("), "cannot be matched"),
        ("target_modules", json!(3), "neither"),
        ("target_modules", json!(vec!["q_proj"; 4097]), "4097 entries"),
        ("exclude_modules", json!({"a": 1}), "`exclude_modules`"),
        ("alpha_pattern", json!({"q_proj": "high"}), "`alpha_pattern` holds \"high\""),
        ("alpha_pattern", json!({"(": 3}), "`alpha_pattern`: the pattern `(`"),
        ("alpha_pattern", json!([3]), "entry per tensor"),
        ("rank_pattern", json!({"q_proj": 0}), "no rank"),
        ("rank_pattern", json!({"q_proj": 1.5}), "wrong type"),
        ("layers_to_transform", json!(-1), "`layers_to_transform`"),
        ("layers_to_transform", json!(["0"]), "`layers_to_transform`"),
        ("layers_pattern", json!("blocks"), "`layers_pattern` is \"blocks\""),
    ];
    for (field, value, piece) in unusable {
        small_adapter().write(dir).unwrap();
        set(dir, &json!({ field: value }));
        expect(Adapter::read(dir), &["adapter_config.json", piece, "--adapter"]);
    }
    small_adapter().write(dir).unwrap();
    set(dir, &json!({"target_modules": ".*", "layers_to_transform": 0}));
    expect(Adapter::read(dir), &["`layers_to_transform` stands beside a pattern"]);
}

#[test]
fn factors_that_are_not_the_announced_ones_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let contradictions = [
        ("rank_pattern", json!({"mlp.up_proj": 3}), "[2, 3], expected [3, 3] (rank_pattern is 3 in"),
        ("r", json!(4), "[2, 3], expected [4, 3] (r is 4 in"),
        (
            "layers_to_transform",
            json!(0),
            "layers.1.self_attn.q_proj.lora_A.weight`: q_proj of layer 1 is not among",
        ),
        ("exclude_modules", json!(["mlp.up_proj"]), "up_proj of layer 0 is not among"),
        ("target_modules", json!("all-linear"), "layers.0.self_attn.k_proj.lora_A.weight`: it is missing"),
        (
            "target_modules",
            json!(".*(q|v|up)_proj"),
            "layers.0.self_attn.v_proj.lora_A.weight`: it is missing",
        ),
        ("target_modules", json!("q_proj"), "q_proj of layer 0 is not among"),
    ];
    for (field, value, piece) in contradictions {
        small_adapter().write(dir).unwrap();
        set(dir, &json!({ field: value }));
        expect(Adapter::read(dir), &["adapter_model.safetensors", piece, "--adapter"]);
    }
}

#[test]
fn damaged_adapters_name_key_file_and_shapes() {
    const Q: &str = "base_model.model.model.layers.0.self_attn.q_proj";
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let mut adapter = small_adapter();
    adapter.tensors.retain(|key, _| *key == (0, Target::Q));
    adapter.config.targets = BTreeSet::from([Target::Q]);
    adapter.write(dir).unwrap();
    let (a, b) = (floats(&[1.0; 6]), floats(&[1.0; 6]));
    let read = |keys: &[(&str, &str, &[usize], &[u8])]| {
        let names: Vec<String> = keys.iter().map(|(key, ..)| key.replace('Q', Q)).collect();
        let tensors: Vec<Raw<'_>> =
            keys.iter().zip(&names).map(|(key, name)| (name.as_str(), key.1, key.2, key.3)).collect();
        fs::write(dir.join("adapter_model.safetensors"), raw_file(&tensors)).unwrap();
        Adapter::read(dir)
    };
    let good_a: Raw<'_> = ("Q.lora_A.weight", "F32", &[2, 3], &a);
    let good_b: Raw<'_> = ("Q.lora_B.weight", "F32", &[3, 2], &b);
    assert_eq!(read(&[good_a, good_b]).unwrap().tensors.len(), 1);
    let (halves, brains) = ([0x00, 0x3C].repeat(6), [0x80, 0x3F].repeat(6));
    let infix: [Raw<'_>; 2] = [
        ("Q.lora_A.default.weight", "F16", &[2, 3], &halves),
        ("Q.lora_B.default.weight", "BF16", &[3, 2], &brains),
    ];
    assert_eq!(read(&infix).unwrap(), read(&[good_a, good_b]).unwrap());

    let file = "adapter_model.safetensors";
    expect(read(&[good_a]), &[file, "q_proj.lora_A.weight", "q_proj.lora_B.weight` is missing", "--adapter"]);
    expect(read(&[good_a, good_b, infix[0]]), &[file, "lora_A.default.weight", "same factor"]);
    expect(
        read(&[("Q.lora_A.weight", "F32", &[3, 2], &a), good_b]),
        &[file, "q_proj.lora_A.weight", "[3, 2]", "[2, 2]", "r is 2"],
    );
    expect(read(&[("Q.lora_A.weight", "F32", &[6], &a), good_b]), &["[6]", "[2, 6]"]);
    expect(read(&[("Q.lora_A.weight", "F32", &[], &a[..4]), good_b]), &["[]"]);
    expect(read(&[good_a, ("Q.lora_B.weight", "I32", &[3, 2], &b)]), &["lora_B", "I32", "--adapter"]);
    expect(
        read(&[good_a, good_b, ("lm_head.lora_A.weight", "F32", &[2, 3], &a)]),
        &["lm_head", "no LoRA factor"],
    );
    let far = Q.replace('0', "18446744073709551615");
    let far: [(String, Raw<'_>); 2] =
        [(format!("{far}.lora_A.weight"), good_a), (format!("{far}.lora_B.weight"), good_b)];
    let far: Vec<Raw<'_>> = far.iter().map(|(key, raw)| (key.as_str(), raw.1, raw.2, raw.3)).collect();
    expect(read(&[good_a, good_b, far[0], far[1]]), &["layers.18446744073709551615.", "no LoRA factor"]);
    let far = Q.replace('0', "999");
    let far: [(String, Raw<'_>); 2] =
        [(format!("{far}.lora_A.weight"), good_a), (format!("{far}.lora_B.weight"), good_b)];
    let far: Vec<Raw<'_>> = far.iter().map(|(key, raw)| (key.as_str(), raw.1, raw.2, raw.3)).collect();
    expect(read(&[good_a, good_b, far[0], far[1]]), &["layers.1.", "missing"]);
    expect(read(&[]), &["no factors"]);
    fs::remove_file(dir.join(file)).unwrap();
    expect(Adapter::read(dir), &["adapter_model.safetensors or adapter_model.bin", "--adapter"]);
    fs::write(dir.join("adapter_model.bin"), b"PK\x03\x04").unwrap();
    expect(Adapter::read(dir), &["adapter_model.bin", "PyTorch", "--adapter"]);
    expect(Adapter::read(&dir.join("nowhere")), &["adapter_config.json", "--adapter"]);
}

/// A bitsandbytes checkpoint of one [2, 64] weight, with one part changed.
fn quantized(change: (&str, Option<Part<'_>>)) -> (TempDir, Checkpoint) {
    let state = r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [2, 64]}"#;
    #[rustfmt::skip]
    let table = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0];
    let parts: [(&str, &str, &[usize], Vec<u8>); 4] = [
        ("", "U8", &[64, 1], vec![0xF0; 64]),
        (".absmax", "F32", &[2], floats(&[0.5, 2.0])),
        (".quant_map", "F32", &[16], floats(&table)),
        (".quant_state.bitsandbytes__nf4", "U8", &[state.len()], state.as_bytes().to_vec()),
    ];
    let mut all: BTreeMap<&str, Part<'_>> =
        parts.into_iter().map(|(name, dtype, shape, bytes)| (name, (dtype, shape, bytes))).collect();
    match change {
        (name, Some(part)) => drop(all.insert(name, part)),
        (name, None) => drop(all.remove(name)),
    }
    let names: Vec<String> = all.keys().map(|name| format!("q.weight{name}")).collect();
    let tensors: Vec<Raw<'_>> = names
        .iter()
        .zip(all.values())
        .map(|(name, (dtype, shape, bytes))| (&**name, *dtype, *shape, &**bytes))
        .collect();
    let folder = folder_with(&[("model.safetensors", &raw_file(&tensors))]);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    (folder, checkpoint)
}

#[test]
fn a_four_bit_weight_must_be_whole() {
    let (_folder, checkpoint) = quantized(("", Some(("U8", &[64, 1], vec![0xF0; 64]))));
    let stored = Nf4Stored::read(&checkpoint, "q.weight", [2, 64]).unwrap();
    assert_eq!(stored.absmax, Absmax::Plain(vec![0.5, 2.0]));
    assert!(Nf4Stored::is_stored(&checkpoint, "q.weight") && !Nf4Stored::is_stored(&checkpoint, "k.weight"));
    expect(Nf4Stored::read(&checkpoint, "q.weight", [64, 2]), &["`q.weight`", "[2, 64]", "[64, 2]"]);
    expect(Nf4Stored::read(&checkpoint, "k.weight", [2, 64]), &["`k.weight`"]);

    const STATE: &str = ".quant_state.bitsandbytes__nf4";
    let refuse = |change: (&str, Option<Part<'_>>), pieces: &[&str]| {
        let (_folder, checkpoint) = quantized(change);
        expect(Nf4Stored::read_any_shape(&checkpoint, "q.weight"), pieces);
    };
    refuse(("", Some(("U8", &[63, 1], vec![0; 63]))), &["63 bytes", "2 x 64", "--model"]);
    let (_folder, checkpoint) = quantized(("", Some(("BF16", &[32, 1], vec![0xF0; 64]))));
    assert_eq!(Nf4Stored::read_any_shape(&checkpoint, "q.weight").unwrap(), stored, "only the bytes count");
    refuse((".absmax", None), &["`q.weight.absmax`"]);
    refuse((".absmax", Some(("F32", &[3], floats(&[1.0; 3])))), &["[3]", "[2]"]);
    refuse((".absmax", Some(("F32", &[2], floats(&[1.0, f32::INFINITY])))), &["absmax", "inf", "element 1 "]);
    refuse((".quant_map", Some(("F32", &[16], floats(&[0.5; 16])))), &["code book"]);
    refuse((STATE, None), &["bitsandbytes__nf4"]);
    refuse((".quant_state.bitsandbytes__fp4", Some(("U8", &[2], b"{}".to_vec()))), &["fp4"]);
    let states = [
        ("{", "not usable"),
        (r#"{"quant_type":"nf4","blocksize":128,"dtype":"float32","shape":[2,64]}"#, "128"),
        (r#"{"quant_type":"fp4","blocksize":64,"dtype":"float32","shape":[2,64]}"#, "fp4"),
        (r#"{"quant_type":"nf4","blocksize":64,"dtype":"float32","shape":[128]}"#, "[128]"),
        (r#"{"quant_type":"nf4","blocksize":64,"dtype":"float32","shape":[9223372036854775807,9]}"#, "x 9;"),
        (
            r#"{"quant_type":"nf4","blocksize":64,"dtype":"float32","shape":[2,64],"nested_blocksize":64}"#,
            "64",
        ),
        (
            r#"{"quant_type":"nf4","blocksize":64,"dtype":"float32","shape":[2,64],"nested_blocksize":256}"#,
            "F32",
        ),
    ];
    for (state, piece) in states {
        let bytes = state.as_bytes().to_vec();
        refuse((STATE, Some(("U8", &[state.len()], bytes))), &["q.weight", piece]);
    }
}

#[test]
fn real_single_and_sharded_checkpoints_are_equal() {
    let Some(dir) = shared("weights/tiny-llama") else { return };
    let (single, sharded) =
        (Checkpoint::open(&dir).unwrap(), Checkpoint::open(&dir.join("sharded")).unwrap());
    assert!(single.names().eq(sharded.names()));
    assert_eq!(single.names().len(), 21);
    let shards: BTreeSet<_> = sharded.names().map(|name| sharded.file_of(name).unwrap()).collect();
    assert_eq!(shards.len(), 2);
    for name in single.names() {
        let (shape, values) = single.read_f32_any_shape(name).unwrap();
        assert_eq!(sharded.read_f32(name, &shape).unwrap(), values, "{name}");
    }
    let expected = Checkpoint::open_for(&dir.join("expected/activations.safetensors"), "--golden").unwrap();
    assert_eq!(expected.read_i64("input_ids").unwrap().0, [1, 16]);
}

#[test]
fn real_adapters_are_read_and_written_again() {
    let cases = [
        ("adapters/tinyllama1.1b_r4_qv", "rank 4, scaling 2, q_proj v_proj in 22 layers, 563200 parameters"),
        ("golden/small/adapter-init", "rank 8, scaling 2,"),
        ("golden/small/adapter-final", "rank 8, scaling 2,"),
    ];
    let folder = tempfile::tempdir().unwrap();
    for (path, description) in cases {
        let Some(dir) = shared(path) else { continue };
        let adapter = Adapter::read(&dir).unwrap();
        assert!(describe(&adapter).contains(description), "{}", describe(&adapter));
        adapter.write(folder.path()).unwrap();
        let again = Adapter::read(folder.path()).unwrap();
        assert_eq!(again, adapter);
        assert_eq!(bits(&again), bits(&adapter));
        let config = |dir: &Path| -> Value {
            serde_json::from_slice(&fs::read(dir.join("adapter_config.json")).unwrap()).unwrap()
        };
        let (original, written) = (config(&dir), config(folder.path()));
        for (key, value) in written.as_object().unwrap() {
            if key != "target_modules" {
                assert_eq!(value, &original[key], "{path}: {key}");
            }
        }
    }
}

#[test]
fn real_four_bit_weights_give_the_values_of_bitsandbytes() {
    let Some(dir) = shared("golden/small") else { return };
    let golden = Checkpoint::open_for(&dir.join("golden.safetensors"), "--golden").unwrap();
    let name = "model.layers.0.self_attn.q_proj.weight";
    for (folder, key) in [("bnb-nf4", "dequant_q0_nf4"), ("bnb-nf4-dq", "dequant_q0_nf4_dq")] {
        let checkpoint = Checkpoint::open(&dir.join(folder)).unwrap();
        let (shape, expected) = golden.read_f32_any_shape(key).unwrap();
        let stored = Nf4Stored::read(&checkpoint, name, [shape[0], shape[1]]).unwrap();
        let table = checkpoint.read_f32(&format!("{name}.quant_map"), &[16]).unwrap();
        let absmax = stored.absmax.to_f32();
        let codes = stored.codes.iter().flat_map(|&byte| [byte >> 4, byte & 15]);
        let values = codes.enumerate().map(|(e, code)| table[usize::from(code)] * absmax[e / 64]);
        assert!(values.map(f32::to_bits).eq(expected.iter().map(|value| value.to_bits())), "{key}");
        let weights = checkpoint.names().filter(|name| Nf4Stored::is_stored(&checkpoint, name)).count();
        assert_eq!(weights, 28);
        for name in checkpoint.names().filter(|name| Nf4Stored::is_stored(&checkpoint, name)) {
            Nf4Stored::read_any_shape(&checkpoint, name).unwrap();
        }
    }
}
