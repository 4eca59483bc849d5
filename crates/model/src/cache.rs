//! Keys and values of the tokens seen so far.
//!
//! A batch shares one length: shorter prompts are padded on the left, in a document of their own. What it trades: the
//! whole capacity is taken at the start. What it refuses: to grow, or to forget.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor};
use buzzer_kernels::AttentionIndex;

use crate::LlamaConfig;

/// Keys and values of one block.
#[derive(Clone, Debug)]
pub struct LayerCache<B: Backend> {
    /// `[b, g, capacity, k]`.
    keys: Tensor<B, 4>,
    values: Tensor<B, 4>,
}

/// Keys and values of every block, and which token each slot holds.
#[derive(Clone, Debug)]
pub struct KvCache<B: Backend> {
    pub(crate) layers: Vec<LayerCache<B>>,
    documents: Tensor<B, 2, Int>,
    positions: Tensor<B, 2, Int>,
    length: usize,
    capacity: usize,
}

impl<B: Backend> KvCache<B> {
    /// Room for `capacity` tokens in each of `batch` rows.
    #[must_use]
    pub fn new(
        config: &LlamaConfig,
        batch: usize,
        capacity: usize,
        dtype: DType,
        device: &B::Device,
    ) -> Self {
        let dims = [batch, config.num_key_value_heads, capacity, config.head_dim];
        let empty = || Tensor::zeros(dims, (device, dtype));
        let layer = |_| LayerCache { keys: empty(), values: empty() };
        let ids = Tensor::zeros([batch, capacity], device);
        Self {
            layers: (0..config.num_hidden_layers).map(layer).collect(),
            documents: ids.clone(),
            positions: ids,
            length: 0,
            capacity,
        }
    }

    /// Tokens held in each row.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether no token has come yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Tokens a row holds at most.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Keeps only the rows at these places `[n]`, in this order.
    pub fn keep_rows(&mut self, places: Tensor<B, 1, Int>) {
        for layer in &mut self.layers {
            layer.keys.inplace(|keys| keys.select(0, places.clone()));
            layer.values.inplace(|values| values.select(0, places.clone()));
        }
        self.documents.inplace(|documents| documents.select(0, places.clone()));
        self.positions.inplace(|positions| positions.select(0, places));
    }

    /// Takes note of the next tokens `[b, t]`; the index says what they may see.
    ///
    /// # Panics
    /// If there is no room for them.
    pub(crate) fn extend(
        &mut self,
        documents: Tensor<B, 2, Int>,
        positions: Tensor<B, 2, Int>,
    ) -> AttentionIndex<B> {
        let [b, t] = documents.dims();
        let (from, to) = (self.length, self.length + t);
        assert!(to <= self.capacity, "the cache holds {} tokens, {to} are needed", self.capacity);
        self.documents.inplace(|all| all.slice_assign([0..b, from..to], documents.clone()));
        self.positions.inplace(|all| all.slice_assign([0..b, from..to], positions.clone()));
        self.length = to;
        AttentionIndex {
            query_documents: documents,
            query_positions: positions,
            key_documents: self.documents.clone().narrow(1, 0, to),
            key_positions: self.positions.clone().narrow(1, 0, to),
            ranges: None,
        }
    }
}

impl<B: Backend> LayerCache<B> {
    /// Appends keys and values `[b, g, t, k]` so that `length` tokens are held; returns all of them.
    pub(crate) fn append(
        &mut self,
        keys: Tensor<B, 4>,
        values: Tensor<B, 4>,
        length: usize,
    ) -> (Tensor<B, 4>, Tensor<B, 4>) {
        let [b, g, t, k] = keys.dims();
        let place = [0..b, 0..g, length - t..length, 0..k];
        self.keys.inplace(|all| all.slice_assign(place.clone(), keys));
        self.values.inplace(|all| all.slice_assign(place, values));
        (self.keys.clone().narrow(2, 0, length), self.values.clone().narrow(2, 0, length))
    }
}
