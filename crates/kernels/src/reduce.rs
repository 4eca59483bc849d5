//! Sums and maxima over the units of a cube.
//!
//! The norm has a sum of its own, over vectors, because its two sums travel together.

use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::features::Plane;
use cubecl::prelude::*;

/// Combines one number of each unit of a cube, by maximum or by sum, in a fixed order; every unit gets the result.
///
/// `units` is a power of two.
#[cube]
pub(crate) fn over_cube(
    value: f32,
    #[comptime] units: usize,
    #[comptime] planes: bool,
    #[comptime] largest: bool,
) -> f32 {
    if comptime!(planes) { by_planes(value, units, largest) } else { by_halves(value, units, largest) }
}

#[cube]
fn by_planes(value: f32, #[comptime] units: usize, #[comptime] largest: bool) -> f32 {
    // A plane has four units or more.
    let mut parts = SharedMemory::<f32>::new(comptime!(units.div_ceil(4)));
    let part = if comptime!(largest) { plane_max(value) } else { plane_sum(value) };
    if UNIT_POS_PLANE == 0 {
        parts[(UNIT_POS / PLANE_DIM) as usize] = part;
    }
    sync_cube();
    let mut result = parts[0];
    for plane in 1..CUBE_DIM.div_ceil(PLANE_DIM) as usize {
        result = join(result, parts[plane], largest);
    }
    result
}

#[cube]
fn by_halves(value: f32, #[comptime] units: usize, #[comptime] largest: bool) -> f32 {
    let unit = UNIT_POS as usize;
    let mut parts = SharedMemory::<f32>::new(units);
    parts[unit] = value;
    sync_cube();
    let mut half = comptime!(units / 2).runtime();
    while half > 0 {
        if unit < half {
            let other = parts[unit + half];
            parts[unit] = join(parts[unit], other, largest);
        }
        sync_cube();
        half /= 2;
    }
    parts[0]
}

#[cube]
fn join(a: f32, b: f32, #[comptime] largest: bool) -> f32 {
    if comptime!(largest) { max(a, b) } else { a + b }
}

/// Whether sums and maxima over planes can be used.
pub(crate) fn has_planes<R: CubeRuntime>(x: &CubeTensor<R>) -> bool {
    x.client.properties().features.plane.contains(Plane::Ops)
}
