//! What the tests of kernels on devices share.

mod noise;

pub(crate) use noise::noise;

/// The device of a runtime.
pub(crate) type Device<R> = <R as cubecl::Runtime>::Device;
