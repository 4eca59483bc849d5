//! Folders that appear whole or not at all.
//!
//! A folder is filled beside its place, as `NAME.partial-PID`, forced to the disk and renamed in one step: whoever looks at
//! the name sees the old content or the new. What it trades: room for both at once, and rights to write in the parent. What it
//! refuses: [`NewFolder::create`] takes no place where something stands already, unless it is an empty folder. Folders of this
//! crate's own making (an adapter, a small model) are replaced, files of others in them come along.
//!
//! A process that is killed leaves its part-filled folder behind. The next start for the same place removes it: a part
//! whose lock can be taken belongs to nobody.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::WeightsError;
use crate::write::sync_folder;

/// What stands between a folder's name and the number of the process that works at it.
const PARTIAL: &str = ".partial-";

/// A folder that is being filled; dropped before [`NewFolder::finish`] or [`NewFolder::replace`], it is removed.
#[derive(Debug)]
pub struct NewFolder {
    target: PathBuf,
    staging: PathBuf,
    /// Held as long as somebody works in the folder; the system lets go of it when the process ends, however it ends.
    lock: File,
}

impl NewFolder {
    /// Begins a folder for a place, and removes what killed processes have left beside it. Parents are created.
    ///
    /// # Errors
    /// If something stands there already, or nothing can be written there.
    pub fn create(target: &Path) -> Result<Self, WeightsError> {
        let occupied = || WeightsError::OutOccupied { path: target.to_owned() };
        match fs::read_dir(target) {
            Ok(entries) => {
                if entries.count() > 0 {
                    return Err(occupied());
                }
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) if error.kind() == ErrorKind::NotADirectory => return Err(occupied()),
            Err(error) => return Err(WeightsError::write(target, error)),
        }
        Self::begin(target)
    }

    /// [`Self::create`] for a place where an older folder may stand, to be ended with [`Self::replace`].
    ///
    /// # Errors
    /// If nothing can be written there.
    pub fn begin(target: &Path) -> Result<Self, WeightsError> {
        // A link keeps its place, and what it leads to is written.
        let target = fs::canonicalize(target).unwrap_or_else(|_| target.to_owned());
        let Some(name) = target.file_name() else {
            return Err(WeightsError::write(&target, ErrorKind::InvalidFilename));
        };
        let name = name.to_string_lossy();
        let parent = parent_of(&target);
        fs::create_dir_all(parent).map_err(|error| WeightsError::write(parent, error))?;
        remove_abandoned(parent, |abandoned| abandoned == name);
        let staging = partial_name(&target);
        let fault = |error: std::io::Error| WeightsError::write(&staging, error);
        fs::create_dir(&staging).map_err(fault)?;
        let lock = File::open(&staging).map_err(fault)?;
        lock.try_lock().map_err(|error| fault(error.into()))?;
        Ok(Self { target, staging, lock })
    }

    /// Where to write meanwhile.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.staging
    }

    /// Gives the folder its name. Its files must have been forced to the disk, as [`write_atomic`](crate::write_atomic)
    /// does.
    ///
    /// # Errors
    /// If something has come to stand there, or the rename fails; the folder is removed then.
    pub fn finish(self) -> Result<(), WeightsError> {
        self.lock.sync_all().map_err(|error| WeightsError::write(&self.staging, error))?;
        // An empty folder gives way to this; a file or a folder with content does not.
        fs::rename(&self.staging, &self.target).map_err(|error| match error.kind() {
            ErrorKind::DirectoryNotEmpty | ErrorKind::NotADirectory | ErrorKind::AlreadyExists => {
                WeightsError::OutOccupied { path: self.target.clone() }
            }
            _ => WeightsError::write(&self.target, error),
        })?;
        sync_folder(parent_of(&self.target));
        Ok(())
    }

    /// [`Self::finish`] in place of an older folder; files in that one which this one does not have come along, but for
    /// those that are `outdated` by what this one has.
    ///
    /// # Errors
    /// If a file cannot be brought along, or the folders cannot change places; the new folder is removed then.
    pub fn replace(self, outdated: &[&str]) -> Result<(), WeightsError> {
        if !self.target.is_dir() {
            return self.finish();
        }
        let fault = |error: std::io::Error| WeightsError::write(&self.target, error);
        bring_along(&self.target, &self.staging).map_err(fault)?;
        for name in outdated {
            match fs::remove_file(self.staging.join(name)) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(fault(error)),
                _ => {}
            }
        }
        self.lock.sync_all().map_err(fault)?;
        exchange(&self.staging, &self.target).map_err(fault)?;
        sync_folder(parent_of(&self.target));
        Ok(())
    }
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        // After a rename there is nothing under this name; and if it cannot be removed, the next start will try again.
        let _ = fs::remove_dir_all(&self.staging);
    }
}

/// Removes a folder, so that whoever looks at the name sees all of it or nothing. Nothing to remove is no error.
///
/// # Errors
/// If it cannot be renamed or removed.
pub fn remove_folder(path: &Path) -> Result<(), WeightsError> {
    let aside = partial_name(path);
    let fault = |error: std::io::Error| WeightsError::write(path, error);
    match fs::rename(path, &aside) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(fault(error)),
        Ok(()) => fs::remove_dir_all(&aside).map_err(fault),
    }
}

/// Removes what killed processes have left in a folder: parts of folders that they were filling or removing.
pub fn remove_partial_folders(parent: &Path) {
    remove_abandoned(parent, |_| true);
}

