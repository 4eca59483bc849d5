//! What the kernels of all operations share: device tensors in and out of Burn's, and views of parts of them.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::tensor::{DType, Int, Shape, Tensor, TensorPrimitive};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeRuntime};
use cubecl::prelude::*;
use cubecl::zspace::metadata::Metadata;

use crate::{Dropout, InputGradient};

/// The backend of a runtime, without Burn's `fusion`: what is hot is fused by hand here.
pub type Cube<R> = CubeBackend<R, f32, i32, u8>;

pub(crate) fn primitive<R: CubeRuntime, const D: usize>(tensor: Tensor<Cube<R>, D>) -> CubeTensor<R> {
    tensor.into_primitive().tensor()
}

pub(crate) fn int_primitive<R: CubeRuntime, const D: usize>(
    tensor: Tensor<Cube<R>, D, Int>,
) -> CubeTensor<R> {
    tensor.into_primitive()
}

pub(crate) fn tensor<R: CubeRuntime, const D: usize>(primitive: CubeTensor<R>) -> Tensor<Cube<R>, D> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}

/// [`InputGradient`] as kernels take it: rows `[n, d]` whose elements lie side by side.
#[derive(Clone, Debug)]
pub struct SplitGradient<R: CubeRuntime> {
    /// What came through the weights, or all of it.
    pub base: CubeTensor<R>,
    /// What came through the factors.
    pub low_rank: Option<CubeTensor<R>>,
    /// The mask that the latter has yet to pass.
    pub dropout: Option<Dropout>,
}

impl<R: CubeRuntime> From<InputGradient<Cube<R>>> for SplitGradient<R> {
    fn from(gradient: InputGradient<Cube<R>>) -> Self {
        let base = side_by_side(primitive(gradient.base));
        let Some((low_rank, dropout)) = gradient.low_rank else {
            return Self { base, low_rank: None, dropout: None };
        };
        let dropout = dropout.filter(|dropout| dropout.probability > 0.0);
        Self { base, low_rank: Some(side_by_side(primitive(low_rank))), dropout }
    }
}

/// Runs a job on the thread that submits operations to a device; at once, if this is that thread. Whoever takes a lock and asks for addresses
/// under it does so there: elsewhere it would wait for that thread, which may wait for the lock.
pub(crate) fn on_device_thread<R: CubeRuntime, T: Send>(
    device: &R::Device,
    job: impl FnOnce() -> T + Send,
) -> T {
    let mut result = None;
    // CubeCL drops what a panic says, and takes no results that borrow anything: both go by the way of `result`.
    let done = R::client(device).exclusive(|| result = Some(catch_unwind(AssertUnwindSafe(job))));
    match result {
        Some(Ok(result)) => result,
        Some(Err(panic)) => resume_unwind(panic),
        None => panic!("the thread of the device does not run jobs: {done:?}"),
    }
}

/// A new tensor on the device of another one; its values are what the memory held.
pub(crate) fn uninitialized<R: CubeRuntime>(
    like: &CubeTensor<R>,
    dims: impl Into<Shape>,
    dtype: DType,
) -> CubeTensor<R> {
    let shape = dims.into();
    let handle = like.client.empty(shape.num_elements() * dtype.size());
    CubeTensor::new_contiguous(like.client.clone(), like.device.clone(), shape, handle, dtype)
}

/// The tensor itself if the elements of a row lie side by side, else a copy of which that is true.
pub(crate) fn side_by_side<R: CubeRuntime>(x: CubeTensor<R>) -> CubeTensor<R> {
    let single = x.meta.shape().last() == Some(&1);
    if single || x.meta.strides().last() == Some(&1) { x } else { into_contiguous(x) }
}

/// Elements of 16 bytes.
pub(crate) fn widest(dtype: DType) -> usize {
    16 / dtype.size()
}

/// Elements that are read and written at once: as many as 16 bytes of the first tensor hold, or as few as it takes for
/// [`vector_width_of`].
pub(crate) fn vector_width<R: CubeRuntime>(columns: usize, tensors: &[&CubeTensor<R>]) -> usize {
    vector_width_of(tensors.first().map_or(1, |x| widest(x.dtype)), columns, tensors)
}

/// The widest vector of at most `most` elements that divides `columns` and, for every tensor, all strides but the last
/// and the place where its buffer starts.
pub(crate) fn vector_width_of<R: CubeRuntime>(
    most: usize,
    columns: usize,
    tensors: &[&CubeTensor<R>],
) -> usize {
    let fits = |x: &&CubeTensor<R>, width: usize| {
        let offset = x.handle.offset_start.unwrap_or(0) as usize;
        let (_, rows) = x.meta.strides().split_last().unwrap_or((&1, &[]));
        rows.iter().all(|stride| stride.is_multiple_of(width))
            && offset.is_multiple_of(width * x.dtype.size())
    };
    let fits_all = |width: &usize| columns.is_multiple_of(*width) && tensors.iter().all(|x| fits(x, *width));
    [8, 4, 2].into_iter().filter(|width| *width <= most).find(fits_all).unwrap_or(1)
}

/// Cubes in one dimension that every runtime allows.
pub(crate) const CUBES: usize = 65_535;

/// So many cubes, numbered by `CUBE_POS`; there can be more than that.
pub(crate) fn cubes(count: usize) -> CubeCount {
    let count = count.max(1);
    let x = count.min(CUBES);
    CubeCount::Static(x as u32, count.div_ceil(x) as u32, 1)
}

/// A part of a row-major tensor `[rows, columns]`, perhaps taken as its transpose.
#[derive(Debug)]
pub(crate) struct Matrix<R: CubeRuntime> {
    /// The tensor the part lies in; the elements of a row are neighbours.
    pub(crate) tensor: CubeTensor<R>,
    /// Elements from the tensor's start to the part's.
    pub(crate) offset: usize,
    /// Rows and columns of the part, before it is transposed.
    pub(crate) dims: [usize; 2],
    /// Whether it is taken as its transpose.
    pub(crate) transposed: bool,
}

