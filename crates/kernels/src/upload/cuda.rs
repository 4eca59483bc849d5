//! The way onto a CUDA device: through pinned memory, which the device reads by itself.
//!
//! CubeCL 0.10 copies what it is given into fresh memory, and the driver copies that again, because it is not pinned. Here values are
//! written to one of two places, which stay for the life of the process, and a stream of our own copies from there: while it does, the
//! other place is written. What it trades: that much pinned memory, and a round trip to CubeCL's device thread for the address. What it
//! refuses: nothing; where the driver does, the plain way is gone.

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock};

use burn::tensor::{DType, Shape};
use burn_cubecl::tensor::CubeTensor;
use cubecl::Runtime;
use cubecl::cuda::{CudaDevice, CudaRuntime};
use cudarc::driver::{CudaContext, result as driver, sys};

use crate::pinned::Pinned;
use crate::side_stream::{SideStream, address_of, driver_version};

/// Where values wait for the device.
struct Place {
    memory: Pinned<u8>,
    /// Behind the last copy from here.
    copied: sys::CUevent,
}

struct Uploader {
    stream: SideStream,
    places: [Place; 2],
    /// The place whose copy is older.
    next: usize,
}

// SAFETY: the driver's handles may be used from any thread that has bound the context, one at a time; a mutex guards them.
unsafe impl Send for Uploader {}

/// Floats `[1, n]` on a device, whose bytes `fill` writes; none if the driver refuses, or another thread is at it. That is not waited
/// for: the device's thread may be the one that would wait, and who has the lock waits for that thread.
pub(crate) fn upload(
    device: &CudaDevice,
    dtype: DType,
    count: usize,
    fill: &mut dyn FnMut(&mut [u8]),
) -> Option<CubeTensor<CudaRuntime>> {
    static UPLOADERS: OnceLock<Mutex<HashMap<usize, Option<Uploader>>>> = OnceLock::new();
    let mut all = UPLOADERS.get_or_init(Mutex::default).try_lock().ok()?;
    let uploader = all.entry(device.index).or_insert_with(|| Uploader::open(device)).as_mut()?;
    let (client, bytes) = (CudaRuntime::client(device), count * dtype.size());
    let handle = client.empty(bytes);
    let tensor = CubeTensor::new_contiguous(client, device.clone(), Shape::from([1, count]), handle, dtype);
    uploader.upload(&tensor, bytes, fill)?;
    Some(tensor)
}

impl Uploader {
    fn open(device: &CudaDevice) -> Option<Self> {
        let context = CudaContext::new(device.index).ok()?;
        let stream = SideStream::open(context, driver_version().ok()?).ok()?;
        let place = || {
            let copied = driver::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).ok()?;
            Some(Place { memory: Pinned::new(0).ok()?, copied })
        };
        Some(Self { stream, places: [place()?, place()?], next: 0 })
    }

    fn upload(
        &mut self,
        tensor: &CubeTensor<CudaRuntime>,
        bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]),
    ) -> Option<()> {
        self.stream.bind().ok()?;
        let place = &mut self.places[self.next];
        self.next = 1 - self.next;
        // SAFETY: the event lives as long as its place; one that was never recorded is past.
        unsafe { sys::cuEventSynchronize(place.copied) }.result().ok()?;
        if place.memory.len() < bytes {
            place.memory = Pinned::new(bytes).ok()?;
        }
        let values = &mut place.memory.values()[..bytes];
        fill(values);
        // The memory may be that of a tensor whose kernels still run: the copy comes after everything before, and what comes next after
        // the copy.
        let address = address_of(tensor).ok()?;
        self.stream.follow().ok()?;
        // SAFETY: the tensor has so many bytes and is alive, and the place is not written before the event behind the copy is past.
        unsafe {
            driver::memcpy_htod_async(address, values, self.stream.raw()).ok()?;
            driver::event::record(place.copied, self.stream.raw()).ok()?;
        }
        self.stream.lead().ok()
    }
}
