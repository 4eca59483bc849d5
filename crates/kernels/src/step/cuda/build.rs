//! From a program to launches: where everything lies that it names, and room for what is computed.

use burn::tensor::{DType, Int, Tensor, TensorData};
use burn_cubecl::kernel::{cast, into_contiguous};
use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::CudaRuntime;

use super::layout::{Part, Product, words};
use super::outline::{FROM_ATTENTION, Outline, TABLE, dims};
use super::{Room, Shapes, refused, unsupported};
use crate::device::{Cube, primitive, uninitialized};
use crate::limits::Limits;
use crate::nf4::kernel::DeviceScales;
use crate::nf4::{NF4_CODE, dynamic_code};
use crate::side_stream::address_of;
use crate::step::{StepError, StepOperation, StepProgram, StepSource, StepTarget};
use crate::{FloatPages, FrozenWeight, LinearPart, LoraTerm, Nf4Tensor, Pages, rotary};

type Device = Cube<CudaRuntime>;
type Memory = CubeTensor<CudaRuntime>;

/// A program on its device.
pub(super) struct Built {
    pub(super) products: Vec<Product>,
    pub(super) shapes: Shapes,
    pub(super) room: Room,
    /// The memory of `room.logits`.
    pub(super) logits: Memory,
    pub(super) tables: Tables,
    pub(super) kept: Kept,
    pub(super) bf16: bool,
}

/// Addresses of what a program only reads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tables {
    pub(super) products: u64,
    pub(super) embedding: u64,
    /// Of the code book.
    pub(super) pairs: u64,
    /// Levels of scales.
    pub(super) dynamic: u64,
    /// Sines and cosines of all positions.
    pub(super) turns: u64,
}

/// Tensors that are in use.
#[derive(Debug, Default)]
pub(super) struct Kept(Vec<Memory>);

impl Kept {
    /// The address of a tensor's first element; the tensor stays.
    fn address(&mut self, tensor: Memory) -> Result<u64, StepError> {
        let address = address(&tensor)?;
        if !address.is_multiple_of(16) {
            return Err(unsupported("a tensor does not begin at a multiple of 16 bytes"));
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
            return Err(unsupported(format!(
                "pages in {:?}, not in {dtype:?} and side by side",
                tensor.dtype
            )));
        }
        self.address(tensor)
    }

    /// New memory; its values are what it held.
    fn room(&mut self, like: &Memory, bytes: u64) -> Result<u64, StepError> {
        self.address(memory(like, bytes))
    }

