//! From keyword arguments to a recipe, with an account of each.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::Serialize;
use serde_json::Value as Json;
use toml::{Table, Value};

use super::python::{Argument, Literal, Place, Script};
use super::rules::{
    CALLS, DEFAULTS, OBJECTS, Outcome, QUANTIZATION, SFT, TRAINING, has_rule, number, outcome, set,
};
use crate::{Failure, Recipe};

/// The preset under an imported recipe.
const PRESET: &str = "notebook";

/// An argument that became settings, or needs none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Taken {
    /// Where it stands in the source; none for a default of its library.
    pub place: Option<String>,
    /// Its name and value.
    pub argument: String,
    /// The settings, or why none is needed.
    pub means: String,
}

/// An argument without a counterpart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Left {
    /// Where it stands in the source; none for a default of its library.
    pub place: Option<String>,
    /// Its name and value.
    pub argument: String,
    /// Why.
    pub why: String,
}

/// A recipe from somebody else's script.
#[derive(Debug)]
pub(crate) struct Import {
    /// The recipe file's text, with the account as comments.
    pub recipe: String,
    /// What was understood.
    pub taken: Vec<Taken>,
    /// What was not.
    pub left: Vec<Left>,
}

/// Reads a Python file, a notebook (`.ipynb`) or JSON of arguments and makes a recipe of it.
///
/// # Errors
/// If the file cannot be read or parsed, has none of the arguments, or gives a run settings that make no sense.
pub(crate) fn import_recipe(path: &Path) -> Result<Import, Failure> {
    let fault = |message: String| Failure::input(format!("{}: {message}", path.display()));
    let text = fs::read_to_string(path).map_err(|error| fault(error.to_string()))?;
    let mut script = Script::default();
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("ipynb") => read_notebook(&text, &mut script).map_err(fault)?,
        Some("json") => read_json(&text, &mut script).map_err(fault)?,
        _ => script.read(&text, None, &CALLS).map_err(|place| fault(never_closed(place)))?,
    }
    let mut account = Account::default();
    account.arguments(&script);
    if account.taken.is_empty() && account.left.is_empty() {
        return Err(fault(format!(
            "none of {} is called here, and no argument of theirs is set",
            CALLS.join(", ")
        )));
    }
    account.finish(path)
}

fn never_closed(place: Place) -> String {
    format!("{place}: a text is never closed; give a file that Python can read")
}

fn read_notebook(text: &str, script: &mut Script) -> Result<(), String> {
    let notebook: Json = serde_json::from_str(text).map_err(|error| format!("no notebook: {error}"))?;
    let cells = notebook["cells"].as_array().ok_or("no notebook: it has no cells")?;
    for (number, cell) in (1..).zip(cells).filter(|(_, cell)| cell["cell_type"] == "code") {
        let source = match &cell["source"] {
            Json::Array(lines) => lines.iter().filter_map(Json::as_str).collect(),
            source => source.as_str().unwrap_or_default().to_owned(),
        };
        script.read(&source, Some(number), &CALLS).map_err(never_closed)?;
    }
    Ok(())
}

fn read_json(text: &str, script: &mut Script) -> Result<(), String> {
    let json: Json = serde_json::from_str(text).map_err(|error| format!("no JSON: {error}"))?;
    let Json::Object(_) = json else { return Err("no object of arguments".into()) };
    flatten(&json, text, script);
    Ok(())
}

/// The members of an object and of those inside it, as arguments.
fn flatten(json: &Json, text: &str, script: &mut Script) {
    for (name, value) in json.as_object().into_iter().flatten() {
        if value.is_object() {
            flatten(value, text, script);
            continue;
        }
        // The parser keeps no places; a name stands once in such a file.
        let line = 1 + text.lines().position(|line| line.contains(&format!("\"{name}\""))).unwrap_or(0);
        let place = Place { cell: None, line };
        script.arguments.push(Argument { place, name: name.clone(), value: literal(value) });
    }
}

fn literal(json: &Json) -> Literal {
    match json {
        Json::Null => Literal::None,
        Json::Bool(truth) => Literal::Truth(*truth),
        Json::String(text) => Literal::Text(text.clone()),
        Json::Array(list) => Literal::List(list.iter().map(literal).collect()),
        Json::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(whole), _) => Literal::Integer(whole),
            (None, Some(number)) => Literal::Number(number),
            (None, None) => Literal::Computed,
        },
        Json::Object(_) => Literal::Computed,
    }
}

