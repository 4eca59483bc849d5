//! Signals that ask a program to end: heard, and answered between two steps.
//!
//! What it trades: a second Ctrl-C ends the program at once, which loses the steps since the last checkpoint. What it refuses: to
//! stop at a hang-up that the program was started to survive, as `nohup` does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::Failure;

/// The status with which shells report a program that Ctrl-C ended.
const INTERRUPTED: i32 = 130;

/// Whether the program has been asked to end.
#[derive(Clone, Debug)]
pub struct StopSignal(Arc<AtomicBool>);

impl StopSignal {
    /// From here on Ctrl-C, a polite kill or a hang-up only leave a note here; a second Ctrl-C ends the program.
    ///
    /// # Errors
    /// If the system takes no handler.
    pub fn listen() -> Result<Self, Failure> {
        let asked = Arc::new(AtomicBool::new(false));
        // Registered first, so that it sees the note of an earlier signal only.
        flag::register_conditional_shutdown(SIGINT, INTERRUPTED, Arc::clone(&asked))?;
        for signal in [SIGINT, SIGTERM].into_iter().chain(hang_up()) {
            flag::register(signal, Arc::clone(&asked))?;
        }
        Ok(Self(asked))
    }

    /// Whether a signal has come.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// The signal of a lost terminal, unless whoever started this program had it ignored.
#[cfg(unix)]
fn hang_up() -> Option<i32> {
    use signal_hook::consts::SIGHUP;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    (mask & (1 << (SIGHUP - 1)) == 0).then_some(SIGHUP)
}

#[cfg(not(unix))]
fn hang_up() -> Option<i32> {
    None
}
