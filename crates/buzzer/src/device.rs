//! Which device a program runs on, chosen at run time among those that were built in.
//!
//! A backend is a type, so a program hands over a job that is generic over it. It refuses a device that is not built in
//! instead of quietly taking another.

use std::fmt;
use std::str::FromStr;

use burn_flex::{Flex, FlexDevice};
use buzzer_kernels::KernelBackend;

/// A device of this build.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Device {
    /// The processor, through Burn's `flex`.
    #[default]
    Cpu,
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
    #[error("--device {0}: this build has no {0} engine yet; use --device cpu")]
    NotBuilt(&'static str),
    /// No device has this name.
    #[error("--device {0}: no such device; use cpu")]
    Unknown(String),
}

impl Device {
    /// Runs a job here.
    pub fn run<J: DeviceJob>(self, job: J) -> J::Output {
        match self {
            Self::Cpu => job.run::<Flex>(&FlexDevice),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
        })
    }
}

impl FromStr for Device {
    type Err = DeviceError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name.split(':').next().unwrap_or_default() {
            "cpu" if name == "cpu" => Ok(Self::Cpu),
            "cuda" => Err(DeviceError::NotBuilt("cuda")),
            "wgpu" => Err(DeviceError::NotBuilt("wgpu")),
            _ => Err(DeviceError::Unknown(name.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_missing_engines_named() {
        assert_eq!("cpu".parse(), Ok(Device::Cpu));
        assert_eq!(Device::default().to_string(), "cpu");
        assert_eq!("cuda:1".parse::<Device>(), Err(DeviceError::NotBuilt("cuda")));
        assert!("tpu".parse::<Device>().unwrap_err().to_string().contains("tpu"));
    }
}
