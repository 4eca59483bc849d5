//! Where compiled kernels stay from one start of a program to the next: a program compiles for some 25 s on a card otherwise.
//!
//! CubeCL tells kept kernels apart by name and settings, so a kernel that was changed would be taken for the one before: a folder is
//! for one program file, compiler and kind of card, and lies in the user's folder for caches (`~/.cache/buzzer/kernels` on
//! Linux). What it trades: a program that is built anew compiles anew. What it refuses: nothing; where no folder can be
//! had, kernels are compiled at each start.

use std::fs;
use std::path::Path;
use std::time::SystemTime;

/// Folders that stay; programs that were not started for longest lose theirs.
const FOLDERS: usize = 12;

/// The folder of this program on a card, by its number.
#[cfg(feature = "cuda")]
pub(crate) fn folder(index: usize) -> Option<std::path::PathBuf> {
    let target = buzzer_kernels::cuda_target(index)?;
    let program = blake3::hash(&fs::read(std::env::current_exe().ok()?).ok()?);
    let root = dirs::cache_dir()?.join("buzzer").join("kernels");
    let folder = root.join(format!("{}-{target}", &program.to_hex()[..16]));
    fs::create_dir_all(&folder).ok()?;
    // The time of the last start; a folder keeps the one of its last new file otherwise.
    let _ = fs::write(folder.join("started"), "");
    forget(&root, FOLDERS);
    Some(folder)
}

/// Removes all folders but those that were used last; one that another program has open is empty for it, no more.
fn forget(root: &Path, kept: usize) {
    let Ok(entries) = fs::read_dir(root) else { return };
    let used = |folder: &Path| {
        fs::metadata(folder.join("started"))
            .and_then(|file| file.modified())
            .unwrap_or(SystemTime::UNIX_EPOCH)
    };
    let mut folders: Vec<_> = entries.flatten().map(|entry| (used(&entry.path()), entry.path())).collect();
    folders.sort();
    for (_, folder) in folders.iter().rev().skip(kept) {
        let _ = fs::remove_dir_all(folder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_that_were_used_last_stay() {
        let root = tempfile::tempdir().unwrap();
        for (place, name) in ["b", "a", "d", "c"].into_iter().enumerate() {
            let folder = root.path().join(name);
            fs::create_dir(&folder).unwrap();
            let file = fs::File::create(folder.join("started")).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(60 * place as u64))
                .unwrap();
        }
        fs::create_dir(root.path().join("never")).unwrap();
        forget(root.path(), 2);
        let mut left: Vec<_> =
            fs::read_dir(root.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["c", "d"]);
    }
}
