//! A file that grows by whole records.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::PathBuf;

use buzzer::weights::WeightsError;

/// A file that records are appended to; after a failed write it ends with the last whole one.
#[derive(Debug)]
pub(super) struct Appender {
    path: PathBuf,
    file: File,
    /// Bytes of whole records.
    length: u64,
    /// Records that could not be written yet.
    pending: Vec<u8>,
}

impl Appender {
    /// Opens or makes a file and drops what it has beyond a length.
    pub(super) fn open(path: PathBuf, length: u64) -> Result<Self, WeightsError> {
        let fault = |error| WeightsError::write(&path, error);
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(false).open(&path).map_err(fault)?;
        file.set_len(length).map_err(fault)?;
        file.seek(SeekFrom::Start(length)).map_err(fault)?;
        Ok(Self { path, file, length, pending: Vec::new() })
    }

    /// Writes a record, behind those that wait.
    pub(super) fn append(&mut self, record: &[u8]) -> Result<(), WeightsError> {
        self.pending.extend_from_slice(record);
        match self.file.write_all(&self.pending) {
            Ok(()) => {
                self.length += self.pending.len() as u64;
                self.pending.clear();
                Ok(())
            }
            Err(error) => {
                // If this fails too, reading stops at the record that was cut short.
                let _ = self.file.set_len(self.length);
                let _ = self.file.seek(SeekFrom::Start(self.length));
                Err(WeightsError::write(&self.path, error))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_beyond_the_length_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "one\ntwo\nthr").unwrap();
        let mut appender = Appender::open(path.clone(), 8).unwrap();
        appender.append(b"three\n").unwrap();
        assert_eq!(std::fs::read_to_string(path).unwrap(), "one\ntwo\nthree\n");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_delays_records_and_loses_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let mut appender = Appender::open(path.clone(), 0).unwrap();
        let open = |path: &std::path::Path| OpenOptions::new().write(true).open(path).unwrap();
        appender.append(b"one\n").unwrap();
        appender.file = open("/dev/full".as_ref());
        let message = appender.append(b"two\n").unwrap_err().to_string();
        assert!(message.contains("file"), "{message}");
        appender.file = open(&path);
        appender.file.seek(SeekFrom::Start(appender.length)).unwrap();
        appender.append(b"three\n").unwrap();
        assert_eq!(std::fs::read_to_string(path).unwrap(), "one\ntwo\nthree\n");
    }
}
