//! What a run will hold in memory, from the same numbers as the run.
//!
//! The plan goes through training steps request by request, as `step.rs` and the operations below it make them, and
//! keeps an allocator's books (`ledger.rs`): on a card a buffer serves requests of its own size only, so what is taken
//! is, for each size, the largest number alive at once. Each function below is one stretch of the step and names its
//! tensors; where the step changes, change the function.
//!
//! Not counted are the context, the compiled kernels, buffers of a few bytes a row, and on the host the program itself
//! and the corpus.

mod ledger;
mod work;

use buzzer_kernels::WORKSPACE_BYTES;
use buzzer_kernels::adamw::BLOCK_8BIT;
use buzzer_kernels::cross_entropy::{CHUNK_ROWS, CHUNK_VALUES};
use buzzer_kernels::nf4::{BLOCK, NESTED_BLOCK};
use buzzer_kernels::qlora_linear::uses_most;
use buzzer_model::{LlamaConfig, LoraSettings, Target};
use serde::{Deserialize, Serialize};

use ledger::{Buffer, Ledger, Part};

pub use work::{StepWork, dense_token_flop, token_flop};

use crate::batch::rows_at_head;

/// The sizes of one batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// b: rows on the device at a time.
    pub batch_rows: usize,
    /// t: tokens of a row.
    pub row_len: usize,
}

impl Shape {
    /// n = b t.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.batch_rows * self.row_len
    }
}

/// How frozen linears are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrozenFormat {
    /// In the dtype that is computed in.
    Dense,
    /// Four bits, scales in f32.
    Nf4,
    /// Four bits, scales in eight.
    Nf4Double,
}

/// Whose allocator and whose operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Fused kernels, and an allocator that reuses memory by exact size.
    Card,
    /// Reference operations, which hold scores of attention, in a process's memory.
    Host,
}

/// All that memory depends on.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanSettings {
    /// Sizes of the model.
    pub config: LlamaConfig,
    /// The corrections.
    pub lora: LoraSettings,
    /// Sizes of a batch.
    pub shape: Shape,
    /// Batches of a step; gradients of two are alive at once where there is more than one.
    pub accumulation: usize,
    /// How linears are held.
    pub frozen: FrozenFormat,
    /// Bytes of an element of the dtype that is computed in.
    pub element: usize,
    /// Whether moments are held in 8 bits.
    pub eight_bit: bool,
    /// Whether inputs of corrections are dropped out.
    pub dropout: bool,
    /// Inputs of every so many blocks are kept.
    pub checkpoint_every: usize,
    /// Share of the tokens that bear loss.
    pub loss_share: f64,
    /// Where it runs.
    pub engine: Engine,
}

/// Bytes by part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPlan {
    /// The frozen model: packed linears, tables, norms.
    pub weights: usize,
    /// LoRA factors, f32.
    pub adapters: usize,
    /// Their gradients, f32.
    pub gradients: usize,
    /// Both moments of AdamW.
    pub optimizer: usize,
    /// One tensor `[b t, d]` a block whose input is kept, the batch itself and its rotations.
    pub block_inputs: usize,
    /// Activations of the block that is run again, and the gradients that flow through it.
    pub block_peak: usize,
    /// The largest weights that are multiplied at once, dense.
    pub dense_weights: usize,
    /// A chunk of logits in f32 and its gradient.
    pub logits_chunk: usize,
    /// Of the library that multiplies.
    pub workspace: usize,
}

impl MemoryPlan {
    /// The plan of a run.
    #[must_use]
    pub fn new(settings: &PlanSettings) -> Self {
        let ledger = Walk::new(settings).run();
        Self {
            weights: ledger.of(Part::Weights),
            adapters: ledger.of(Part::Adapters),
            gradients: ledger.of(Part::Gradients),
            optimizer: ledger.of(Part::Optimizer),
            block_inputs: ledger.of(Part::BlockInputs),
            block_peak: ledger.of(Part::BlockPeak),
            dense_weights: ledger.of(Part::DenseWeights),
            logits_chunk: ledger.of(Part::Logits),
            workspace: ledger.of(Part::Workspace),
        }
    }

