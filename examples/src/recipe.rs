//! The settings of a fine-tuning run: a named recipe, and flags that override it.

use buzzer::data::{LossOn, Packing};
use buzzer::model::{LoraSettings, ModelError, Target};
use buzzer::text::Template;
use buzzer::train::{OptimizerSettings, ScheduleKind, TrainSettings};
use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::{Failure, PackArgs};

/// A named set of settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    /// For the tiny model that ships with the project: minutes on a processor
    Small,
    /// The settings of the Colab notebooks for Llama-2-7B
    Notebook,
}

/// The optimizer, as an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OptimizerArg {
    /// AdamW with moments in f32: 8 bytes for each trained number
    Adamw,
    /// AdamW with moments in 8 bits: 2 bytes
    Adamw8,
}

/// Flags that override a preset.
#[derive(Args, Clone, Debug)]
pub struct RecipeArgs {
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
    /// Prompt: question, category or chat
    #[arg(long)]
    pub template: Option<Template>,
    /// Decides initial factors, order of rows and dropout masks
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

/// All settings of a run, resolved.
#[derive(Clone, Debug, Serialize)]
pub struct Recipe {
    /// What it started from.
    pub preset: Preset,
    /// LoRA.
    pub lora: LoraSettings,
    /// Optimizer, schedule, batches.
    pub train: TrainSettings,
    /// Tokens of a row.
    pub row_len: usize,
    /// How clues share rows.
    pub packing: Packing,
    /// Which tokens bear loss.
    pub loss_on: LossOn,
    /// The prompt.
    pub template: Template,
    /// A limit on the steps.
    pub steps: Option<u64>,
}

impl Preset {
    fn recipe(self) -> Recipe {
        let all = Target::ALL.to_vec();
        let train = TrainSettings {
            batch_rows: 4,
            accumulation: 1,
            epochs: 1.0,
            learning_rate: 2e-4,
            schedule: ScheduleKind::Cosine,
            warmup_ratio: 0.03,
            optimizer: OptimizerSettings { weight_decay: 1e-3, ..OptimizerSettings::default() },
            dropout: 0.1,
            seed: 0,
            checkpoint_every: 1,
        };
        let notebook = Recipe {
            preset: self,
            lora: LoraSettings { rank: 64, alpha: 16.0, rslora: false, targets: all },
            train,
            row_len: 1024,
            packing: Packing::Isolated,
            loss_on: LossOn::All,
            template: Template::Question,
            steps: None,
        };
        match self {
            Self::Notebook => notebook,
            Self::Small => Recipe {
                lora: LoraSettings { rank: 32, alpha: 64.0, ..notebook.lora },
                train: TrainSettings {
                    epochs: 2.5,
                    learning_rate: 3e-3,
                    warmup_ratio: 0.1,
                    optimizer: OptimizerSettings { max_grad_norm: Some(1.0), ..OptimizerSettings::default() },
                    dropout: 0.0,
                    ..notebook.train
                },
                row_len: 128,
                loss_on: LossOn::Answers,
                ..notebook
            },
        }
    }
}

impl RecipeArgs {
    /// The preset with the flags applied.
    ///
    /// # Errors
    /// If a linear has no such name, or a number makes no sense.
    pub fn resolve(&self, sample_model: bool) -> Result<Recipe, Failure> {
        let usual = if sample_model { Preset::Small } else { Preset::Notebook };
        let mut recipe = self.preset.unwrap_or(usual).recipe();
        set(&mut recipe.lora.rank, self.rank);
        set(&mut recipe.lora.alpha, self.alpha);
        set(&mut recipe.lora.targets, self.targets.as_deref().map(Target::parse_list).transpose()?);
        set(&mut recipe.train.dropout, self.dropout);
        set(&mut recipe.train.learning_rate, self.lr);
        set(&mut recipe.train.schedule, self.schedule);
        set(&mut recipe.train.warmup_ratio, self.warmup);
        set(&mut recipe.train.optimizer.weight_decay, self.weight_decay);
        let limit = self.max_grad_norm.map(|norm| (norm > 0.0).then_some(norm));
        set(&mut recipe.train.optimizer.max_grad_norm, limit);
        let eight_bit = self.optimizer.map(|optimizer| optimizer == OptimizerArg::Adamw8);
        set(&mut recipe.train.optimizer.eight_bit, eight_bit);
        set(&mut recipe.train.batch_rows, self.batch);
        set(&mut recipe.train.accumulation, self.accumulate);
        set(&mut recipe.train.checkpoint_every, self.checkpoint_every);
        set(&mut recipe.train.epochs, self.epochs);
        set(&mut recipe.row_len, self.row_len);
        set(&mut recipe.packing, self.packing);
        set(&mut recipe.loss_on, self.loss_on);
        set(&mut recipe.template, self.template);
        recipe.train.seed = self.seed;
        recipe.steps = self.steps;
        recipe.lora.check()?;
        recipe.train.check()?;
        if recipe.row_len < 2 {
            let found = recipe.row_len.to_string();
            return Err(ModelError::Lora {
                what: "a row length (--row-len)",
                found,
                choose: "two tokens or more",
            }
            .into());
        }
        Ok(recipe)
    }
}

fn set<T>(setting: &mut T, flag: Option<T>) {
    if let Some(value) = flag {
        *setting = value;
    }
}

impl Recipe {
    /// The part that packing needs.
    #[must_use]
    pub fn pack_args(&self) -> PackArgs {
        PackArgs {
            packing: self.packing,
            row_len: self.row_len,
            loss_on: self.loss_on,
            seed: self.train.seed,
        }
    }

    /// Shortens the run to the limit on its steps, if there is one: the schedule then ends there.
    pub fn limit_steps(&mut self, rows: usize) {
        if let Some(steps) = self.steps {
            let wanted = steps * self.train.rows_per_step() as u64;
            self.train.epochs = self.train.epochs.min(wanted as f64 / rows.max(1) as f64);
        }
    }
}
