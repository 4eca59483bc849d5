//! What a program may know of the device it runs on, and of cards that are not here: names, abilities, memory.
//!
//! [`MODELS`] repeats vendors' data sheets, so that a run can be planned for a card before it is rented. Times that come
//! from it are predictions: rates of data sheets, multiplied by efficiencies that are stated here.

use burn::tensor::DType;

#[cfg(feature = "cuda")]
use crate::limits::compute_capability;

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
    /// Why the host waits before and after every product in the vendor's library, if it does.
    pub library_waits: Option<String>,
    /// Why no kernel can be compiled for it, if so: nothing runs then.
    pub without_compiler: Option<String>,
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

/// A card as its data sheet describes it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CardModel {
    /// How it is chosen by flag.
    pub flag: &'static str,
    /// What the driver's name for it contains.
    pub name: &'static str,
    /// Bytes of its memory.
    pub memory_bytes: u64,
    /// Bytes that are left for tensors: without what driver, context and compiled kernels take.
    pub usable_bytes: u64,
    /// 75 for 7.5.
    pub compute_capability: u32,
    /// Operations a second of dense products of [`Self::compute_dtype`], summed in f32.
    pub matmul_flops: f64,
    /// Bytes a second from and to its memory.
    pub bandwidth: f64,
}

/// What a process has taken before its first tensor: context, library handles, kernels. An estimate.
const CONTEXT_BYTES: u64 = 400 << 20;
/// Share of the data sheet's rate that large products reach.
pub const MATMUL_EFFICIENCY: f64 = 0.7;
/// Share of the data sheet's bandwidth that kernels reach which only move data.
pub const BANDWIDTH_EFFICIENCY: f64 = 0.75;

/// The cards that can be named. Where a card comes in versions, it is the one with the faster memory.
pub const MODELS: [CardModel; 9] = [
    // Of 15,360 MiB, 14.75 GiB are free before a context exists.
    CardModel { usable_bytes: 15_104 * MIB - CONTEXT_BYTES, ..model("t4", "T4", 15_360, 75, 65.0, 320.0) },
    model("l4", "L4", 23_034, 89, 121.0, 300.0),
    model("a10", "A10", 23_028, 86, 125.0, 600.0),
    model("3090", "3090", 24_576, 86, 71.0, 936.0),
    model("4090", "4090", 24_564, 89, 165.2, 1008.0),
    model("a100", "A100", 40_960, 80, 312.0, 1555.0),
    model("a100-80", "A100", 81_920, 80, 312.0, 2039.0),
    model("h100", "H100", 81_559, 90, 989.4, 3350.0),
    model("h200", "H200", 143_771, 90, 989.4, 4800.0),
];

const MIB: u64 = 1 << 20;

/// A row of the table: MiB as `nvidia-smi` tells them, TFLOP/s and GB/s. The driver keeps some 2 % of the memory.
const fn model(
    flag: &'static str,
    name: &'static str,
    mebibytes: u64,
    compute_capability: u32,
    teraflops: f64,
    gigabytes: f64,
) -> CardModel {
    let memory_bytes = mebibytes * MIB;
    CardModel {
        flag,
        name,
        memory_bytes,
        usable_bytes: memory_bytes / 100 * 98 - CONTEXT_BYTES,
        compute_capability,
        matmul_flops: teraflops * 1e12,
        bandwidth: gigabytes * 1e9,
    }
}

/// A card's name that is in no row of the table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("--card {0}: not in the table; use one of: {flags}", flags = MODELS.map(|model| model.flag).join(", "))]
pub struct UnknownCard(pub String);

impl std::str::FromStr for CardModel {
    type Err = UnknownCard;

    fn from_str(flag: &str) -> Result<Self, UnknownCard> {
        let named = MODELS.into_iter().find(|model| model.flag == flag.to_lowercase());
        named.ok_or_else(|| UnknownCard(flag.to_owned()))
    }
}

impl CardModel {
    /// The row that describes a card that is present, if there is one.
    #[must_use]
    pub fn of(card: &Card) -> Option<Self> {
        let words: Vec<&str> = card.name.split([' ', '-']).collect();
        let named = MODELS.into_iter().filter(|model| words.contains(&model.name));
        let memory = card.memory_bytes.unwrap_or(0);
        named.min_by_key(|model| model.memory_bytes.abs_diff(memory))
    }

    /// The dtype to compute in.
    #[must_use]
    pub fn compute_dtype(&self) -> DType {
        if self.compute_capability >= 80 { DType::BF16 } else { DType::F16 }
    }

    /// Expected seconds of work that multiplies so much and moves so much beside the products. A prediction.
    #[must_use]
    pub fn seconds(&self, flop: f64, bytes: f64) -> f64 {
        flop / (MATMUL_EFFICIENCY * self.matmul_flops) + bytes / (BANDWIDTH_EFFICIENCY * self.bandwidth)
    }
}