    /// The parts with a few words on each, in the order in which a run takes them.
    #[must_use]
    pub fn parts(&self) -> [(&'static str, usize); 9] {
        [
            ("weights, frozen", self.weights),
            ("LoRA factors", self.adapters),
            ("their gradients", self.gradients),
            ("optimizer's moments", self.optimizer),
            ("inputs of all blocks", self.block_inputs),
            ("one block's activations", self.block_peak),
            ("dense copies of weights", self.dense_weights),
            ("a chunk of logits", self.logits_chunk),
            ("library's workspace", self.workspace),
        ]
    }

    /// All parts.
    #[must_use]
    pub fn total(&self) -> usize {
        self.parts().iter().map(|(_, bytes)| bytes).sum()
    }
}

impl PlanSettings {
    /// Numbers that are trained.
    #[must_use]
    pub fn lora_parameters(&self) -> usize {
        self.lora.parameters(&self.config)
    }

    /// Rows of a batch that reach the head.
    #[must_use]
    pub fn head_rows(&self) -> usize {
        let n = self.shape.tokens();
        let targets = (self.loss_share * n as f64).ceil() as usize;
        rows_at_head(targets.max(1), n).unwrap_or(n)
    }

    fn qkv_width(&self) -> usize {
        [Target::Q, Target::K, Target::V].map(|target| self.config.linear_shape(target)[0]).iter().sum()
    }

    fn rank_of(&self, target: Target) -> usize {
        if self.lora.targets.contains(&target) { self.lora.rank } else { 0 }
    }

    fn packed(&self) -> bool {
        self.frozen != FrozenFormat::Dense
    }
}

/// Steps in the making.
struct Walk<'a> {
    settings: &'a PlanSettings,
    ledger: Ledger,
    /// n = b t.
    n: usize,
    /// d.
    d: usize,
    /// Bytes of an element.
    e: usize,
    /// Bytes left of the last block's input that was offered for gradients, and those that gradients asked for since.
    left: usize,
    asked: usize,
}

/// The attention half of a block: kept for the corrections, joined queries, keys and values, output and log sums, what
/// dropout leaves of the output, and the residual stream after it.
struct Attention {
    kept: Vec<Buffer>,
    rows: Buffer,
    o: Buffer,
    log_sum: Buffer,
    dropped_o: Option<Buffer>,
    residual: Buffer,
}

/// The MLP half of a block up to its gate.
struct Mlp {
    kept: Vec<Buffer>,
    gate_up: Buffer,
}

/// Linears that share an input.
const QKV: [Target; 3] = [Target::Q, Target::K, Target::V];
const GATE_UP: [Target; 2] = [Target::Gate, Target::Up];

impl<'a> Walk<'a> {
    fn new(settings: &'a PlanSettings) -> Self {
        let n = settings.shape.tokens();
        let ledger = Ledger::new(settings.engine == Engine::Card);
        Self { settings, ledger, n, d: settings.config.hidden_size, e: settings.element, left: 0, asked: 0 }
    }

    /// A step that is not the first: the moments exist.
    fn run(mut self) -> Ledger {
        self.workspace();
        self.weights();
        self.adapters();
        self.moments();
        let batch = self.batch();
        self.name_parts();
        let first = self.pass();
        if self.settings.accumulation > 1 {
            // A second batch has gradients of its own, which are then added to those of the first.
            let second = self.pass();
            self.ledger.give(second);
        }
        self.ledger.give(first.into_iter().chain(batch));
        self.ledger
    }

    /// Takes what is known to be alive at once and gives it back, part by part: no size gets more buffers by this than the
    /// step needs, and memory is counted as what it is, and not as the passing tensor that had it first.
    fn name_parts(&mut self) {
        let size = self.n * self.d * self.e;
        let inputs: Vec<Buffer> =
            (0..self.checkpoints().len()).map(|_| self.ledger.take(Part::BlockInputs, size)).collect();
        self.ledger.give(inputs);
        let gradients: Vec<Buffer> = self
            .gradient_sizes()
            .into_iter()
            .map(|count| self.ledger.take(Part::Gradients, 4 * count))
            .collect();
        self.ledger.give(gradients);
        self.dense_weights(&[Target::Gate]);
        self.logits(self.settings.head_rows());
        self.ledger.put_rest_under(Part::BlockPeak);
    }

