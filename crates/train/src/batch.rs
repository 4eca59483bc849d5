//! A batch on the device, with its targets already shifted.
//!
//! Rows without a target never reach the head: the places that bear loss are picked on the host, where they are known.

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};
use buzzer_data::Batch;

/// Rows `[b, t]` and their targets.
#[derive(Clone, Debug)]
pub struct DeviceBatch<B: Backend> {
    /// Token ids `[b, t]`.
    pub ids: Tensor<B, 2, Int>,
    /// Documents `[b, t]`; padding -1.
    pub documents: Tensor<B, 2, Int>,
    /// Positions `[b, t]`.
    pub positions: Tensor<B, 2, Int>,
    /// Places among the `b t` tokens whose successor is a target `[n]`.
    pub loss_rows: Tensor<B, 1, Int>,
    /// Those successors `[n]`.
    pub targets: Tensor<B, 1, Int>,
    /// n.
    pub loss_tokens: usize,
    /// Tokens without padding.
    pub tokens: usize,
}

impl<B: Backend> DeviceBatch<B> {
    /// Uploads a batch. Token t of a row predicts label t + 1 of that row.
    #[must_use]
    pub fn new(batch: &Batch, device: &B::Device) -> Self {
        let dims = [batch.rows, batch.len];
        let upload = |values: &[i32]| Tensor::from_data(TensorData::new(values.to_vec(), dims), device);
        let (rows, targets): (Vec<i32>, Vec<i32>) = shifted(batch).unzip();
        let loss_tokens = rows.len();
        let line = |values: Vec<i32>| Tensor::from_data(TensorData::new(values, [loss_tokens]), device);
        Self {
            ids: upload(&batch.ids),
            documents: upload(&batch.documents),
            positions: upload(&batch.positions),
            loss_rows: line(rows),
            targets: line(targets),
            loss_tokens,
            tokens: batch.tokens,
        }
    }
}

/// Pairs of a place and the target it predicts.
fn shifted(batch: &Batch) -> impl Iterator<Item = (i32, i32)> {
    let predicts = |place: usize| !(place + 1).is_multiple_of(batch.len) && batch.labels[place + 1] >= 0;
    let places = (0..batch.ids.len()).filter(move |&place| predicts(place));
    places.map(|place| (place as i32, batch.labels[place + 1]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_is_predicted_once_by_the_token_before_it() {
        let labels = vec![-100, 11, -100, 13, -100, 21, 22, -100];
        let batch = Batch {
            rows: 2,
            len: 4,
            ids: vec![10, 11, 12, 13, 20, 21, 22, 0],
            positions: vec![0, 1, 0, 1, 0, 1, 2, 0],
            documents: vec![0, 0, 1, 1, 0, 0, 0, -1],
            labels,
            tokens: 7,
            loss_tokens: 4,
        };
        assert_eq!(shifted(&batch).collect::<Vec<_>>(), [(0, 11), (2, 13), (4, 21), (5, 22)]);
    }
}
