//! A program before anything of it has an address: what there are kernels for, its shapes, and how much memory it needs.

use burn::tensor::DType;
use cubecl::cuda::CudaRuntime;

use super::driver::Limits;
use super::layout::{
    Attend, GROUP, MOST_PARTS, Part, Product, RANKS, Share, TILE, attention_splits, row_tiles,
};
use super::{Ends, Launch, ROWS, Room, Shapes, unsupported};
use crate::device::Cube;
use crate::step::{StepError, StepOperation, StepProgram, StepSource, StepTarget};
use crate::{FrozenWeight, LinearPart, LoraTerm};

type Device = Cube<CudaRuntime>;

/// As the kernels define it.
pub(super) const FROM_RESIDUAL: i32 = 0;
/// As the kernels define it.
pub(super) const FROM_ROWS: i32 = 1;
const TO_ROWS: i32 = 0;
const TO_RESIDUAL: i32 = 1;
const TO_ACTIVATED: i32 = 2;

/// Entries of the tables of the code book's pairs and of the levels of scales.
pub(super) const TABLE: usize = 256;

/// What a program is made of.
pub(super) struct Outline {
    /// Launches without addresses.
    pub(super) launches: Vec<Launch>,
    pub(super) shapes: Shapes,
    /// Bytes.
    pub(super) room: Room,
    /// Bytes of factors that are converted or filled up.
    copies: usize,
}

impl Outline {
    /// # Errors
    /// If there are no kernels for it.
    pub(super) fn new(program: &StepProgram<Device>, limits: &Limits) -> Result<Self, StepError> {
        let dtype = program.embedding.dtype();
        if !matches!(dtype, DType::F16 | DType::BF16) {
            return Err(unsupported(format!("the model is computed in {dtype:?}, not in 16 bits")));
        }
        if ![64, 128].contains(&program.heads.width) {
            return Err(unsupported(format!("heads are {} wide, not 64 or 128", program.heads.width)));
        }
        let launches = program.operations.iter().map(|operation| launch(program, operation));
        let launches = launches.collect::<Result<Vec<_>, _>>()?;
        let most_rows = most_rows(&launches, limits)
            .ok_or_else(|| unsupported("the card has too little shared memory"))?;
        let [vocabulary, hidden] = program.embedding.dims();
        let shapes = Shapes {
            heads: program.heads,
            hidden,
            vocabulary,
            table: program.context.div_ceil(program.page_tokens),
            most_rows,
            products: products(&launches).count(),
        };
        let room = room(&launches, &shapes, limits);
        let copies = program.operations.iter().map(|operation| copied_bytes(operation, dtype)).sum();
        Ok(Self { launches, shapes, room, copies })
    }

    /// Bytes that the program takes besides what it names, but for what the allocator rounds up.
    pub(super) fn bytes(&self) -> usize {
        let tables = 4 * (2 * TABLE + self.shapes.heads.width / 2);
        self.room.total() as usize + self.copies + tables
    }
}

impl Room {
    fn total(&self) -> u64 {
        let Self {
            residual,
            joined,
            logits,
            attended,
            log_sums,
            heads_arrived,
            heads_result,
            normalised,
            activated,
            low_rank,
            partials,
            arrived,
            ready,
            numbers,
            choices,
        } = *self;
        let rows = residual + joined + logits + heads_result + normalised + activated;
        let parts = attended + log_sums + low_rank + partials;
        rows + parts + heads_arrived + arrived + ready + numbers + choices
    }
}

fn launch(program: &StepProgram<Device>, operation: &StepOperation<Device>) -> Result<Launch, StepError> {
    match operation {
        StepOperation::Linear { source, parts, target } => product(source, parts, *target),
        StepOperation::Attention => Ok(Launch::Attend(Attend {
            page_tokens: program.page_tokens as i32,
            heads: program.heads.queries as i32,
            key_heads: program.heads.keys as i32,
            scale: 1.0 / (program.heads.width as f32).sqrt(),
            ..Attend::default()
        })),
    }
}

fn product(
    source: &StepSource<Device>,
    parts: &[LinearPart<Device>],
    target: StepTarget,
) -> Result<Launch, StepError> {
    let dims: Vec<_> = parts.iter().map(|part| dims(&part.weight)).collect();
    check(parts, &dims, target)?;
    let inner = dims[0][1];
    let mut product = Product { part_count: parts.len() as i32, inner: inner as i32, ..Product::default() };
    for ((own, part), [rows, _]) in product.parts.iter_mut().zip(parts).zip(&dims) {
        *own = Part {
            rows: *rows as i32,
            first_row: product.rows,
            first_rank: product.ranks,
            ..Part::default()
        };
        if let Some(lora) = &part.lora {
            own.rank = filled_rank(lora, [*rows, inner])? as i32;
            own.lora_scale = lora.scale as f32;
        }
        product.rows += own.rows;
        product.ranks += own.rank;
    }
    product.tiles = (product.rows as usize).div_ceil(TILE) as i32;
    product.source = match source {
        StepSource::Residual(_, epsilon) => {
            product.epsilon = *epsilon as f32;
            FROM_RESIDUAL
        }
        StepSource::Attention | StepSource::Activated => FROM_ROWS,
    };
    product.target = match target {
        StepTarget::Joined | StepTarget::Logits => TO_ROWS,
        StepTarget::Residual => TO_RESIDUAL,
        StepTarget::Activated => TO_ACTIVATED,
    };
    let after_attention = matches!(source, StepSource::Attention);
    Ok(Launch::Product(product, Ends { after_attention, target }))
}

