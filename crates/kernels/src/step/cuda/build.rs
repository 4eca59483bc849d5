//! From a program to launches: what may be multiplied, where it lies, and room for what is computed.

use burn::tensor::{DType, Int, Tensor, TensorData};
use burn_cubecl::kernel::{cast, into_contiguous};
use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::CudaRuntime;

use super::driver::Limits;
use super::layout::{
    Attend, GROUP, MOST_PARTS, Part, Product, RANKS, Share, TILE, attention_splits, row_tiles,
};
use super::{Ends, Launch, ROWS, Room, Shapes, wrong};
use crate::device::{Cube, primitive, uninitialized};
use crate::nf4::kernel::DeviceScales;
use crate::nf4::{NF4_CODE, dynamic_code};
use crate::step::{StepError, StepOperation, StepProgram, StepSource, StepTarget};
use crate::{FrozenWeight, LinearPart, LoraTerm, Nf4Tensor, rotary};

type Device = Cube<CudaRuntime>;
type Memory = CubeTensor<CudaRuntime>;

/// As the kernels define it.
pub(super) const FROM_RESIDUAL: i32 = 0;
/// As the kernels define it.
pub(super) const FROM_ROWS: i32 = 1;
const TO_ROWS: i32 = 0;
const TO_RESIDUAL: i32 = 1;
const TO_ACTIVATED: i32 = 2;

/// A program on its device.
pub(super) struct Built {
    pub(super) launches: Vec<Launch>,
    pub(super) embedding: u64,
    pub(super) shapes: Shapes,
    pub(super) room: Room,
    pub(super) kept: Kept,
    pub(super) bf16: bool,
}

/// Tensors that are in use.
#[derive(Debug, Default)]
pub(super) struct Kept(Vec<Memory>);

impl Kept {
    /// The address of a tensor's first element; the tensor stays.
    fn address(&mut self, tensor: Memory) -> Result<u64, StepError> {
        let address = address(&tensor)?;
        if !address.is_multiple_of(16) {
            return Err(wrong("a tensor does not begin at a multiple of 16 bytes"));
        }
        self.0.push(tensor);
        Ok(address)
    }

    /// The same of a tensor in a dtype whose elements lie side by side; it is copied if that is not so yet.
    fn packed(&mut self, tensor: Memory, dtype: DType) -> Result<u64, StepError> {
        self.address(into_contiguous(cast(tensor, dtype)))
    }

    /// The same of a tensor that others write: it is not copied.
    fn shared(&mut self, tensor: Memory, dtype: DType) -> Result<u64, StepError> {
        if tensor.dtype != dtype || !tensor.is_contiguous() {
            return Err(wrong(format!("pages in {:?}, not in {dtype:?} and side by side", tensor.dtype)));
        }
        self.address(tensor)
    }

    /// New memory; its values are what it held.
    fn room(&mut self, like: &Memory, bytes: usize) -> Result<u64, StepError> {
        self.address(uninitialized(like, [bytes.div_ceil(4).max(4)], DType::F32))
    }

    fn floats(&mut self, values: Vec<f32>, like: &Memory) -> Result<u64, StepError> {
        let count = values.len();
        let data = TensorData::new(values, [count]);
        self.address(primitive(Tensor::<Device, 1>::from_data(data, (&like.device, DType::F32))))
    }

    fn words(&mut self, values: Vec<i32>, like: &Memory) -> Result<u64, StepError> {
        let count = values.len();
        let data = TensorData::new(values, [count]);
        self.address(Tensor::<Device, 1, Int>::from_data(data, (&like.device, DType::I32)).into_primitive())
    }

    /// Waits until everything before has been submitted to the device.
    pub(super) fn settle(&self) -> Result<(), StepError> {
        self.0.first().map_or(Ok(()), |tensor| address(tensor).map(drop))
    }
}

fn address(tensor: &Memory) -> Result<u64, StepError> {
    let found = tensor.client.get_resource(tensor.handle.clone());
    Ok(found.map_err(|error| wrong(format!("a tensor has no address: {error:?}")))?.resource().ptr)
}

