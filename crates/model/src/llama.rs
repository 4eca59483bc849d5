//! The whole model, in the pieces that training and answering run.

use std::convert::Infallible;

use burn::module::{Module, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Distribution, Int, Tensor, TensorData};
use buzzer_kernels::{
    Dropout, FrozenWeight, KernelBackend, LinearPart, PageFormat, RotaryAngles, StepOperation, StepProgram,
    StepSource, StepTarget,
};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::{
    Block, BlockContext, LlamaConfig, Lora, LoraSet, LoraSettings, PagedCache, PagedPass, Target, Weight,
};

/// A Llama 2 model.
#[derive(Module, Debug)]
pub struct Llama<B: Backend> {
    /// `[v, d]`.
    pub embedding: Param<Tensor<B, 2>>,
    /// The blocks in order.
    pub blocks: Vec<Block<B>>,
    /// `[d]`.
    pub norm: Param<Tensor<B, 1>>,
    /// `[v, d]`; `None` where the head is the embedding.
    pub head: Option<Param<Tensor<B, 2>>>,
    #[module(skip)]
    config: LlamaConfig,
}

impl<B: Backend> Llama<B> {
    /// A model from its parts.
    #[must_use]
    pub fn new(
        config: &LlamaConfig,
        embedding: Param<Tensor<B, 2>>,
        blocks: Vec<Block<B>>,
        norm: Param<Tensor<B, 1>>,
        head: Option<Param<Tensor<B, 2>>>,
    ) -> Self {
        Self { embedding, blocks, norm, head, config: config.clone() }
    }

    /// A dense model with random weights (normal, σ 0.02; norms 1), all of them trainable; f32.
    ///
    /// `seed` decides them on every backend alike, whatever else runs: a backend's own generator is one for the whole
    /// process.
    #[must_use]
    pub fn init(config: &LlamaConfig, seed: u64, device: &B::Device) -> Self {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        let mut normal = |dims| Param::from_tensor(normal(dims, &mut generator, device));
        let ones = || Param::from_tensor(Tensor::ones([config.hidden_size], device));
        let table = [config.vocab_size, config.hidden_size];
        let mut block = || {
            let weight = |target| Ok::<_, Infallible>(Weight::Dense(normal(config.linear_shape(target))));
            match Block::build(config, ones(), ones(), weight) {
                Ok(block) => block,
                Err(never) => match never {},
            }
        };
        let blocks = (0..config.num_hidden_layers).map(|_| block()).collect();
        let head = (!config.tie_word_embeddings).then(|| normal(table));
        Self::new(config, normal(table), blocks, ones(), head)
    }

    /// The sizes.
    #[must_use]
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// Where the model lies.
    #[must_use]
    pub fn device(&self) -> B::Device {
        self.embedding.val().device()
    }

    /// The dtype of the residual stream: that of the embedding.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.embedding.val().dtype()
    }

    /// The head `[v, d]`.
    #[must_use]
    pub fn head_weight(&self) -> Tensor<B, 2> {
        self.head.as_ref().unwrap_or(&self.embedding).val()
    }

    /// Gives the chosen linears of every block fresh corrections, in place of any they had; others lose theirs.
    pub fn add_lora(&mut self, settings: &LoraSettings, seed: u64) {
        let device = self.device();
        for (layer, block) in self.blocks.iter_mut().enumerate() {
            for target in Target::ALL {
                let linear = block.linear_mut(target);
                let stream = (layer * Target::ALL.len() + target as usize) as u64;
                linear.lora = settings
                    .targets
                    .contains(&target)
                    .then(|| Lora::init(linear.weight.dims(), settings, seed, stream, &device));
            }
        }
    }

    /// Every correction with its block and linear, in a fixed order.
    pub fn loras(&self) -> impl Iterator<Item = (usize, Target, &Lora<B>)> {
        self.blocks.iter().enumerate().flat_map(|(layer, block)| {
            let lora = move |target| Some((layer, target, block.linear(target).lora.as_ref()?));
            Target::ALL.into_iter().filter_map(lora)
        })
    }

    /// The model's corrections as a set of their own, for [`Self::hidden_paged`]. No copies.
    #[must_use]
    pub fn lora_set(&self) -> LoraSet<B> {
        let block = |block: &Block<B>| Target::ALL.map(|target| block.linear(target).lora.clone());
        LoraSet { layers: self.blocks.iter().map(block).collect() }
    }

    /// Weights of the corrections.
    #[must_use]
    pub fn lora_parameters(&self) -> usize {
        let count = |tensor: Tensor<B, 2>| tensor.dims().iter().product::<usize>();
        self.loras().map(|(_, _, lora)| count(lora.a.val()) + count(lora.b.val())).sum()
    }

    /// Bytes of the weights on the device, without corrections.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        let size = self.dtype().size();
        let tables = if self.head.is_some() { 2 } else { 1 };
        let norms = (2 * self.blocks.len() + 1) * self.config.hidden_size;
        let dense = tables * self.config.vocab_size * self.config.hidden_size + norms;
        let linears = self
            .blocks
            .iter()
            .flat_map(|block| Target::ALL.map(|target| block.linear(target).weight.bytes()));
        dense * size + linears.sum::<usize>()
    }
}

