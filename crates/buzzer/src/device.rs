//! Which device a program runs on, chosen at run time among those that were built in.
//!
//! A backend is a type, so a program hands over a job that is generic over it. It refuses a device that is not built in
//! instead of quietly taking another.

use std::fmt;
use std::str::FromStr;

use burn_flex::{Flex, FlexDevice};
use buzzer_kernels::KernelBackend;

/// A device of this build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Device {
    /// The processor, through Burn's `flex`.
    Cpu,
    /// An NVIDIA card, by its number.
    #[cfg(feature = "cuda")]
    Cuda(usize),
    /// The first adapter that Vulkan, Metal or WebGPU offers; f32 only.
    #[cfg(feature = "wgpu")]
    Wgpu,
}

/// Work that runs on any backend.
pub trait DeviceJob {
    /// What comes of it.
    type Output;

    /// Runs on one device of one backend.
    fn run<B: KernelBackend>(self, device: &B::Device) -> Self::Output;
}

/// A device that does not exist, or is not part of this build.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// A known device that this build lacks.
    #[error("--device {0}: not part of this build; build with --features {0}, or use one of: {built}", built = BUILT)]
    NotBuilt(&'static str),
    /// No device has this name.
    #[error("--device {0}: no such device; use one of: {built}", built = BUILT)]
    Unknown(String),
}

/// The devices of this build, for messages.
const BUILT: &str = match (cfg!(feature = "cuda"), cfg!(feature = "wgpu")) {
    (false, false) => "cpu",
    (true, false) => "cpu, cuda, cuda:N",
    (false, true) => "cpu, wgpu",
    (true, true) => "cpu, cuda, cuda:N, wgpu",
};

impl Default for Device {
    /// The best one: a CUDA card if it is built in and there is one, else the processor. `wgpu` is taken by name only,
    /// because software adapters exist.
    fn default() -> Self {
        #[cfg(feature = "cuda")]
        if buzzer_kernels::cuda_cards() > 0 {
            return Self::Cuda(0);
        }
        Self::Cpu
    }
}

impl Device {
    /// Runs a job here.
    pub fn run<J: DeviceJob>(self, job: J) -> J::Output {
        match self {
            Self::Cpu => job.run::<Flex>(&FlexDevice),
            #[cfg(feature = "cuda")]
            Self::Cuda(index) => {
                buzzer_kernels::configure(kept_kernels(index));
                job.run::<buzzer_kernels::Cuda>(&buzzer_kernels::CudaDevice::new(index))
            }
            #[cfg(feature = "wgpu")]
            Self::Wgpu => job.run::<buzzer_kernels::Wgpu>(&buzzer_kernels::WgpuDevice::DefaultDevice),
        }
    }
}

/// Where kernels in CUDA C++ stay compiled for the next start on a card of this kind: a folder of the user's caches, if there is one.
#[cfg(feature = "cuda")]
fn kept_kernels(index: usize) -> Option<std::path::PathBuf> {
    let target = buzzer_kernels::cuda_target(index)?;
    Some(dirs::cache_dir()?.join("buzzer").join("kernels").join(target))
}

impl Device {
    /// What it is, whichever of several: the part of its name before the number.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => "cuda",
            #[cfg(feature = "wgpu")]
            Self::Wgpu => "wgpu",
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(index) => write!(f, "{}:{index}", self.kind()),
            _ => f.write_str(self.kind()),
        }
    }
}

impl FromStr for Device {
    type Err = DeviceError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let unknown = || DeviceError::Unknown(name.to_owned());
        let (kind, number) = name.split_once(':').unwrap_or((name, ""));
        match (kind, number) {
            ("cpu", "") => Ok(Self::Cpu),
            #[cfg(feature = "cuda")]
            ("cuda", "") => Ok(Self::Cuda(0)),
            #[cfg(feature = "cuda")]
            ("cuda", number) => number.parse().map(Self::Cuda).map_err(|_| unknown()),
            #[cfg(feature = "wgpu")]
            ("wgpu", "") => Ok(Self::Wgpu),
            #[cfg(not(feature = "cuda"))]
            ("cuda", _) => Err(DeviceError::NotBuilt("cuda")),
            #[cfg(not(feature = "wgpu"))]
            ("wgpu", "") => Err(DeviceError::NotBuilt("wgpu")),
            _ => Err(unknown()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_missing_engines_named() {
        assert_eq!("cpu".parse(), Ok(Device::Cpu));
        assert!("tpu".parse::<Device>().unwrap_err().to_string().contains("tpu"));
        assert!("cpu:1".parse::<Device>().is_err());
        for name in ["cuda:1", "wgpu"] {
            match name.parse::<Device>() {
                Ok(device) => assert_eq!(device.to_string(), name),
                Err(error) => assert!(error.to_string().contains("--features"), "{error}"),
            }
        }
    }
}
