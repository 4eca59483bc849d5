//! The choice on a device: a cube a row.
//!
//! Where a filter ends is found by bisecting the logits' bits, which have the order of the numbers once their sign is turned: 32 counts
//! for top-k and 32 sums for top-p, each over the whole row. The draw then goes over stretches of ids, a unit each, in the order
//! of the ids. Sums are taken in f32 and in a fixed order, so a row's token does not depend on the others.

use burn::tensor::{DType, Int, Tensor as DenseTensor, TensorData};
use burn_cubecl::CubeRuntime;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{ChosenToken, TokenChoice};
use crate::device::{Cube, primitive, uninitialized};
use crate::product::ProductRuntime;
use crate::reduce::{has_planes, over_cube};

/// Units of a cube.
const UNITS: usize = 256;
/// Numbers that say how a row's token is chosen.
const NUMBERS: usize = 5;

/// Tokens of rows `[n, v]`, a choice each; `None` where a logit is no number.
///
/// # Panics
/// If there are not as many choices as rows, or the vocabulary is empty or has 2²⁴ tokens or more.
pub(crate) fn choose<R: ProductRuntime>(
    logits: DenseTensor<Cube<R>, 2>,
    choices: &[TokenChoice],
) -> Vec<Option<ChosenToken>> {
    let [rows, vocabulary] = logits.dims();
    assert_eq!(rows, choices.len(), "a choice for each row of logits");
    assert!((1..1 << 24).contains(&vocabulary), "a vocabulary of {vocabulary}");
    if rows == 0 {
        return Vec::new();
    }
    let draws = choices.iter().any(|choice| choice.temperature > 0.0);
    let filters = draws && choices.iter().any(|choice| choice.top_k > 0 || choice.top_p < 1.0);
    let numbers = choices.iter().flat_map(|choice| numbers(choice, vocabulary)).collect::<Vec<_>>();
    let numbers = TensorData::new(numbers, [rows * NUMBERS]);
    let numbers = DenseTensor::<Cube<R>, 1>::from_data(numbers, (&logits.device(), DType::F32));
    let out = launch(into_contiguous(primitive(logits)), primitive(numbers), Form { draws, filters });
    let found = DenseTensor::<Cube<R>, 1, Int>::from_primitive(out).into_data();
    let found: Vec<i32> = found.iter::<i32>().collect();
    found.as_chunks().0.iter().zip(choices).map(|(&pair, choice)| chosen(pair, choice)).collect()
}

/// The numbers of a choice as the kernel reads them.
fn numbers(choice: &TokenChoice, vocabulary: usize) -> [f32; NUMBERS] {
    let most = if choice.top_k == 0 { vocabulary } else { choice.top_k.min(vocabulary) };
    [choice.temperature, most as f32, choice.top_p, choice.min_p, choice.draw]
}

fn chosen([id, log_prob]: [i32; 2], choice: &TokenChoice) -> Option<ChosenToken> {
    let id = u32::try_from(id).ok()?;
    let log_prob = choice.log_prob.then(|| f32::from_bits(log_prob.cast_unsigned()));
    Some(ChosenToken { id, log_prob })
}

fn launch<R: CubeRuntime>(logits: CubeTensor<R>, numbers: CubeTensor<R>, form: Form) -> CubeTensor<R> {
    let [rows, vocabulary] = [0, 1].map(|dim| logits.meta.shape()[dim]);
    let out = uninitialized(&logits, [2 * rows], DType::I32);
    let (client, dtype, planes) = (logits.client.clone(), logits.dtype, has_planes(&logits));
    // SAFETY: a cube reads its row and its numbers, and writes its two words.
    unsafe {
        choose_kernel::launch_unchecked::<R>(
            &client,
            CubeCount::Static(rows as u32, 1, 1),
            CubeDim::new_1d(UNITS as u32),
            logits.into_tensor_arg(),
            numbers.into_tensor_arg(),
            out.clone().into_tensor_arg(),
            vocabulary,
            form,
            planes,
            dtype.into(),
        );
    }
    out
}

/// What a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Form {
    /// Whether a row is drawn.
    draws: bool,
    /// Whether one of those has a top-k or a top-p.
    filters: bool,
}

/// What is known of a row.
#[derive(CubeType, Clone, Copy)]
struct Row {
    /// Its first logit.
    start: usize,
    vocabulary: usize,
    greatest: f32,
    temperature: f32,
}

