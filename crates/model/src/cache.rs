//! Keys and values of every block, in pages that sequences share out among themselves.
//!
//! Which page belongs to which sequence is not known here: a pass comes with its [`PagedIndex`]. What it trades:
//! the whole memory is taken at the start. What it refuses: to grow, and to forget by itself.

use burn::tensor::DType;
use burn::tensor::backend::Backend;
use buzzer_kernels::{PageFormat, PagedIndex, Pages};

use crate::{LlamaConfig, Lora, Target};

/// Keys and values of every block.
#[derive(Debug)]
pub struct PagedCache<B: Backend> {
    pub(crate) layers: Vec<Pages<B>>,
    page_tokens: usize,
    format: PageFormat,
}

/// The corrections of a block's linears in the order of [`Target::ALL`].
pub(crate) type BlockLoras<B> = [Option<Lora<B>>; Target::ALL.len()];

/// Which tokens a pass runs, where their keys and values go, and which corrections their rows get.
#[derive(Debug)]
pub struct PagedPass<'a, B: Backend> {
    /// Token ids of all rows.
    pub ids: Vec<u32>,
    /// The sequences that the rows belong to.
    pub index: PagedIndex<B>,
    /// Neighbouring rows and their corrections, in the order of the rows.
    pub adapters: Vec<AdapterRows<'a, B>>,
}

/// Rows that follow each other and get the same corrections.
#[derive(Clone, Copy, Debug)]
pub struct AdapterRows<'a, B: Backend> {
    /// Their number.
    pub rows: usize,
    /// The corrections.
    pub loras: &'a LoraSet<B>,
}

/// The corrections of a whole model, apart from the model: those of one adapter.
#[derive(Clone, Debug)]
pub struct LoraSet<B: Backend> {
    pub(crate) layers: Vec<BlockLoras<B>>,
}

impl<B: Backend> PagedCache<B> {
    /// So many pages of so many tokens each.
    #[must_use]
    pub fn new(
        config: &LlamaConfig,
        pages: usize,
        page_tokens: usize,
        format: PageFormat,
        device: &B::Device,
    ) -> Self {
        let heads = config.heads();
        let layer = |_| Pages::zeros(pages * page_tokens, heads, format, device);
        Self { layers: (0..config.num_hidden_layers).map(layer).collect(), page_tokens, format }
    }

    /// How keys and values are stored.
    #[must_use]
    pub fn format(&self) -> PageFormat {
        self.format
    }

    /// Tokens a page holds.
    #[must_use]
    pub fn page_tokens(&self) -> usize {
        self.page_tokens
    }

    /// The pages of every block.
    #[must_use]
    pub fn pages(&self) -> &[Pages<B>] {
        &self.layers
    }

    /// Bytes of a page in all blocks.
    #[must_use]
    pub fn page_bytes(config: &LlamaConfig, page_tokens: usize, format: PageFormat) -> usize {
        config.num_hidden_layers * page_tokens * format.place_bytes(config.heads())
    }

    /// Makes pages zero, so that what was computed wrongly there cannot spread: a weight of zero times NaN is NaN.
    pub fn clear(&mut self, pages: &[u32]) {
        for layer in &mut self.layers {
            for &page in pages {
                let first = page as usize * self.page_tokens;
                layer.clear(first..first + self.page_tokens);
            }
        }
    }
}

impl<B: Backend> LoraSet<B> {
    /// No correction anywhere: the base alone.
    #[must_use]
    pub fn none(config: &LlamaConfig) -> Self {
        Self { layers: (0..config.num_hidden_layers).map(|_| Default::default()).collect() }
    }

    /// Blocks it is for.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Every correction with its block and linear, and the shape `[out, in]` of the weight that its factors are for.
    pub fn shapes(&self) -> impl Iterator<Item = (usize, Target, [usize; 2])> {
        self.layers.iter().enumerate().flat_map(|(layer, loras)| {
            let own = Target::ALL.into_iter().zip(loras);
            own.filter_map(move |(target, lora)| {
                let lora = lora.as_ref()?;
                Some((layer, target, [lora.b.val().dims()[0], lora.a.val().dims()[1]]))
            })
        })
    }

    /// The same with factors in another dtype, so that they need not be converted each time they are used.
    #[must_use]
    pub fn cast(&self, dtype: DType) -> Self {
        let lora = |lora: &Lora<B>| Lora::new(lora.a.val().cast(dtype), lora.b.val().cast(dtype), lora.scale);
        let layer = |layer: &BlockLoras<B>| layer.each_ref().map(|own| own.as_ref().map(lora));
        Self { layers: self.layers.iter().map(layer).collect() }
    }
}
