//! One block: attention and MLP, each behind a norm and around a residual.

use burn::module::{Module, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor};
use buzzer_kernels::{
    AttentionIndex, Dropout, Heads, KernelBackend, PagedIndex, Pages, RotaryAngles, RowGroup, StepOperation,
    StepSource, StepTarget,
};

use crate::cache::BlockLoras;
use crate::linear::project;
use crate::{LlamaConfig, Lora, LoraLinear, Target, Weight};

/// A block of the model.
#[derive(Module, Debug)]
pub struct Block<B: Backend> {
    pub(crate) attention_norm: Param<Tensor<B, 1>>,
    pub(crate) mlp_norm: Param<Tensor<B, 1>>,
    q: LoraLinear<B>,
    k: LoraLinear<B>,
    v: LoraLinear<B>,
    o: LoraLinear<B>,
    gate: LoraLinear<B>,
    up: LoraLinear<B>,
    down: LoraLinear<B>,
    head_dim: usize,
    pub(crate) epsilon: f64,
}

/// What every block of one pass shares.
#[derive(Clone, Debug)]
pub struct BlockContext<B: Backend> {
    /// Rotations of the tokens' positions.
    pub angles: RotaryAngles<B>,
    /// Who may look at whom.
    pub index: AttentionIndex<B>,
}

/// Rows that follow each other, and the corrections of this block's linears that they get.
pub(crate) type BlockRows<'a, B> = (usize, &'a BlockLoras<B>);

impl<B: KernelBackend> BlockContext<B> {
    /// Rows `[b, t]` that see only themselves.
    #[must_use]
    pub fn rows(config: &LlamaConfig, documents: Tensor<B, 2, Int>, positions: Tensor<B, 2, Int>) -> Self {
        Self {
            angles: RotaryAngles::new(positions.clone(), config.head_dim, config.rope_theta),
            index: AttentionIndex::rows(documents, positions).prepared(),
        }
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
    /// Rows `x [n, d]` of b rows of t tokens, n = b t, to `[n, d]`. `dropout` is this block's; layers that share an
    /// input share a mask derived from it. The differentiable form.
    #[must_use]
    pub fn forward(
        &self,
        x: Tensor<B, 2>,
        context: &BlockContext<B>,
        dropout: Option<Dropout>,
    ) -> Tensor<B, 2> {
        let residual = x.clone() + self.attention(x, context, dropout);
        let h = B::rms_norm(residual.clone(), self.mlp_norm.val(), self.epsilon);
        let activated = B::swiglu(self.project(&[Target::Gate, Target::Up], h, dropout));
        residual + self.project(&[Target::Down], activated, dropout)
    }

    fn attention(
        &self,
        x: Tensor<B, 2>,
        context: &BlockContext<B>,
        dropout: Option<Dropout>,
    ) -> Tensor<B, 2> {
        let heads = self.heads();
        let h = B::rms_norm(x, self.attention_norm.val(), self.epsilon);
        let rows = self.project(&[Target::Q, Target::K, Target::V], h, dropout);
        let rows = B::rotary(rows, &context.angles, heads.queries + heads.keys);
        let o = B::attention_of_rows(rows, heads, &context.index);
        self.project(&[Target::O], o, dropout)
    }

    /// New tokens `x [n, d]` of sequences whose keys and values lie in pages, to `[n, d]`. For answering: the
    /// corrections are those of the rows' adapters and not the block's own, there is no dropout, and no gradient.
    #[must_use]
    pub(crate) fn forward_paged(
        &self,
        x: Tensor<B, 2>,
        angles: &RotaryAngles<B>,
        index: &PagedIndex<B>,
        adapters: &[BlockRows<'_, B>],
        pages: &mut Pages<B>,
    ) -> Tensor<B, 2> {
        let heads = self.heads();
        let h = B::rms_norm(x.clone(), self.attention_norm.val(), self.epsilon);
        let rows = self.project_groups(&[Target::Q, Target::K, Target::V], h, adapters, None);
        let q = B::paged_store(rows, angles, heads, pages, index);
        let o = B::paged_attention(q, heads, pages, index);
        let residual = self.project_groups(&[Target::O], o, adapters, Some(x));
        let h = B::rms_norm(residual.clone(), self.mlp_norm.val(), self.epsilon);
        let activated = B::swiglu(self.project_groups(&[Target::Gate, Target::Up], h, adapters, None));
        self.project_groups(&[Target::Down], activated, adapters, Some(residual))
    }

    /// [`Self::forward_paged`] for one new token a sequence, all with the same corrections, as operations of a program.
    pub(crate) fn step_operations(&self, loras: &BlockLoras<B>) -> Vec<StepOperation<B>> {
        let linear = |targets: &[Target], source, target| StepOperation::Linear {
            source,
            parts: targets.iter().map(|&own| self.linear(own).part_with(&loras[own as usize])).collect(),
            target,
        };
        let [attention_norm, mlp_norm] = self.norms();
        let joined = StepSource::Residual(attention_norm, self.epsilon);
        let into_mlp = StepSource::Residual(mlp_norm, self.epsilon);
        vec![
            linear(&[Target::Q, Target::K, Target::V], joined, StepTarget::Joined),
            StepOperation::Attention,
            linear(&[Target::O], StepSource::Attention, StepTarget::Residual),
            linear(&[Target::Gate, Target::Up], into_mlp, StepTarget::Activated),
            linear(&[Target::Down], StepSource::Activated, StepTarget::Residual),
        ]
    }

    fn project_groups(
        &self,
        targets: &[Target],
        x: Tensor<B, 2>,
        adapters: &[BlockRows<'_, B>],
        residual: Option<Tensor<B, 2>>,
    ) -> Tensor<B, 2> {
        let weights: Vec<_> = targets.iter().map(|&target| self.linear(target).frozen()).collect();
        let group = |&(rows, loras): &BlockRows<'_, B>| {
            let lora = |&target: &Target| loras[target as usize].as_ref().map(Lora::term);
            RowGroup { rows, loras: targets.iter().map(lora).collect() }
        };
        B::grouped_linear(x, &weights, &adapters.iter().map(group).collect::<Vec<_>>(), residual)
    }

    pub(crate) fn heads(&self) -> Heads {
        let heads = |layer: &LoraLinear<B>| layer.weight.dims()[0] / self.head_dim;
        Heads { queries: heads(&self.q), keys: heads(&self.k), width: self.head_dim }
    }

    fn project(&self, targets: &[Target], x: Tensor<B, 2>, dropout: Option<Dropout>) -> Tensor<B, 2> {
        let layers = targets.iter().map(|&target| self.linear(target)).collect::<Vec<_>>();
        project(&layers, x, mask_of(targets[0], dropout))
    }
}

/// The mask of the input that a linear shares with those that follow it.
pub(crate) fn mask_of(first: Target, dropout: Option<Dropout>) -> Option<Dropout> {
    dropout.map(|dropout| dropout.derive(first as u64))
}