/// Settings so far, and what became of each argument.
#[derive(Default)]
struct Account {
    settings: BTreeMap<&'static str, Value>,
    taken: Vec<(Option<Place>, Taken)>,
    left: Vec<(Option<Place>, Left)>,
}

/// Arguments that mean something only together.
const JOINT: [&str; 13] = [
    "load_in_4bit",
    "use_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "use_nested_quant",
    "bnb_4bit_compute_dtype",
    "fp16",
    "bf16",
    "torch_dtype",
    "max_steps",
    "warmup_steps",
    "lr_scheduler_type",
];

/// An argument and where it stands, if anywhere.
#[derive(Clone)]
struct Given {
    place: Option<Place>,
    value: Literal,
}

impl Account {
    fn arguments(&mut self, script: &Script) {
        let loose = script.loose_variables().filter(is_known);
        let mut joint: BTreeMap<String, Given> = BTreeMap::new();
        let all = script.arguments.iter().cloned().chain(loose);
        for Argument { place, name, value } in all.filter(|argument| !is_object(argument)) {
            let given = Given { place: Some(place), value };
            if JOINT.contains(&name.as_str()) && given.value != Literal::Computed {
                joint.insert(name, given);
            } else {
                self.add(&name, &given, outcome(&name, &given.value));
            }
        }
        self.defaults(script, &joint);
        self.length(&joint);
        self.quantization(script, &joint);
        self.dtype(&joint);
        // Last, for one of them has no warm-up, whatever was set.
        if let Some(given) = joint.get("lr_scheduler_type") {
            self.add("lr_scheduler_type", given, outcome("lr_scheduler_type", &given.value));
        } else if script.calls.contains(TRAINING) || script.calls.contains(SFT) {
            let linear = Given { place: None, value: Literal::Text("linear".into()) };
            self.add("lr_scheduler_type", &linear, set("train.schedule", "linear"));
        }
    }

    fn add(&mut self, name: &str, given: &Given, outcome: Outcome) {
        let at = given.place;
        let place = at.map(|place| place.to_string());
        let argument = format!("{name} = {}", given.value);
        match outcome {
            Outcome::Set(settings, remark) => {
                let made: Vec<String> =
                    settings.iter().map(|(key, value)| format!("{key} = {value}")).collect();
                let remark = remark.map(|remark| format!(" ({remark})")).unwrap_or_default();
                self.taken.push((at, Taken { place, argument, means: made.join(", ") + &remark }));
                self.settings.extend(settings);
            }
            Outcome::Same(means) => self.taken.push((at, Taken { place, argument, means: means.to_owned() })),
            Outcome::Left(why) => self.left.push((at, Left { place, argument, why })),
        }
    }

    /// What the libraries take for arguments that a call leaves out.
    fn defaults(&mut self, script: &Script, joint: &BTreeMap<String, Given>) {
        let is_given = |name: &str| script.arguments.iter().any(|argument| argument.name == name);
        for (call, name, value) in DEFAULTS {
            let is_called = script.calls.contains(call) || (call == TRAINING && script.calls.contains(SFT));
            let replaced = name == "warmup_ratio" && joint.contains_key("warmup_steps");
            let renamed = name == "max_seq_length" && is_given("max_length");
            if !is_called || is_given(name) || replaced || renamed {
                continue;
            }
            let outcome = if name == "learning_rate" && script.calls.contains(SFT) {
                Outcome::Left("it is left out, and what TRL takes then depends on its version".into())
            } else {
                outcome(name, &value)
            };
            self.add(name, &Given { place: None, value }, outcome);
        }
    }

    /// A limit on the steps, and a warm-up that is counted in steps.
    fn length(&mut self, joint: &BTreeMap<String, Given>) {
        let steps = |name: &str| joint.get(name).and_then(|given| number(&given.value));
        let limit = steps("max_steps").filter(|&steps| steps >= 1.0);
        if let Some(given) = joint.get("max_steps") {
            let outcome = match limit {
                Some(steps) => set("steps", steps as i64),
                None => Outcome::Same("the epochs decide"),
            };
            self.add("max_steps", given, outcome);
        }
        if let Some(given) = joint.get("warmup_steps") {
            let outcome = match (steps("warmup_steps"), limit) {
                (Some(0.0), _) => set("train.warmup_ratio", 0.0),
                (Some(warmup), Some(limit)) => set("train.warmup_ratio", warmup / limit),
                _ => Outcome::Left("a warm-up is a share of the steps here: set train.warmup_ratio".into()),
            };
            self.add("warmup_steps", given, outcome);
        }
    }