/// Finds everything that a program names.
pub(super) fn build(program: &StepProgram<Device>, limits: &Limits) -> Result<Built, StepError> {
    let table = primitive(program.embedding.clone());
    let dtype = table.dtype;
    if !matches!(dtype, DType::F16 | DType::BF16) {
        return Err(wrong(format!("the model is computed in {dtype:?}, not in 16 bits")));
    }
    if ![64, 128].contains(&program.heads.width) {
        return Err(wrong(format!("heads are {} wide, not 64 or 128", program.heads.width)));
    }
    let mut builder = Builder { program, kept: Kept::default(), dtype };
    let operations = program.operations.iter().map(|operation| builder.launch(operation));
    let mut launches = operations.collect::<Result<Vec<_>, _>>()?;
    let most_rows =
        most_rows(&launches, limits).ok_or_else(|| wrong("the card has too little shared memory"))?;
    let [vocabulary, hidden] = [0, 1].map(|i| table.meta.shape()[i]);
    let shapes = Shapes {
        heads: program.heads,
        hidden,
        vocabulary,
        table: program.context.div_ceil(program.page_tokens),
        most_rows,
        products: launches.iter().filter(|launch| matches!(launch, Launch::Product(..))).count(),
    };
    let room = builder.room(&launches, &shapes, &table, limits)?;
    let tables = builder.tables(&table)?;
    launches.iter_mut().for_each(|launch| settle_in(launch, &room, &shapes, tables));
    let embedding = builder.kept.packed(table, dtype)?;
    Ok(Built { launches, embedding, shapes, room, kept: builder.kept, bf16: dtype == DType::BF16 })
}

/// The most rows whose products all have a share of the card's shared memory.
fn most_rows(launches: &[Launch], limits: &Limits) -> Option<usize> {
    let fits = |n: usize| {
        launches.iter().all(|launch| match launch {
            Launch::Product(product, _) => share(product, n, limits).is_some(),
            Launch::Attend(_) => true,
        })
    };
    ROWS.into_iter().find(|&n| fits(n))
}

fn share(product: &Product, n: usize, limits: &Limits) -> Option<Share> {
    Share::new(n, product.inner as usize, product.ranks as usize, limits)
}

/// Addresses of the code book's pairs, of the levels of scales, and of the rotations' frequencies.
#[derive(Clone, Copy)]
struct Tables {
    pairs: u64,
    dynamic: u64,
    frequencies: u64,
}

struct Builder<'a> {
    program: &'a StepProgram<Device>,
    kept: Kept,
    dtype: DType,
}