/// Where this process works at a folder.
fn partial_name(target: &Path) -> PathBuf {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    target.with_file_name(format!("{name}{PARTIAL}{}", std::process::id()))
}

fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Gives a folder what another has and it has not, by links where the file system knows them.
fn bring_along(from: &Path, to: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            match fs::create_dir(&target) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
                _ => bring_along(&entry.path(), &target)?,
            }
        } else if !target.exists() && fs::hard_link(entry.path(), &target).is_err() {
            fs::copy(entry.path(), &target)?;
        }
    }
    Ok(())
}

/// Lets two folders change places: in one step on Linux, and in three where the system cannot, between the first and the
/// second of which nothing stands at the second place.
fn exchange(new: &Path, old: &Path) -> std::io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        if renameat_with(CWD, new, CWD, old, RenameFlags::EXCHANGE).is_ok() {
            return Ok(());
        }
    }
    let aside = new.with_extension("old");
    fs::rename(old, &aside)?;
    if let Err(error) = fs::rename(new, old) {
        fs::rename(&aside, old)?;
        return Err(error);
    }
    fs::rename(&aside, new)
}

/// Removes part-filled folders of such names whose process is gone.
fn remove_abandoned(parent: &Path, is_meant: impl Fn(&str) -> bool) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let parts = name.to_str().and_then(|name| name.rsplit_once(PARTIAL));
        if parts.is_none_or(|(name, process)| !is_meant(name) || process.parse::<u32>().is_err()) {
            continue;
        }
        let free = File::open(entry.path()).is_ok_and(|folder| folder.try_lock().is_ok());
        if free {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_appears_whole_or_not_at_all() {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("a/b");
        let folder = NewFolder::create(&target).unwrap();
        fs::write(folder.path().join("x"), "1").unwrap();
        assert!(!target.exists());
        folder.finish().unwrap();
        assert_eq!(fs::read(target.join("x")).unwrap(), b"1");
        assert_eq!(fs::read_dir(parent.path().join("a")).unwrap().count(), 1);

        let dropped = NewFolder::create(&parent.path().join("c")).unwrap();
        let staging = dropped.path().to_owned();
        drop(dropped);
        assert!(!staging.exists() && !parent.path().join("c").exists());
    }

    #[test]
    fn what_stands_there_stays() {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("out");
        fs::write(&target, "a file").unwrap();
        assert!(NewFolder::create(&target).unwrap_err().to_string().contains("--out"));
        fs::remove_file(&target).unwrap();
        fs::create_dir(&target).unwrap();
        let late = NewFolder::create(&target).unwrap();
        fs::write(target.join("y"), "came meanwhile").unwrap();
        assert!(late.finish().unwrap_err().to_string().contains("not empty"));
        assert!(NewFolder::create(&target).unwrap_err().to_string().contains("not empty"));
        assert_eq!(fs::read(target.join("y")).unwrap(), b"came meanwhile");
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_older_folder_is_replaced_and_keeps_what_is_not_ours() {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("adapter");
        for (round, content) in ["1", "2"].into_iter().enumerate() {
            let folder = NewFolder::begin(&target).unwrap();
            fs::write(folder.path().join("weights"), content).unwrap();
            assert_eq!(target.exists(), round > 0);
            folder.replace(&["outdated"]).unwrap();
            assert!(!target.join("outdated").exists());
            fs::write(target.join("outdated"), "an index").unwrap();
            assert_eq!(fs::read_to_string(target.join("weights")).unwrap(), content);
            fs::create_dir_all(target.join("notes")).unwrap();
            fs::write(target.join("notes/README"), "of the user").unwrap();
        }
        let unfinished = NewFolder::begin(&target).unwrap();
        fs::write(unfinished.path().join("weights"), "3").unwrap();
        drop(unfinished);
        assert_eq!(fs::read_to_string(target.join("weights")).unwrap(), "2");
        assert_eq!(fs::read_to_string(target.join("notes/README")).unwrap(), "of the user");
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);
    }

    #[test]
    fn where_folders_cannot_change_places_they_are_renamed() {
        let parent = tempfile::tempdir().unwrap();
        let [new, old] = ["new", "old"].map(|name| parent.path().join(name));
        fs::create_dir(&new).unwrap();
        assert!(exchange(&new, &old).is_err());
        assert!(new.exists() && !old.exists());
    }

    #[test]
    fn only_abandoned_parts_are_removed() {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("out");
        let path = |name: &str| parent.path().join(name);
        for name in ["out.partial-7", "out.partial-x", "other.partial-7", "out.partial-8"] {
            fs::create_dir(path(name)).unwrap();
            fs::write(path(name).join("x"), "1").unwrap();
        }
        let held = File::open(path("out.partial-8")).unwrap();
        held.lock().unwrap();
        NewFolder::create(&target).unwrap().finish().unwrap();
        assert!(!path("out.partial-7").exists());
        for name in ["out.partial-x", "other.partial-7", "out.partial-8", "out"] {
            assert!(path(name).exists(), "{name}");
        }
        remove_partial_folders(parent.path());
        assert!(!path("other.partial-7").exists());
        for name in ["out.partial-x", "out.partial-8", "out"] {
            assert!(path(name).exists(), "{name}");
        }
    }

    #[test]
    fn a_removed_folder_leaves_nothing() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("old");
        fs::create_dir_all(folder.join("inner")).unwrap();
        fs::write(folder.join("inner/x"), "1").unwrap();
        remove_folder(&folder).unwrap();
        remove_folder(&folder).unwrap();
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }
}