    fn quantization(&mut self, script: &Script, joint: &BTreeMap<String, Given>) {
        const KEY: &str = "model.quantization";
        let one_of = |names: &[&'static str]| {
            names.iter().find_map(|name| joint.get(*name).map(|given| (*name, given.clone())))
        };
        let double = one_of(&["bnb_4bit_use_double_quant", "use_nested_quant"]);
        let is_double = double.as_ref().is_some_and(|(_, given)| given.value == Literal::Truth(true));
        let form = if is_double { "nf4-double" } else { "nf4" };
        if let Some((name, given)) = one_of(&["load_in_4bit", "use_4bit"]) {
            let outcome = match given.value {
                Literal::Truth(true) => set(KEY, form),
                _ => set(KEY, "none"),
            };
            self.add(name, &given, outcome);
        }
        if let Some((name, given)) = double {
            let same = if is_double { "scales in 8 bits: nf4-double" } else { "scales in f32: nf4" };
            self.add(name, &given, Outcome::Same(same));
        }
        if let Some(given) = joint.get("load_in_8bit") {
            let outcome = match given.value {
                Literal::Truth(false) => Outcome::Same("weights are not held in 8 bits"),
                _ => Outcome::Left("weights are held in 4 bits or dense here".into()),
            };
            self.add("load_in_8bit", given, outcome);
        }
        let absent = Given { place: None, value: Literal::Text("fp4".into()) };
        let kind = joint.get("bnb_4bit_quant_type").cloned();
        if let Some(given) = kind.or_else(|| script.calls.contains(QUANTIZATION).then_some(absent)) {
            let outcome = match &given.value {
                Literal::Text(kind) if kind == "nf4" => Outcome::Same("four bits are NF4 here"),
                _ => Outcome::Left("four bits are NF4 here, and nothing else".into()),
            };
            self.add("bnb_4bit_quant_type", &given, outcome);
        }
    }

    /// The dtype of computation: that of the trainer if it names one, else that of the packed weights.
    fn dtype(&mut self, joint: &BTreeMap<String, Given>) {
        const KEY: &str = "model.dtype";
        let is_on = |name: &str| joint.get(name).is_some_and(|given| given.value == Literal::Truth(true));
        let mixed = if is_on("bf16") {
            Some("bf16")
        } else if is_on("fp16") {
            Some("f16")
        } else {
            None
        };
        for (name, dtype) in [("bf16", "bf16"), ("fp16", "f16")] {
            let Some(given) = joint.get(name) else { continue };
            let outcome = match (is_on(name), mixed) {
                (true, Some(mixed)) if mixed == dtype => set(KEY, dtype),
                (true, _) => Outcome::Left("bf16 is taken, which is on as well".into()),
                (false, _) => Outcome::Same("another dtype decides, or the device's own"),
            };
            self.add(name, given, outcome);
        }
        for name in ["bnb_4bit_compute_dtype", "torch_dtype"] {
            let Some(given) = joint.get(name) else { continue };
            let outcome = match (dtype_of(&given.value), mixed) {
                (_, Some(_)) => {
                    Outcome::Left("the trainer's own dtype is taken: all is computed in one here".into())
                }
                (Some(dtype), None) => set(KEY, dtype),
                (None, None) => Outcome::Left("it is none of float32, float16 and bfloat16".into()),
            };
            self.add(name, given, outcome);
        }
    }

    fn finish(self, path: &Path) -> Result<Import, Failure> {
        let source = path.display();
        let (taken, left) = (in_order(self.taken), in_order(self.left));
        let mut text = format!("# A recipe made from {source} by `import-recipe`.\n#\n");
        let at = |place: &Option<String>| place.clone().unwrap_or_else(|| "left out, so".into());
        text += "# No counterpart:\n";
        for Left { place, argument, why } in &left {
            text += &format!("#   {}: {argument}: {why}\n", at(place));
        }
        text += "#\n# Taken:\n";
        for Taken { place, argument, means } in &taken {
            text += &format!("#   {}: {argument}: {means}\n", at(place));
        }
        let settings = toml::to_string(&nested(&self.settings)).map_err(|error| {
            Failure::input(format!("{source}: its settings cannot be written as TOML: {error}"))
        })?;
        text += &format!("\npreset = \"{PRESET}\"\n\n{settings}");
        Recipe::parse(&text, &format!("the recipe made from {source}"))?;
        Ok(Import { recipe: text, taken, left })
    }
}

