//! The settings of a fine-tuning run: a preset, a recipe file over it, flags over both.
//!
//! A recipe holds every setting that a run depends on, in sections that belong to the crates which use them. `finetune` writes
//! the whole of it into the run's folder, from where it can be given again. Presets are recipes too, in `examples/recipes`. What
//! it refuses: settings that do not exist, with the nearest that does, and values that make no sense; both with file and line.

mod keys;
mod layers;
mod reader;

use std::path::{Path, PathBuf};

use buzzer::Device;
use buzzer::data::{LossOn, PackOptions, Packing};
use buzzer::model::LoraSettings;
use buzzer::text::Template;
use buzzer::train::{ScheduleKind, TrainError, TrainSettings};
use clap::{ArgMatches, Args, ValueEnum};
use serde::{Deserialize, Serialize};

use self::layers::{Node, Place, Value};
use self::reader::Reader;
use crate::answer::WRITING;
use crate::model::TINY_LLAMA;
use crate::{AnswerArgs, DataArgs, Failure, LimitArgs, ModelArgs, write_bytes};

/// What a run's own recipe is called in its folder.
pub(crate) const RECIPE_FILE: &str = "recipe.toml";
const HEADER: &str = "# All settings of a run of `finetune`, as preset, recipe file and flags made them.\n\
                      # `finetune --recipe` with this file runs it again.\n\n";

/// A named set of settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    /// For the tiny model that ships with the project: minutes on a processor
    Small,
    /// The settings of the Colab notebooks for Llama-2-7B
    Notebook,
    /// For Llama-2-7B and the whole of the game's clues
    Jeopardy,
}

/// The optimizer, as an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OptimizerArg {
    /// AdamW with moments in f32: 8 bytes for each trained number
    Adamw,
    /// AdamW with moments in 8 bits: 2 bytes
    Adamw8,
}

/// Flags that override a preset and a recipe file.
#[derive(Args, Clone, Debug)]
pub struct RecipeArgs {
    /// Recipe to start from; flags override it. Every run writes its own, as recipe.toml
    #[arg(long, value_name = "FILE")]
    pub recipe: Option<PathBuf>,
    /// Settings to start from [default: small for the model that ships with the project, else notebook]
    #[arg(long, value_enum)]
    pub preset: Option<Preset>,
    /// LoRA rank
    #[arg(long, value_name = "R")]
    pub rank: Option<usize>,
    /// LoRA alpha; corrections are scaled by alpha / rank
    #[arg(long, value_name = "A")]
    pub alpha: Option<f64>,
    /// Linears to correct: all, qv, or names like q_proj,v_proj
    #[arg(long, value_name = "LIST")]
    pub targets: Option<String>,
    /// Dropout in front of the LoRA factors
    #[arg(long, value_name = "P")]
    pub dropout: Option<f64>,
    /// Highest learning rate
    #[arg(long, value_name = "RATE")]
    pub lr: Option<f64>,
    /// Learning rate after the warm-up: constant, linear or cosine
    #[arg(long)]
    pub schedule: Option<ScheduleKind>,
    /// Share of the steps that warm up
    #[arg(long, value_name = "SHARE")]
    pub warmup: Option<f64>,
    /// Weight decay
    #[arg(long, value_name = "W")]
    pub weight_decay: Option<f64>,
    /// Largest gradient norm; 0 for no limit
    #[arg(long, value_name = "NORM")]
    pub max_grad_norm: Option<f64>,
    /// How the optimizer holds its moments
    #[arg(long, value_enum)]
    pub optimizer: Option<OptimizerArg>,
    /// Rows on the device at a time
    #[arg(long, value_name = "ROWS")]
    pub batch: Option<usize>,
    /// Batches that one optimizer step adds up
    #[arg(long, value_name = "N")]
    pub accumulate: Option<usize>,
    /// Keep the input of every so many blocks only: less memory, more time
    #[arg(long, value_name = "N")]
    pub checkpoint_every: Option<usize>,
    /// Tokens of a packed row
    #[arg(long, value_name = "N")]
    pub row_len: Option<usize>,
    /// Passes over the training clues; may be a fraction
    #[arg(long, value_name = "N")]
    pub epochs: Option<f64>,
    /// Stop after so many steps; the schedule ends there too
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: Option<u64>,
    /// How clues share rows: isolated, wrapped or none
    #[arg(long)]
    pub packing: Option<Packing>,
    /// Which tokens bear loss: all or answers
    #[arg(long)]
    pub loss_on: Option<LossOn>,
    /// Prompt: question, category or chat for answers; clue for writing clues
    #[arg(long)]
    pub template: Option<Template>,
    /// Decides initial factors, order of rows and dropout masks
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
}

