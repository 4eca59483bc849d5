//! A repository at one commit: its files, and which of them are here.
//!
//! Every file is asked for by the commit's name, so a branch that moves on meanwhile does not mix two versions. The cache's
//! note of what a branch means is written last: where there is one, what was asked for is here.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use buzzer::weights::indexed_files;
use hf_hub::api::RepoInfo;

use super::choose::{self, Files, Weights};
use super::name::{is_hash, is_inside};
use super::transfer::Download;
use super::{Hub, HubError, RepoName, Wanted};

/// The flag that errors about an index name.
const FLAG: &str = "--model";

/// A commit of a repository.
#[derive(Debug)]
pub(super) struct Snapshot<'a> {
    pub(super) hub: &'a Hub,
    pub(super) name: &'a RepoName,
    commit: String,
    files: Files,
    /// Whether files that are not here can be fetched.
    remote: bool,
}

impl<'a> Snapshot<'a> {
    /// What the hub says that there is.
    pub(super) fn of_hub(hub: &'a Hub, name: &'a RepoName, info: RepoInfo) -> Result<Self, HubError> {
        if !is_hash(&info.sha) {
            let message = format!("its commit is called `{}`", info.sha.escape_debug());
            return Err(HubError::Answer { url: hub.page(name), message });
        }
        let files: Files = info.siblings.into_iter().map(|file| file.rfilename).collect();
        if let Some(file) = files.iter().find(|file| !is_inside(file)) {
            let message =
                format!("it lists a file `{}`, which would not be inside its folder", file.escape_debug());
            return Err(HubError::Answer { url: hub.page(name), message });
        }
        Ok(Self { hub, name, commit: info.sha, files, remote: true })
    }

    /// What the cache holds of a revision.
    pub(super) fn of_cache(hub: &'a Hub, name: &'a RepoName) -> Option<Self> {
        let commit = if name.is_commit() {
            name.revision().to_owned()
        } else {
            fs::read_to_string(note(hub, name)).ok()?.trim().to_owned()
        };
        let mut snapshot = Self { hub, name, commit, files: BTreeSet::new(), remote: false };
        if !is_hash(&snapshot.commit) {
            return None;
        }
        files_below(&snapshot.folder(), "", &mut snapshot.files);
        Some(snapshot).filter(|snapshot| !snapshot.files.is_empty())
    }

    /// Where its files are, or will be.
    pub(super) fn folder(&self) -> PathBuf {
        self.hub.cache.repo(self.name.repo()).pointer_path(&self.commit)
    }

    pub(super) fn commit(&self) -> &str {
        &self.commit
    }

    /// Notes in the cache which commit the revision means. A note that is cut short names no folder, so nothing is found by it.
    pub(super) fn remember(&self) -> Result<(), HubError> {
        if self.name.is_commit() {
            return Ok(());
        }
        let repo = self.hub.cache.repo(self.name.repo());
        repo.create_ref(&self.commit).map_err(|source| HubError::cache(&note(self.hub, self.name), source))
    }

    /// Whether everything wanted is in the cache already.
    pub(super) fn is_whole(&self, wanted: Wanted<'_>) -> bool {
        let has_tokenizer = match wanted {
            Wanted::Description | Wanted::Model => choose::has_tokenizer(&self.files),
            Wanted::Adapter | Wanted::File(_) => true,
        };
        !self.remote && has_tokenizer && self.collect(wanted).is_ok()
    }

    /// Makes sure that the files are here, and gives their folder.
    pub(super) fn collect(&self, wanted: Wanted<'_>) -> Result<PathBuf, HubError> {
        match wanted {
            Wanted::File(file) => self.get(file)?,
            Wanted::Adapter => {
                let files = choose::adapter(&self.files).ok_or_else(|| self.no_adapter())?;
                self.get_all(&files)?;
            }
            Wanted::Description if choose::has_config(&self.files) => {
                self.get_all(&choose::description(&self.files))?;
            }
            Wanted::Description | Wanted::Model => {
                let weights = choose::weights(&self.files).ok_or_else(|| self.no_model())?;
                self.get_all(&choose::description(&self.files))?;
                self.get_weights(weights)?;
            }
        }
        Ok(self.folder())
    }

    fn get_weights(&self, weights: Weights) -> Result<(), HubError> {
        match weights {
            Weights::Files(files) => self.get_all(&files),
            Weights::Index(index) => {
                self.get(&index)?;
                let shards = indexed_files(&self.folder().join(index), FLAG)?;
                self.get_all(&shards.into_iter().collect::<Vec<_>>())
            }
        }
    }

    fn get_all(&self, files: &[String]) -> Result<(), HubError> {
        files.iter().try_for_each(|file| self.get(file))
    }

    /// Makes sure that a file is here.
    fn get(&self, file: &str) -> Result<(), HubError> {
        if self.folder().join(file).is_file() {
            return Ok(());
        }
        if !self.remote {
            return Err(self.hub.offline(self.name, &format!("`{file}`")));
        }
        if !self.files.contains(file) {
            let ending = Path::new(file).extension();
            let is_near = |name: &str| Path::new(name).extension() == ending;
            return Err(HubError::NoFile {
                repo: self.name.to_string(),
                file: file.to_owned(),
                there: choose::there(&self.files, is_near),
                page: self.hub.page(self.name),
            });
        }
        Download::new(self, file).run()
    }

    fn no_model(&self) -> HubError {
        let advice = if choose::is_adapter(&self.files) {
            "it is an adapter, so give it to --adapter, and its base to --model"
        } else {
            "give a repository with safetensors or PyTorch files; of several GGUF files, download one and give its path"
        };
        self.foreign(
            "model that can be read here: weights with config.json or params.json, or one GGUF file",
            advice,
        )
    }

    fn no_adapter(&self) -> HubError {
        self.foreign(
            "PEFT adapter",
            "give a repository with adapter_config.json and adapter_model.safetensors",
        )
    }

    /// From the cache it is only known what was fetched before.
    fn foreign(&self, wanted: &'static str, advice: &'static str) -> HubError {
        if !self.remote {
            return self.hub.offline(self.name, &format!("a {wanted}"));
        }
        let there = choose::there(&self.files, choose::may_be_weights);
        HubError::Foreign { repo: self.name.to_string(), wanted, there, advice }
    }
}

/// The cache's note of which commit a branch means.
fn note(hub: &Hub, name: &RepoName) -> PathBuf {
    hub.cache.path().join(name.repo().folder_name()).join("refs").join(name.revision())
}

/// Names of the files in a folder and the folders in it, with slashes; links to files that are gone are none.
fn files_below(folder: &Path, prefix: &str, files: &mut Files) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let (path, name) = (entry.path(), format!("{prefix}{}", entry.file_name().to_string_lossy()));
        if path.is_dir() {
            files_below(&path, &format!("{name}/"), files);
        } else if path.is_file() {
            files.insert(name);
        }
    }
}
