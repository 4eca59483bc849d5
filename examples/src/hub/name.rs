//! Names of repositories as they are typed: `org/name[@revision]`, and `hub:org/name/file[@revision]` for data.
//!
//! What it refuses: every character that would mean something else in an address or a path.

use std::fmt;
use std::path::Path;

use hf_hub::{Repo, RepoType};

use super::HubError;

/// In front of a data file's name, because `a/b/c.csv` is a path as well.
const DATA_PREFIX: &str = "hub:";
/// What is meant without a revision.
const MAIN: &str = "main";
/// Characters of a commit's name in full.
const COMMIT_DIGITS: usize = 40;

/// A repository on the hub, and a branch, tag or commit of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepoName {
    id: String,
    revision: String,
    is_data: bool,
}

impl RepoName {
    /// The repository of a model or an adapter, if a path reads like the name of one.
    #[must_use]
    pub fn of_model(path: &Path) -> Option<Self> {
        let (id, revision) = with_revision(path.to_str()?);
        let is_name = id.split('/').count() == 2 && is_plain_path(id) && is_plain_path(revision);
        is_name.then(|| Self { id: id.to_owned(), revision: revision.to_owned(), is_data: false })
    }

    /// The repository and the file that an argument after `hub:` names; nothing if it is a path.
    ///
    /// # Errors
    /// If it begins with `hub:` and is no such name.
    pub fn of_data(path: &Path) -> Result<Option<(Self, String)>, HubError> {
        let Some(name) = path.to_str().and_then(|path| path.strip_prefix(DATA_PREFIX)) else {
            return Ok(None);
        };
        let (name, revision) = with_revision(name);
        let parts: Vec<&str> = name.splitn(3, '/').collect();
        match parts[..] {
            [org, repo, file]
                if is_plain_path(org)
                    && is_plain_path(repo)
                    && is_plain_path(revision)
                    && is_inside(file) =>
            {
                let id = format!("{org}/{repo}");
                Ok(Some((Self { id, revision: revision.to_owned(), is_data: true }, file.to_owned())))
            }
            _ => Err(HubError::Name { name: path.display().to_string() }),
        }
    }

    /// `org/name`.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The branch, tag or commit.
    #[must_use]
    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// Whether the revision is a commit in full, which never comes to mean another one.
    pub(super) fn is_commit(&self) -> bool {
        self.revision.len() == COMMIT_DIGITS && self.revision.bytes().all(|byte| byte.is_ascii_hexdigit())
    }

    /// In hf-hub's terms: addresses and places in the cache follow from it.
    pub(super) fn repo(&self) -> Repo {
        let kind = if self.is_data { RepoType::Dataset } else { RepoType::Model };
        Repo::with_revision(self.id.clone(), kind, self.revision.clone())
    }
}

impl fmt::Display for RepoName {
    /// As it is typed for a model.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id)?;
        if self.revision == MAIN { Ok(()) } else { write!(f, "@{}", self.revision) }
    }
}

fn with_revision(name: &str) -> (&str, &str) {
    name.split_once('@').unwrap_or((name, MAIN))
}

/// Names of letters, digits, `.`, `-` and `_`, with slashes between them; none begins with a dot.
fn is_plain_path(path: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    path.split('/').all(|part| !part.is_empty() && !part.starts_with('.') && part.bytes().all(plain))
}

/// Whether a file's name in a repository, which the other side may have chosen, stays inside the folder that it is put into,
/// on every system.
pub(super) fn is_inside(file: &str) -> bool {
    let strange = |character: char| character.is_control() || matches!(character, '\\' | ':');
    !file.contains(strange) && file.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

/// Whether a hash, which the other side has chosen, can be the name of a file or folder.
pub(super) fn is_hash(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}