/// When a run looks at itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EvalSettings {
    /// Measurements of the loss on held-out clues during the run.
    pub evaluations: u64,
}

impl Default for EvalSettings {
    fn default() -> Self {
        Self { evaluations: 4 }
    }
}

/// All settings of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// What it started from.
    pub preset: Preset,
    /// Where it runs.
    #[serde(default, with = "as_text")]
    pub device: Device,
    /// The prompt.
    pub template: Template,
    /// A limit on the steps.
    pub steps: Option<u64>,
    /// The base.
    #[serde(default)]
    pub model: ModelArgs,
    /// The clues.
    #[serde(default)]
    pub data: DataArgs,
    /// How clues share rows, and which tokens bear loss.
    pub packing: PackOptions,
    /// LoRA.
    pub lora: LoraSettings,
    /// Optimizer, schedule, batches.
    pub train: TrainSettings,
    /// The loss on held-out clues.
    #[serde(default)]
    pub eval: EvalSettings,
    /// How clues are answered.
    #[serde(default)]
    pub answer: AnswerArgs,
    /// Limits of the run.
    #[serde(default)]
    pub limits: LimitArgs,
}

/// A value as its text.
mod as_text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::Serializer;

    pub(super) fn serialize<T: Display, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(value)
    }

    pub(super) fn deserialize<'de, T, D>(from: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        String::deserialize(from)?.parse().map_err(Error::custom)
    }
}

impl Preset {
    const fn name_and_text(self) -> (&'static str, &'static str) {
        match self {
            Self::Small => ("preset small", include_str!("../../recipes/small.toml")),
            Self::Notebook => ("preset notebook", include_str!("../../recipes/notebook.toml")),
            Self::Jeopardy => ("preset jeopardy", include_str!("../../recipes/jeopardy.toml")),
        }
    }

    fn layer(self) -> Result<Node, Failure> {
        let (name, text) = self.name_and_text();
        Node::parse(text, name)
    }

    /// The one that is named, or the usual one of the model.
    fn choose(settings: &Node, usual: Option<Self>) -> Result<Self, Failure> {
        if let Some(named) = settings.get(PRESET) {
            return Ok(Self::deserialize(Reader::new(named, PRESET))?);
        }
        let model = settings.get("model.path").and_then(Node::text).unwrap_or(TINY_LLAMA);
        let of_model = if ModelArgs::is_sample_path(Path::new(model)) { Self::Small } else { Self::Notebook };
        Ok(usual.unwrap_or(of_model))
    }
}

/// The key of what a recipe starts from.
const PRESET: &str = "preset";

impl Recipe {
    /// The settings that a program's flags and the recipe file among them make. Where neither names a preset, it is the `usual`
    /// one, or that of the model.
    ///
    /// # Errors
    /// If the file cannot be read, or a setting does not exist or makes no sense.
    pub fn resolve(matches: &ArgMatches, usual: Option<Preset>) -> Result<Self, Failure> {
        let flags = keys::flags(matches)?;
        let file = match matches.get_one::<PathBuf>("recipe") {
            Some(path) => Node::read(path)?,
            None => Node::empty(Place::Flag("the command line".into())),
        };
        Self::of_layers(file, flags, usual)
    }

    /// A recipe from a file's text, without flags; `source` is what errors call it.
    ///
    /// # Errors
    /// As [`Recipe::resolve`].
    pub fn parse(text: &str, source: &str) -> Result<Self, Failure> {
        Self::of_layers(Node::parse(text, source)?, Node::empty(Place::Flag("no flag".into())), None)
    }

    fn of_layers(mut file: Node, flags: Node, usual: Option<Preset>) -> Result<Self, Failure> {
        if keys::HELD_OUT.iter().any(|key| flags.get(key).is_some()) {
            keys::HELD_OUT.iter().for_each(|key| file.remove(key));
        }
        let settings = file.overridden_by(flags);
        let preset = Preset::choose(&settings, usual)?;
        let mut settings = preset.layer()?.overridden_by(settings);
        refuse_two_splits(&settings)?;
        settle_writing(&mut settings)?;
        let mut recipe = Self::deserialize(Reader::new(&settings, ""))?;
        recipe.data.settle_split();
        recipe.lora.targets.sort_unstable();
        recipe.lora.targets.dedup();
        recipe.check().map_err(|failure| located(failure, &settings))?;
        Ok(recipe)
    }