/// The rank of a correction once it is filled up with zeros.
fn filled_rank(lora: &LoraTerm<Device>, [out, inner]: [usize; 2]) -> Result<usize, StepError> {
    let ([rank, width], [rows, _]) = (lora.a.dims(), lora.b.dims());
    if [rows, width] != [out, inner] {
        return Err(unsupported(format!("a correction [{rows}, {width}] of a layer [{out}, {inner}]")));
    }
    Ok(rank.next_multiple_of(RANKS))
}

/// Bytes of the factors of an operation that do not serve as they are.
fn copied_bytes(operation: &StepOperation<Device>, dtype: DType) -> usize {
    let StepOperation::Linear { parts, .. } = operation else { return 0 };
    let copied = |lora: &LoraTerm<Device>| {
        let ([rank, inner], [out, _]) = (lora.a.dims(), lora.b.dims());
        let serves = lora.a.dtype() == dtype && rank.is_multiple_of(RANKS);
        if serves { 0 } else { dtype.size() * rank.next_multiple_of(RANKS) * (inner + out) }
    };
    parts.iter().filter_map(|part| part.lora.as_ref()).map(copied).sum()
}

pub(super) fn dims(weight: &FrozenWeight<Device>) -> [usize; 2] {
    match weight {
        FrozenWeight::Dense(weight) => weight.dims(),
        FrozenWeight::Nf4(weight) => weight.dims(),
    }
}

/// Whether the kernels can multiply these layers.
fn check(parts: &[LinearPart<Device>], dims: &[[usize; 2]], target: StepTarget) -> Result<(), StepError> {
    if parts.is_empty() || parts.len() > MOST_PARTS {
        return Err(unsupported(format!("{} layers share an input, not 1 to {MOST_PARTS}", parts.len())));
    }
    let inner = dims[0][1];
    if !inner.is_multiple_of(GROUP) || dims.iter().any(|dims| dims[1] != inner) {
        return Err(unsupported(format!(
            "layers {dims:?} have no common width that is a multiple of {GROUP}"
        )));
    }
    let kind = |part: &LinearPart<Device>| match &part.weight {
        FrozenWeight::Nf4(weight) => Some(weight.is_double()),
        FrozenWeight::Dense(_) => None,
    };
    if parts.iter().any(|part| kind(part) != kind(&parts[0])) {
        return Err(unsupported("layers that share an input are packed in different ways"));
    }
    let (activated, whole) = (target == StepTarget::Activated, if parts.len() > 1 { TILE } else { 1 });
    if activated && (dims.len() != 2 || dims[0] != dims[1]) {
        return Err(unsupported(format!("layers {dims:?} are not two of a kind to be activated")));
    }
    match dims.iter().find(|dims| !dims[0].is_multiple_of(whole)) {
        Some(dims) => {
            Err(unsupported(format!("a layer has {} rows, which is no multiple of {TILE}", dims[0])))
        }
        None => Ok(()),
    }
}

fn products(launches: &[Launch]) -> impl Iterator<Item = (&Product, StepTarget)> {
    launches.iter().filter_map(|launch| match launch {
        Launch::Product(product, ends) => Some((product, ends.target)),
        Launch::Attend(_) => None,
    })
}

/// The most rows whose products all have a share of the card's shared memory.
fn most_rows(launches: &[Launch], limits: &Limits) -> Option<usize> {
    let fits = |&n: &usize| products(launches).all(|(product, _)| share(product, n, limits).is_some());
    ROWS.into_iter().find(fits)
}

fn share(product: &Product, n: usize, limits: &Limits) -> Option<Share> {
    Share::new(n, product.inner as usize, product.ranks as usize, limits)
}

/// Bytes for what a step computes.
fn room(launches: &[Launch], shapes: &Shapes, limits: &Limits) -> Room {
    let Shapes { heads, hidden, vocabulary, table, most_rows, .. } = *shapes;
    let most = |size: &dyn Fn(&Product) -> usize| {
        products(launches).map(|(product, _)| size(product)).max().unwrap_or(0)
    };
    let rows_to = |to: StepTarget| {
        let rows = products(launches).filter(|&(_, target)| target == to).map(|(product, _)| product.rows);
        rows.max().unwrap_or(0) as usize
    };
    let over_rows = |size: &dyn Fn(usize) -> usize| (1..=most_rows).map(size).max().unwrap_or(0);
    let low_rank = most(&|product| {
        over_rows(&|n| {
            let pieces = share(product, n, limits).map_or(0, |share| share.splits * share.a_chunks);
            pieces * n * product.ranks as usize
        })
    });
    let partials = most(&|product| {
        over_rows(&|n| {
            let splits = share(product, n, limits).map_or(0, |share| share.splits);
            product.tiles as usize * splits * TILE * 8 * row_tiles(n)
        })
    });
    let splits = over_rows(&|n| n * attention_splits(n, heads.queries, limits));
    let [words, halves] = [4, 2].map(|size| move |count: usize| (size * count) as u64);
    Room {
        residual: words(most_rows * hidden),
        joined: words(most_rows * rows_to(StepTarget::Joined)),
        logits: words(most_rows * vocabulary),
        attended: words(splits * heads.queries * heads.width),
        log_sums: words(splits * heads.queries),
        heads_arrived: words(most_rows * heads.queries),
        heads_result: halves(most_rows * heads.queries * heads.width),
        normalised: halves(most_rows * hidden),
        // Of the two layers that are activated together one is left.
        activated: halves(most_rows * rows_to(StepTarget::Activated) / 2),
        low_rank: words(low_rank),
        partials: words(partials),
        arrived: words(most(&|product| product.tiles as usize)),
        ready: words(shapes.products),
        numbers: words(most_rows * (2 + table)),
        choices: words(most_rows),
    }
}
