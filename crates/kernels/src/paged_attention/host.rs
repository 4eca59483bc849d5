//! The operation on the processor, straight over the pages.
//!
//! The composition of plain operations copies the pages of every sequence in every pass, and computes the scores of
//! every pair of a row and a key of all sequences. Here a row reads the keys that it may see and no others. What it
//! trades: sums are in eight parts, so that they are vector instructions, and are not added in the reference's
//! order. What it refuses: any dtype but f32.

use burn::tensor::{DType, Tensor, TensorData, TensorPrimitive};
use burn_flex::{Flex, FlexTensor};
use rayon::prelude::*;

use super::{PagedIndex, Pages};
use crate::{Heads, RotaryAngles};

/// Products below which one thread is faster than several.
const FEW_PRODUCTS: usize = 1 << 17;

const LANES: usize = 8;

fn host<const D: usize>(tensor: Tensor<Flex, D>) -> FlexTensor {
    let primitive = tensor.into_primitive().tensor();
    if primitive.is_contiguous() && primitive.layout().start_offset() == 0 {
        primitive
    } else {
        primitive.to_contiguous()
    }
}

fn tensor<const D: usize>(primitive: FlexTensor) -> Tensor<Flex, D> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}

fn is_f32(tensors: &[&Tensor<Flex, 2>]) -> bool {
    tensors.iter().all(|tensor| tensor.dtype() == DType::F32)
}

/// [`store`](super::store), or the rows back if they or the pages are not f32.
#[allow(clippy::result_large_err, reason = "the query goes back to who asked, once a block")]
pub(crate) fn store_on_host(
    rows: Tensor<Flex, 2>,
    angles: &RotaryAngles<Flex>,
    heads: Heads,
    pages: &mut Pages<Flex>,
    index: &PagedIndex<Flex>,
) -> Result<Tensor<Flex, 2>, Tensor<Flex, 2>> {
    if !is_f32(&[&rows, &pages.keys, &pages.values]) {
        return Err(rows);
    }
    let [n, width] = rows.dims();
    let (queries, keys) = (heads.queries * heads.width, heads.keys * heads.width);
    let half = heads.width / 2;
    let (cos, sin) = (host(angles.cos.clone()), host(angles.sin.clone()));
    let (cos, sin) = (cos.storage::<f32>(), sin.storage::<f32>());
    let rows = host(rows);
    let mut turned = vec![0.0; n * queries];
    let store = |all: &mut Tensor<Flex, 2>, each: &mut dyn FnMut(usize, &mut [f32])| {
        all.inplace(|all| {
            let mut all = host(all);
            let storage = all.storage_mut::<f32>();
            for (row, (sequence, position)) in index.each_row().enumerate() {
                let place = sequence.place(position, index.page_tokens());
                each(row, &mut storage[place * keys..][..keys]);
            }
            tensor(all)
        });
    };
    let rows = &rows.storage::<f32>()[..n * width];
    let row = |row: usize| &rows[row * width..][..width];
    let angles = |row: usize| (&cos[row * half..][..half], &sin[row * half..][..half]);
    store(&mut pages.keys, &mut |at, key| turn(&row(at)[queries..][..keys], angles(at), key));
    store(&mut pages.values, &mut |at, value| value.copy_from_slice(&row(at)[queries + keys..]));
    for (at, q) in turned.chunks_exact_mut(queries).enumerate() {
        turn(&row(at)[..queries], angles(at), q);
    }
    Ok(Tensor::from_data(TensorData::new(turned, [n, queries]), &Default::default()))
}

/// Turns the heads of one row by its angles.
fn turn(heads: &[f32], (cos, sin): (&[f32], &[f32]), turned: &mut [f32]) {
    let half = cos.len();
    for (head, turned) in heads.chunks_exact(2 * half).zip(turned.chunks_exact_mut(2 * half)) {
        let ((first, second), (to_first, to_second)) = (head.split_at(half), turned.split_at_mut(half));
        for i in 0..half {
            to_first[i] = first[i] * cos[i] - second[i] * sin[i];
            to_second[i] = second[i] * cos[i] + first[i] * sin[i];
        }
    }
}

/// [`reference()`](super::reference); `None` if queries or pages are not f32.
pub(crate) fn attend_on_host(
    q: &Tensor<Flex, 2>,
    heads: Heads,
    pages: &Pages<Flex>,
    index: &PagedIndex<Flex>,
) -> Option<Tensor<Flex, 2>> {
    if !is_f32(&[q, &pages.keys, &pages.values]) {
        return None;
    }
    let [n, width] = q.dims();
    let [q, keys, values] = [q, &pages.keys, &pages.values].map(|tensor| host(tensor.clone()));
    let [q, keys, values] = [&q, &keys, &values].map(|tensor| tensor.storage::<f32>());
    let (rows, page_tokens): (Vec<_>, _) = (index.each_row().collect(), index.page_tokens());
    let mut o = vec![0.0; n * width];
    let attend = |scores: &mut Vec<f32>, row: usize, o: &mut [f32]| {
        let (sequence, position) = rows[row];
        let place = |at: usize| sequence.place(at, page_tokens);
        Row { heads, keys, values, length: position + 1 }.attend(
            &q[row * width..][..width],
            o,
            scores,
            place,
        );
    };
    let products: usize = rows.iter().map(|(_, position)| (position + 1) * width).sum();
    if products < FEW_PRODUCTS {
        let mut scores = Vec::new();
        o.chunks_exact_mut(width).enumerate().for_each(|(row, o)| attend(&mut scores, row, o));
    } else {
        let chunks = o.par_chunks_exact_mut(width).enumerate();
        chunks.for_each_init(Vec::new, |scores, (row, o)| attend(scores, row, o));
    }
    Some(Tensor::from_data(TensorData::new(o, [n, width]), &Default::default()))
}

/// One row's view of the pages.
struct Row<'a> {
    heads: Heads,
    keys: &'a [f32],
    values: &'a [f32],
    /// Keys it sees.
    length: usize,
}

impl Row<'_> {
    /// Attends for all heads; key by key, since the key heads of a place are neighbours in memory.
    fn attend(&self, q: &[f32], o: &mut [f32], scores: &mut Vec<f32>, place: impl Fn(usize) -> usize) {
        let Heads { queries, keys: groups, width } = self.heads;
        let (shared, stride) = (queries / groups, groups * width);
        let scale = 1.0 / (width as f32).sqrt();
        scores.clear();
        scores.resize(queries * self.length, 0.0);
        for at in 0..self.length {
            let keys = &self.keys[place(at) * stride..][..stride];
            for head in 0..queries {
                let key = &keys[head / shared * width..][..width];
                scores[head * self.length + at] = scale * dot(&q[head * width..][..width], key);
            }
        }
        scores.chunks_exact_mut(self.length).for_each(softmax);
        for at in 0..self.length {
            let values = &self.values[place(at) * stride..][..stride];
            for head in 0..queries {
                let value = &values[head / shared * width..][..width];
                let weight = scores[head * self.length + at];
                for (o, value) in o[head * width..][..width].iter_mut().zip(value) {
                    *o += weight * value;
                }
            }
        }
    }
}

fn softmax(scores: &mut [f32]) {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for score in scores.iter_mut() {
        *score = (*score - largest).exp();
        sum += *score;
    }
    scores.iter_mut().for_each(|score| *score /= sum);
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0; LANES];
    let (a_parts, b_parts) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f32 = a_parts.remainder().iter().zip(b_parts.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a_parts.zip(b_parts) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum::<f32>() + rest
}
