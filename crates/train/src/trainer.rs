//! The loop over packed rows: one optimizer step at a time, so that a program decides what happens between steps.

use std::collections::BTreeMap;
use std::time::Instant;

use burn::module::Param;
use burn::tensor::{DType, Tensor};
use buzzer_data::{Batch, Cursor, PackedRow, RowStream};
use buzzer_kernels::{AdamW, AdamWState, AdamWState8, Dropout, KernelBackend};
use buzzer_model::{Llama, Lora, Target};
use serde::{Deserialize, Serialize};

use crate::gradients::scalar;
use crate::step::{PassSettings, locate_non_finite, target_losses};
use crate::{DeviceBatch, LoraGradients, LossScale, Schedule, ScheduleKind, TrainError, backward_by_blocks};

mod state;

pub use state::{HostMoments, Progress, TrainerState};

/// AdamW's numbers and the clipping in front of it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct OptimizerSettings {
    /// β₁.
    pub beta_1: f64,
    /// β₂.
    pub beta_2: f64,
    /// ε.
    pub epsilon: f64,
    /// λ.
    pub weight_decay: f64,
    /// The largest gradient norm, if there is to be one; written as 0 where there is not, since TOML has no null.
    #[serde(with = "limit")]
    pub max_grad_norm: Option<f64>,
    /// Keep the moments in 8 bits: 2 bytes for each trained number instead of 8.
    #[serde(default)]
    pub eight_bit: bool,
}

/// A limit as a number, 0 for none.
mod limit {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(limit: &Option<f64>, to: S) -> Result<S::Ok, S::Error> {
        limit.unwrap_or(0.0).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<f64>, D::Error> {
        let limit = Option::<f64>::deserialize(from)?;
        Ok(limit.filter(|&limit| limit != 0.0))
    }
}

impl Default for OptimizerSettings {
    fn default() -> Self {
        Self {
            beta_1: 0.9,
            beta_2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: Some(0.3),
            eight_bit: false,
        }
    }
}

impl OptimizerSettings {
    /// What gradients of this norm are multiplied by: PyTorch's rule, `most / (norm + 1e-6)` where that is below 1.
    #[must_use]
    pub fn clip_factor(&self, norm: f64) -> f64 {
        self.max_grad_norm.map_or(1.0, |most| (most / (norm + 1e-6)).min(1.0))
    }

    /// # Errors
    /// If a number makes no sense.
    pub fn check(&self) -> Result<(), TrainError> {
        let wrong =
            |flag, found: f64, choose| Err(TrainError::Setting { flag, found: found.to_string(), choose });
        let positive = |number: f64| number > 0.0 && number.is_finite();
        // No flag sets these three, so they are called what they are called in a recipe.
        for (setting, beta) in [("beta_1", self.beta_1), ("beta_2", self.beta_2)] {
            if !(0.0..1.0).contains(&beta) {
                return wrong(setting, beta, "a number from 0 up to, but not including, 1");
            }
        }
        if !positive(self.epsilon) {
            return wrong("epsilon", self.epsilon, "a positive number");
        }
        if !(self.weight_decay >= 0.0 && self.weight_decay.is_finite()) {
            return wrong("--weight-decay", self.weight_decay, "0 or a positive number");
        }
        if let Some(most) = self.max_grad_norm.filter(|&most| !positive(most)) {
            return wrong("--max-grad-norm", most, "a positive number, or 0 for no limit");
        }
        Ok(())
    }

