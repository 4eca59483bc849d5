//! One block: attention and MLP, each behind a norm and around a residual.

use burn::module::{Module, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor};
use buzzer_kernels::{AttentionIndex, Dropout, KernelBackend, RotaryAngles};

use crate::{LayerCache, LlamaConfig, LoraLinear, Target, Weight};

/// A block of the model.
#[derive(Module, Debug)]
pub struct Block<B: Backend> {
    attention_norm: Param<Tensor<B, 1>>,
    mlp_norm: Param<Tensor<B, 1>>,
    q: LoraLinear<B>,
    k: LoraLinear<B>,
    v: LoraLinear<B>,
    o: LoraLinear<B>,
    gate: LoraLinear<B>,
    up: LoraLinear<B>,
    down: LoraLinear<B>,
    head_dim: usize,
    epsilon: f64,
}

/// What every block of one pass shares.
#[derive(Clone, Debug)]
pub struct BlockContext<B: Backend> {
    /// Rotations of the tokens' positions.
    pub angles: RotaryAngles<B>,
    /// Who may look at whom.
    pub index: AttentionIndex<B>,
}

impl<B: Backend> BlockContext<B> {
    /// Rows `[b, t]` that see only themselves.
    #[must_use]
    pub fn rows(config: &LlamaConfig, documents: Tensor<B, 2, Int>, positions: Tensor<B, 2, Int>) -> Self {
        Self {
            angles: RotaryAngles::new(positions.clone(), config.head_dim, config.rope_theta),
            index: AttentionIndex::rows(documents, positions),
        }
    }

    /// The same context under another backend decorator.
    #[must_use]
    pub fn map<C: Backend>(
        &self,
        floats: impl FnMut(Tensor<B, 3>) -> Tensor<C, 3>,
        ints: impl FnMut(Tensor<B, 2, Int>) -> Tensor<C, 2, Int>,
    ) -> BlockContext<C> {
        BlockContext { angles: self.angles.map(floats), index: self.index.map(ints) }
    }
}

impl<B: Backend> Block<B> {
    /// A block from its two norms `[d]` and a function that gives each linear's weight.
    ///
    /// # Errors
    /// Those of the function.
    pub fn build<E>(
        config: &LlamaConfig,
        attention_norm: Param<Tensor<B, 1>>,
        mlp_norm: Param<Tensor<B, 1>>,
        mut weight: impl FnMut(Target) -> Result<Weight<B>, E>,
    ) -> Result<Self, E> {
        let mut linear = |target| weight(target).map(LoraLinear::new);
        Ok(Self {
            attention_norm,
            mlp_norm,
            q: linear(Target::Q)?,
            k: linear(Target::K)?,
            v: linear(Target::V)?,
            o: linear(Target::O)?,
            gate: linear(Target::Gate)?,
            up: linear(Target::Up)?,
            down: linear(Target::Down)?,
            head_dim: config.head_dim,
            epsilon: config.rms_norm_eps,
        })
    }

    /// One of the linears.
    #[must_use]
    pub fn linear(&self, target: Target) -> &LoraLinear<B> {
        match target {
            Target::Q => &self.q,
            Target::K => &self.k,
            Target::V => &self.v,
            Target::O => &self.o,
            Target::Gate => &self.gate,
            Target::Up => &self.up,
            Target::Down => &self.down,
        }
    }

    /// One of the linears, to change it.
    pub fn linear_mut(&mut self, target: Target) -> &mut LoraLinear<B> {
        match target {
            Target::Q => &mut self.q,
            Target::K => &mut self.k,
            Target::V => &mut self.v,
            Target::O => &mut self.o,
            Target::Gate => &mut self.gate,
            Target::Up => &mut self.up,
            Target::Down => &mut self.down,
        }
    }

    /// The norms `[d]` before attention and before the MLP.
    #[must_use]
    pub fn norms(&self) -> [Tensor<B, 1>; 2] {
        [self.attention_norm.val(), self.mlp_norm.val()]
    }
}

impl<B: KernelBackend> Block<B> {
    /// `x [b, t, d]` to `[b, t, d]`. `dropout` is this block's; each linear draws a mask of its own from it.
    ///
    /// With a cache, keys and values are appended to it and the context's keys are those of the cache.
    #[must_use]
    pub fn forward(
        &self,
        x: Tensor<B, 3>,
        context: &BlockContext<B>,
        dropout: Option<Dropout>,
        cache: Option<&mut LayerCache<B>>,
    ) -> Tensor<B, 3> {
        let [b, t, d] = x.dims();
        let x = x.reshape([b * t, d]);
        let x = x.clone() + self.attention(x, [b, t], context, dropout, cache);
        let x = x.clone() + self.mlp(x, dropout);
        x.reshape([b, t, d])
    }

    fn attention(
        &self,
        x: Tensor<B, 2>,
        [b, t]: [usize; 2],
        context: &BlockContext<B>,
        dropout: Option<Dropout>,
        cache: Option<&mut LayerCache<B>>,
    ) -> Tensor<B, 2> {
        let x = B::rms_norm(x, self.attention_norm.val(), self.epsilon);
        let heads = |target, x: Tensor<B, 2>| {
            let y = self.project(target, x, dropout);
            let [_, width] = y.dims();
            y.reshape([b, t, width / self.head_dim, self.head_dim]).swap_dims(1, 2)
        };
        let q = B::rotary(heads(Target::Q, x.clone()), &context.angles);
        let k = B::rotary(heads(Target::K, x.clone()), &context.angles);
        let v = heads(Target::V, x);
        let (k, v) = match cache {
            Some(cache) => cache.append(k, v, context.index.key_documents.dims()[1]),
            None => (k, v),
        };
        let o = <B as KernelBackend>::attention(q, k, v, &context.index).swap_dims(1, 2);
        let [_, _, h, k] = o.dims();
        self.project(Target::O, o.reshape([b * t, h * k]), dropout)
    }

    fn mlp(&self, x: Tensor<B, 2>, dropout: Option<Dropout>) -> Tensor<B, 2> {
        let x = B::rms_norm(x, self.mlp_norm.val(), self.epsilon);
        let gate = self.project(Target::Gate, x.clone(), dropout);
        let up = self.project(Target::Up, x, dropout);
        self.project(Target::Down, B::swiglu(gate, up), dropout)
    }

    fn project(&self, target: Target, x: Tensor<B, 2>, dropout: Option<Dropout>) -> Tensor<B, 2> {
        self.linear(target).forward(x, dropout.map(|dropout| dropout.derive(target as u64)))
    }
}