/// Bits in the order of the numbers; both zeros have those of zero.
#[cube]
fn key(logit: f32) -> u32 {
    let bits = u32::reinterpret(logit);
    let bits = select(bits == 0x8000_0000u32, 0u32, bits);
    select(bits >> 31 == 1, bits ^ 0xffff_ffffu32, bits | 0x8000_0000u32)
}

/// The number of a key.
#[cube]
fn of_key(key: u32) -> f32 {
    f32::reinterpret(select(key >> 31 == 1, key & 0x7fff_ffffu32, key ^ 0xffff_ffffu32))
}

#[cube]
fn weight(logit: f32, row: &Row) -> f32 {
    ((logit - row.greatest) / row.temperature).exp()
}

/// How many logits have at least this key, and the sum of their weights.
#[cube]
fn from_key_on<F: Float>(
    logits: &Tensor<F>,
    row: &Row,
    least: u32,
    #[comptime] weights: bool,
    #[comptime] planes: bool,
) -> f32 {
    let mut sum = f32::new(0.0);
    let mut place = UNIT_POS as usize;
    while place < row.vocabulary {
        let logit = f32::cast_from(logits[row.start + place]);
        if key(logit) >= least {
            if comptime!(weights) {
                sum += weight(logit, row);
            } else {
                sum += f32::new(1.0);
            }
        }
        place += UNITS;
    }
    let sum = over_cube(sum, UNITS, planes, false);
    // Memory of this sum is that of the next one.
    sync_cube();
    sum
}

/// The greatest key from which on logits count, or weigh, at least so much.
#[cube]
fn bisect<F: Float>(
    logits: &Tensor<F>,
    row: &Row,
    enough: f32,
    #[comptime] weights: bool,
    #[comptime] planes: bool,
) -> u32 {
    let mut found = 0u32;
    for step in 0..32u32 {
        let candidate = found | (1u32 << (31u32 - step));
        let sum = from_key_on::<F>(logits, row, candidate, weights, planes);
        found = select(sum >= enough, candidate, found);
    }
    found
}

/// The last key that stays, and how many logits that have it.
#[derive(CubeType, Clone, Copy)]
struct Kept {
    key: u32,
    ties: f32,
}

/// Top-k, and top-p of what it leaves.
#[cube]
fn filtered<F: Float>(
    logits: &Tensor<F>,
    row: &Row,
    most: f32,
    share: f32,
    #[comptime] planes: bool,
) -> Kept {
    let last = bisect::<F>(logits, row, most, false, planes);
    let above = from_key_on::<F>(logits, row, last + 1, false, planes);
    let ties = most - above;
    let own = weight(of_key(last), row);
    let above = from_key_on::<F>(logits, row, last + 1, true, planes);
    let needed = share * (above + ties * own);
    // Below the last key of top-k nothing stays, whatever it weighs.
    let heavy = bisect::<F>(logits, row, needed, true, planes);
    let by_share = max(heavy, last);
    let above = from_key_on::<F>(logits, row, by_share + 1, true, planes);
    let own = weight(of_key(by_share), row);
    let enough = max(((needed - above) / own).ceil(), f32::new(1.0));
    let bounded = select(by_share == last, min(enough, ties), enough);
    let all = share >= 1.0;
    Kept { key: select(all, last, by_share), ties: select(all, ties, bounded) }
}

/// The weight of a logit that stays, else 0; `tie` is how many with the last key came before it.
#[cube]
fn kept_weight(logit: f32, row: &Row, kept: &Kept, least: f32, tie: f32) -> f32 {
    let own = key(logit);
    let stays = own > kept.key || (own == kept.key && tie < kept.ties);
    let weight = weight(logit, row);
    select(stays && weight >= least, weight, f32::new(0.0))
}