    pub(crate) fn at(&self, learning_rate: f64, step: u64) -> AdamW {
        AdamW {
            gradient_scale: 1.0,
            learning_rate,
            beta_1: self.beta_1,
            beta_2: self.beta_2,
            epsilon: self.epsilon,
            weight_decay: self.weight_decay,
            step,
        }
    }
}

/// How to fine-tune.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainSettings {
    /// Rows on the device at a time.
    pub batch_rows: usize,
    /// Batches whose gradients one step adds up.
    pub accumulation: usize,
    /// Passes over the rows; may be a fraction.
    pub epochs: f64,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// What follows the warm-up.
    pub schedule: ScheduleKind,
    /// Share of the steps that warm up.
    pub warmup_ratio: f64,
    /// AdamW and clipping.
    pub optimizer: OptimizerSettings,
    /// Dropout in front of the LoRA factors.
    pub dropout: f64,
    /// Decides the order of the rows and the dropout masks.
    pub seed: u64,
    /// Keep the input of every so many blocks only, and compute those between again: less memory, more work.
    #[serde(default = "one")]
    pub checkpoint_every: usize,
}

fn one() -> usize {
    1
}

/// A mean that is being gathered.
#[derive(Clone, Copy, Debug, Default)]
struct Mean {
    sum: f64,
    count: usize,
}

impl Mean {
    fn add(&mut self, value: f64) {
        self.sum += value;
        self.count += 1;
    }

    fn value(&self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / self.count as f64)
    }
}

/// What one step did.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StepReport {
    /// The step, from 1.
    pub step: u64,
    /// Mean loss over the step's targets, before the step.
    pub loss: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// The learning rate used.
    pub learning_rate: f64,
    /// Tokens without padding.
    pub tokens: usize,
    /// Targets among them.
    pub loss_tokens: usize,
    /// Duration.
    pub seconds: f64,
    /// What the loss was multiplied by for the backward pass; 1 unless computed in f16.
    pub loss_scale: f64,
    /// Whether a gradient left the range of f16, and the factors were left as they were.
    pub skipped: bool,
}

/// The moments of one factor.
#[derive(Clone, Debug)]
enum Moments<B: KernelBackend> {
    Full(AdamWState<B, 2>),
    EightBit(AdamWState8<B>),
}

impl<B: KernelBackend> Moments<B> {
    fn zeros(parameter: &Tensor<B, 2>, eight_bit: bool) -> Self {
        if eight_bit {
            let elements = parameter.dims().iter().product();
            Self::EightBit(AdamWState8::zeros(elements, &parameter.device()))
        } else {
            Self::Full(AdamWState::zeros_like(parameter))
        }
    }

    fn step(self, value: Tensor<B, 2>, gradient: Tensor<B, 2>, settings: &AdamW) -> (Tensor<B, 2>, Self) {
        match self {
            Self::Full(state) => {
                let (value, state) = B::adamw_step(value, gradient, state, settings);
                (value, Self::Full(state))
            }
            Self::EightBit(state) => {
                let (value, state) = B::adamw_step8(value, gradient, state, settings);
                (value, Self::EightBit(state))
            }
        }
    }
}

/// Moments of every LoRA factor.
#[derive(Clone, Debug)]
pub struct LoraOptimizer<B: KernelBackend> {
    settings: OptimizerSettings,
    states: BTreeMap<(usize, Target), [Moments<B>; 2]>,
    /// Steps that changed the factors.
    steps: u64,
}

/// Trains a model's LoRA factors on packed rows.
#[derive(Debug)]
pub struct Trainer<B: KernelBackend> {
    model: Llama<B>,
    rows: Vec<PackedRow>,
    settings: TrainSettings,
    optimizer: LoraOptimizer<B>,
    schedule: Schedule,
    stream: RowStream,
    /// Rows that the rest of the run will take.
    rows_left: usize,
    /// Steps taken.
    step: u64,
    loss_scale: LossScale,
    /// Tokens of the longest row.
    width: usize,
}

impl<B: KernelBackend> LoraOptimizer<B> {
    /// No steps taken yet.
    #[must_use]
    pub fn new(settings: OptimizerSettings) -> Self {
        Self { settings, states: BTreeMap::new(), steps: 0 }
    }