impl<B: KernelBackend> Llama<B> {
    /// A model for measurements: linears of random values (normal, σ 0.02) packed in four bits with doubly quantized
    /// scales, one at a time, and tables and norms in `dtype`. Which values they are depends on the backend.
    #[must_use]
    pub fn random_frozen(config: &LlamaConfig, dtype: DType, device: &B::Device) -> Self {
        let normal = |dims: [usize; 2]| {
            Tensor::<B, 2>::random(dims, Distribution::Normal(0.0, 0.02), (device, DType::F32))
        };
        let frozen = |tensor: Tensor<B, 2>| Param::from_tensor(tensor.cast(dtype)).set_require_grad(false);
        let ones = || {
            let ones = Tensor::ones([config.hidden_size], (device, dtype));
            Param::from_tensor(ones).set_require_grad(false)
        };
        let block = || {
            let weight = |target| {
                let dense = normal(config.linear_shape(target));
                Ok::<_, Infallible>(Weight::Nf4(B::nf4_quantize(dense, true)))
            };
            match Block::build(config, ones(), ones(), weight) {
                Ok(block) => block,
                Err(never) => match never {},
            }
        };
        let table = [config.vocab_size, config.hidden_size];
        let blocks = (0..config.num_hidden_layers).map(|_| block()).collect();
        let head = (!config.tie_word_embeddings).then(|| frozen(normal(table)));
        Self::new(config, frozen(normal(table)), blocks, ones(), head)
    }

    /// Token ids `[b, t]` to the residual stream `[b t, d]`.
    #[must_use]
    pub fn embed(&self, ids: Tensor<B, 2, Int>) -> Tensor<B, 2> {
        let [b, t] = ids.dims();
        self.embedding.val().select(0, ids.reshape([b * t]))
    }

    /// The final norm of rows `[n, d]`.
    #[must_use]
    pub fn normed(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        B::rms_norm(x, self.norm.val(), self.config.rms_norm_eps)
    }

    /// The final hidden states `[b t, d]` of rows `[b, t]` that see only themselves.
    #[must_use]
    pub fn hidden(
        &self,
        ids: Tensor<B, 2, Int>,
        context: &BlockContext<B>,
        dropout: Option<Dropout>,
    ) -> Tensor<B, 2> {
        self.hidden_from(self.embed(ids), context, dropout)
    }

    /// The same from what [`Self::embed`] gave `[b t, d]`, computed in its dtype.
    #[must_use]
    pub fn hidden_from(
        &self,
        mut x: Tensor<B, 2>,
        context: &BlockContext<B>,
        dropout: Option<Dropout>,
    ) -> Tensor<B, 2> {
        for (layer, block) in self.blocks.iter().enumerate() {
            x = block.forward(x, context, dropout.map(|dropout| dropout.derive(layer as u64)));
        }
        self.normed(x)
    }