    /// Numbers in the gradients that have memory of their own, buffer by buffer: on a card those of the last block, since
    /// others lie where inputs of finished blocks lay, unless they are to be added up.
    fn gradient_sizes(&self) -> Vec<usize> {
        let block = self.block_gradient_sizes();
        if self.spends_inputs() {
            return block;
        }
        let sets = if self.settings.accumulation > 1 { 2 } else { 1 };
        block.repeat(sets * self.settings.config.num_hidden_layers)
    }

    /// One buffer for each B, and one for all A of linears that share an input.
    fn gradient_sizes_of(&self, targets: &[Target]) -> Vec<usize> {
        let [_, inner, rank] = self.widths(targets);
        let out = |target: &Target| self.settings.config.linear_shape(*target)[0];
        let b = targets.iter().map(|target| out(target) * self.settings.rank_of(*target));
        b.chain([rank * inner]).filter(|&count| count > 0).collect()
    }

    fn rows(&mut self, width: usize) -> Buffer {
        self.ledger.take(Part::BlockPeak, self.n * width * self.e)
    }

    /// Rows with room for u behind them on a card, where such memory comes in multiples of 512 columns.
    fn spacious(&mut self, width: usize, targets: &[Target]) -> Buffer {
        let rank = self.widths(targets)[2];
        let wide = match self.settings.engine {
            Engine::Card if rank > 0 => (width + rank).next_multiple_of(512),
            _ => width,
        };
        self.rows(wide)
    }

    fn keep(&mut self, part: Part, bytes: usize) {
        let _kept = self.ledger.take(part, bytes);
    }

    fn workspace(&mut self) {
        if self.settings.engine == Engine::Card {
            self.keep(Part::Workspace, WORKSPACE_BYTES);
        }
    }

    /// Codes of four bits; scales of blocks of 64 in f32, or in 8 bits with a second level and an offset; tables and norms.
    fn weights(&mut self) {
        let config = &self.settings.config;
        let (layers, table) = (config.num_hidden_layers, config.vocab_size * self.d * self.e);
        let tables = if config.tie_word_embeddings { 1 } else { 2 };
        (0..tables).for_each(|_| self.keep(Part::Weights, table));
        (0..2 * layers + 1).for_each(|_| self.keep(Part::Weights, self.d * self.e));
        for target in (0..layers).flat_map(|_| Target::ALL) {
            let count = self.settings.config.linear_shape(target).iter().product::<usize>();
            let scales = count.div_ceil(BLOCK);
            let sizes = match self.settings.frozen {
                FrozenFormat::Dense => vec![count * self.e],
                FrozenFormat::Nf4 => vec![count / 2, 4 * scales],
                FrozenFormat::Nf4Double => vec![count / 2, scales, 4 * scales.div_ceil(NESTED_BLOCK), 4],
            };
            sizes.into_iter().for_each(|bytes| self.keep(Part::Weights, bytes));
        }
    }

    /// A `[r, in]` and B `[out, r]` of every correction, f32.
    fn factors(&self) -> Vec<usize> {
        let blocks = 0..self.settings.config.num_hidden_layers;
        let corrected = blocks.flat_map(|_| self.settings.lora.targets.clone());
        corrected
            .flat_map(|target| {
                self.settings.config.linear_shape(target).map(|width| width * self.settings.lora.rank)
            })
            .collect()
    }

    fn adapters(&mut self) {
        for count in self.factors() {
            self.keep(Part::Adapters, 4 * count);
        }
    }

    /// m and v in f32, or a byte each with a scale for 256 of them.
    fn moments(&mut self) {
        for count in self.factors() {
            for _ in 0..2 {
                if self.settings.eight_bit {
                    self.keep(Part::Optimizer, count.next_multiple_of(BLOCK_8BIT));
                    self.keep(Part::Optimizer, 4 * count.div_ceil(BLOCK_8BIT));
                } else {
                    self.keep(Part::Optimizer, 4 * count);
                }
            }
        }
    }

    /// Ids, documents, positions and targets, i32; cosines and sines, f32.
    fn batch(&mut self) -> Vec<Buffer> {
        let half = self.settings.config.head_dim / 2;
        [1, 1, 1, 1, half, half].map(|width| self.ledger.take(Part::BlockInputs, 4 * self.n * width)).into()
    }