    /// Clips the gradients, changes the model's factors, and returns the norm before clipping.
    pub fn step(&mut self, model: &mut Llama<B>, gradients: LoraGradients<B>, learning_rate: f64) -> f64 {
        self.step_scaled(model, &gradients, learning_rate, 1.0)
    }

    /// [`Self::step`] with gradients of a loss that was multiplied by `loss_scale`; the norm returned is that of the
    /// loss itself. A norm that is no finite number changes nothing.
    pub fn step_scaled(
        &mut self,
        model: &mut Llama<B>,
        gradients: &LoraGradients<B>,
        learning_rate: f64,
        loss_scale: f64,
    ) -> f64 {
        let norm = gradients.norm() / loss_scale;
        if !norm.is_finite() {
            return norm;
        }
        self.steps += 1;
        let gradient_scale = self.settings.clip_factor(norm) / loss_scale;
        let settings = AdamW { gradient_scale, ..self.settings.at(learning_rate, self.steps) };
        B::on_device_thread(&model.device(), || self.step_of_factors(model, gradients, &settings));
        norm
    }

    fn step_of_factors(&mut self, model: &mut Llama<B>, gradients: &LoraGradients<B>, settings: &AdamW) {
        for (&place, gradients) in &gradients.factors {
            let (layer, target) = place;
            // Taken out of the model, so that the factors are held once and change where they lie.
            let linear = model.blocks[layer].linear_mut(target);
            let Some(Lora { a, b, scale }) = linear.lora.take() else { continue };
            let fresh = || [&a, &b].map(|factor| Moments::zeros(&factor.val(), self.settings.eight_bit));
            let [a_moments, b_moments] = self.states.remove(&place).unwrap_or_else(fresh);
            let [a_gradient, b_gradient] = gradients.clone();
            let (a, a_moments) = step_of_factor(a, a_gradient, a_moments, settings);
            let (b, b_moments) = step_of_factor(b, b_gradient, b_moments, settings);
            linear.lora = Some(Lora { a, b, scale });
            self.states.insert(place, [a_moments, b_moments]);
        }
    }
}

fn step_of_factor<B: KernelBackend>(
    factor: Param<Tensor<B, 2>>,
    gradient: Tensor<B, 2>,
    moments: Moments<B>,
    settings: &AdamW,
) -> (Param<Tensor<B, 2>>, Moments<B>) {
    let (id, value, mapper) = factor.consume();
    let (value, moments) = moments.step(value, gradient, settings);
    (Param::from_mapped_value(id, value, mapper), moments)
}

impl TrainSettings {
    /// Rows of one step.
    #[must_use]
    pub fn rows_per_step(&self) -> usize {
        self.batch_rows * self.accumulation
    }

    /// Rows and steps of a whole run over so many packed rows.
    #[must_use]
    pub fn length(&self, rows: usize) -> (usize, u64) {
        let total = (self.epochs * rows as f64).round().max(1.0) as usize;
        (total, total.div_ceil(self.rows_per_step()) as u64)
    }

    /// # Errors
    /// If a number makes no sense.
    pub fn check(&self) -> Result<(), TrainError> {
        let wrong = |flag, found: String, choose| Err(TrainError::Setting { flag, found, choose });
        let positive = |number: f64| number > 0.0 && number.is_finite();
        if self.batch_rows == 0 {
            return wrong("--batch", "0".into(), "one row or more");
        }
        if self.checkpoint_every == 0 {
            return wrong("--checkpoint-every", "0".into(), "one block or more");
        }
        if self.accumulation == 0 {
            return wrong("--accumulate", "0".into(), "one batch or more");
        }
        if !positive(self.epochs) {
            return wrong("--epochs", self.epochs.to_string(), "a positive number");
        }
        if !positive(self.learning_rate) {
            return wrong("--lr", self.learning_rate.to_string(), "a positive number");
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return wrong(
                "--dropout",
                self.dropout.to_string(),
                "a number from 0 up to, but not including, 1",
            );
        }
        if !(0.0..=1.0).contains(&self.warmup_ratio) {
            return wrong("--warmup", self.warmup_ratio.to_string(), "a share from 0 to 1");
        }
        self.optimizer.check()
    }
}