    fn check(&self) -> Result<(), Failure> {
        if self.steps == Some(0) {
            let (flag, found) = ("--steps", "0".to_owned());
            return Err(TrainError::Setting { flag, found, choose: "one step or more" }.into());
        }
        self.data.check()?;
        self.packing.check()?;
        self.lora.check()?;
        self.train.check()?;
        self.answer.check()?;
        self.limits.check()
    }

    /// Writes `DIR/recipe.toml`, which holds every setting that is made.
    ///
    /// # Errors
    /// If the file cannot be written, or a seed is too large for TOML.
    pub fn write(&self, dir: &Path) -> Result<PathBuf, Failure> {
        let path = dir.join(RECIPE_FILE);
        write_bytes(&path, self.to_toml()?.as_bytes())?;
        Ok(path)
    }

    fn to_toml(&self) -> Result<String, Failure> {
        let text = toml::to_string(self).map_err(|error| {
            Failure::input(format!("the recipe cannot be written as TOML: {error}; choose seeds below 2^63"))
        })?;
        Ok(format!("{HEADER}{text}"))
    }

    /// Shortens the run to the limit on its steps, if there is one: the schedule then ends there.
    pub fn limit_steps(&mut self, rows: usize) {
        if let Some(steps) = self.steps {
            let wanted = steps * self.train.rows_per_step() as u64;
            self.train.epochs = self.train.epochs.min(wanted as f64 / rows.max(1) as f64);
        }
    }
}

/// Where clues are written, makes the settings of answers that go with it and are not made.
fn settle_writing(settings: &mut Node) -> Result<(), Failure> {
    const TEMPLATE: &str = "template";
    let template = settings.get(TEMPLATE).map(|node| Template::deserialize(Reader::new(node, TEMPLATE)));
    if !template.transpose()?.is_some_and(Template::writes_clues) {
        return Ok(());
    }
    let place = Place::Flag(format!("--{TEMPLATE}").into());
    for (flag, word) in WRITING {
        let key = keys::key_of_flag(flag);
        if let Some(key) = key.filter(|key| settings.get(key).is_none()) {
            settings.set(key, Node { place: place.clone(), value: Value::Word(word.to_owned()) });
        }
    }
    Ok(())
}

/// A date to split by, and another way to split.
fn refuse_two_splits(settings: &Node) -> Result<(), Failure> {
    let [date, rest @ ..] = keys::HELD_OUT;
    let Some(by_date) = settings.get(date) else { return Ok(()) };
    match rest.iter().find_map(|key| settings.get(key).map(|node| (key, node))) {
        Some((key, node)) => Err(Failure::input(format!(
            "{}: {key}: not together with {date} ({}); leave out one of them",
            node.place, by_date.place
        ))),
        None => Ok(()),
    }
}