    /// The blocks whose inputs are kept.
    fn checkpoints(&self) -> Vec<usize> {
        let layers = self.settings.config.num_hidden_layers;
        (0..layers).step_by(self.settings.checkpoint_every.max(1)).collect()
    }

    /// Forward and backward of one batch; gives the gradients.
    fn pass(&mut self) -> Vec<Buffer> {
        let layers = self.settings.config.num_hidden_layers;
        let firsts = self.checkpoints();
        let mut checkpoints = Vec::with_capacity(firsts.len());
        let mut x = self.ledger.take(Part::BlockInputs, self.n * self.d * self.e);
        for layer in 0..layers {
            let y = self.forward(if firsts.contains(&layer) {
                checkpoints.push(x);
                None
            } else {
                Some(x)
            });
            x = y;
        }
        let mut upstream = self.head(x);
        let mut gradients = Vec::new();
        let mut end = layers;
        while let (Some(checkpoint), Some(&first)) = (checkpoints.pop(), firsts.get(checkpoints.len())) {
            let mut inputs = vec![checkpoint];
            for _ in first + 1..end {
                inputs.push(self.forward(None));
            }
            end = first;
            while let Some(input) = inputs.pop() {
                upstream = self.backward(first + inputs.len(), input, upstream, &mut gradients);
            }
        }
        self.ledger.give([upstream]);
        (self.left, self.asked) = (0, 0);
        gradients
    }

    /// A block forward. Its output is new; its input is given up as soon as it is added, unless the caller keeps it.
    fn forward(&mut self, x: Option<Buffer>) -> Buffer {
        let Attention { kept, residual, rows, o, log_sum, dropped_o } = self.attention();
        self.ledger.give(kept.into_iter().chain([rows, o, log_sum]).chain(dropped_o).chain(x));
        let Mlp { kept, gate_up } = self.mlp();
        self.ledger.give(kept);
        let f = self.settings.config.intermediate_size;
        let activated = self.spacious(f, &[Target::Down]);
        let dropped = self.settings.dropout.then(|| self.rows(f));
        self.ledger.give([gate_up]);
        let (y, u) = self.project(&[Target::Down]);
        self.ledger.give(u.into_iter().chain([residual, activated]).chain(dropped));
        y
    }

    /// A normed tensor and what dropout leaves of it, which is kept: itself without dropout.
    fn normed(&mut self, targets: &[Target]) -> (Option<Buffer>, Buffer) {
        let h = self.spacious(self.d, targets);
        if self.settings.dropout { (Some(h), self.rows(self.d)) } else { (None, h) }
    }

    /// The attention half of a block. Kept are what dropout left of the normed input, and u of q, k and v.
    fn attention(&mut self) -> Attention {
        let heads = self.settings.config.num_attention_heads;
        let width = heads * self.settings.config.head_dim;
        let (h, dropped) = self.normed(&QKV);
        let (rows, u) = self.project(&QKV);
        self.ledger.give(h);
        self.scores(3);
        let o = self.rows(width);
        let log_sum = self.ledger.take(Part::BlockPeak, 4 * self.n * heads);
        let dropped_o = self.settings.dropout.then(|| self.rows(width));
        // The output has no room behind it, so it is copied to where there is some.
        let copy = (self.settings.engine == Engine::Card && self.settings.rank_of(Target::O) > 0)
            .then(|| self.spacious(width, &[Target::O]));
        let (residual, u_o) = self.project(&[Target::O]);
        self.ledger.give(copy);
        let kept = [dropped].into_iter().chain(u).chain(u_o).collect();
        Attention { kept, rows, o, log_sum, dropped_o, residual }
    }

    /// The MLP half of a block up to its gate. Kept are what dropout left of the normed input, and u of gate and up.
    fn mlp(&mut self) -> Mlp {
        let (h, dropped) = self.normed(&GATE_UP);
        let (gate_up, u) = self.project(&GATE_UP);
        self.ledger.give(h);
        Mlp { kept: [dropped].into_iter().chain(u).collect(), gate_up }
    }

