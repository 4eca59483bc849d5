//! Training a small dense model whole, under plain autodiff.
//!
//! It exists so that the base model shipped with this project is made by this project. It trades memory for plainness:
//! every activation is kept. Weights, their gradients and the moments are f32; between embedding and loss everything is computed in
//! the dtype of the settings, to which a weight is cast where it is used. Losses are not scaled, so f16 is out of reach. Weight
//! decay is for matrices only, as usual.

use std::collections::HashMap;
use std::time::Instant;

use burn::backend::Autodiff;
use burn::module::{Module, ModuleMapper, Param, ParamId};
use burn::tensor::backend::AutodiffBackend;
use burn::tensor::{DType, Tensor};
use buzzer_data::Batch;
use buzzer_kernels::{AdamWState, KernelBackend};
use buzzer_model::{BlockContext, Llama, LlamaConfig};

use crate::gradients::scalar;
use crate::{DeviceBatch, OptimizerSettings, Schedule, StepReport, TrainError};

/// How to train.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PretrainSettings {
    /// AdamW and clipping.
    pub optimizer: OptimizerSettings,
    /// The learning rates.
    pub schedule: Schedule,
    /// Decides the initial weights.
    pub seed: u64,
    /// What is computed in: f32 or bf16.
    pub dtype: DType,
}

/// A dense model in training.
#[derive(Debug)]
pub struct Pretrainer<B: KernelBackend> {
    model: Llama<Autodiff<B>>,
    settings: PretrainSettings,
    states: HashMap<ParamId, AdamWState<B, 1>>,
    step: u64,
}

type Grads<B> = <Autodiff<B> as AutodiffBackend>::Gradients;

impl<B: KernelBackend> Pretrainer<B> {
    /// Random weights.
    #[must_use]
    pub fn new(config: &LlamaConfig, settings: PretrainSettings, device: &B::Device) -> Self {
        Self { model: Llama::init(config, settings.seed, device), settings, states: HashMap::new(), step: 0 }
    }

    /// The model without autodiff.
    #[must_use]
    pub fn model(&self) -> Llama<B> {
        use burn::module::AutodiffModule;
        self.model.valid()
    }

    /// The sizes.
    #[must_use]
    pub fn config(&self) -> &LlamaConfig {
        self.model.config()
    }

    /// How it is trained.
    #[must_use]
    pub fn settings(&self) -> &PretrainSettings {
        &self.settings
    }

    /// One step on one batch.
    ///
    /// # Errors
    /// If the batch has no target, or loss or gradient is no finite number.
    pub fn step(&mut self, batch: &Batch) -> Result<StepReport, TrainError> {
        let started = Instant::now();
        let batch = DeviceBatch::<Autodiff<B>>::new(batch, &self.model.device());
        let step = self.step + 1;
        if batch.loss_tokens == 0 {
            return Err(TrainError::NoTargets { step });
        }
        let (loss, mut grads, head) = self.backward(&batch);
        if !loss.is_finite() {
            return Err(TrainError::NonFinite {
                step,
                what: "loss",
                value: loss,
                place: "the whole model".into(),
            });
        }
        let mut gather = Gather::<B> { grads: &mut grads, found: Vec::new() };
        self.model = self.model.clone().map(&mut gather);
        let mut found = gather.found;
        let (owner, head) = (self.head_id(), head.reshape([-1]));
        match found.iter_mut().find(|(id, _)| *id == owner) {
            // A tied head is the embedding, which has a gradient of its own.
            Some((_, embedding)) => embedding.inplace(|embedding| embedding + head),
            None => found.push((owner, head)),
        }
        let grad_norm = self.update(found)?;
        let learning_rate = self.settings.schedule.rate(self.step);
        self.step = step;
        Ok(StepReport {
            step,
            loss,
            grad_norm,
            learning_rate,
            tokens: batch.tokens,
            loss_tokens: batch.loss_tokens,
            seconds: started.elapsed().as_secs_f64(),
            loss_scale: 1.0,
            skipped: false,
        })
    }

    /// Mean loss over the targets of batches that are not learnt, or `None` if they have no target.
    #[must_use]
    pub fn evaluate(&self, batches: impl IntoIterator<Item = Batch>) -> Option<f64> {
        let (mut sum, mut count) = (0.0, 0);
        for batch in batches {
            let batch = DeviceBatch::<Autodiff<B>>::new(&batch, &self.model.device());
            let (hidden, head) = self.hidden(&batch);
            let losses = B::cross_entropy(hidden.inner(), head, batch.targets.inner());
            sum += f64::from(scalar(losses.sum()));
            count += batch.loss_tokens;
        }
        (count > 0).then(|| sum / count as f64)
    }