    /// The final hidden states `[n, d]` of new tokens, whose keys and values go into their pages of the cache.
    ///
    /// The corrections are those that the pass names, not the model's own.
    ///
    /// # Panics
    /// If ids, sequences and adapters do not have the same number of rows.
    #[must_use]
    pub fn hidden_paged(&self, pass: &PagedPass<'_, B>, cache: &mut PagedCache<B>) -> Tensor<B, 2> {
        let PagedPass { ids, index, adapters } = pass;
        let n = index.rows();
        let of_adapters: usize = adapters.iter().map(|adapter| adapter.rows).sum();
        assert_eq!([ids.len(), of_adapters], [n, n], "rows of ids, adapters and sequences");
        B::on_device_thread(index.device(), || self.pass_paged(pass, cache))
    }

    fn pass_paged(&self, pass: &PagedPass<'_, B>, cache: &mut PagedCache<B>) -> Tensor<B, 2> {
        let PagedPass { ids, index, adapters } = pass;
        let n = index.rows();
        let ids: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
        let angles = RotaryAngles::new(index.positions(), self.config.head_dim, self.config.rope_theta);
        let mut x = self.embed(Tensor::from_data(TensorData::new(ids, [1, n]), index.device()));
        for (layer, (block, pages)) in self.blocks.iter().zip(&mut cache.layers).enumerate() {
            let adapters: Vec<_> =
                adapters.iter().map(|adapter| (adapter.rows, &adapter.loras.layers[layer])).collect();
            x = block.forward_paged(x, &angles, index, &adapters, pages);
        }
        self.normed(x)
    }

    /// [`Self::hidden_paged`] and [`Self::logits`] for one new token a sequence, as a program for
    /// [`KernelBackend::step_runner`]: the corrections are part of it. It goes with the pages of a cache of this model.
    #[must_use]
    pub fn step_program(
        &self,
        loras: &LoraSet<B>,
        page_tokens: usize,
        page_format: PageFormat,
    ) -> StepProgram<B> {
        let blocks = self.blocks.iter().zip(&loras.layers);
        let mut operations: Vec<_> = blocks.flat_map(|(block, loras)| block.step_operations(loras)).collect();
        let head = LinearPart { weight: FrozenWeight::Dense(self.head_weight()), lora: None };
        operations.push(StepOperation::Linear {
            source: StepSource::Residual(self.norm.val(), self.config.rms_norm_eps),
            parts: vec![head],
            target: StepTarget::Logits,
        });
        StepProgram {
            embedding: self.embedding.val(),
            operations,
            heads: self.config.heads(),
            theta: self.config.rope_theta,
            page_tokens,
            page_format,
            context: self.config.max_position_embeddings,
        }
    }

    /// Logits `[n, v]` in f32 of hidden states `[n, d]`.
    #[must_use]
    pub fn logits(&self, hidden: Tensor<B, 2>) -> Tensor<B, 2> {
        let head = self.head_weight();
        if head.is_require_grad() {
            return hidden.clone().matmul(head.cast(hidden.dtype()).transpose()).cast(DType::F32);
        }
        let head = LinearPart { weight: FrozenWeight::Dense(head), lora: None };
        B::qlora_linear(hidden, &[head], None).cast(DType::F32)
    }

    /// Adds every correction into its weight, which becomes dense in the model's dtype.
    pub fn merge_lora(&mut self) {
        let dtype = self.dtype();
        for block in &mut self.blocks {
            for target in Target::ALL {
                let linear = block.linear_mut(target);
                if linear.lora.is_some() {
                    linear.weight = Weight::frozen(linear.merged(dtype));
                    linear.lora = None;
                }
            }
        }
    }
}

/// Numbers with mean 0 and deviation 0.02, by Box and Muller's transformation of two uniform ones each.
fn normal<B: Backend>(dims: [usize; 2], generator: &mut ChaCha8Rng, device: &B::Device) -> Tensor<B, 2> {
    // Above 0, because of the logarithm, and at most 1.
    let mut uniform = || (f64::from(generator.next_u32()) + 1.0) / 4_294_967_296.0;
    let mut value = || 0.02 * (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
    let values: Vec<f32> = (0..dims[0] * dims[1]).map(|_| value() as f32).collect();
    Tensor::from_data(TensorData::new(values, dims), (device, DType::F32))
}
