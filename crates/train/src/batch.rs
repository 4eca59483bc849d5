//! A batch on the device, with its targets already shifted.
//!
//! Where few tokens bear loss, only those reach the head: their places are picked on the host, where they are known, and
//! filled up with places without target to one of a few sizes, because an allocator that reuses memory by size would
//! otherwise take more for every batch. Where most bear loss, all are passed on, which saves the copies.

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};
use buzzer_data::Batch;
use buzzer_kernels::IGNORED;

/// Rows `[b, t]` and their targets.
#[derive(Clone, Debug)]
pub struct DeviceBatch<B: Backend> {
    /// Token ids `[b, t]`.
    pub ids: Tensor<B, 2, Int>,
    /// Documents `[b, t]`; padding -1.
    pub documents: Tensor<B, 2, Int>,
    /// Positions `[b, t]`.
    pub positions: Tensor<B, 2, Int>,
    /// Places among the `b t` tokens that reach the head `[n]`; `None` if all do, n = b t.
    pub loss_rows: Option<Tensor<B, 1, Int>>,
    /// What each is to predict `[n]`; [`IGNORED`] where that bears no loss.
    pub targets: Tensor<B, 1, Int>,
    /// Targets among them.
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
        let line = |values: Vec<i32>| {
            let length = values.len();
            Tensor::from_data(TensorData::new(values, [length]), device)
        };
        let places = Places::new(batch);
        Self {
            ids: upload(&batch.ids),
            documents: upload(&batch.documents),
            positions: upload(&batch.positions),
            loss_rows: places.rows.map(line),
            targets: line(places.targets),
            loss_tokens: places.loss_tokens,
            tokens: batch.tokens,
        }
    }

    /// The rows of `x [b t, d]` that reach the head.
    #[must_use]
    pub fn at_head<C: Backend>(
        &self,
        x: Tensor<C, 2>,
        map: impl Fn(Tensor<B, 1, Int>) -> Tensor<C, 1, Int>,
    ) -> Tensor<C, 2> {
        match &self.loss_rows {
            Some(rows) => x.select(0, map(rows.clone())),
            None => x,
        }
    }
}

/// What reaches the head, on the host.
struct Places {
    rows: Option<Vec<i32>>,
    targets: Vec<i32>,
    loss_tokens: usize,
}

impl Places {
    fn new(batch: &Batch) -> Self {
        let (mut rows, mut targets): (Vec<i32>, Vec<i32>) = shifted(batch).unzip();
        let (loss_tokens, all) = (rows.len(), batch.ids.len());
        let Some(length) = rows_at_head(loss_tokens, all) else {
            let mut everywhere = vec![IGNORED; all];
            for (row, target) in rows.into_iter().zip(targets) {
                everywhere[row as usize] = target;
            }
            return Self { rows: None, targets: everywhere, loss_tokens };
        };
        rows.resize(length, 0);
        targets.resize(length, IGNORED);
        Self { rows: Some(rows), targets, loss_tokens }
    }
}

/// Into how many sizes, at most, the numbers of places are rounded up.
const SIZES: usize = 16;

/// How many of so many tokens reach the head if so many bear loss; `None` for all of them.
pub(crate) fn rows_at_head(loss_tokens: usize, all: usize) -> Option<usize> {
    (2 * loss_tokens <= all).then(|| loss_tokens.next_multiple_of((all / SIZES).max(1)))
}

/// Pairs of a place and the target it predicts.
pub(crate) fn shifted(batch: &Batch) -> impl Iterator<Item = (i32, i32)> {
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
        let few = Places::new(&batch);
        assert_eq!(few.rows, Some(vec![0, 2, 4, 5]));
        assert_eq!(few.targets, [11, 13, 21, 22]);
        let most = Batch { labels: vec![-100, 11, 12, 13, -100, 21, 22, -100], ..batch };
        let all = Places::new(&most);
        assert_eq!((all.rows, all.loss_tokens), (None, 5));
        assert_eq!(all.targets, [11, 12, 13, IGNORED, 21, 22, IGNORED, IGNORED]);
    }

    #[test]
    fn numbers_of_places_are_rounded_to_a_few_sizes() {
        let labels = (0..640).map(|place| if place % 10 == 1 { 3 } else { -100 }).collect();
        let zeros = vec![0; 640];
        let batch = Batch {
            rows: 1,
            len: 640,
            ids: zeros.clone(),
            positions: zeros.clone(),
            documents: zeros,
            labels,
            tokens: 640,
            loss_tokens: 64,
        };
        let places = Places::new(&batch);
        assert_eq!((places.rows.unwrap().len(), places.targets.len(), places.loss_tokens), (80, 80, 64));
        assert_eq!(places.targets[63..66], [3, IGNORED, IGNORED]);
    }
}