    /// The parameter that the head is.
    fn head_id(&self) -> ParamId {
        self.model.head.as_ref().unwrap_or(&self.model.embedding).id
    }

    /// What reaches the head `[n, d]`, and the head `[v, d]` in its dtype.
    fn hidden(&self, batch: &DeviceBatch<Autodiff<B>>) -> (Tensor<Autodiff<B>, 2>, Tensor<B, 2>) {
        let (model, dtype) = (&self.model, self.settings.dtype);
        let context = BlockContext::rows(model.config(), batch.documents.clone(), batch.positions.clone());
        let hidden = model.hidden_from(model.embed(batch.ids.clone()).cast(dtype), &context, None);
        (batch.at_head(hidden, |rows| rows), model.head_weight().inner().cast(dtype))
    }

    /// The loss, what autodiff found, and the head's gradient, which the fused loss gives.
    fn backward(&self, batch: &DeviceBatch<Autodiff<B>>) -> (f64, Grads<B>, Tensor<B, 2>) {
        let (hidden, head) = self.hidden(batch);
        let (rows, targets) = (hidden.clone().inner(), batch.targets.clone().inner());
        let scale = 1.0 / batch.loss_tokens as f64;
        let loss = B::cross_entropy_with_gradient(rows, head, targets, scale, true);
        let grads = (hidden * Tensor::from_inner(loss.hidden)).sum().backward();
        let d_head = loss.head.unwrap_or_else(|| self.model.head_weight().inner().zeros_like());
        (f64::from(scalar(loss.loss_sum)) * scale, grads, d_head)
    }

    /// Clips and applies the gradients, which stand in the model's order, so that equal runs sum them alike; their norm before that.
    fn update(&mut self, gradients: Vec<(ParamId, Tensor<B, 1>)>) -> Result<f64, TrainError> {
        let step = self.step + 1;
        let rows = gradients.iter().map(|(_, gradient)| gradient.clone().unsqueeze()).collect();
        let norm = B::sum_of_squares(rows).map_or(0.0, |sum| f64::from(scalar(sum)).sqrt());
        if !norm.is_finite() {
            return Err(TrainError::NonFinite {
                step,
                what: "gradient norm",
                value: norm,
                place: "the whole model".into(),
            });
        }
        let factor = self.settings.optimizer.clip_factor(norm);
        let clipped = |(id, gradient): (ParamId, Tensor<B, 1>)| (id, gradient.mul_scalar(factor));
        let gradients = gradients.into_iter().map(clipped).collect();
        let mut apply = Apply { trainer: self, gradients, step };
        let model = apply.trainer.model.clone().map(&mut apply);
        self.model = model;
        Ok(norm)
    }
}

/// Takes every parameter's gradient out of autodiff's register, in the model's order.
struct Gather<'a, B: KernelBackend> {
    grads: &'a mut Grads<B>,
    found: Vec<(ParamId, Tensor<B, 1>)>,
}

impl<B: KernelBackend> ModuleMapper<Autodiff<B>> for Gather<'_, B> {
    fn map_float<const D: usize>(
        &mut self,
        param: Param<Tensor<Autodiff<B>, D>>,
    ) -> Param<Tensor<Autodiff<B>, D>> {
        if let Some(gradient) = param.val().grad_remove(self.grads) {
            self.found.push((param.id, gradient.reshape([-1])));
        }
        param
    }
}

/// Changes every parameter that has a gradient.
struct Apply<'a, B: KernelBackend> {
    trainer: &'a mut Pretrainer<B>,
    gradients: HashMap<ParamId, Tensor<B, 1>>,
    step: u64,
}

impl<B: KernelBackend> ModuleMapper<Autodiff<B>> for Apply<'_, B> {
    fn map_float<const D: usize>(
        &mut self,
        param: Param<Tensor<Autodiff<B>, D>>,
    ) -> Param<Tensor<Autodiff<B>, D>> {
        let (id, tensor, mapper) = param.consume();
        let Some(gradient) = self.gradients.remove(&id) else {
            return Param::from_mapped_value(id, tensor, mapper);
        };
        let settings = self.trainer.settings;
        let mut adamw = settings.optimizer.at(settings.schedule.rate(self.step - 1), self.step);
        if D == 1 {
            adamw.weight_decay = 0.0;
        }
        let dims = tensor.dims();
        let value = tensor.inner().reshape([-1]);
        let state = self.trainer.states.remove(&id).unwrap_or_else(|| AdamWState::zeros_like(&value));
        let (value, state) = B::adamw_step(value, gradient, state, &adamw);
        self.trainer.states.insert(id, state);
        let tensor = Tensor::from_inner(value.reshape(dims)).require_grad();
        Param::from_mapped_value(id, tensor, mapper)
    }
}