impl Builder<'_> {
    fn launch(&mut self, operation: &StepOperation<Device>) -> Result<Launch, StepError> {
        match operation {
            StepOperation::Linear { source, parts, target } => self.product(source, parts, *target),
            StepOperation::Attention { keys, values } => self.attend(keys.clone(), values.clone()),
        }
    }

    fn product(
        &mut self,
        source: &StepSource<Device>,
        parts: &[LinearPart<Device>],
        target: StepTarget,
    ) -> Result<Launch, StepError> {
        let dims: Vec<_> = parts.iter().map(|part| dims(&part.weight)).collect();
        check(parts, &dims, target)?;
        let inner = dims[0][1];
        let mut product =
            Product { part_count: parts.len() as i32, inner: inner as i32, ..Product::default() };
        for (own, part) in product.parts.iter_mut().zip(parts) {
            *own = self.part(part, inner)?;
            (own.first_row, own.first_rank) = (product.rows, product.ranks);
            product.rows += own.rows;
            product.ranks += own.rank;
        }
        product.tiles = (product.rows as usize).div_ceil(TILE) as i32;
        product.source = match source {
            StepSource::Residual(norm, epsilon) => {
                product.norm = self.kept.packed(primitive(norm.clone()), self.dtype)?;
                product.epsilon = *epsilon as f32;
                FROM_RESIDUAL
            }
            StepSource::Attention | StepSource::Activated => FROM_ROWS,
        };
        let after_attention = matches!(source, StepSource::Attention);
        product.target = match target {
            StepTarget::Joined | StepTarget::Logits => TO_ROWS,
            StepTarget::Residual => TO_RESIDUAL,
            StepTarget::Activated => TO_ACTIVATED,
        };
        Ok(Launch::Product(product, Ends { after_attention, target }))
    }

    fn part(&mut self, part: &LinearPart<Device>, inner: usize) -> Result<Part, StepError> {
        let mut own = Part { rows: dims(&part.weight)[0] as i32, ..Part::default() };
        match &part.weight {
            FrozenWeight::Dense(weight) => {
                own.dense = self.kept.packed(primitive(weight.clone()), self.dtype)?
            }
            FrozenWeight::Nf4(weight) => self.packed_weight(weight, &mut own)?,
        }
        if let Some(lora) = &part.lora {
            self.correction(lora, inner, &mut own)?;
        }
        Ok(own)
    }

    fn correction(&mut self, lora: &LoraTerm<Device>, inner: usize, own: &mut Part) -> Result<(), StepError> {
        let LoraTerm { a, b, scale } = lora;
        let ([rank, width], [rows, _]) = (a.dims(), b.dims());
        if [width, rows] != [inner, own.rows as usize] {
            return Err(wrong(format!("a correction [{rows}, {width}] of a layer [{}, {inner}]", own.rows)));
        }
        let fill = rank.next_multiple_of(RANKS) - rank;
        let zeros = |dims: [usize; 2]| Tensor::zeros(dims, (&a.device(), a.dtype()));
        let (a, b) = match fill {
            0 => (a.clone(), b.clone()),
            _ => (
                Tensor::cat(vec![a.clone(), zeros([fill, inner])], 0),
                Tensor::cat(vec![b.clone(), zeros([rows, fill])], 1),
            ),
        };
        own.rank = (rank + fill) as i32;
        own.lora_scale = *scale as f32;
        own.a = self.kept.packed(primitive(a), self.dtype)?;
        own.b = self.kept.packed(primitive(b), self.dtype)?;
        Ok(())
    }

    fn packed_weight(&mut self, weight: &Nf4Tensor<Device>, own: &mut Part) -> Result<(), StepError> {
        let (codes, scales) = weight.device_parts();
        own.codes = self.kept.address(codes)?;
        match scales {
            DeviceScales::Plain(absmax) => own.scales = self.kept.address(absmax)?,
            DeviceScales::Double { codes, nested, offset } => {
                own.scale_codes = self.kept.address(codes)?;
                own.scales = self.kept.address(nested)?;
                own.offset = self.kept.address(offset)?;
            }
        }
        Ok(())
    }

    fn attend(&mut self, keys: Tensor<Device, 2>, values: Tensor<Device, 2>) -> Result<Launch, StepError> {
        let heads = self.program.heads;
        Ok(Launch::Attend(Attend {
            keys: self.kept.shared(primitive(keys), self.dtype)?,
            values: self.kept.shared(primitive(values), self.dtype)?,
            page_tokens: self.program.page_tokens as i32,
            heads: heads.queries as i32,
            key_heads: heads.keys as i32,
            scale: 1.0 / (heads.width as f32).sqrt(),
            ..Attend::default()
        }))
    }

    fn room(
        &mut self,
        launches: &[Launch],
        shapes: &Shapes,
        like: &Memory,
        limits: &Limits,
    ) -> Result<Room, StepError> {
        let Shapes { heads, hidden, vocabulary, table, most_rows, products } = *shapes;
        let most = |size: &dyn Fn(&Product, StepTarget) -> usize| {
            let sizes = launches.iter().filter_map(|launch| match launch {
                Launch::Product(product, ends) => Some(size(product, ends.target)),
                Launch::Attend(_) => None,
            });
            sizes.max().unwrap_or(0)
        };
        let rows_to = |to: StepTarget| {
            most(&move |product, target| if target == to { product.rows as usize } else { 0 })
        };
        let over_rows = |size: &dyn Fn(usize) -> usize| (1..=most_rows).map(size).max().unwrap_or(0);
        let low_rank = most(&|product, _| {
            over_rows(&|n| {
                let pieces = share(product, n, limits).map_or(0, |share| share.splits * share.a_chunks);
                pieces * n * product.ranks as usize
            })
        });
        let partials = most(&|product, _| {
            over_rows(&|n| {
                let splits = share(product, n, limits).map_or(0, |share| share.splits);
                product.tiles as usize * splits * TILE * 8 * row_tiles(n)
            })
        });
        let splits = over_rows(&|n| n * attention_splits(n, heads.queries, limits));
        let mut room = |bytes: usize| self.kept.room(like, bytes);
        Ok(Room {
            residual: room(4 * most_rows * hidden)?,
            joined: room(4 * most_rows * rows_to(StepTarget::Joined))?,
            logits: room(4 * most_rows * vocabulary)?,
            attended: room(4 * splits * heads.queries * heads.width)?,
            log_sums: room(4 * splits * heads.queries)?,
            heads_result: room(2 * most_rows * heads.queries * heads.width)?,
            normalised: room(2 * most_rows * hidden)?,
            activated: room(most_rows * rows_to(StepTarget::Activated))?,
            low_rank: room(4 * low_rank)?,
            partials: room(4 * partials)?,
            ready: room(4 * products)?,
            numbers: room(4 * most_rows * (2 + table))?,
            choices: room(4 * most_rows)?,
            heads_arrived: self.kept.words(vec![0; most_rows * heads.queries], like)?,
            arrived: self.kept.words(vec![0; most(&|product, _| product.tiles as usize)], like)?,
        })
    }

    fn tables(&mut self, like: &Memory) -> Result<Tables, StepError> {
        let frequencies = rotary::frequencies(self.program.heads.width, self.program.theta);
        Ok(Tables {
            pairs: self.kept.words(pairs(self.dtype), like)?,
            dynamic: self.kept.floats(dynamic_code().to_vec(), like)?,
            frequencies: self.kept.floats(frequencies, like)?,
        })
    }
}

