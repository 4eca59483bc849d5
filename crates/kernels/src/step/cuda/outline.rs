//! A program before anything of it has an address: what there are kernels for, its shapes, and how much memory it needs.

use burn::tensor::DType;
use cubecl::cuda::CudaRuntime;

use super::layout::{
    COUNT_BITS, GROUP, MOST_PARTS, MOST_TILE_ROWS, Needs, Part, Product, RANKS, SQUARES_APART, Share,
};
use super::{ROWS, Room, Shapes, unsupported};
use crate::device::Cube;
use crate::limits::Limits;
use crate::step::{StepError, StepOperation, StepProgram, StepSource, StepTarget};
use crate::{FrozenWeight, LinearPart, LoraTerm, PageFormat};

type Device = Cube<CudaRuntime>;

/// As the kernel defines them.
pub(super) const FROM_RESIDUAL: i32 = 0;
const FROM_ROWS: i32 = 1;
pub(super) const FROM_ATTENTION: i32 = 2;
const TO_ROWS: i32 = 0;
const TO_RESIDUAL: i32 = 1;
const TO_ACTIVATED: i32 = 2;

/// Entries of the tables of the code book's pairs and of the levels of scales.
pub(super) const TABLE: usize = 256;

/// What a program is made of.
pub(super) struct Outline {
    /// Products without addresses, in order; an attention belongs to the product that follows it.
    pub(super) products: Vec<Product>,
    /// Where the results of each go.
    pub(super) targets: Vec<StepTarget>,
    pub(super) shapes: Shapes,
    /// Bytes.
    pub(super) room: Room,
    /// Bytes of factors that are converted or filled up.
    copies: usize,
}

impl Outline {
    /// # Errors
    /// If there is no kernel for it.
    pub(super) fn new(program: &StepProgram<Device>, limits: &Limits) -> Result<Self, StepError> {
        let dtype = program.embedding.dtype();
        if !matches!(dtype, DType::F16 | DType::BF16) {
            return Err(unsupported(format!("the model is computed in {dtype:?}, not in 16 bits")));
        }
        if ![64, 128].contains(&program.heads.width) {
            return Err(unsupported(format!("heads are {} wide, not 64 or 128", program.heads.width)));
        }
        match program.page_format {
            PageFormat::Float(own) if own == dtype => {}
            PageFormat::Float(own) => return Err(unsupported(format!("pages in {own:?}, not in {dtype:?}"))),
            PageFormat::Int8 => return Err(unsupported("keys and values are in 8 bits")),
        }
        if !program.page_tokens.is_power_of_two() {
            return Err(unsupported(format!("pages of {} tokens, no power of two", program.page_tokens)));
        }
        let (products, targets) = products(program)?;
        let [vocabulary, hidden] = program.embedding.dims();
        let needs = Needs {
            ranks: most(&products, |product| product.ranks),
            rows: most(&products, |product| product.rows),
            hidden,
            heads: program.heads,
            plain: plain(program)?,
        };
        let fits = |&n: &usize| (1..=n).all(|n| Share::new(n, &needs, limits).is_some());
        let most_rows = ROWS
            .into_iter()
            .find(fits)
            .ok_or_else(|| unsupported("the card has too little shared memory"))?;
        let shapes = Shapes {
            needs,
            vocabulary,
            table: program.context.div_ceil(program.page_tokens),
            page_shift: program.page_tokens.ilog2(),
            context: program.context,
            most_rows,
        };
        let room = room(&products, &targets, &shapes, limits);
        let copies = program.operations.iter().map(|operation| copied_bytes(operation, dtype)).sum();
        Ok(Self { products, targets, shapes, room, copies })
    }

    /// Bytes that the program takes besides what it names, but for what the allocator rounds up.
    pub(super) fn bytes(&self) -> usize {
        let Shapes { context, needs, .. } = self.shapes;
        let tables = 4 * 2 * TABLE + 8 * context * needs.heads.width / 2;
        self.room.total() as usize + self.copies + tables + size_of_val(&self.products[..])
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
            heads_result,
            partial,
            arrived,
            squares,
            normalised,
            activated,
            low_rank,
            barrier,
            numbers,
        } = *self;
        let rows = residual + joined + logits + heads_result + normalised + activated;
        let sums = attended + log_sums + partial + low_rank + squares;
        rows + sums + arrived + barrier + numbers
    }
}

/// The products of a program, and where their results go.
fn products(program: &StepProgram<Device>) -> Result<(Vec<Product>, Vec<StepTarget>), StepError> {
    let mut found = (Vec::new(), Vec::new());
    let mut attends = 0;
    for operation in &program.operations {
        match operation {
            StepOperation::Linear { source, parts, target } => {
                let follows = found.1.last().is_none_or(|&target| target == StepTarget::Residual);
                if matches!(source, StepSource::Residual(..)) && !follows {
                    return Err(unsupported(
                        "layers that read the residual stream after others than those that add to it",
                    ));
                }
                if (attends == 1) != matches!(source, StepSource::Attention) {
                    return Err(unsupported("an attention whose result is not the next layers' input"));
                }
                found.0.push(Product { attends, ..product(source, parts, *target)? });
                found.1.push(*target);
                attends = 0;
            }
            StepOperation::Attention => attends = 1,
        }
    }
    Ok(found)
}

