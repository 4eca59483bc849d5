//! What each keyword argument means here: a setting, nothing that needs one, or nothing at all, and why.

use buzzer::model::Target;
use toml::Value;

use super::python::Literal;

/// What becomes of an argument.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Outcome {
    /// Settings with their dotted keys, and a remark if they are not quite the same.
    Set(Vec<(&'static str, Value)>, Option<&'static str>),
    /// It is so here without a setting.
    Same(&'static str),
    /// No counterpart, and why.
    Left(String),
}

/// How an argument is understood.
#[derive(Clone, Copy)]
pub(super) enum Rule {
    /// A number that is a setting.
    Number(&'static str),
    /// A whole number that is a setting.
    Whole(&'static str),
    /// Whatever a function makes of it.
    By(fn(&Literal) -> Outcome),
    /// Nothing, because.
    Nothing(&'static str),
}

pub(super) const LORA: &str = "LoraConfig";
pub(super) const TRAINING: &str = "TrainingArguments";
pub(super) const SFT: &str = "SFTConfig";
pub(super) const TRAINER: &str = "SFTTrainer";
pub(super) const QUANTIZATION: &str = "BitsAndBytesConfig";
/// Calls whose arguments are read.
pub(super) const CALLS: [&str; 5] = [LORA, TRAINING, SFT, TRAINER, QUANTIZATION];

/// Arguments that hand objects on and set nothing themselves.
pub(super) const OBJECTS: [&str; 7] =
    ["model", "args", "peft_config", "tokenizer", "processing_class", "train_dataset", "eval_dataset"];

/// What PEFT, transformers 4 and TRL take for arguments that a call leaves out.
pub(super) const DEFAULTS: [(&str, &str, Literal); 13] = [
    (LORA, "r", Literal::Integer(8)),
    (LORA, "lora_alpha", Literal::Integer(8)),
    (LORA, "lora_dropout", Literal::Number(0.0)),
    (LORA, "target_modules", Literal::None),
    (TRAINING, "learning_rate", Literal::Number(5e-5)),
    (TRAINING, "num_train_epochs", Literal::Number(3.0)),
    (TRAINING, "per_device_train_batch_size", Literal::Integer(8)),
    (TRAINING, "warmup_ratio", Literal::Number(0.0)),
    (TRAINING, "weight_decay", Literal::Number(0.0)),
    (TRAINING, "max_grad_norm", Literal::Number(1.0)),
    (TRAINING, "seed", Literal::Integer(42)),
    (TRAINER, "packing", Literal::Truth(false)),
    (TRAINER, "max_seq_length", Literal::None),
];

/// The arguments that mean something by themselves. Those that work together are in [`super::arguments`].
const RULES: [(&str, Rule); 44] = [
    ("r", Rule::Whole("lora.rank")),
    ("lora_r", Rule::Whole("lora.rank")),
    ("lora_alpha", Rule::Number("lora.alpha")),
    ("lora_dropout", Rule::Number("train.dropout")),
    ("use_rslora", Rule::By(rslora)),
    ("target_modules", Rule::By(targets)),
    ("bias", Rule::By(bias)),
    ("task_type", Rule::By(task)),
    ("modules_to_save", Rule::By(modules)),
    ("num_train_epochs", Rule::Number("train.epochs")),
    ("per_device_train_batch_size", Rule::Whole("train.batch_rows")),
    ("gradient_accumulation_steps", Rule::Whole("train.accumulation")),
    ("learning_rate", Rule::Number("train.learning_rate")),
    ("lr_scheduler_type", Rule::By(schedule)),
    ("warmup_ratio", Rule::Number("train.warmup_ratio")),
    ("weight_decay", Rule::Number("train.optimizer.weight_decay")),
    ("max_grad_norm", Rule::Number("train.optimizer.max_grad_norm")),
    ("adam_beta1", Rule::Number("train.optimizer.beta_1")),
    ("adam_beta2", Rule::Number("train.optimizer.beta_2")),
    ("adam_epsilon", Rule::Number("train.optimizer.epsilon")),
    ("optim", Rule::By(optimizer)),
    ("seed", Rule::By(seed)),
    ("gradient_checkpointing", Rule::By(checkpointing)),
    ("max_seq_length", Rule::By(row_length)),
    ("max_length", Rule::By(row_length)),
    ("packing", Rule::By(packing)),
    ("completion_only_loss", Rule::By(answers_only)),
    ("assistant_only_loss", Rule::By(answers_only)),
    ("group_by_length", Rule::By(grouping)),
    ("output_dir", Rule::Nothing("name the folder with --out")),
    ("model_name", Rule::By(model)),
    (
        "dataset_name",
        Rule::Nothing("clues are one file here: name it with --data, on the hub as hub:org/name/file"),
    ),
    ("dataset_text_field", Rule::Nothing("a clue's text comes from its columns and `template`")),
    (
        "per_device_eval_batch_size",
        Rule::Nothing("held-out rows are measured in batches like those of training"),
    ),
    ("logging_steps", Rule::Nothing("every step is recorded, in metrics.jsonl and for TensorBoard")),
    ("report_to", Rule::Nothing("every run is recorded, in metrics.jsonl and for TensorBoard")),
    ("save_steps", Rule::Nothing("when a run is saved is no part of its recipe")),
    ("save_strategy", Rule::Nothing("when a run is saved is no part of its recipe")),
    ("save_total_limit", Rule::Nothing("when a run is saved is no part of its recipe")),
    ("eval_steps", Rule::Nothing("`eval.evaluations` is how often a run measures held-out loss")),
    ("data_collator", Rule::Nothing("which tokens bear loss is `packing.loss_on`: all or answers")),
    ("neftune_noise_alpha", Rule::Nothing("noise on embeddings is not here")),
    ("device_map", Rule::Nothing("a run has one device: --device")),
    ("bnb_4bit_quant_storage", Rule::Nothing("packed weights have one form here")),
];

/// Whether an argument has a meaning of its own.
pub(super) fn has_rule(name: &str) -> bool {
    RULES.iter().any(|(known, _)| *known == name)
}

/// What an argument means.
pub(super) fn outcome(name: &str, value: &Literal) -> Outcome {
    if *value == Literal::Computed {
        return Outcome::Left("its value is computed, and only literals are read".into());
    }
    match RULES.into_iter().find(|(known, _)| *known == name).map(|(_, rule)| rule) {
        Some(Rule::Number(key)) => match number(value) {
            Some(number) => set(key, number),
            None => Outcome::Left("it is no number".into()),
        },
        Some(Rule::Whole(key)) => match value {
            Literal::Integer(number) => set(key, *number),
            _ => Outcome::Left("it is no whole number".into()),
        },
        Some(Rule::By(make)) => make(value),
        Some(Rule::Nothing(why)) => Outcome::Left(why.into()),
        None => Outcome::Left("there is nothing like it here".into()),
    }
}

pub(super) fn set(key: &'static str, value: impl Into<Value>) -> Outcome {
    Outcome::Set(vec![(key, value.into())], None)
}

pub(super) fn number(value: &Literal) -> Option<f64> {
    match value {
        Literal::Integer(number) => Some(*number as f64),
        Literal::Number(number) => Some(*number),
        _ => None,
    }
}

/// A folder or a name on the hub, which `--model` takes as well.
fn model(value: &Literal) -> Outcome {
    match value {
        Literal::Text(name) => set("model.path", name.clone()),
        _ => Outcome::Left("it names no model".into()),
    }
}

fn rslora(value: &Literal) -> Outcome {
    match value {
        Literal::Truth(truth) => set("lora.rslora", *truth),
        _ => Outcome::Left("it is neither True nor False".into()),
    }
}

fn targets(value: &Literal) -> Outcome {
    let names: Vec<String> = match value {
        // What PEFT takes for Llama if nothing is said.
        Literal::None => vec!["qv".into()],
        Literal::Text(all) if all == "all-linear" => vec!["all".into()],
        Literal::List(list) => list
            .iter()
            .map(|name| match name {
                Literal::Text(name) => name.clone(),
                other => other.to_string(),
            })
            .collect(),
        other => return Outcome::Left(format!("{other} is no list of linears; patterns are not read")),
    };
    match Target::parse_list(&names.join(",")) {
        Ok(targets) => {
            let names = targets.iter().map(|target| Value::from(target.hf_name())).collect::<Vec<_>>();
            set("lora.targets", names)
        }
        Err(error) => Outcome::Left(error.to_string()),
    }
}

fn text_of(value: &Literal) -> Option<&str> {
    match value {
        Literal::Text(text) | Literal::Name(text) => Some(text),
        _ => None,
    }
}

fn bias(value: &Literal) -> Outcome {
    match text_of(value) {
        Some("none") => Outcome::Same("biases are not trained"),
        _ => Outcome::Left("Llama's linears have no bias to train".into()),
    }
}

fn task(value: &Literal) -> Outcome {
    match text_of(value).map(|task| task.rsplit('.').next().unwrap_or(task)) {
        Some("CAUSAL_LM") => Outcome::Same("the model predicts the next token"),
        _ => Outcome::Left("models here predict the next token, and do nothing else".into()),
    }
}

fn modules(value: &Literal) -> Outcome {
    match value {
        Literal::None => Outcome::Same("nothing but the factors is trained"),
        _ => Outcome::Left("nothing but the factors of linears is trained".into()),
    }
}

/// A schedule and, for the one that never warms up, no warm-up.
fn schedule(value: &Literal) -> Outcome {
    const KEY: &str = "train.schedule";
    match text_of(value).map(|name| name.rsplit('.').next().unwrap_or(name).to_lowercase()).as_deref() {
        Some("linear") => set(KEY, "linear"),
        Some("cosine") => set(KEY, "cosine"),
        Some("constant_with_warmup") => set(KEY, "constant"),
        Some("constant") => Outcome::Set(
            vec![(KEY, "constant".into()), ("train.warmup_ratio", 0.0.into())],
            Some("transformers' constant schedule has no warm-up, whatever else is set"),
        ),
        _ => Outcome::Left("there are constant, linear and cosine schedules here".into()),
    }
}

fn optimizer(value: &Literal) -> Outcome {
    let name = text_of(value).unwrap_or_default();
    let eight_bit = name.contains("8bit");
    let kind = name.trim_start_matches("paged_");
    let known = [
        "adamw",
        "adamw_hf",
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_32bit",
        "adamw_8bit",
        "adamw_bnb_8bit",
    ];
    if !known.contains(&kind) {
        return Outcome::Left("AdamW is the only optimizer here".into());
    }
    let remark = if kind != name {
        Some("nothing is paged: the moments stay on the device, and the plan counts them")
    } else if eight_bit {
        Some("moments in 8 bits")
    } else {
        Some("AdamW with moments in f32")
    };
    Outcome::Set(vec![("train.optimizer.eight_bit", eight_bit.into())], remark)
}

fn seed(value: &Literal) -> Outcome {
    match value {
        Literal::Integer(seed) => Outcome::Set(
            vec![("train.seed", (*seed).into()), ("packing.seed", (*seed).into())],
            Some("it decides other draws than in PyTorch"),
        ),
        _ => Outcome::Left("it is no whole number".into()),
    }
}

fn checkpointing(value: &Literal) -> Outcome {
    match value {
        Literal::Truth(true) => Outcome::Same("every block is computed again in the backward pass"),
        _ => Outcome::Left("every block is computed again in the backward pass, always".into()),
    }
}

/// Tokens of a row; TRL takes 1,024 where nothing is said.
fn row_length(value: &Literal) -> Outcome {
    const KEY: &str = "packing.row_len";
    match value {
        Literal::Integer(length) => set(KEY, *length),
        Literal::None => Outcome::Set(vec![(KEY, 1024.into())], Some("what TRL takes where nothing is said")),
        _ => Outcome::Left("it is no whole number".into()),
    }
}

fn packing(value: &Literal) -> Outcome {
    const KEY: &str = "packing.form";
    match value {
        Literal::Truth(true) => Outcome::Set(
            vec![(KEY, "wrapped".into())],
            Some(
                "documents are cut at rows' ends and see each other; \"isolated\" keeps them whole and apart",
            ),
        ),
        Literal::Truth(false) => Outcome::Set(
            vec![(KEY, "none".into())],
            Some(
                "a row holds one clue and is padded; \"isolated\" fills rows and keeps clues apart, with more clues a step",
            ),
        ),
        _ => Outcome::Left("it is neither True nor False".into()),
    }
}

fn answers_only(value: &Literal) -> Outcome {
    match value {
        Literal::Truth(true) => set("packing.loss_on", "answers"),
        Literal::Truth(false) => set("packing.loss_on", "all"),
        _ => Outcome::Left("it is neither True nor False".into()),
    }
}

fn grouping(value: &Literal) -> Outcome {
    match value {
        Literal::Truth(false) => Outcome::Same("rows come in a shuffled order"),
        _ => Outcome::Left(
            "rows come in a shuffled order; packed ones have nearly the same length anyway".into(),
        ),
    }
}