    /// Final norm, loss and the gradient at the last block's output x.
    fn head(&mut self, x: Buffer) -> Buffer {
        let m = self.settings.head_rows();
        let mut rows = || self.ledger.take(Part::Logits, m * self.d * self.e);
        // Where few tokens bear loss, theirs are copied out of x, and their gradient into a tensor of zeros.
        let selected = (m < self.n).then(&mut rows);
        let [normed, gradient] = [rows(), rows()];
        let everywhere = (m < self.n).then(|| self.rows(self.d));
        self.logits(m);
        self.ledger.give([normed]);
        let dx = self.ledger.take(Part::Logits, m * self.d * self.e);
        self.ledger.give([gradient, x].into_iter().chain(selected));
        match everywhere {
            Some(everywhere) => {
                self.ledger.give([dx]);
                everywhere
            }
            None => dx,
        }
    }

    /// A chunk of logits in f32 and its gradient; the last chunk may be shorter. The reference holds exponentials too.
    fn logits(&mut self, m: usize) {
        let v = self.settings.config.vocab_size;
        let (chunk, gradient) = match self.settings.engine {
            Engine::Card => (CHUNK_ROWS, self.e),
            Engine::Host => ((CHUNK_VALUES / v).max(1), 8),
        };
        for start in [0, m - m % chunk] {
            let count = chunk.min(m - start);
            let chunk = [4, gradient].map(|size| self.ledger.take(Part::Logits, count * v * size));
            self.ledger.give(chunk);
        }
    }

    /// A block forward again, all but its last product, and back: from the gradient at its output to that at its input,
    /// which is given up.
    fn backward(&mut self, layer: usize, x: Buffer, grad: Buffer, gradients: &mut Vec<Buffer>) -> Buffer {
        let attention = self.attention();
        let Mlp { kept, gate_up } = self.mlp();
        let input = self.rows(self.settings.config.intermediate_size);
        let d_activated = self.project_backward(&[Target::Down], Some(input), true, gradients);
        // On a card the gradient is written over the gate.
        let d_gate_up = match self.settings.engine {
            Engine::Card => gate_up,
            Engine::Host => {
                let d_gate_up = self.rows(2 * self.settings.config.intermediate_size);
                self.ledger.give([gate_up]);
                d_gate_up
            }
        };
        self.ledger.give(d_activated);
        // What is kept is the input of gate and up, and u.
        let mut kept = kept.into_iter();
        let d_h = self.project_backward(&GATE_UP, kept.next(), true, gradients);
        let d_residual = self.rows(self.d);
        self.ledger.give(d_h.into_iter().chain([d_gate_up, grad, attention.residual]).chain(kept));

        let parts = self.project_backward(&[Target::O], attention.dropped_o, true, gradients);
        // Both parts of the gradient as one.
        let d_o = self.rows(self.widths(&[Target::O])[1]);
        self.ledger.give(parts);
        let along = self.ledger.take(Part::BlockPeak, 4 * self.n * self.settings.config.num_attention_heads);
        self.scores(4);
        let d_rows = self.rows(self.settings.qkv_width());
        self.ledger.give([d_o, along].into_iter().chain([attention.rows, attention.o, attention.log_sum]));
        let mut kept = attention.kept.into_iter();
        let d_h = self.project_backward(&QKV, kept.next(), layer > 0, gradients);
        let dx = self.rows(self.d);
        self.ledger.give(d_h.into_iter().chain([d_rows, d_residual]).chain(kept));
        self.offer(x, gradients);
        dx
    }

    fn spends_inputs(&self) -> bool {
        let of_block = self.block_gradient_sizes().iter().map(|count| 4 * count).sum();
        self.settings.engine == Engine::Card
            && self.settings.accumulation == 1
            && (self.settings.checkpoint_every == 1 || uses_most(self.n * self.d * self.e, of_block))
    }

    fn block_gradient_sizes(&self) -> Vec<usize> {
        [&QKV[..], &[Target::O], &GATE_UP, &[Target::Down]]
            .map(|group| self.gradient_sizes_of(group))
            .concat()
    }

    /// Memory for a gradient, unless it finds room in the last input that was offered.
    fn gradient(&mut self, bytes: usize) -> Option<Buffer> {
        self.asked += bytes;
        if bytes <= self.left {
            self.left -= bytes;
            return None;
        }
        Some(self.ledger.take(Part::Gradients, bytes))
    }

