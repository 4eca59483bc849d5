//! A block's backward pass by hand, from its input: run it again, keep what the gradients need, and walk back.
//!
//! ```text
//! forward   h = norm(x)    r = x + o(attention(rotary(q, k, v (h))))    m = norm(r)    y = r + down(swiglu(gate, up (m)))
//! backward  y's gradient is r's too; down, swiglu, gate and up, norm give the rest of r's; o, attention, rotary, q, k and v,
//!           norm the rest of x's
//! ```
//!
//! The result of `down` is never computed again. Autodiff would give the same numbers (the tests of `buzzer-train` hold
//! them against each other); by hand every tensor is given up where it is used last, gradients are added where they
//! lie, and the host does less. What it refuses: gradients for the weights and norms, which are frozen.

use burn::tensor::Tensor;
use buzzer_kernels::qlora_linear::{Gradients, Input, Upstream};
use buzzer_kernels::{Attended, Dropout, InputGradient, KernelBackend, LinearPart, Projection, Spent};

use crate::block::mask_of;
use crate::{Block, BlockContext, Target};

/// Linears that share an input.
const GROUPS: [&[Target]; 4] =
    [&[Target::Q, Target::K, Target::V], &[Target::O], &[Target::Gate, Target::Up], &[Target::Down]];

/// What a block's backward pass gives.
#[derive(Debug)]
pub struct BlockGradients<B: KernelBackend> {
    /// For the block's input `[n, d]`, if it was asked for.
    pub x: Option<Tensor<B, 2>>,
    /// For A `[r, in]` and B `[out, r]` of every corrected linear; f32.
    pub factors: Vec<(Target, [Tensor<B, 2>; 2])>,
}

/// The attention half of a block.
struct Attention<B: KernelBackend> {
    dropped: Tensor<B, 2>,
    u: Option<Tensor<B, 2>>,
    rows: Tensor<B, 2>,
    attended: Attended<B>,
    dropped_o: Tensor<B, 2>,
    u_o: Option<Tensor<B, 2>>,
    residual: Tensor<B, 2>,
}

/// The MLP half of a block up to its gate.
struct Mlp<B: KernelBackend> {
    dropped: Tensor<B, 2>,
    u: Option<Tensor<B, 2>>,
    gate_up: Tensor<B, 2>,
}

/// One block on one batch.
struct Pass<'a, B: KernelBackend> {
    block: &'a Block<B>,
    context: &'a BlockContext<B>,
    dropout: Option<Dropout>,
}

impl<B: KernelBackend> Block<B> {
    /// The block's result for rows `x [n, d]`, as [`Block::forward`] without autodiff.
    #[must_use]
    pub fn run(&self, x: Tensor<B, 2>, context: &BlockContext<B>, dropout: Option<Dropout>) -> Tensor<B, 2> {
        let pass = Pass { block: self, context, dropout };
        let residual = pass.attention(x).residual;
        let Mlp { gate_up, .. } = pass.mlp(residual.clone());
        let (x, dropped) = B::swiglu_dropout(gate_up, pass.mask(3), pass.rank(3));
        pass.project(3, Input { x, dropped, residual: Some(residual) }).y
    }

    /// The residual stream between the block's halves `[n, d]`.
    #[must_use]
    pub fn run_attention(
        &self,
        x: Tensor<B, 2>,
        context: &BlockContext<B>,
        dropout: Option<Dropout>,
    ) -> Tensor<B, 2> {
        Pass { block: self, context, dropout }.attention(x).residual
    }

    /// Gradients for the block's factors and, if `with_x`, for its input `x [n, d]`, given the one of its result. The
    /// memory of x is offered for gradients to come.
    #[must_use]
    pub fn backward(
        &self,
        x: Tensor<B, 2>,
        context: &BlockContext<B>,
        dropout: Option<Dropout>,
        grad: Tensor<B, 2>,
        with_x: bool,
        spent: &mut Spent<B>,
    ) -> BlockGradients<B> {
        let pass = Pass { block: self, context, dropout };
        let mut backward = Backward { pass: &pass, factors: Vec::new(), spent };
        let attention = pass.attention(x.clone());
        let mlp = pass.mlp(attention.residual.clone());
        let d_residual = backward.mlp(mlp, attention.residual.clone(), grad);
        let d_x = backward.attention(attention, x.clone(), d_residual, with_x);
        let factors = backward.factors;
        spent.offer(x);
        BlockGradients { x: d_x, factors }
    }
}