impl<B: KernelBackend> Trainer<B> {
    /// A run at its first step.
    ///
    /// # Errors
    /// If a setting makes no sense, there are no rows, or the model has no LoRA factors.
    pub fn new(model: Llama<B>, rows: Vec<PackedRow>, settings: TrainSettings) -> Result<Self, TrainError> {
        settings.check()?;
        if rows.is_empty() {
            return Err(TrainError::NoRows);
        }
        if model.lora_parameters() == 0 {
            return Err(TrainError::NoFactors);
        }
        let (rows_left, steps) = settings.length(rows.len());
        let warmup = (settings.warmup_ratio * steps as f64).ceil() as u64;
        Ok(Self {
            schedule: Schedule::new(settings.schedule, settings.learning_rate, warmup, steps),
            stream: RowStream::new(rows.len(), settings.seed),
            optimizer: LoraOptimizer::new(settings.optimizer),
            width: rows.iter().map(|row| row.ids.len()).max().unwrap_or(0),
            loss_scale: LossScale::new(model.dtype() == DType::F16),
            model,
            rows,
            settings,
            rows_left,
            step: 0,
        })
    }

    /// Steps of the whole run.
    #[must_use]
    pub fn total_steps(&self) -> u64 {
        self.schedule.total
    }

    /// Steps taken.
    #[must_use]
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// The model as it is now.
    #[must_use]
    pub fn model(&self) -> &Llama<B> {
        &self.model
    }

    /// Ends the run and gives the model back.
    #[must_use]
    pub fn into_model(self) -> Llama<B> {
        self.model
    }

    /// Where the run stands in the packed stream.
    #[must_use]
    pub fn cursor(&self) -> Cursor {
        self.stream.cursor()
    }

    /// Takes one optimizer step; `None` once the run is over.
    ///
    /// In f16 a step whose gradient leaves the dtype's range is skipped, reported as such, and the loss is scaled down.
    ///
    /// # Errors
    /// If the rows have no target, or loss or gradient is no finite number and a smaller scale cannot help. The run then
    /// stands where it stood before the step.
    pub fn step(&mut self) -> Result<Option<StepReport>, TrainError> {
        let (cursor, loss_scale) = (self.cursor(), self.loss_scale);
        self.try_step().inspect_err(|_| {
            self.stream = RowStream::resume(self.rows.len(), cursor);
            self.loss_scale = loss_scale;
        })
    }

    /// [`Self::step`], after an error of which the stream is past the step's rows and the loss's scale has changed.
    fn try_step(&mut self) -> Result<Option<StepReport>, TrainError> {
        let started = Instant::now();
        let count = self.rows_left.min(self.settings.rows_per_step());
        if count == 0 {
            return Ok(None);
        }
        let places = self.stream.next(count);
        let batches: Vec<Batch> = places
            .chunks(self.settings.batch_rows)
            .map(|places| self.collate(&places.iter().map(|&place| &self.rows[place]).collect::<Vec<_>>()))
            .collect();
        let step = self.step + 1;
        let loss_scale = self.loss_scale.value();
        let (loss, gradients) = self.gradients(&batches, step, loss_scale)?;
        let learning_rate = self.schedule.rate(self.step);
        let grad_norm = self.optimizer.step_scaled(&mut self.model, &gradients, learning_rate, loss_scale);
        let skipped = !grad_norm.is_finite();
        if !self.loss_scale.adapt(skipped) {
            let place = gradients.first_non_finite().map_or_else(
                || "the sum over all factors".into(),
                |(layer, target)| format!("{} of block {layer}", target.hf_name()),
            );
            return Err(TrainError::NonFinite { step, what: "gradient norm", value: grad_norm, place });
        }
        self.step = step;
        self.rows_left -= count;
        Ok(Some(StepReport {
            step,
            loss,
            grad_norm,
            learning_rate,
            tokens: batches.iter().map(|batch| batch.tokens).sum(),
            loss_tokens: batches.iter().map(|batch| batch.loss_tokens).sum(),
            seconds: started.elapsed().as_secs_f64(),
            loss_scale,
            skipped,
        }))
    }

