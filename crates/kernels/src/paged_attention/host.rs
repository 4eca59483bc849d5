//! The operation on the processor, straight over the pages.
//!
//! The composition of plain operations copies the pages of every sequence in every pass, and computes the scores of
//! every pair of a row and a key of all sequences. Here a row reads the keys that it may see and no others. What it
//! trades: sums are in eight parts, so that they are vector instructions, and are not added in the reference's
//! order; places in 8 bits are restored anew for every row that reads them. What it refuses: any dtype of rows but f32, and
//! pages of any other but f32 and 8 bits.

use burn::tensor::{DType, Tensor, TensorData, TensorPrimitive};
use burn_flex::{Flex, FlexTensor};
use rayon::prelude::*;

use super::int8::{Int8Rows, head_words, quantize_head, restore_head};
use super::{FloatPages, Int8Pages, PagedIndex, Pages};
use crate::{Heads, RotaryAngles};

/// Products below which one thread is faster than several.
const FEW_PRODUCTS: usize = 1 << 17;

const LANES: usize = 8;

fn host<const D: usize>(tensor: Tensor<Flex, D>) -> FlexTensor {
    side_by_side(tensor.into_primitive().tensor())
}

fn side_by_side(primitive: FlexTensor) -> FlexTensor {
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

/// Whether the processor reads and writes these rows and pages where they lie.
fn suits(rows: &Tensor<Flex, 2>, pages: &Pages<Flex>) -> bool {
    match pages {
        Pages::Float(FloatPages { keys, values }) => is_f32(&[rows, keys, values]),
        Pages::Int8(_) => is_f32(&[rows]),
    }
}

/// [`store`](super::store), or the rows back if they or the pages have another dtype than this is for.
#[allow(clippy::result_large_err, reason = "the query goes back to who asked, once a block")]
pub(crate) fn store_on_host(
    rows: Tensor<Flex, 2>,
    angles: &RotaryAngles<Flex>,
    heads: Heads,
    pages: &mut Pages<Flex>,
    index: &PagedIndex<Flex>,
) -> Result<Tensor<Flex, 2>, Tensor<Flex, 2>> {
    if !suits(&rows, pages) {
        return Err(rows);
    }
    let [n, width] = rows.dims();
    let (queries, keys) = (heads.queries * heads.width, heads.keys * heads.width);
    let half = heads.width / 2;
    let (cos, sin) = (host(angles.cos.clone()), host(angles.sin.clone()));
    let (cos, sin) = (cos.storage::<f32>(), sin.storage::<f32>());
    let rows = host(rows);
    let mut turned = vec![0.0; n * queries];
    let rows = &rows.storage::<f32>()[..n * width];
    let row = |row: usize| &rows[row * width..][..width];
    let angles = |row: usize| (&cos[row * half..][..half], &sin[row * half..][..half]);
    let key = |at: usize, key: &mut [f32]| turn(&row(at)[queries..][..keys], angles(at), key);
    let value = |at: usize, value: &mut [f32]| value.copy_from_slice(&row(at)[queries + keys..]);
    match pages {
        Pages::Float(own) => {
            store_floats(&mut own.keys, index, &key);
            store_floats(&mut own.values, index, &value);
        }
        Pages::Int8(own) => {
            store_int8(&mut own.keys, heads, index, &key);
            store_int8(&mut own.values, heads, index, &value);
        }
    }
    for (at, q) in turned.chunks_exact_mut(queries).enumerate() {
        turn(&row(at)[..queries], angles(at), q);
    }
    Ok(Tensor::from_data(TensorData::new(turned, [n, queries]), &Default::default()))
}

/// Lets `write` write the row of each place that is stored to.
fn store_floats(all: &mut Tensor<Flex, 2>, index: &PagedIndex<Flex>, write: &dyn Fn(usize, &mut [f32])) {
    let [_, width] = all.dims();
    all.inplace(|all| {
        let mut all = host(all);
        let storage = all.storage_mut::<f32>();
        for (row, (sequence, position)) in index.each_row().enumerate() {
            write(row, &mut storage[sequence.place(position, index.page_tokens()) * width..][..width]);
        }
        tensor(all)
    });
}

/// The same in 8 bits.
fn store_int8(
    all: &mut Int8Rows<Flex>,
    heads: Heads,
    index: &PagedIndex<Flex>,
    write: &dyn Fn(usize, &mut [f32]),
) {
    let (words, mut row_of) = (head_words(heads.width), vec![0.0; heads.keys * heads.width]);
    let Int8Rows { codes, scales } = all;
    codes.inplace(|codes| {
        let mut codes = side_by_side(codes.into_primitive());
        scales.inplace(|scales| {
            let mut scales = host(scales);
            let (words_of, scales_of) = (codes.storage_mut::<i32>(), scales.storage_mut::<f32>());
            for (row, (sequence, position)) in index.each_row().enumerate() {
                write(row, &mut row_of);
                let first = sequence.place(position, index.page_tokens()) * heads.keys;
                for (head, x) in (first..).zip(row_of.chunks_exact(heads.width)) {
                    scales_of[head] = quantize_head(x, &mut words_of[head * words..][..words]);
                }
            }
            tensor(scales)
        });
        Tensor::from_primitive(codes)
    });
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

/// [`reference()`](super::reference); `None` if queries or pages have another dtype than this is for.
pub(crate) fn attend_on_host(
    q: &Tensor<Flex, 2>,
    heads: Heads,
    pages: &Pages<Flex>,
    index: &PagedIndex<Flex>,
) -> Option<Tensor<Flex, 2>> {
    if !suits(q, pages) {
        return None;
    }
    let q = host(q.clone());
    let o = match pages {
        Pages::Float(FloatPages { keys, values }) => {
            let [keys, values] = [keys, values].map(|all| host(all.clone()));
            let places = |all| Places::Float { all, width: heads.keys * heads.width };
            let [keys, values] = [&keys, &values].map(|all| places(all.storage::<f32>()));
            attend_all(q.storage::<f32>(), heads, [keys, values], index)
        }
        Pages::Int8(Int8Pages { keys, values }) => {
            let parts = |rows: &Int8Rows<Flex>| {
                (side_by_side(rows.codes.clone().into_primitive()), host(rows.scales.clone()))
            };
            let (keys, values) = (parts(keys), parts(values));
            let places = [&keys, &values].map(|parts| Places::in_8_bits(parts, heads));
            attend_all(q.storage::<f32>(), heads, places, index)
        }
    };
    let n = index.rows();
    let width = heads.queries * heads.width;
    Some(Tensor::from_data(TensorData::new(o, [n, width]), &Default::default()))
}

/// Results of all rows.
fn attend_all(
    q: &[f32],
    heads: Heads,
    [keys, values]: [Places<'_>; 2],
    index: &PagedIndex<Flex>,
) -> Vec<f32> {
    let width = heads.queries * heads.width;
    let (rows, page_tokens): (Vec<_>, _) = (index.each_row().collect(), index.page_tokens());
    let mut o = vec![0.0; rows.len() * width];
    let attend = |room: &mut Room, row: usize, o: &mut [f32]| {
        let (sequence, position) = rows[row];
        let place = |at: usize| sequence.place(at, page_tokens);
        let own = Row { heads, keys, values, length: position + 1 };
        own.attend(&q[row * width..][..width], o, room, place);
    };
    let products: usize = rows.iter().map(|(_, position)| (position + 1) * width).sum();
    if products < FEW_PRODUCTS {
        let mut room = Room::default();
        o.chunks_exact_mut(width).enumerate().for_each(|(row, o)| attend(&mut room, row, o));
    } else {
        let chunks = o.par_chunks_exact_mut(width).enumerate();
        chunks.for_each_init(Room::default, |room, (row, o)| attend(room, row, o));
    }
    o
}

/// What all places hold, keys or values.
#[derive(Clone, Copy)]
enum Places<'a> {
    Float { all: &'a [f32], width: usize },
    Int8 { codes: &'a [i32], scales: &'a [f32], heads: Heads },
}

impl<'a> Places<'a> {
    fn in_8_bits((codes, scales): &'a (FlexTensor, FlexTensor), heads: Heads) -> Self {
        Self::Int8 { codes: codes.storage::<i32>(), scales: scales.storage::<f32>(), heads }
    }

    /// The numbers of one place `[g k]`, in `room` if they have to be restored.
    fn numbers<'b>(&self, place: usize, room: &'b mut Vec<f32>) -> &'b [f32]
    where
        'a: 'b,
    {
        match *self {
            Self::Float { all, width } => &all[place * width..][..width],
            Self::Int8 { codes, scales, heads: Heads { keys, width, .. } } => {
                let words = head_words(width);
                room.resize(keys * width, 0.0);
                for (head, x) in (place * keys..).zip(room.chunks_exact_mut(width)) {
                    restore_head(&codes[head * words..][..words], scales[head], x);
                }
                room
            }
        }
    }
}

/// What one row after the other needs.
#[derive(Default)]
struct Room {
    scores: Vec<f32>,
    restored: Vec<f32>,
}

/// One row's view of the pages.
struct Row<'a> {
    heads: Heads,
    keys: Places<'a>,
    values: Places<'a>,
    /// Keys it sees.
    length: usize,
}

impl Row<'_> {
    /// Attends for all heads; key by key, since the key heads of a place are neighbours in memory.
    fn attend(&self, q: &[f32], o: &mut [f32], room: &mut Room, place: impl Fn(usize) -> usize) {
        let Heads { queries, keys: groups, width } = self.heads;
        let shared = queries / groups;
        let scale = 1.0 / (width as f32).sqrt();
        let Room { scores, restored } = room;
        scores.clear();
        scores.resize(queries * self.length, 0.0);
        for at in 0..self.length {
            let keys = self.keys.numbers(place(at), restored);
            for head in 0..queries {
                let key = &keys[head / shared * width..][..width];
                scores[head * self.length + at] = scale * dot(&q[head * width..][..width], key);
            }
        }
        scores.chunks_exact_mut(self.length).for_each(softmax);
        for at in 0..self.length {
            let values = self.values.numbers(place(at), restored);
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