fn product(
    source: &StepSource<Device>,
    parts: &[LinearPart<Device>],
    target: StepTarget,
) -> Result<Product, StepError> {
    let dims: Vec<_> = parts.iter().map(|part| dims(&part.weight)).collect();
    check(parts, &dims, target)?;
    let inner = dims[0][1];
    let mut product =
        Product { parts: [Part::absent(); MOST_PARTS], inner: inner as i32, ..Product::default() };
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
    product.source = match source {
        StepSource::Residual(_, epsilon) => {
            product.epsilon = *epsilon as f32;
            FROM_RESIDUAL
        }
        StepSource::Attention => FROM_ATTENTION,
        StepSource::Activated => FROM_ROWS,
    };
    product.target = match target {
        StepTarget::Joined | StepTarget::Logits => TO_ROWS,
        StepTarget::Residual => TO_RESIDUAL,
        StepTarget::Activated => TO_ACTIVATED,
    };
    Ok(product)
}

/// Whether the scales of the packed layers are stored as they are, which has to be the same for all.
fn plain(program: &StepProgram<Device>) -> Result<bool, StepError> {
    let parts = program.operations.iter().flat_map(|operation| match operation {
        StepOperation::Linear { parts, .. } => parts.as_slice(),
        StepOperation::Attention => &[],
    });
    let mut kinds = parts.filter_map(|part| match &part.weight {
        FrozenWeight::Nf4(weight) => Some(!weight.is_double()),
        FrozenWeight::Dense(_) => None,
    });
    let Some(first) = kinds.next() else { return Ok(false) };
    if kinds.any(|kind| kind != first) {
        return Err(unsupported("layers with double quantization beside layers without"));
    }
    Ok(first)
}

fn most(products: &[Product], size: impl Fn(&Product) -> i32) -> usize {
    products.iter().map(size).max().unwrap_or(0) as usize
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
    if inner / RANKS >= 1 << COUNT_BITS {
        return Err(unsupported(format!("layers {dims:?} have more columns than can be counted")));
    }
    let packed = |part: &LinearPart<Device>| matches!(part.weight, FrozenWeight::Nf4(_));
    if parts.iter().any(|part| packed(part) != packed(&parts[0])) {
        return Err(unsupported("layers that share an input are packed in different ways"));
    }
    let (activated, whole) =
        (target == StepTarget::Activated, if parts.len() > 1 { MOST_TILE_ROWS } else { 1 });
    if activated && (dims.len() != 2 || dims[0] != dims[1]) {
        return Err(unsupported(format!("layers {dims:?} are not two of a kind to be activated")));
    }
    match dims.iter().find(|dims| dims[0] < MOST_TILE_ROWS || !dims[0].is_multiple_of(whole)) {
        Some(dims) => Err(unsupported(format!(
            "a layer has {} rows, which is less than {MOST_TILE_ROWS} or no multiple of it",
            dims[0]
        ))),
        None => Ok(()),
    }
}

/// Bytes for what a step computes.
fn room(products: &[Product], targets: &[StepTarget], shapes: &Shapes, limits: &Limits) -> Room {
    let Shapes { needs, vocabulary, table, most_rows, .. } = *shapes;
    let heads = needs.heads;
    let rows_to = |to: StepTarget| {
        let rows = products.iter().zip(targets).filter(|&(_, &target)| target == to);
        rows.map(|(product, _)| product.rows as usize).max().unwrap_or(0)
    };
    let shares: Vec<_> =
        (1..=most_rows).filter_map(|n| Share::new(n, &needs, limits).map(|share| (n, share))).collect();
    let splits = shares.iter().map(|(n, share)| n * share.splits).max().unwrap_or(0);
    let partial = |share: &Share| {
        let of =
            |product: &Product| share.variant.partial_bytes(product.rows as usize, product.inner as usize);
        products.iter().map(of).max().unwrap_or(0)
    };
    let partial = shares.iter().map(|(_, share)| partial(share)).max().unwrap_or(0);
    let [words, halves] = [4, 2].map(|size| move |count: usize| (size * count) as u64);
    Room {
        residual: words(most_rows * needs.hidden),
        joined: words(most_rows * rows_to(StepTarget::Joined)),
        logits: words(most_rows * vocabulary),
        attended: words(splits * heads.queries * heads.width),
        log_sums: words(splits * heads.queries),
        heads_result: halves(most_rows * heads.queries * heads.width),
        partial: partial as u64,
        // A counter for each tile of three products.
        arrived: words(3 * needs.most_tiles()),
        // Those of three products too, in 64 bits.
        squares: words(3 * 2 * most_rows * SQUARES_APART),
        normalised: halves(most_rows * needs.hidden),
        // Of the two layers that are activated together one is left.
        activated: halves(most_rows * rows_to(StepTarget::Activated) / 2),
        // Three products' sums, in 64 bits.
        low_rank: words(3 * 2 * most_rows * needs.ranks),
        barrier: words(1),
        numbers: words(most_rows * (2 + table)),
    }
}