    /// One width for all batches: an allocator that reuses memory by size would take more for each new one.
    fn collate(&self, rows: &[&PackedRow]) -> Batch {
        Batch::collate(rows, Some(self.width))
    }

    /// Mean loss and gradients, times `loss_scale`, of all batches of a step.
    fn gradients(
        &self,
        batches: &[Batch],
        step: u64,
        loss_scale: f64,
    ) -> Result<(f64, LoraGradients<B>), TrainError> {
        let device = self.model.device();
        let uploaded: Vec<_> = batches.iter().map(|batch| DeviceBatch::<B>::new(batch, &device)).collect();
        let targets: usize = uploaded.iter().map(|batch| batch.loss_tokens).sum();
        if targets == 0 {
            return Err(TrainError::NoTargets { step });
        }
        let scale = 1.0 / targets as f64;
        let mut sum = LoraGradients { factors: BTreeMap::new() };
        let mut losses = Vec::with_capacity(uploaded.len());
        for (number, batch) in uploaded.iter().enumerate().filter(|(_, batch)| batch.loss_tokens > 0) {
            let settings = PassSettings {
                scale: scale * loss_scale,
                dropout: self.dropout(step, number),
                checkpoint_every: self.settings.checkpoint_every,
                spend_inputs: uploaded.len() == 1,
            };
            let pass = backward_by_blocks(&self.model, batch, &settings);
            losses.push((number, pass.loss));
            sum.add(pass.gradients);
        }
        let mut loss_sum = 0.0;
        for (number, loss) in losses {
            let value = f64::from(scalar(loss));
            if !value.is_finite() {
                let place = locate_non_finite(&self.model, &uploaded[number], self.dropout(step, number));
                return Err(TrainError::NonFinite { step, what: "loss", value, place });
            }
            loss_sum += value;
        }
        Ok((loss_sum * scale, sum))
    }

    fn dropout(&self, step: u64, batch: usize) -> Option<Dropout> {
        let dropout = Dropout { probability: self.settings.dropout, key: self.settings.seed };
        (dropout.probability > 0.0).then(|| dropout.derive(step).derive(batch as u64))
    }

    /// Mean loss over the targets of other rows, or `None` if they have no target.
    #[must_use]
    pub fn evaluate(&self, rows: &[PackedRow]) -> Option<f64> {
        self.evaluate_each(&[rows]).pop().flatten()
    }

    /// Mean loss over the targets of each of several labellings of the same rows, from one pass through the blocks; `None` for
    /// one without a target.
    ///
    /// The head takes as many tokens at a time as have a target under the first, which is best the one that is trained: the
    /// device's memory then holds what it holds in a step.
    #[must_use]
    pub fn evaluate_each(&self, labellings: &[&[PackedRow]]) -> Vec<Option<f64>> {
        let mut means = vec![Mean::default(); labellings.len()];
        let rows = labellings.iter().map(|rows| rows.len()).min().unwrap_or(0);
        for first in (0..rows).step_by(self.settings.batch_rows) {
            let last = rows.min(first + self.settings.batch_rows);
            let collate = |rows: &&[PackedRow]| self.collate(&rows[first..last].iter().collect::<Vec<_>>());
            let batches: Vec<Batch> = labellings.iter().map(collate).collect();
            for (mean, losses) in means.iter_mut().zip(target_losses(&self.model, &batches)) {
                losses.iter().for_each(|&loss| mean.add(loss));
            }
        }
        means.iter().map(Mean::value).collect()
    }
}