impl<B: KernelBackend> Pass<'_, B> {
    fn mask(&self, group: usize) -> Option<Dropout> {
        mask_of(GROUPS[group][0], self.dropout)
    }

    /// Σ r of a group: the columns of its u.
    fn rank(&self, group: usize) -> usize {
        let loras = GROUPS[group].iter().filter_map(|&target| self.block.linear(target).lora.as_ref());
        loras.map(|lora| lora.a.val().dims()[0]).sum()
    }

    fn parts(&self, group: usize) -> Vec<LinearPart<B>> {
        GROUPS[group].iter().map(|&target| self.block.linear(target).part()).collect()
    }

    fn project(&self, group: usize, input: Input<B>) -> Projection<B> {
        B::qlora_project(input, &self.parts(group))
    }

    fn attention(&self, x: Tensor<B, 2>) -> Attention<B> {
        let heads = self.block.heads();
        let (norm, epsilon) = (self.block.attention_norm.val(), self.block.epsilon);
        let (h, dropped) = B::rms_norm_dropout(x.clone(), norm, epsilon, self.mask(0), self.rank(0));
        let Projection { y, u } = self.project(0, Input { x: h, dropped: dropped.clone(), residual: None });
        let rows = B::rotary(y, &self.context.angles, heads.queries + heads.keys);
        let [n, _] = rows.dims();
        let [q, k, v] = heads.split(rows.clone(), self.context.index.query_documents.dims());
        let attended = <B as KernelBackend>::attention(q, k, v, &self.context.index);
        let o = attended.o.clone().swap_dims(1, 2).reshape([n, heads.queries * heads.width]);
        let dropped_o = self.mask(1).map_or(o.clone(), |mask| B::dropout(o.clone(), mask));
        let input = Input { x: o.into(), dropped: dropped_o.clone(), residual: Some(x) };
        let Projection { y: residual, u: u_o } = self.project(1, input);
        Attention { dropped, u, rows, attended, dropped_o, u_o, residual }
    }

    fn mlp(&self, residual: Tensor<B, 2>) -> Mlp<B> {
        let (norm, epsilon) = (self.block.mlp_norm.val(), self.block.epsilon);
        let (h, dropped) = B::rms_norm_dropout(residual, norm, epsilon, self.mask(2), self.rank(2));
        let Projection { y: gate_up, u } =
            self.project(2, Input { x: h, dropped: dropped.clone(), residual: None });
        Mlp { dropped, u, gate_up }
    }
}

/// The way back of a pass.
struct Backward<'a, B: KernelBackend> {
    pass: &'a Pass<'a, B>,
    factors: Vec<(Target, [Tensor<B, 2>; 2])>,
    spent: &'a mut Spent<B>,
}

impl<B: KernelBackend> Backward<'_, B> {
    /// Keeps the factors' gradients and returns the input's.
    fn project(
        &mut self,
        group: usize,
        dropped: Tensor<B, 2>,
        upstream: Upstream<B>,
    ) -> Option<InputGradient<B>> {
        let (parts, mask) = (self.pass.parts(group), self.pass.mask(group));
        let Gradients { x, factors } = B::qlora_linear_backward(dropped, &parts, mask, upstream, self.spent);
        let corrected = GROUPS[group].iter().filter(|&&target| self.pass.block.linear(target).lora.is_some());
        self.factors.extend(corrected.copied().zip(factors));
        x
    }

    /// The gradient at the residual stream between the halves.
    fn mlp(&mut self, mlp: Mlp<B>, residual: Tensor<B, 2>, grad: Tensor<B, 2>) -> Tensor<B, 2> {
        let Mlp { dropped, u, gate_up } = mlp;
        let dropped_activated = B::swiglu_dropped(gate_up.clone(), self.pass.mask(3));
        let down = Upstream { grad: grad.clone(), u: None, with_x: true };
        let Some(d_activated) = self.project(3, dropped_activated, down) else { return grad };
        let d_gate_up = B::swiglu_backward(gate_up, d_activated);
        let Some(dh) = self.project(2, dropped, Upstream { grad: d_gate_up, u, with_x: true }) else {
            return grad;
        };
        let block = self.pass.block;
        let (norm, epsilon) = (block.mlp_norm.val(), block.epsilon);
        B::rms_norm_backward_residual(residual, norm, epsilon, dh, grad)
    }

    /// The gradient at the block's input.
    fn attention(
        &mut self,
        attention: Attention<B>,
        x: Tensor<B, 2>,
        grad: Tensor<B, 2>,
        with_x: bool,
    ) -> Option<Tensor<B, 2>> {
        let Attention { dropped, u, rows, attended, dropped_o, u_o, residual } = attention;
        drop(residual);
        let heads = self.pass.block.heads();
        let upstream = Upstream { grad: grad.clone(), u: u_o, with_x: true };
        let d_o = self.project(1, dropped_o, upstream)?;
        let [b, h, t, k] = attended.o.dims();
        let d_o = d_o.sum().reshape([b, t, h, k]).swap_dims(1, 2);
        let [n, width] = rows.dims();
        let qkv = heads.split(rows, [b, t]);
        let d_rows = B::attention_backward(qkv, attended, &self.pass.context.index, d_o).reshape([n, width]);
        let d_rows = B::rotary_backward(d_rows, &self.pass.context.angles, heads.queries + heads.keys);
        let dh = self.project(0, dropped, Upstream { grad: d_rows, u, with_x })?;
        let block = self.pass.block;
        let (norm, epsilon) = (block.attention_norm.val(), block.epsilon);
        Some(B::rms_norm_backward_residual(x, norm, epsilon, dh, grad))
    }
}