/// What cuBLASLt's algorithms may use on a card besides their operands.
pub const WORKSPACE_BYTES: usize = 32 << 20;

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

/// What kernels are compiled for and by on a card, `sm_90-nvrtc-13.0-driver-13.0`: kernels compiled under one name run wherever it
/// is the same. None without a card of this number, or without NVRTC.
#[cfg(feature = "cuda")]
#[must_use]
pub fn cuda_target(index: usize) -> Option<String> {
    let context = cudarc::driver::CudaContext::new(index).ok()?;
    let capability = compute_capability(&context).ok()?;
    let driver = crate::side_stream::version_name(crate::side_stream::driver_version().ok()?);
    Some(format!("sm_{capability}-nvrtc-{}-driver-{driver}", crate::compiler::compiler_version()?))
}

#[cfg(feature = "cuda")]
pub(crate) fn cuda(index: usize) -> Card {
    use cudarc::driver::CudaContext;
    use cudarc::driver::result::mem_get_info;
    let context = CudaContext::new(index).ok();
    let context = context.as_ref();
    let capability = context.and_then(|context| u32::try_from(compute_capability(context).ok()?).ok());
    let memory = context.and_then(|context| {
        context.bind_to_thread().ok()?;
        mem_get_info().ok()
    });
    Card {
        name: context
            .and_then(|context| context.name().ok())
            .unwrap_or_else(|| format!("CUDA device {index}")),
        compute_capability: capability,
        memory_bytes: memory.map(|(_, total)| total as u64),
        free_bytes: memory.map(|(free, _)| free as u64),
        driver: None,
        without_library: None,
        library_waits: None,
        without_compiler: context
            .zip(capability)
            .and_then(|(context, capability)| crate::compiler::obstacle(context, capability as usize)),
    }
}

/// Takes all of a card's free memory but `limit_bytes`, for the life of the process, so that tensors beyond the limit
/// cannot be allocated. Returns what it took.
///
/// # Errors
/// If the card cannot be asked, or has less than the limit.
#[cfg(feature = "cuda")]
pub fn limit_memory(index: usize, limit_bytes: u64) -> Result<u64, String> {
    use cudarc::driver::CudaContext;
    use cudarc::driver::result::{malloc_sync, mem_get_info};
    let context = CudaContext::new(index).map_err(|error| format!("cuda:{index} has no context: {error}"))?;
    context.bind_to_thread().map_err(|error| format!("cuda:{index}: {error}"))?;
    let (free, _) = mem_get_info().map_err(|error| format!("cuda:{index} tells no memory: {error}"))?;
    let Some(rest) = (free as u64).checked_sub(limit_bytes) else {
        return Err(format!("cuda:{index} has {free} bytes free, which is less"));
    };
    // SAFETY: a plain allocation in the context that was just bound; nobody gets its address.
    unsafe { malloc_sync(rest as usize) }
        .map_err(|error| format!("cuda:{index} does not give {rest} bytes: {error}"))?;
    // The memory belongs to the context, which therefore must not end.
    std::mem::forget(context);
    Ok(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_are_found_by_flag_and_by_their_drivers_name() {
        let t4: CardModel = "T4".parse().unwrap();
        assert_eq!((t4.compute_capability, t4.compute_dtype()), (75, DType::F16));
        assert!(t4.usable_bytes < 14_750 << 20 && t4.usable_bytes > 14 << 30);
        assert!("b52".parse::<CardModel>().unwrap_err().to_string().contains("a100-80"));
        let flag = |name: &str, gib: u64| {
            let card = Card {
                name: name.into(),
                compute_capability: Some(80),
                memory_bytes: Some(gib << 30),
                free_bytes: None,
                driver: None,
                without_library: None,
                library_waits: None,
                without_compiler: None,
            };
            CardModel::of(&card).map(|model| model.flag)
        };
        assert_eq!(flag("Tesla T4", 15), Some("t4"));
        assert_eq!(flag("NVIDIA A100-SXM4-40GB", 39), Some("a100"));
        assert_eq!(flag("NVIDIA A100 80GB PCIe", 79), Some("a100-80"));
        assert_eq!(flag("NVIDIA H100 80GB HBM3", 79), Some("h100"));
        assert_eq!(flag("NVIDIA H200", 140), Some("h200"));
        assert_eq!(flag("NVIDIA GeForce RTX 4090", 23), Some("4090"));
        assert_eq!(flag("NVIDIA A1000", 8), None);
    }

    #[test]
    fn faster_cards_are_predicted_faster() {
        let seconds = MODELS.map(|model| model.seconds(1e15, 1e12));
        assert!(seconds[0] > seconds[5] && seconds[5] > seconds[7] && seconds[7] >= seconds[8]);
    }
}
