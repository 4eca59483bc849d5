//! A CUDA stream of our own beside CubeCL's, in order with them.
//!
//! CubeCL 0.10 makes its streams itself, hands none of them out, and makes them such that not even CUDA's default stream waits
//! for them. What we share with it is the context. From driver 12.5 on a context has events: our stream waits for one that
//! lies behind everything submitted before, and everything submitted later waits for one behind our work. An older driver has
//! events of streams only, so the host waits there: for the context before our work, and for our stream after it. Results
//! are the same, and the device idles while the host submits what comes next. `docs/decisions/0015-older-drivers.md` says what
//! else was looked at.

use std::sync::{Arc, OnceLock};

use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::CudaRuntime;
use cudarc::driver::{CudaContext, DriverError, result as driver, sys};

/// The first driver interface with events of a whole context.
const CONTEXT_EVENTS: i32 = 12_050;

/// Version that drivers are taken for at most.
static ASSUMED: OnceLock<i32> = OnceLock::new();

/// Takes the driver for one of at most this version (12040 for 12.4) from now on, so that what happens on older drivers can be
/// tried on a newer one. Does nothing if a version was assumed before.
pub fn assume_driver(version: u32) {
    ASSUMED.get_or_init(|| i32::try_from(version).unwrap_or(i32::MAX));
}

/// Version of the driver's interface: 12040 for 12.4.
pub(crate) fn driver_version() -> Result<i32, String> {
    let mut version = 0;
    // SAFETY: the driver writes one integer to a place that is alive.
    let status = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    status.result().map_err(|error| format!("no CUDA driver: {error}"))?;
    Ok(ASSUMED.get().map_or(version, |&assumed| version.min(assumed)))
}

/// A version as people write it.
pub(crate) fn version_name(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// Where a tensor's first element lies, as long as the tensor lives. Waits until everything before has been submitted.
pub(crate) fn address_of(tensor: &CubeTensor<CudaRuntime>) -> Result<u64, String> {
    let found = tensor.client.get_resource(tensor.handle.clone());
    Ok(found.map_err(|error| format!("a tensor has no address: {error:?}"))?.resource().ptr)
}

/// Who keeps our stream in order with CubeCL's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    /// The device, by events of the context.
    Device,
    /// The host, by waiting.
    Host,
}

impl Order {
    const fn of_driver(version: i32) -> Self {
        if version >= CONTEXT_EVENTS { Self::Device } else { Self::Host }
    }
}

/// `cuCtxRecordEvent` and `cuCtxWaitEvent`.
type ContextFunction = unsafe extern "C" fn(sys::CUcontext, sys::CUevent) -> sys::CUresult;

/// Events of a context. The functions are looked up here, because cudarc declares them only where the toolkit that it is built
/// with has them, and ends the process where the driver lacks them.
#[derive(Debug)]
struct ContextEvents {
    record: ContextFunction,
    wait: ContextFunction,
    before: sys::CUevent,
    after: sys::CUevent,
}

impl ContextEvents {
    /// None where the driver lacks the functions. The context is bound to this thread.
    fn new() -> Result<Option<Self>, DriverError> {
        // SAFETY: the driver's header declares both functions as `ContextFunction` says.
        let find =
            |name: &[u8]| unsafe { sys::culib().get::<ContextFunction>(name) }.ok().map(|found| *found);
        let Some((record, wait)) = find(b"cuCtxRecordEvent\0").zip(find(b"cuCtxWaitEvent\0")) else {
            return Ok(None);
        };
        let event = || driver::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        Ok(Some(Self { record, wait, before: event()?, after: event()? }))
    }
}

impl Drop for ContextEvents {
    fn drop(&mut self) {
        for event in [self.before, self.after] {
            // SAFETY: nothing else has the event; an error leaves it to the context's end.
            unsafe { driver::event::destroy(event) }.ok();
        }
    }
}

/// A stream of its own on a device that CubeCL uses too.
#[derive(Debug)]
pub(crate) struct SideStream {
    context: Arc<CudaContext>,
    stream: sys::CUstream,
    /// None where the host keeps order.
    events: Option<ContextEvents>,
}

// SAFETY: the driver's handles may be used from any thread that has bound the context, which callers do by `bind`.
unsafe impl Send for SideStream {}

impl SideStream {
    /// A stream on a device, by its number; this thread is one of the context's then.
    pub(crate) fn open(context: Arc<CudaContext>, driver_version: i32) -> Result<Self, DriverError> {
        context.bind_to_thread()?;
        let events = match Order::of_driver(driver_version) {
            Order::Device => ContextEvents::new()?,
            Order::Host => None,
        };
        let stream = driver::stream::create(driver::stream::StreamKind::NonBlocking)?;
        Ok(Self { context, stream, events })
    }

    /// The driver's handle.
    pub(crate) fn raw(&self) -> sys::CUstream {
        self.stream
    }

    /// Whether the host keeps order.
    pub(crate) fn waits(&self) -> bool {
        self.events.is_none()
    }

    /// Makes this thread one of the context's. Before any other method.
    pub(crate) fn bind(&self) -> Result<(), DriverError> {
        self.context.bind_to_thread()
    }

    /// What is submitted to this stream from now on runs after everything that was submitted to the context before.
    pub(crate) fn follow(&self) -> Result<(), DriverError> {
        let Some(events) = &self.events else {
            return driver::ctx::synchronize();
        };
        let wait = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: context, event and stream are alive and this stream's own.
        unsafe {
            (events.record)(self.context.cu_ctx(), events.before).result()?;
            driver::stream::wait_event(self.stream, events.before, wait)
        }
    }

    /// What is submitted to the context from now on runs after everything that was submitted to this stream before.
    pub(crate) fn lead(&self) -> Result<(), DriverError> {
        let Some(events) = &self.events else {
            return self.finish();
        };
        // SAFETY: context, event and stream are alive and this stream's own.
        unsafe {
            driver::event::record(events.after, self.stream)?;
            (events.wait)(self.context.cu_ctx(), events.after).result()
        }
    }

    /// Waits for the stream.
    pub(crate) fn finish(&self) -> Result<(), DriverError> {
        // SAFETY: the stream is alive.
        unsafe { driver::stream::synchronize(self.stream) }
    }
}

impl Drop for SideStream {
    fn drop(&mut self) {
        // SAFETY: nothing else has the stream; an error leaves it to the context's end.
        unsafe { driver::stream::destroy(self.stream) }.ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_keeps_order_below_driver_12_5() {
        for version in [11_080, 12_000, 12_020, 12_040] {
            assert_eq!(Order::of_driver(version), Order::Host, "{}", version_name(version));
        }
        for version in [12_050, 12_080, 13_000] {
            assert_eq!(Order::of_driver(version), Order::Device, "{}", version_name(version));
        }
        assert_eq!(version_name(12_040), "12.4");
    }
}