/// Puts the place of the setting in front that an error begins with.
fn located(failure: Failure, settings: &Node) -> Failure {
    let name = failure.message().split(' ').next().unwrap_or_default();
    match keys::key_of(name).and_then(|key| Some((key, settings.get(key)?))) {
        Some((key, Node { place: place @ Place::Line(..), .. })) => failure.at(&format!("{place}: {key}")),
        _ => failure,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use buzzer::data::{Date, Format};
    use clap::{Command, FromArgMatches};

    use super::*;
    use crate::{DtypeArg, SplitArg};

    /// Every flag that a recipe knows.
    fn command() -> Command {
        let command = RecipeArgs::augment_args(Command::new("test"));
        let command = ModelArgs::augment_args(DataArgs::augment_args(command));
        LimitArgs::augment_args(AnswerArgs::augment_args(command))
    }

    fn resolved(file: &str, flags: &[&str]) -> Result<Recipe, Failure> {
        let matches = command().try_get_matches_from([&["test"], flags].concat()).unwrap();
        Recipe::of_layers(Node::parse(file, "a.toml")?, keys::flags(&matches)?, None)
    }

    #[track_caller]
    fn refused(file: &str, flags: &[&str], words: &[&str]) {
        let message = format!("{:?}", resolved(file, flags).unwrap_err());
        for word in words {
            assert!(message.contains(word), "`{word}` is missing in: {message}");
        }
    }

    /// A recipe in which every setting is made.
    fn full() -> Recipe {
        let mut recipe = resolved("preset = \"jeopardy\"", &[]).unwrap();
        recipe.steps = Some(7);
        recipe.model.tokenizer = Some("tokenizer.json".into());
        recipe.model.dtype = Some(DtypeArg::Bf16);
        recipe.limits.memory_limit = Some(12.5);
        recipe.data = DataArgs {
            data: "clues.csv".into(),
            format: Some(Format::JsonLines),
            question_column: Some("q".into()),
            answer_column: Some("a".into()),
            category_column: Some("c".into()),
            air_date_column: Some("d".into()),
            limit: Some(3),
            eval_from: Date::new(2011, 1, 2),
            split: Some(SplitArg::AirDate),
            eval_fraction: Some(0.1),
            split_seed: 5,
            eval_limit: 9,
        };
        recipe
    }

    #[test]
    fn presets_are_whole_recipes_and_say_who_they_are() {
        for preset in [Preset::Small, Preset::Notebook, Preset::Jeopardy] {
            let (source, text) = preset.name_and_text();
            let recipe = Recipe::parse(text, source).unwrap();
            assert_eq!(recipe.preset, preset);
            // A setting that may be missing would come back from the preset when a run that lacks it is repeated.
            let left_out =
                [recipe.steps.is_some(), recipe.model.dtype.is_some(), recipe.data.limit.is_some()];
            assert_eq!(left_out, [false; 3]);
        }
        let notebook = resolved("preset = \"notebook\"", &[]).unwrap();
        assert_eq!(
            (notebook.lora.rank, notebook.train.rows_per_step(), notebook.packing.row_len),
            (64, 4, 1024)
        );
    }

    #[test]
    fn a_written_recipe_reads_back_the_same() {
        let mut recipe = full();
        // One rules out the other.
        recipe.data.split = None;
        recipe.data.eval_fraction = None;
        recipe.train.optimizer.max_grad_norm = None;
        recipe.train.learning_rate = 1.0 / 3.0;
        let text = recipe.to_toml().unwrap();
        assert_eq!(Recipe::parse(&text, "recipe.toml").unwrap(), recipe, "{text}");
    }

    #[test]
    fn every_setting_has_a_flag_or_is_known_to_have_none() {
        fn dotted(prefix: &str, table: &toml::Table, keys: &mut BTreeSet<String>) {
            for (name, value) in table {
                let key = format!("{prefix}{name}");
                match value {
                    toml::Value::Table(inner) => dotted(&format!("{key}."), inner, keys),
                    _ => drop(keys.insert(key)),
                }
            }
        }
        let mut found = BTreeSet::new();
        dotted("", &toml::from_str(&full().to_toml().unwrap()).unwrap(), &mut found);
        let known: BTreeSet<String> = keys::all_keys().into_iter().map(str::to_owned).collect();
        assert_eq!(found, known);
    }

    #[test]
    fn defaults_of_flags_are_those_of_recipes() {
        let matches = command().try_get_matches_from(["test"]).unwrap();
        assert_eq!(DataArgs::from_arg_matches(&matches).unwrap(), DataArgs::default());
        assert_eq!(ModelArgs::from_arg_matches(&matches).unwrap(), ModelArgs::default());
        assert_eq!(AnswerArgs::from_arg_matches(&matches).unwrap(), AnswerArgs::default());
        assert_eq!(LimitArgs::from_arg_matches(&matches).unwrap(), LimitArgs::default());
    }

    #[test]
    fn flags_override_the_file_and_the_file_its_preset() {
        let file =
            "preset = \"notebook\"\n[lora]\nrank = 8\nalpha = 4\n[train.optimizer]\nmax_grad_norm = 0\n";
        let flags = ["--rank", "2", "--seed", "9", "--targets", "qv", "--optimizer", "adamw8"];
        let recipe = resolved(file, &flags).unwrap();
        assert_eq!((recipe.lora.rank, recipe.lora.alpha), (2, 4.0));
        assert_eq!((recipe.train.seed, recipe.packing.seed, recipe.train.epochs), (9, 9, 1.0));
        assert_eq!(recipe.lora.targets.len(), 2);
        assert_eq!((recipe.train.optimizer.max_grad_norm, recipe.train.optimizer.eight_bit), (None, true));
        assert_eq!(resolved(file, &["--preset", "small"]).unwrap().preset, Preset::Small);
        let own = resolved("[model]\npath = \"elsewhere\"", &[]).unwrap();
        assert_eq!(own.preset, Preset::Notebook);
        assert_eq!(resolved("", &[]).unwrap().preset, Preset::Small);
    }

    #[test]
    fn clues_are_written_at_length_and_at_random_unless_something_else_is_said() {
        let answer = |file, flags: &[&str]| resolved(file, flags).unwrap().answer;
        let written = answer("", &["--template", "clue"]);
        assert_eq!((written.max_new_tokens, written.temperature), (80, 0.8));
        assert_eq!(answer("template = \"clue\"", &[]), written);
        assert_eq!(answer("template = \"clue\"\n[answer]\ntemperature = 0\n", &[]).temperature, 0.0);
        assert_eq!(answer("", &["--template", "clue", "--max-new-tokens", "9"]).max_new_tokens, 9);
        assert_eq!(answer("", &["--template", "chat"]), AnswerArgs::default());
        // The flags of programs without a recipe say the same.
        let matches = command().try_get_matches_from(["test", "--template", "clue"]).unwrap();
        assert_eq!(AnswerArgs::from_arg_matches(&matches).unwrap(), written);
    }

    #[test]
    fn how_clues_are_held_out_is_one_choice() {
        let by_date = "[data]\neval_from = 2006-01-01\n";
        let data = resolved(by_date, &["--eval-fraction", "0.2"]).unwrap().data;
        assert_eq!((data.eval_from, data.eval_fraction), (None, Some(0.2)));
        refused(&format!("{by_date}split = \"hash\"\n"), &[], &["a.toml line 3", "data.split", "line 2"]);
        // What was left to the program is written down.
        assert!(resolved("", &[]).unwrap().data.eval_from.is_some());
        let own = resolved("[data]\nfile = \"own.csv\"", &[]).unwrap().data;
        assert_eq!((own.eval_from, own.eval_fraction), (None, Some(0.05)));
    }

    #[test]
    fn settings_that_do_not_exist_are_named_with_what_was_meant() {
        refused("[lora]\nrnak = 4\n", &[], &["a.toml line 2", "`rnak` in [lora]", "`rank`"]);
        let nested = "[train]\nepochs = 1\n[train.optimizer]\n\nbeta1 = 0.5\n";
        refused(nested, &[], &["a.toml line 5", "`beta1` in [train.optimizer]", "`beta_1`"]);
        refused("[train]\nrank = 4\n", &[], &["a.toml line 2", "`rank` in `[lora]`"]);
        refused("[train]\nlr = 1e-4\n", &[], &["`learning_rate` in `[train]`"]);
        refused("[optimiser]\nx = 1\n", &[], &["a.toml line 1", "at the top", "`optimizer` in `[train]`"]);
        refused("\nzzzzzzzz = 1\n", &[], &["a.toml line 2", "packing, lora, train"]);
        refused("[lora]\nzzzzzzz = 1\n", &[], &["it takes: rank, alpha, rslora, targets"]);
    }

    #[test]
    fn values_that_make_no_sense_are_named_with_their_place() {
        refused("[lora]\nrank = \"8\"\n", &[], &["a.toml line 2: lora.rank", "string \"8\"", "usize"]);
        refused("[lora]\nrank = -8\n", &[], &["a.toml line 2: lora.rank", "`-8`"]);
        refused("[lora]\nrank = 0\n", &[], &["a.toml line 2: lora.rank", "0 is not possible", "from 1 on"]);
        refused("[lora]\ntargets = [\"lm_head\"]\n", &[], &["a.toml line 2", "`lm_head`", "down_proj"]);
        refused("lora = 3\n", &[], &["a.toml line 1: lora", "integer `3`"]);
        refused(
            "\n[train]\nschedule = \"step\"\n",
            &[],
            &["a.toml line 3: train.schedule", "`step`", "cosine"],
        );
        refused("[train.optimizer]\nbeta_2 = 1.5\n", &[], &["a.toml line 2: train.optimizer.beta_2", "1.5"]);
        refused("[packing]\nrow_len = 1\n", &[], &["a.toml line 2: packing.row_len", "two tokens"]);
        refused(
            "[answer]\ncache_dtype = \"int4\"\n",
            &[],
            &["a.toml line 2: answer.cache_dtype", "`int4`", "compute", "int8"],
        );
        refused("[answer]\ntop_p = 0\n", &[], &["a.toml line 2: answer.top_p"]);
        refused("[limits]\nmemory_limit = 0\n", &[], &["a.toml line 2: limits.memory_limit"]);
        refused("[data]\neval_fraction = 1\n", &[], &["a.toml line 2: data.eval_fraction"]);
        refused("[data]\neval_from = \"soon\"\n", &[], &["a.toml line 2: data.eval_from", "`soon`"]);
        refused("device = \"abacus\"\n", &[], &["a.toml line 1: device", "abacus", "cpu"]);
        refused(
            "preset = \"smal\"\n",
            &[],
            &["a.toml line 1: preset", "`smal`", "small, notebook, jeopardy"],
        );
        // A flag's own mistake is not blamed on the file.
        refused("[lora]\nrank = 8\n", &["--rank", "0"], &["--rank 0 is not possible"]);
    }
}