impl<R: CubeRuntime> Clone for Matrix<R> {
    fn clone(&self) -> Self {
        Self { tensor: self.tensor.clone(), ..*self }
    }
}

impl<R: CubeRuntime> Matrix<R> {
    /// The whole of a tensor `[rows, columns]`, which is copied if the elements of its rows are no neighbours.
    pub(crate) fn new(tensor: CubeTensor<R>) -> Self {
        let strides = tensor.meta.strides();
        let rows_are_whole = strides[1] == 1 && strides[0] >= tensor.meta.shape()[1];
        let tensor = if rows_are_whole { tensor } else { into_contiguous(tensor) };
        let dims = [tensor.meta.shape()[0], tensor.meta.shape()[1]];
        Self { tensor, offset: 0, dims, transposed: false }
    }

    /// Some of its columns, before it is transposed.
    pub(crate) fn columns(&self, start: usize, count: usize) -> Self {
        Self { offset: self.offset + start, dims: [self.dims[0], count], ..self.clone() }
    }

    /// Some of its rows, before it is transposed.
    pub(crate) fn rows(&self, start: usize, count: usize) -> Self {
        Self { offset: self.offset + start * self.row_stride(), dims: [count, self.dims[1]], ..self.clone() }
    }

    /// Its transpose.
    pub(crate) fn t(&self) -> Self {
        Self { transposed: !self.transposed, ..self.clone() }
    }

    /// Rows and columns as they are taken.
    pub(crate) fn shape(&self) -> [usize; 2] {
        let [rows, columns] = self.dims;
        if self.transposed { [columns, rows] } else { [rows, columns] }
    }

    /// Elements from one row to the next.
    pub(crate) fn row_stride(&self) -> usize {
        self.tensor.meta.strides()[0]
    }

    pub(crate) fn dtype(&self) -> DType {
        self.tensor.dtype
    }

    /// The part as a tensor of its own, as it is taken; a view where Burn can make one.
    pub(crate) fn part(&self) -> CubeTensor<R> {
        let stride = self.row_stride().max(1);
        let (row, column) = (self.offset / stride, self.offset % stride);
        let [rows, columns] = self.dims;
        let part = if self.offset == 0 && self.tensor.meta.shape()[..] == self.dims {
            self.tensor.clone()
        } else {
            burn_cubecl::kernel::slice(self.tensor.clone(), &[row..row + rows, column..column + columns])
        };
        if self.transposed { primitive(tensor::<R, 2>(part).swap_dims(0, 1)) } else { part }
    }

    /// The part as a view, if the runtime can bind memory that begins there.
    pub(crate) fn view(&self) -> Option<CubeTensor<R>> {
        let bytes = (self.offset * self.dtype().size()) as u64;
        let alignment = self.tensor.client.properties().memory.alignment;
        if !bytes.is_multiple_of(alignment) {
            return None;
        }
        let whole = self.tensor.clone();
        let metadata = Metadata::new(Shape::from(self.dims), whole.meta.strides().clone());
        let handle = whole.handle.offset_start(bytes);
        Some(CubeTensor::new(whole.client, handle, metadata, whole.device, whole.dtype))
    }
}

/// The largest buffer of dense weights asked for so far, in bytes.
static SCRATCH_BYTES: AtomicUsize = AtomicUsize::new(0);

/// A buffer for dense weights. All of them get the size of the largest, so that one piece of memory serves them in turn
/// where an allocator reuses pieces by size.
pub(crate) fn scratch<R: CubeRuntime>(like: &CubeTensor<R>, dims: [usize; 2], dtype: DType) -> CubeTensor<R> {
    let bytes = dims[0] * dims[1] * dtype.size();
    let size = SCRATCH_BYTES.fetch_max(bytes, Ordering::Relaxed).max(bytes);
    let handle = like.client.empty(size);
    CubeTensor::new_contiguous(like.client.clone(), like.device.clone(), Shape::from(dims), handle, dtype)
}

/// New rows `[n, d]` with at least so many spare columns behind each; their values are what the memory held.
///
/// The starts of rows lie a multiple of 16 bytes apart, and memory is taken for a multiple of 512 columns, so that rows
/// of nearly the same width share it where an allocator reuses pieces by size.
pub(crate) fn spacious<R: CubeRuntime>(
    like: &CubeTensor<R>,
    [n, d]: [usize; 2],
    spare: usize,
    dtype: DType,
) -> CubeTensor<R> {
    if spare == 0 {
        return uninitialized(like, [n, d], dtype);
    }
    let stride = (d + spare).next_multiple_of(8);
    let handle = like.client.empty(n * stride.next_multiple_of(512) * dtype.size());
    let shape = Shape::from([n, stride]);
    let whole = CubeTensor::new_contiguous(like.client.clone(), like.device.clone(), shape, handle, dtype);
    with_columns(&whole, d)
}

/// The same rows with fewer or more columns, of which there are as many as lie between the starts of two rows.
pub(crate) fn with_columns<R: CubeRuntime>(rows: &CubeTensor<R>, columns: usize) -> CubeTensor<R> {
    let [n, stride] = [rows.meta.shape()[0], rows.meta.strides()[0]];
    assert!(columns <= stride, "{columns} columns of rows whose starts lie {stride} elements apart");
    let metadata = Metadata::new(Shape::from([n, columns]), rows.meta.strides().clone());
    let rows = rows.clone();
    CubeTensor::new(rows.client, rows.handle, metadata, rows.device, rows.dtype)
}
