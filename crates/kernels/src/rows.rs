//! The shape of launches in which a unit has a vector of a row of a tensor `[n, d]`, and the plainest of them.

use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use crate::device::{CUBES, Matrix, side_by_side, vector_width_of};

/// Units of a cube.
const UNITS: usize = 256;

/// n and d of rows.
pub(crate) fn dims<R: CubeRuntime>(x: &CubeTensor<R>) -> [usize; 2] {
    [x.meta.shape()[0], x.meta.shape()[1]]
}

/// Cubes and units that give each of n rows so many units, found by [`row`] and [`column`]. Narrow rows share a cube.
pub(crate) fn launch_shape(n: usize, units: usize) -> (CubeCount, CubeDim) {
    let width = units.next_power_of_two().clamp(1, UNITS);
    let height = UNITS / width;
    let cubes = n.div_ceil(height).max(1);
    let count = CubeCount::Static(
        units.div_ceil(width).max(1) as u32,
        cubes.min(CUBES) as u32,
        cubes.div_ceil(CUBES) as u32,
    );
    (count, CubeDim::new_2d(width as u32, height as u32))
}

/// Vectors from one row to the next. Kernels get it, and the shape, as scalars: what CubeCL knows of a tensor's shape lies
/// in memory, and would have to arrive before a unit could ask for its vectors.
pub(crate) fn row_stride<R: CubeRuntime>(x: &CubeTensor<R>, width: usize) -> usize {
    x.meta.strides()[0] / width
}

/// The row of a unit; it can lie past the last row.
#[cube]
pub(crate) fn row() -> usize {
    ((CUBE_POS_Z * CUBE_COUNT_Y + CUBE_POS_Y) * CUBE_DIM_Y + UNIT_POS_Y) as usize
}

/// The vector of a unit in its row; it can lie past the row's end.
#[cube]
pub(crate) fn column() -> usize {
    (CUBE_POS_X * CUBE_DIM_X + UNIT_POS_X) as usize
}

/// Writes `scale · source`, of any dtype, into the columns of a part from `first` on, and zeros into its others.
pub(crate) fn write_columns<R: CubeRuntime>(
    source: CubeTensor<R>,
    target: &Matrix<R>,
    first: usize,
    scale: f32,
) {
    let source = side_by_side(source);
    let ([rows, columns], [n, d]) = (target.dims, dims(&source));
    assert!(n == rows && first + d <= columns, "[{n}, {d}] from column {first} on of [{rows}, {columns}]");
    let most = vector_width_of(8, d, &[&source, &target.tensor]);
    let fits = |width: &usize| [columns, first, target.offset].iter().all(|x| x.is_multiple_of(*width));
    let width = [8, 4, 2].into_iter().filter(|width| *width <= most).find(fits).unwrap_or(1);
    let (cubes, units) = launch_shape(rows, columns / width);
    let (from, to) = (source.dtype.into(), target.dtype().into());
    let [stride, target_stride] = [&source, &target.tensor].map(|x| row_stride(x, width));
    let client = source.client.clone();
    // SAFETY: units past the last row or the part's last column do nothing; the others read inside the source and write
    // inside the part, which lies in its tensor's memory.
    unsafe {
        write_columns_kernel::launch_unchecked::<R>(
            &client,
            cubes,
            units,
            width,
            source.into_tensor_arg(),
            target.tensor.clone().into_tensor_arg(),
            rows,
            columns / width,
            first / width,
            d / width,
            stride,
            target.offset / width,
            target_stride,
            scale,
            from,
            to,
        );
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments, reason = "a kernel has no other way to take them")]
fn write_columns_kernel<I: Float, O: Float, N: Size>(
    source: &Tensor<Vector<I, N>>,
    target: &mut Tensor<Vector<O, N>>,
    rows: usize,
    vectors: usize,
    first: usize,
    count: usize,
    stride: usize,
    offset: usize,
    target_stride: usize,
    scale: f32,
    #[define(I)] _from: StorageType,
    #[define(O)] _to: StorageType,
) {
    let (row, column) = (row(), column());
    if row < rows && column < vectors {
        let mut value = Vector::<f32, N>::new(0.0);
        if column >= first && column < first + count {
            value = Vector::cast_from(source[row * stride + column - first]);
        }
        target[offset + row * target_stride + column] = Vector::cast_from(value * Vector::new(scale));
    }
}