    /// The input of a finished block, which is given up, or kept as long as the gradients if there is too little room for
    /// those of another block.
    fn offer(&mut self, x: Buffer, gradients: &mut Vec<Buffer>) {
        if self.spends_inputs() && self.left < self.asked {
            self.left = self.n * self.d * self.e;
            gradients.push(x);
        } else {
            self.ledger.give([x]);
        }
        self.asked = 0;
    }

    /// Products with frozen weights and corrections of one input: y and u; in passing, dense weights, and the factors A
    /// in the dtype that is computed in.
    fn project(&mut self, targets: &[Target]) -> (Buffer, Option<Buffer>) {
        let [out, inner, rank] = self.widths(targets);
        let y = self.rows(out);
        let u = (rank > 0).then(|| {
            let a = self.ledger.take(Part::BlockPeak, rank * inner * self.e);
            let u = self.rows(rank);
            self.ledger.give([a]);
            u
        });
        self.dense_weights(targets);
        if self.settings.engine == Engine::Host {
            // The reference adds the correction to a tensor of its own, and then puts the results side by side.
            let copies = [self.rows(out), self.rows(out)];
            self.ledger.give(copies);
        }
        (y, u)
    }

    /// Gradients of the above for x, which is given back in one part or two, and for the factors, which go to `gradients`.
    /// Its input is given up when those exist. One u, that of the last product, is computed anew.
    fn project_backward(
        &mut self,
        targets: &[Target],
        input: Option<Buffer>,
        with_x: bool,
        gradients: &mut Vec<Buffer>,
    ) -> Vec<Buffer> {
        let [_, inner, rank] = self.widths(targets);
        if rank > 0 {
            let base = self.spacious(inner, targets);
            self.dense_weights(targets);
            let mut narrow = vec![self.ledger.take(Part::BlockPeak, rank * inner * self.e)];
            if targets == [Target::Down] {
                narrow.push(self.rows(rank));
            }
            for count in self.gradient_sizes_of(targets) {
                gradients.extend(self.gradient(4 * count));
            }
            self.ledger.give(input);
            let mut dx = vec![base];
            if with_x {
                dx.push(self.rows(inner));
            }
            self.ledger.give(narrow);
            return dx;
        }
        let dx = if with_x { vec![self.rows(inner)] } else { Vec::new() };
        self.dense_weights(targets);
        self.ledger.give(input);
        dx
    }

    /// `Σ out`, `in` and `Σ r`.
    fn widths(&self, targets: &[Target]) -> [usize; 3] {
        let shapes = targets.iter().map(|&target| self.settings.config.linear_shape(target));
        let out = shapes.clone().map(|[out, _]| out).sum();
        let inner = shapes.map(|[_, inner]| inner).max().unwrap_or(0);
        [out, inner, targets.iter().map(|&target| self.settings.rank_of(target)).sum()]
    }

    /// On a card weights that are multiplied at once lie in one buffer with their factors beside them; it has the size of
    /// the largest asked for so far, and smaller ones before it stay taken. The reference unpacks one weight at a time.
    fn dense_weights(&mut self, targets: &[Target]) {
        if !self.settings.packed() {
            return;
        }
        let size = |target| self.settings.config.linear_shape(target).iter().product::<usize>();
        let joined = |group: &[Target]| {
            let [out, inner, rank] = self.widths(group);
            out * (inner + rank).next_multiple_of(8)
        };
        let counts = match self.settings.engine {
            Engine::Card => [&QKV[..], &[Target::O], &GATE_UP, &[Target::Down]].map(joined).to_vec(),
            Engine::Host => targets.iter().map(|&target| size(target)).collect(),
        };
        let mut largest = 0;
        for count in counts {
            if count > largest {
                largest = count;
                let scratch = self.ledger.take(Part::DenseWeights, count * self.e);
                self.ledger.give([scratch]);
            }
        }
    }