    /// New memory of zeros.
    fn zeros(&mut self, like: &Memory, bytes: u64) -> Result<u64, StepError> {
        self.words(vec![0; (bytes as usize).div_ceil(4)], like)
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

/// Memory of so many bytes.
fn memory(like: &Memory, bytes: u64) -> Memory {
    uninitialized(like, [(bytes as usize).div_ceil(4).max(4)], DType::F32)
}

fn address(tensor: &Memory) -> Result<u64, StepError> {
    address_of(tensor).map_err(refused)
}

/// Finds everything that a program names.
pub(super) fn build(
    program: &StepProgram<Device>,
    pages: &[Pages<Device>],
    limits: &Limits,
) -> Result<Built, StepError> {
    let Outline { mut products, targets, shapes, room, .. } = Outline::new(program, limits)?;
    let embedding = primitive(program.embedding.clone());
    let dtype = embedding.dtype;
    let mut builder = Builder { kept: Kept::default(), dtype };
    let logits = memory(&embedding, room.logits);
    let room = builder.room(&room, &embedding, &logits)?;
    let layers = program.operations.iter().filter_map(|operation| match operation {
        StepOperation::Linear { source, parts, .. } => Some((source, parts)),
        StepOperation::Attention => None,
    });
    let mut pages = pages.iter();
    for ((product, target), (source, parts)) in products.iter_mut().zip(targets).zip(layers) {
        builder.product(product, source, parts)?;
        if product.attends == 1 {
            let pages = pages.next().ok_or_else(|| unsupported("more attentions than layers of pages"))?;
            builder.attend(product, pages)?;
        }
        settle_in(product, target, &room);
    }
    let tables = builder.tables(program, &products, embedding)?;
    Ok(Built { products, shapes, room, logits, tables, kept: builder.kept, bf16: dtype == DType::BF16 })
}

struct Builder {
    kept: Kept,
    dtype: DType,
}

impl Builder {
    fn product(
        &mut self,
        product: &mut Product,
        source: &StepSource<Device>,
        parts: &[LinearPart<Device>],
    ) -> Result<(), StepError> {
        if let StepSource::Residual(norm, _) = source {
            product.norm = self.kept.packed(primitive(norm.clone()), self.dtype)?;
        }
        product.parts.iter_mut().zip(parts).try_for_each(|(own, part)| self.part(own, part))
    }

    fn part(&mut self, own: &mut Part, part: &LinearPart<Device>) -> Result<(), StepError> {
        match &part.weight {
            FrozenWeight::Dense(weight) => {
                own.dense = self.kept.packed(primitive(weight.clone()), self.dtype)?
            }
            FrozenWeight::Nf4(weight) => self.packed_weight(weight, own)?,
        }
        match &part.lora {
            Some(lora) => self.correction(lora, dims(&part.weight), own),
            None => Ok(()),
        }
    }

    fn correction(
        &mut self,
        lora: &LoraTerm<Device>,
        [rows, inner]: [usize; 2],
        own: &mut Part,
    ) -> Result<(), StepError> {
        let LoraTerm { a, b, .. } = lora;
        let fill = own.rank as usize - a.dims()[0];
        let zeros = |dims: [usize; 2]| Tensor::zeros(dims, (&a.device(), a.dtype()));
        let (a, b) = match fill {
            0 => (a.clone(), b.clone()),
            _ => (
                Tensor::cat(vec![a.clone(), zeros([fill, inner])], 0),
                Tensor::cat(vec![b.clone(), zeros([rows, fill])], 1),
            ),
        };
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

    fn attend(&mut self, product: &mut Product, pages: &Pages<Device>) -> Result<(), StepError> {
        let Pages::Float(FloatPages { keys, values }) = pages else {
            return Err(unsupported("pages in 8 bits"));
        };
        product.keys = self.kept.shared(primitive(keys.clone()), self.dtype)?;
        product.values = self.kept.shared(primitive(values.clone()), self.dtype)?;
        Ok(())
    }

    /// Takes memory of so many bytes, but for that of the logits, which is there.
    fn room(&mut self, bytes: &Room, like: &Memory, logits: &Memory) -> Result<Room, StepError> {
        let logits = self.kept.address(logits.clone())?;
        let mut room = |bytes| self.kept.room(like, bytes);
        Ok(Room {
            residual: room(bytes.residual)?,
            joined: room(bytes.joined)?,
            logits,
            attended: room(bytes.attended)?,
            log_sums: room(bytes.log_sums)?,
            heads_result: room(bytes.heads_result)?,
            partial: room(bytes.partial)?,
            arrived: room(bytes.arrived)?,
            squares: room(bytes.squares)?,
            normalised: room(bytes.normalised)?,
            activated: room(bytes.activated)?,
            low_rank: room(bytes.low_rank)?,
            numbers: room(bytes.numbers)?,
            barrier: self.kept.zeros(like, bytes.barrier)?,
        })
    }

    fn tables(
        &mut self,
        program: &StepProgram<Device>,
        products: &[Product],
        embedding: Memory,
    ) -> Result<Tables, StepError> {
        let turns = turns(program.heads.width, program.theta, program.context);
        // SAFETY: a product has no gaps.
        let products = unsafe { words(products) };
        Ok(Tables {
            products: self.kept.words(products, &embedding)?,
            pairs: self.kept.words(pairs(self.dtype), &embedding)?,
            dynamic: self.kept.floats(dynamic_code().to_vec(), &embedding)?,
            turns: self.kept.floats(turns, &embedding)?,
            embedding: self.kept.packed(embedding, self.dtype)?,
        })
    }
}

/// Fills in where a product finds and leaves what steps compute.
fn settle_in(product: &mut Product, target: StepTarget, room: &Room) {
    product.rows_in = if product.source == FROM_ATTENTION { room.heads_result } else { room.activated };
    product.to = match target {
        StepTarget::Joined => room.joined,
        StepTarget::Residual | StepTarget::Activated => room.residual,
        StepTarget::Logits => room.logits,
    };
}

/// Sine and cosine of every angle of every position, `[context, width / 2, 2]`.
fn turns(width: usize, theta: f64, context: usize) -> Vec<f32> {
    let frequencies = rotary::frequencies(width, theta);
    let turn = |angle: f32| {
        let (sine, cosine) = f64::from(angle).sin_cos();
        [sine as f32, cosine as f32]
    };
    let of =
        |position: usize| frequencies.iter().flat_map(move |frequency| turn(position as f32 * frequency));
    (0..context).flat_map(of).collect()
}

/// For each byte of codes its two levels in 16 bits, the first in the lower half.
fn pairs(dtype: DType) -> Vec<i32> {
    let level = |code: usize| match dtype {
        DType::BF16 => u32::from(half::bf16::from_f32(NF4_CODE[code]).to_bits()),
        _ => u32::from(half::f16::from_f32(NF4_CODE[code]).to_bits()),
    };
    (0..TABLE).map(|byte| (level(byte >> 4) | level(byte & 15) << 16).cast_signed()).collect()
}