/// The token at which the sum of weights, by ids, passes its share; every unit has a stretch of ids.
#[cube]
fn drawn<F: Float>(logits: &Tensor<F>, row: &Row, kept: &Kept, least: f32, draw: f32) -> u32 {
    let mut ties = SharedMemory::<f32>::new(UNITS);
    let mut sums = SharedMemory::<f32>::new(UNITS);
    let mut id = SharedMemory::<u32>::new(1usize);
    let unit = UNIT_POS as usize;
    let stretch = row.vocabulary.div_ceil(UNITS);
    let first = min(unit * stretch, row.vocabulary);
    let end = min(first + stretch, row.vocabulary);

    let mut count = f32::new(0.0);
    for place in first..end {
        let same = key(f32::cast_from(logits[row.start + place])) == kept.key;
        count += select(same, f32::new(1.0), f32::new(0.0));
    }
    ties[unit] = count;
    sync_cube();
    let mut before = f32::new(0.0);
    for other in 0..unit {
        before += ties[other];
    }

    let mut sum = f32::new(0.0);
    let mut tie = before;
    for place in first..end {
        let logit = f32::cast_from(logits[row.start + place]);
        sum += kept_weight(logit, row, kept, least, tie);
        tie += select(key(logit) == kept.key, f32::new(1.0), f32::new(0.0));
    }
    sums[unit] = sum;
    sync_cube();

    let mut total = f32::new(0.0);
    for other in 0..UNITS {
        total += sums[other];
    }
    let target = draw * total;
    // The last stretch that has weight and begins before the target; rounding can put the target behind all.
    let mut owner = 0usize;
    let mut start = f32::new(0.0);
    let mut at = f32::new(0.0);
    for other in 0..UNITS {
        if sums[other] > 0.0 && at <= target {
            owner = other;
            start = at;
        }
        at += sums[other];
    }
    if unit == owner {
        let mut tie = before;
        let mut found = 0u32;
        let mut passed = false;
        for place in first..end {
            let logit = f32::cast_from(logits[row.start + place]);
            let weight = kept_weight(logit, row, kept, least, tie);
            tie += select(key(logit) == kept.key, f32::new(1.0), f32::new(0.0));
            if weight > 0.0 && !passed {
                found = place as u32;
                start += weight;
                passed = start > target;
            }
        }
        id[0] = found;
    }
    sync_cube();
    id[0]
}

#[cube(launch_unchecked)]
fn choose_kernel<F: Float>(
    logits: &Tensor<F>,
    numbers: &Tensor<f32>,
    out: &mut Tensor<i32>,
    vocabulary: usize,
    #[comptime] form: Form,
    #[comptime] planes: bool,
    #[define(F)] _dtype: StorageType,
) {
    let cube = CUBE_POS as usize;
    let start = cube * vocabulary;
    let mut greatest = f32::new(f32::MIN);
    let mut wrong = f32::new(0.0);
    let mut place = UNIT_POS as usize;
    while place < vocabulary {
        let logit = f32::cast_from(logits[start + place]);
        let magnitude = u32::reinterpret(logit) & 0x7fff_ffffu32;
        wrong = select(magnitude > 0x7f80_0000u32, f32::new(1.0), wrong);
        greatest = select(logit > greatest, logit, greatest);
        place += UNITS;
    }
    let greatest = over_cube(greatest, UNITS, planes, true);
    sync_cube();
    let wrong = over_cube(wrong, UNITS, planes, true);
    sync_cube();

    let mut sum = f32::new(0.0);
    // Minus the first place of the greatest logit, so that the least place is a maximum.
    let mut first = f32::new(f32::MIN);
    let mut place = UNIT_POS as usize;
    while place < vocabulary {
        let logit = f32::cast_from(logits[start + place]);
        sum += (logit - greatest).exp();
        let here =
            select(logit == greatest, f32::new(0.0) - f32::cast_from(place as u32), f32::new(f32::MIN));
        first = max(first, here);
        place += UNITS;
    }
    let sum = over_cube(sum, UNITS, planes, false);
    sync_cube();
    let first = over_cube(first, UNITS, planes, true);
    sync_cube();
    // Where no logit is a number there is no such place.
    let first = max(first, f32::new(1.0) - f32::cast_from(vocabulary as u32));
    let mut id = u32::cast_from(f32::new(0.0) - first);

    if comptime!(form.draws) {
        let base = cube * NUMBERS;
        let temperature = numbers[base];
        let greedy = temperature == 0.0;
        let row =
            Row { start, vocabulary, greatest, temperature: select(greedy, f32::new(1.0), temperature) };
        let mut key = 0u32;
        let mut ties = f32::new(0.0);
        if comptime!(form.filters) {
            let kept = filtered::<F>(logits, &row, numbers[base + 1], numbers[base + 2], planes);
            key = kept.key;
            ties = kept.ties;
        }
        let kept = Kept { key, ties };
        let drawn = drawn::<F>(logits, &row, &kept, numbers[base + 3], numbers[base + 4]);
        id = select(greedy, id, drawn);
    }
    if UNIT_POS == 0 {
        let logit = f32::cast_from(logits[start + id as usize]);
        let log_prob = (logit - greatest) - sum.ln();
        // Minus one.
        out[2 * cube] = i32::reinterpret(select(wrong > 0.0, 0xffff_ffffu32, id));
        out[2 * cube + 1] = i32::reinterpret(log_prob);
    }
}
