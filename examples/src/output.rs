//! Reports, run folders, and what the operating system knows of this process.

use std::fmt;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use buzzer::kernels::KernelBackend;
use buzzer::weights::{WeightsError, write_atomic, write_json};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Failure;

/// A line for people on standard output. Unlike `println!` it does not end the program where nobody reads any more: a run
/// outlives its terminal, and a log on a full disk.
#[macro_export]
macro_rules! say {
    ($($part:tt)*) => { $crate::print_line(format_args!($($part)*)) };
}

/// What [`say!`](crate::say) does.
pub fn print_line(line: fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// A line on the error stream, under the same rule.
pub fn print_error_line(line: fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Writes `DIR/report.json`; it appears whole or not at all.
///
/// # Errors
/// If the folder or the file cannot be written.
pub fn write_report(dir: &Path, report: &impl Serialize) -> Result<PathBuf, Failure> {
    create(dir)?;
    let path = dir.join("report.json");
    write_json(&path, report)?;
    Ok(path)
}

/// Writes values as JSON, one a line, into a file that appears whole or not at all.
///
/// # Errors
/// If it cannot be written.
pub fn write_json_lines<T: Serialize>(
    path: &Path,
    values: impl IntoIterator<Item = T>,
) -> Result<(), WeightsError> {
    write_atomic(path, |file| {
        for value in values {
            serde_json::to_writer(&mut *file, &value).map_err(|error| WeightsError::write(path, error))?;
            file.write_all(b"\n").map_err(|error| WeightsError::write(path, error))?;
        }
        Ok(())
    })
}

/// Writes a file that appears whole or not at all.
///
/// # Errors
/// If it cannot be written.
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<(), WeightsError> {
    write_atomic(path, |file| file.write_all(bytes).map_err(|error| WeightsError::write(path, error)))
}

/// Reads a JSON file.
///
/// # Errors
/// If it cannot be read or is no such JSON; the message names the file.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, Failure> {
    let text =
        fs::read_to_string(path).map_err(|error| Failure::input(format!("{}: {error}", path.display())))?;
    serde_json::from_str(&text).map_err(|error| Failure::input(format!("{}: {error}", path.display())))
}

/// Makes the first of `runs/NAME-001`, `runs/NAME-002` ... that does not exist yet.
///
/// # Errors
/// If no folder can be made.
pub fn next_run_dir(name: &str) -> Result<PathBuf, Failure> {
    create(Path::new("runs"))?;
    for number in 1_u32.. {
        let dir = PathBuf::from(format!("runs/{name}-{number:03}"));
        match fs::create_dir(&dir) {
            Ok(()) => return Ok(dir),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => {
                return Err(Failure::input(format!(
                    "{}: {error}; choose a folder with --out",
                    dir.display()
                )));
            }
        }
    }
    Err(Failure::input("runs/ is full; choose a folder with --out"))
}

/// The last of `runs/NAME-001`, `runs/NAME-002` ...
#[must_use]
pub fn last_run_dir(name: &str) -> Option<PathBuf> {
    let number = |entry: fs::DirEntry| -> Option<(u32, PathBuf)> {
        let file_name = entry.file_name();
        let number = file_name.to_str()?.strip_prefix(name)?.strip_prefix('-')?.parse().ok()?;
        Some((number, entry.path()))
    };
    let runs = fs::read_dir("runs").into_iter().flatten().flatten();
    runs.filter_map(number).max().map(|(_, path)| path)
}

/// Makes a folder for what a run writes, unless it is there.
///
/// # Errors
/// If it cannot be made.
pub fn create(dir: &Path) -> Result<(), Failure> {
    fs::create_dir_all(dir).map_err(|error| {
        Failure::input(format!("{}: {error}; choose another folder with --out", dir.display()))
    })
}

/// The most memory this process has held, in bytes; 0 where the system does not tell.
#[must_use]
pub fn peak_memory_bytes() -> u64 {
    status_bytes("VmHWM:")
}

/// A size that the system tells of this process; 0 where it does not.
fn status_bytes(name: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let kilobytes = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}

/// What the device's allocator has taken or, on a processor, the memory that this process holds now.
#[must_use]
pub fn device_bytes<B: KernelBackend>(device: &B::Device) -> u64 {
    B::allocated(device).map_or_else(|| status_bytes("VmRSS:"), |allocated| allocated.reserved)
}

/// The most memory that the device's allocator has taken since it was last cleaned up; on a processor, what
/// [`peak_memory_bytes`] tells.
#[must_use]
pub fn peak_device_bytes<B: KernelBackend>(device: &B::Device) -> u64 {
    B::allocated(device).map_or_else(peak_memory_bytes, |allocated| allocated.reserved)
}

/// Memory that the system can give to programs now, where it tells.
#[must_use]
pub fn available_memory_bytes() -> Option<u64> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kilobytes = line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()?;
    Some(kilobytes * 1024)
}

/// A time for people.
#[must_use]
pub fn duration(seconds: f64) -> String {
    let minutes = (seconds / 60.0).round() as u64;
    if seconds < 120.0 {
        format!("{seconds:.0} s")
    } else if minutes < 120 {
        format!("{minutes} min")
    } else {
        format!("{} h {} min", minutes / 60, minutes % 60)
    }
}

/// Bytes for people.
#[must_use]
pub fn bytes(count: u64) -> String {
    let count = count as f64;
    if count < 1024.0 * 1024.0 {
        format!("{:.0} KiB", count / 1024.0)
    } else if count < 1024.0 * 1024.0 * 1024.0 {
        format!("{:.1} MiB", count / (1024.0 * 1024.0))
    } else {
        format!("{:.2} GiB", count / (1024.0 * 1024.0 * 1024.0))
    }
}
