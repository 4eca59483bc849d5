//! Memory of the host that a device reaches by itself: the driver need not copy it before it copies it, and a kernel can write there.

use cudarc::driver::{DriverError, result as driver, sys};

/// So many numbers. Whoever gives the device their address sees to it that it is done with them before they are used or dropped here.
#[derive(Debug)]
pub(crate) struct Pinned<T> {
    first: *mut T,
    count: usize,
}

// SAFETY: the memory is the process's, not a thread's.
unsafe impl<T: Send> Send for Pinned<T> {}

/// Plain numbers, for which any bits are a value.
pub(crate) trait Number: Copy {}
impl Number for u8 {}
impl Number for i32 {}

impl<T: Number> Pinned<T> {
    /// So many zeros. A context is bound to this thread.
    pub(crate) fn new(count: usize) -> Result<Self, DriverError> {
        let bytes = (count * size_of::<T>()).max(1);
        // SAFETY: the memory has room for the numbers, is aligned to a page, and nobody else has it.
        unsafe {
            let first = driver::malloc_host(bytes, sys::CU_MEMHOSTALLOC_DEVICEMAP)?.cast::<T>();
            first.write_bytes(0, count);
            Ok(Self { first, count })
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// The numbers, with which the device is done.
    pub(crate) fn values(&mut self) -> &mut [T] {
        // SAFETY: the memory is this value's own, was filled by `new`, and nothing of the device writes to it now.
        unsafe { std::slice::from_raw_parts_mut(self.first, self.count) }
    }

    /// Where the device finds them.
    pub(crate) fn address(&self) -> Result<sys::CUdeviceptr, DriverError> {
        let mut address = 0;
        // SAFETY: the memory is alive and was taken for devices too; the driver writes one address to a place that is alive.
        unsafe { sys::cuMemHostGetDevicePointer_v2(&raw mut address, self.first.cast(), 0) }.result()?;
        Ok(address)
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        // SAFETY: the device is done with it; an error leaves the memory to the context's end.
        unsafe { driver::free_host(self.first.cast()) }.ok();
    }
}