fn dims(weight: &FrozenWeight<Device>) -> [usize; 2] {
    match weight {
        FrozenWeight::Dense(weight) => weight.dims(),
        FrozenWeight::Nf4(weight) => weight.dims(),
    }
}

/// Whether the kernels can multiply these layers.
fn check(parts: &[LinearPart<Device>], dims: &[[usize; 2]], target: StepTarget) -> Result<(), StepError> {
    if parts.is_empty() || parts.len() > MOST_PARTS {
        return Err(wrong(format!("{} layers share an input, not 1 to {MOST_PARTS}", parts.len())));
    }
    let inner = dims[0][1];
    if !inner.is_multiple_of(GROUP) || dims.iter().any(|dims| dims[1] != inner) {
        return Err(wrong(format!("layers {dims:?} have no common width that is a multiple of {GROUP}")));
    }
    let kind = |part: &LinearPart<Device>| match &part.weight {
        FrozenWeight::Nf4(weight) => Some(weight.is_double()),
        FrozenWeight::Dense(_) => None,
    };
    if parts.iter().any(|part| kind(part) != kind(&parts[0])) {
        return Err(wrong("layers that share an input are packed in different ways"));
    }
    let (activated, whole) = (target == StepTarget::Activated, if parts.len() > 1 { TILE } else { 1 });
    if activated && (dims.len() != 2 || dims[0] != dims[1]) {
        return Err(wrong(format!("layers {dims:?} are not two of a kind to be activated")));
    }
    match dims.iter().find(|dims| !dims[0].is_multiple_of(whole)) {
        Some(dims) => Err(wrong(format!("a layer has {} rows, which is no multiple of {TILE}", dims[0]))),
        None => Ok(()),
    }
}

/// Fills in where a launch finds and leaves what steps compute.
fn settle_in(launch: &mut Launch, room: &Room, shapes: &Shapes, tables: Tables) {
    match launch {
        Launch::Product(product, ends) => {
            product.residual = room.residual;
            product.rows_in = if ends.after_attention { room.heads_result } else { room.activated };
            product.to_activated = room.activated;
            product.low_rank = room.low_rank;
            product.partials = room.partials;
            product.arrived = room.arrived;
            product.pairs = tables.pairs;
            product.dynamic = tables.dynamic;
            product.to = match ends.target {
                StepTarget::Joined => room.joined,
                StepTarget::Residual | StepTarget::Activated => room.residual,
                StepTarget::Logits => room.logits,
            };
        }
        Launch::Attend(attend) => {
            attend.joined = room.joined;
            attend.lengths = room.numbers + 4 * shapes.most_rows as u64;
            attend.tables = room.numbers + 8 * shapes.most_rows as u64;
            attend.frequencies = tables.frequencies;
            attend.attended = room.attended;
            attend.log_sums = room.log_sums;
            attend.result = room.heads_result;
            attend.arrived = room.heads_arrived;
            attend.table = shapes.table as i32;
        }
    }
}

/// For each byte of codes its two levels in 16 bits, the first in the lower half.
fn pairs(dtype: DType) -> Vec<i32> {
    let level = |code: usize| match dtype {
        DType::BF16 => u32::from(half::bf16::from_f32(NF4_CODE[code]).to_bits()),
        _ => u32::from(half::f16::from_f32(NF4_CODE[code]).to_bits()),
    };
    (0..256).map(|byte| (level(byte >> 4) | level(byte & 15) << 16).cast_signed()).collect()
}
