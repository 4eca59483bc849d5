//! The shape of launches in which a unit has a vector of a row of a tensor `[n, d]`.

use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use crate::device::CUBES;

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