/// By place in the source; what is left out there comes last.
fn in_order<T>(mut listed: Vec<(Option<Place>, T)>) -> Vec<T> {
    listed.sort_by_key(|(place, _)| (place.is_none(), *place));
    listed.into_iter().map(|(_, entry)| entry).collect()
}

fn is_object(argument: &Argument) -> bool {
    OBJECTS.contains(&argument.name.as_str())
}

/// Whether a variable that no call was given is named like an argument. A single letter may be anything.
fn is_known(argument: &Argument) -> bool {
    let name = argument.name.as_str();
    name.len() > 1 && (JOINT.contains(&name) || has_rule(name))
}

fn dtype_of(value: &Literal) -> Option<&'static str> {
    let (Literal::Text(name) | Literal::Name(name)) = value else { return None };
    match name.rsplit('.').next()? {
        "float32" => Some("f32"),
        "float16" | "half" => Some("f16"),
        "bfloat16" => Some("bf16"),
        _ => None,
    }
}

/// Dotted keys as tables in tables.
fn nested(settings: &BTreeMap<&'static str, Value>) -> Table {
    let mut root = Table::new();
    settings.iter().for_each(|(key, value)| insert(&mut root, key, value));
    root
}

fn insert(table: &mut Table, key: &str, value: &Value) {
    match key.split_once('.') {
        None => drop(table.insert(key.to_owned(), value.clone())),
        Some((section, rest)) => {
            if let Value::Table(inner) = table.entry(section).or_insert_with(|| Table::new().into()) {
                insert(inner, rest, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use buzzer::data::{LossOn, Packing};
    use buzzer::model::Target;
    use buzzer::train::ScheduleKind;

    use super::*;
    use crate::{DtypeArg, QuantizationArg};

    fn imported(name: &str, text: &str) -> Result<Import, Failure> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        import_recipe(&path)
    }

    fn recipe(import: &Import) -> Recipe {
        Recipe::parse(&import.recipe, "imported").unwrap()
    }

    /// Place and reason of what has no counterpart.
    fn left<'a>(import: &'a Import, name: &str) -> Option<(Option<&'a str>, &'a str)> {
        let left = import.left.iter().find(|left| left.argument.starts_with(&format!("{name} = ")))?;
        Some((left.place.as_deref(), &left.why))
    }

    const SCRIPT: &str = r#"
base = "someone/llama"          # a variable that is no argument
rank, width = 8, 9
lora_r = 24
half = "float16"
tuned = LoraConfig(r=lora_r, lora_alpha=12, lora_dropout=0.2, bias="none", task_type="CAUSAL_LM")
packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                            bnb_4bit_compute_dtype=getattr(torch, half), bnb_4bit_use_double_quant=False)
how = TrainingArguments(
    output_dir="./out", per_device_train_batch_size=2, gradient_accumulation_steps=3, num_train_epochs=2,
    learning_rate=3e-4, lr_scheduler_type="constant", warmup_ratio=0.03, optim="paged_adamw_32bit",
    fp16=False, bf16=True, group_by_length=True, max_grad_norm=0.3, max_steps=-1, weight_decay=0.001,
    report_to="tensorboard",
)
SFTTrainer(model, args=how, peft_config=tuned, dataset_text_field="text", max_seq_length=None, packing=False)
"#;

    #[test]
    fn a_script_becomes_a_recipe() {
        let import = imported("train.py", SCRIPT).unwrap();
        let recipe = recipe(&import);
        assert_eq!((recipe.lora.rank, recipe.lora.alpha, recipe.train.dropout), (24, 12.0, 0.2));
        // What PEFT takes where no linear is named.
        assert_eq!(recipe.lora.targets, [Target::Q, Target::V]);
        assert_eq!(recipe.model.quantization, QuantizationArg::Nf4);
        assert_eq!(recipe.model.dtype, Some(DtypeArg::Bf16));
        assert_eq!((recipe.train.batch_rows, recipe.train.accumulation, recipe.train.epochs), (2, 3, 2.0));
        assert_eq!((recipe.train.schedule, recipe.train.warmup_ratio), (ScheduleKind::Constant, 0.0));
        assert_eq!((recipe.train.learning_rate, recipe.train.optimizer.eight_bit), (3e-4, false));
        assert_eq!(recipe.train.optimizer.max_grad_norm, Some(0.3));
        assert_eq!((recipe.packing.packing, recipe.packing.row_len), (Packing::None, 1024));
        assert_eq!((recipe.train.seed, recipe.steps), (42, None));
    }

    #[test]
    fn what_has_no_counterpart_is_listed_with_place_and_reason() {
        let import = imported("train.py", SCRIPT).unwrap();
        let reason = |name: &str| left(&import, name).unwrap();
        assert_eq!(reason("output_dir").0, Some("line 10"));
        assert_eq!(reason("group_by_length").0, Some("line 12"));
        assert!(reason("report_to").1.contains("metrics.jsonl"));
        assert!(reason("bnb_4bit_compute_dtype").1.contains("computed"));
        assert!(left(&import, "peft_config").is_none(), "it is read where it is made");
        assert!(
            import.recipe.contains("# No counterpart:") && import.recipe.contains("line 12: group_by_length")
        );
        let taken = |name: &str| import.taken.iter().find(|taken| taken.argument.starts_with(name)).unwrap();
        assert!(taken("optim =").means.contains("nothing is paged"));
        assert!(taken("packing =").means.contains("isolated"));
        assert_eq!(taken("target_modules").place, None);
        assert!(import.taken.iter().all(|taken| !taken.argument.starts_with("base")));
    }

    #[test]
    fn variables_alone_are_taken_too() {
        let import = imported(
            "settings.py",
            "model_name = \"org/name\"\nlora_r = 4\nuse_4bit = True\nuse_nested_quant = True\nr = 3\n",
        )
        .unwrap();
        let recipe = recipe(&import);
        assert_eq!((recipe.lora.rank, recipe.model.quantization), (4, QuantizationArg::Nf4Double));
        assert_eq!(recipe.model.model, Path::new("org/name"));
        assert_eq!(import.taken.len(), 4);
    }

    #[test]
    fn notebooks_are_read_cell_by_cell() {
        let notebook = serde_json::json!({ "cells": [
            { "cell_type": "markdown", "source": ["r = 1"] },
            { "cell_type": "code", "source": ["%pip install x\n", "rate = 1e-5\n"] },
            { "cell_type": "code", "source": "c = SFTConfig(\n learning_rate=rate, completion_only_loss=True, max_length=256, max_steps=40, warmup_steps=4, neftune_noise_alpha=5)" },
        ] });
        let import = imported("train.ipynb", &notebook.to_string()).unwrap();
        let recipe = recipe(&import);
        assert_eq!((recipe.train.learning_rate, recipe.packing.row_len), (1e-5, 256));
        assert_eq!((recipe.packing.loss_on, recipe.steps), (LossOn::Answers, Some(40)));
        assert_eq!((recipe.train.warmup_ratio, recipe.train.schedule), (0.1, ScheduleKind::Linear));
        assert_eq!(left(&import, "neftune_noise_alpha").unwrap().0, Some("cell 3, line 2"));
    }

    #[test]
    fn json_of_arguments_is_read() {
        let json = "{\n \"lora\": {\"r\": 16, \"target_modules\": [\"q_proj\", \"model.layers.0.mlp.up_proj\"]},\n \"optim\": \"adamw_bnb_8bit\",\n \"lr_scheduler_type\": \"polynomial\"}";
        let import = imported("arguments.json", json).unwrap();
        let recipe = recipe(&import);
        assert_eq!(recipe.lora.targets, [Target::Q, Target::Up]);
        assert!(recipe.lora.rank == 16 && recipe.train.optimizer.eight_bit);
        assert_eq!(left(&import, "lr_scheduler_type").unwrap().0, Some("line 4"));
    }

    #[test]
    fn sources_that_give_no_recipe_are_refused() {
        let refused = |name: &str, text: &str, words: &[&str]| {
            let message = format!("{:?}", imported(name, text).unwrap_err());
            words
                .iter()
                .for_each(|word| assert!(message.contains(word), "`{word}` is missing in: {message}"));
        };
        refused("a.py", "print('nothing')", &["a.py", "LoraConfig"]);
        refused("a.py", "LoraConfig(r='", &["a.py", "line 1", "never closed"]);
        refused("a.ipynb", "{}", &["a.ipynb", "no cells"]);
        refused("a.json", "[1]", &["a.json", "no object"]);
        refused("a.py", "LoraConfig(r=0)", &["the recipe made from", "a.py", "lora.rank"]);
    }
}