    /// `[b, h, t, t]` in f32, so many times; only the reference holds any.
    fn scores(&mut self, times: usize) {
        if self.settings.engine == Engine::Host {
            let Shape { batch_rows, row_len } = self.settings.shape;
            let size = 4 * batch_rows * self.settings.config.num_attention_heads * row_len * row_len;
            let scores = self.ledger.take(Part::BlockPeak, times * size);
            self.ledger.give([scores]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The notebooks' recipe on a card.
    fn notebook(batch_rows: usize, row_len: usize) -> PlanSettings {
        PlanSettings {
            config: LlamaConfig::llama2_7b(),
            lora: LoraSettings { rank: 64, alpha: 16.0, rslora: false, targets: Target::ALL.to_vec() },
            shape: Shape { batch_rows, row_len },
            accumulation: 1,
            frozen: FrozenFormat::Nf4Double,
            element: 2,
            eight_bit: false,
            dropout: true,
            checkpoint_every: 1,
            loss_share: 1.0,
            engine: Engine::Card,
        }
    }

    #[test]
    fn the_notebooks_adapter_has_160_million_weights() {
        let settings = notebook(4, 1024);
        assert_eq!(settings.lora_parameters(), 159_907_840);
        let plan = MemoryPlan::new(&settings);
        assert_eq!(plan.adapters, 4 * 159_907_840);
        assert_eq!(plan.gradients, 4 * 159_907_840 / 32, "others lie where inputs of blocks lay");
        assert_eq!(plan.optimizer, 8 * 159_907_840);
        let packed = 6_476_005_376 / 2 + 6_476_005_376 / 64;
        assert!((packed..packed + 540_000_000).contains(&plan.weights), "{plan:?}");
    }

    #[test]
    fn parts_are_the_tensors_they_name() {
        let plan = MemoryPlan::new(&notebook(4, 1024));
        let inputs = 32 * 4 * 1024 * 4096 * 2;
        assert!((inputs..inputs + 4 * 1024 * 600).contains(&plan.block_inputs), "{plan:?}");
        assert_eq!(
            plan.dense_weights,
            (3 * 4096 * (4096 + 3 * 64) + 2 * 11_008 * (4096 + 2 * 64)) * 2,
            "q, k and v come first"
        );
        assert_eq!(plan.logits_chunk, 1024 * 32_000 * 6);
        assert_eq!(plan.workspace, 32 << 20);
        assert_eq!(plan.total(), plan.parts().iter().map(|(_, bytes)| bytes).sum::<usize>());
    }

    #[test]
    fn memory_follows_the_settings() {
        let total = |change: &dyn Fn(&mut PlanSettings)| {
            let mut settings = notebook(4, 1024);
            change(&mut settings);
            MemoryPlan::new(&settings)
        };
        let base = total(&|_| {});
        let eight_bit = total(&|settings| settings.eight_bit = true);
        assert!(eight_bit.optimizer * 7 / 2 < base.optimizer, "2 bytes and scales instead of 8");
        let accumulated = total(&|settings| settings.accumulation = 4);
        assert_eq!(accumulated.gradients, 2 * 4 * 159_907_840);
        let longer = total(&|settings| settings.shape.row_len = 2048);
        assert!(longer.block_peak > base.block_peak * 19 / 10);
        let sparse = total(&|settings| (settings.shape.row_len, settings.checkpoint_every) = (2048, 4));
        let saved = (longer.total() - sparse.total()) as f64 / (4 * 2048 * 4096 * 2) as f64;
        assert!(
            (16.0..21.0).contains(&saved),
            "{saved}: three inputs of a stretch are made again, and fewer are there for gradients"
        );
        let sparse = total(&|settings| settings.checkpoint_every = 4);
        assert!(sparse.total() < base.total());
        assert!(sparse.gradients > base.gradients, "inputs of this size would stay idle by two fifths");
        let answers = total(&|settings| settings.loss_share = 0.12);
        assert!(answers.logits_chunk < base.logits_chunk);
        let narrow = total(&|settings| settings.lora.targets = vec![Target::Q, Target::V]);
        assert!(narrow.adapters < base.adapters / 3);
    }

    #[test]
    fn the_host_holds_scores_and_no_workspace() {
        let settings = PlanSettings { element: 4, engine: Engine::Host, ..notebook(1, 512) };
        let host = MemoryPlan::new(&settings);
        assert_eq!(host.workspace, 0);
        assert!(host.block_peak + host.logits_chunk > 3 * 4 * 32 * 512 * 512);
    }
}
