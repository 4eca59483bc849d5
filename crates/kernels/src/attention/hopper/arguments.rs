//! What the kernels are given, byte for byte as `common.cu` and `gradients.cu` declare it.

use burn::tensor::DType;
use cubecl::cuda::CudaRuntime;
use cudarc::driver::sys;

use super::{Memory, Refusal, TILE, WIDTH};
use crate::attention::device::dims;
use crate::attention::ranges::Ranges;
use crate::side_stream::address_of;

/// Own heads that are worked on at a time, so that what passes by them stays in the cache. Of 8, 16 and 32 the first was fastest on an H200.
const TOGETHER: usize = 8;

/// How a tensor `[b, heads, t, 128]` lies, for the copy engine; boxes have [`TILE`] rows and half a row's columns.
#[repr(C, align(128))]
#[derive(Clone, Copy, Debug)]
pub(super) struct TensorMap([u64; 16]);

impl TensorMap {
    pub(super) fn new(x: &Memory) -> Result<Self, Refusal> {
        let address = address_of(x)?;
        let [b, heads, t, width] = dims(x).map(|dim| dim as u64);
        let bytes = |dim: usize| (x.meta.strides()[dim] * x.dtype.size()) as u64;
        let (sizes, strides) = ([width, t, heads, b], [bytes(2), bytes(1), bytes(0)]);
        let (parts, steps) = ([WIDTH as u32 / 2, TILE as u32, 1, 1], [1; 4]);
        let kind = match x.dtype {
            DType::BF16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            _ => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        };
        let mut map = Self([0; 16]);
        // SAFETY: a map has 128 bytes at a multiple of 128, as CUDA 13 wants it (64 before), and the arrays have as many elements as four dimensions need. Drivers with
        // events of contexts, which were asked for before, have the function.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                (&raw mut map).cast(),
                kind,
                4,
                address as *mut _,
                sizes.as_ptr(),
                strides.as_ptr(),
                parts.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()?;
        Ok(map)
    }
}

/// `Rows`: heads that are read or written without the copy engine. Strides in elements.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    data: u64,
    batch: i64,
    head: i64,
    row: i64,
}

impl Rows {
    /// Of a tensor `[b, heads, t, 128]`.
    pub(super) fn new(x: &Memory) -> Result<Self, Refusal> {
        let [batch, head, row] = [0, 1, 2].map(|dim| x.meta.strides()[dim] as i64);
        Ok(Self { data: address_of(x)?, batch, head, row })
    }

    /// Of a tensor `[b, t, heads, 128]`, whose elements are 16 bits.
    pub(super) fn joined(x: &Memory) -> Result<Self, Refusal> {
        let [batch, row, head] = [0, 1, 2].map(|dim| x.meta.strides()[dim] as i64);
        Ok(Self { data: address_of(x)?, batch, head, row })
    }

    /// From a head on.
    pub(super) fn starting_at(self, head: usize) -> Self {
        Self { data: self.data + 2 * head as u64 * self.head as u64, ..self }
    }
}

/// `Statistics`: of queries, `[b h, padded]` in f32.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Statistics {
    /// lse in powers of two.
    log_sums: u64,
    /// D.
    means: u64,
    /// Tokens of a row, filled up.
    padded: i32,
    unused: i32,
}

impl Statistics {
    /// In memory `[2, lines, padded]` of f32.
    pub(super) fn new(address: u64, lines: usize, padded: usize) -> Self {
        let bytes = (lines * padded * size_of::<f32>()) as u64;
        Self { log_sums: address, means: address + bytes, padded: padded as i32, unused: 0 }
    }
}

// As `common.cu` and `gradients.cu` assert.
const _: () = assert!(size_of::<Rows>() == 32 && size_of::<Task>() == 96 && size_of::<Statistics>() == 24);

/// `Task`: a launch whose own rows are queries or keys.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Task {
    own_documents: u64,
    own_positions: u64,
    documents: u64,
    positions: u64,
    codes: u64,
    ranges: u64,
    own_tokens: i32,
    tokens: i32,
    own_tiles: i32,
    tiles: i32,
    own_stride: i32,
    stride: i32,
    heads: i32,
    lines: i32,
    members: i32,
    together: i32,
    scale: f32,
    unused: i32,
}

impl Task {
    /// Own rows are queries `[b, h, t, 128]`, and keys `[b, g, s, 128]` pass by. `tokens` are documents and
    /// positions of queries and of keys, whose elements lie side by side.
    pub(super) fn of_queries(
        q: &Memory,
        k: &Memory,
        tokens: &[Memory; 4],
        ranges: &Ranges<CudaRuntime>,
    ) -> Result<Self, Refusal> {
        let ([b, h, t, _], [_, g, s, _]) = (dims(q), dims(k));
        let [own_documents, own_positions, documents, positions] = addresses(tokens)?;
        let [own_tiles, tiles] = [t, s].map(|tokens| tokens.div_ceil(TILE));
        Ok(Self {
            own_documents,
            own_positions,
            documents,
            positions,
            codes: address_of(&ranges.codes)?,
            ranges: address_of(&ranges.rows)?,
            own_tokens: t as i32,
            tokens: s as i32,
            own_tiles: own_tiles as i32,
            tiles: tiles as i32,
            own_stride: tiles as i32,
            stride: 1,
            heads: h as i32,
            lines: (b * h) as i32,
            members: (h / g) as i32,
            together: TOGETHER as i32,
            scale: 1.0 / (WIDTH as f32).sqrt(),
            unused: 0,
        })
    }

    /// The same with the sides exchanged: own rows are keys, and queries pass by.
    pub(super) fn of_keys(self, ranges: &Ranges<CudaRuntime>) -> Result<Self, Refusal> {
        Ok(Self {
            own_documents: self.documents,
            own_positions: self.positions,
            documents: self.own_documents,
            positions: self.own_positions,
            ranges: address_of(&ranges.columns)?,
            own_tokens: self.tokens,
            tokens: self.own_tokens,
            own_tiles: self.tiles,
            tiles: self.own_tiles,
            own_stride: self.stride,
            stride: self.own_stride,
            heads: self.heads / self.members,
            lines: self.lines / self.members,
            ..self
        })
    }

    /// Blocks that have something to do: two tiles of a head are an item.
    pub(super) fn items(&self) -> u32 {
        (self.own_tiles as u32).div_ceil(2) * self.lines as u32
    }
}

fn addresses(tensors: &[Memory; 4]) -> Result<[u64; 4], Refusal> {
    let [a, b, c, d] = tensors;
    Ok([address_of(a)?, address_of(b)?, address_of(c)?, address_of(d)?])
}
