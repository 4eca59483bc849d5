//! What a program may know of the device it runs on: its name, what it can do, and how much memory is taken.

use burn::tensor::DType;

/// A device.
#[derive(Clone, Debug, PartialEq)]
pub struct Card {
    /// The vendor's name for it.
    pub name: String,
    /// CUDA's compute capability, if it has one: 75 for 7.5.
    pub compute_capability: Option<u32>,
    /// Bytes of its memory, if known.
    pub memory_bytes: Option<u64>,
    /// Bytes that nobody had taken when this was asked, if known.
    pub free_bytes: Option<u64>,
    /// Version of the driver's interface, if known: 13000 for 13.0.
    pub driver: Option<u32>,
    /// Why large products do not go to the vendor's library, if they do not.
    pub without_library: Option<String>,
}

impl Card {
    /// The dtype to compute in: bf16 where the card has it, f16 on older NVIDIA cards, f32 elsewhere.
    #[must_use]
    pub fn compute_dtype(&self) -> DType {
        match self.compute_capability {
            Some(80..) => DType::BF16,
            Some(_) => DType::F16,
            None => DType::F32,
        }
    }
}

/// What the backend's allocator holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allocated {
    /// Bytes taken from the device. Never falls while a program runs, so at its end it is the peak.
    pub reserved: u64,
    /// Bytes of it that tensors use now.
    pub in_use: u64,
}

/// NVIDIA cards that this machine's driver offers; 0 without a driver.
#[cfg(feature = "cuda")]
#[must_use]
pub fn cuda_cards() -> usize {
    use cudarc::driver::{CudaContext, sys};
    // SAFETY: only asks whether the driver's library can be opened.
    if !unsafe { sys::is_culib_present() } {
        return 0;
    }
    CudaContext::device_count().map_or(0, |count| usize::try_from(count).unwrap_or(0))
}

#[cfg(feature = "cuda")]
pub(crate) fn cuda(index: usize) -> Card {
    use cudarc::driver::CudaContext;
    use cudarc::driver::result::mem_get_info;
    use cudarc::driver::sys::CUdevice_attribute as Attribute;
    let context = CudaContext::new(index).ok();
    let context = context.as_ref();
    let attribute = |attribute| u32::try_from(context?.attribute(attribute).ok()?).ok();
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
    let memory = context.and_then(|context| {
        context.bind_to_thread().ok()?;
        mem_get_info().ok()
    });
    Card {
        name: context
            .and_then(|context| context.name().ok())
            .unwrap_or_else(|| format!("CUDA device {index}")),
        compute_capability: major.zip(minor).map(|(major, minor)| 10 * major + minor),
        memory_bytes: memory.map(|(_, total)| total as u64),
        free_bytes: memory.map(|(free, _)| free as u64),
        driver: None,
        without_library: None,
    }
}
