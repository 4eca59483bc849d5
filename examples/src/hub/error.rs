//! What keeps a repository's files from coming, and what to do about it.

use std::path::{Path, PathBuf};

use buzzer::weights::WeightsError;

/// Why a name on the hub did not become a folder here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// A name that is none.
    #[error("{name}: no name of a file on the hub; write hub:org/name/file or hub:org/name/file@revision")]
    Name {
        /// As it was typed.
        name: String,
    },
    /// No place for the cache.
    #[error("no home folder is known, so there is no place for downloads; set HF_HOME to a folder")]
    NoHome,
    /// An endpoint that is no address.
    #[error(
        "HF_ENDPOINT is `{found}`; set it to an address that begins with https:// or http://, or unset it"
    )]
    Endpoint {
        /// Its value.
        found: String,
    },
    /// A repository whose conditions the account has not accepted, or one without an account.
    #[error(
        "{repo} is given only to accounts that have accepted its conditions{said}; accept them at {page}, {then}"
    )]
    Gated {
        /// The repository.
        repo: String,
        /// Its page.
        page: String,
        /// What the hub said.
        said: String,
        /// What to do after that.
        then: &'static str,
    },
    /// No such repository, or none that this account may know of: the hub does not tell which.
    #[error(
        "{repo} is neither a folder here nor a repository that {page} shows{said}; check the name or the path, and set HF_TOKEN \
         if the repository is private"
    )]
    NoRepository {
        /// The repository.
        repo: String,
        /// Its page.
        page: String,
        /// What the hub said.
        said: String,
    },
    /// A token that is refused.
    #[error(
        "{page} refuses the access token (status {status}{said}); make one that may read this repository at \
         https://huggingface.co/settings/tokens and set HF_TOKEN to it, or unset HF_TOKEN"
    )]
    Token {
        /// The repository's page.
        page: String,
        /// 401 or 403.
        status: u16,
        /// What the hub said.
        said: String,
    },
    /// No such branch, tag or commit.
    #[error("{repo} has no revision `{revision}`; see the branches and tags at {page}")]
    NoRevision {
        /// The repository.
        repo: String,
        /// What was asked for.
        revision: String,
        /// Its page.
        page: String,
    },
    /// No such file.
    #[error("{repo} has no file `{file}`{there}; see its files at {page}")]
    NoFile {
        /// The repository.
        repo: String,
        /// The file.
        file: String,
        /// What there is.
        there: String,
        /// Its page.
        page: String,
    },
    /// A repository that holds something else than was asked for.
    #[error("{repo} holds no {wanted}{there}; {advice}")]
    Foreign {
        /// The repository.
        repo: String,
        /// What was looked for.
        wanted: &'static str,
        /// What there is.
        there: String,
        /// What to do.
        advice: &'static str,
    },
    /// Any other answer than the one expected.
    #[error("{url} answers with status {status}{said}; {advice}")]
    Status {
        /// The address.
        url: String,
        /// The status.
        status: u16,
        /// What the hub said.
        said: String,
        /// What to do.
        advice: &'static str,
    },
    /// No answer.
    #[error(
        "{url} cannot be reached: {source}; check the connection and HF_ENDPOINT, or give a folder that is here"
    )]
    Unreachable {
        /// The address.
        url: String,
        /// The cause.
        source: Box<ureq::Error>,
    },
    /// An answer that breaks off, again and again.
    #[error(
        "{file}: the connection broke after {received} of {bytes} bytes ({cause}); what came is kept, run the command again to go on"
    )]
    Broken {
        /// The file.
        file: String,
        /// Bytes that are here.
        received: u64,
        /// Bytes of the file.
        bytes: u64,
        /// How it broke off.
        cause: String,
    },
    /// An answer that cannot be used.
    #[error(
        "{url}: not an answer of a hub: {message}; check HF_ENDPOINT, and that no proxy answers in its place"
    )]
    Answer {
        /// The address.
        url: String,
        /// What is wrong with it.
        message: String,
    },
    /// Bytes that are not those that were announced.
    #[error(
        "{file}: {message}; what came was thrown away, run the command again, and check HF_ENDPOINT if it comes again"
    )]
    Content {
        /// The file.
        file: String,
        /// How they differ.
        message: String,
    },
    /// Nothing in the cache, and the network is not to be used.
    #[error(
        "{repo}: {missing} is not in {cache}, and HF_HUB_OFFLINE forbids to fetch it; unset HF_HUB_OFFLINE, or give a folder"
    )]
    Offline {
        /// The repository.
        repo: String,
        /// What is not there.
        missing: String,
        /// The cache.
        cache: PathBuf,
    },
    /// A place in the cache that cannot be written or read.
    #[error("{path}: {source}; check the space and the rights there, or set HF_HOME to another folder")]
    Cache {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// An index of weights that cannot be used.
    #[error(transparent)]
    Index(#[from] WeightsError),
}

impl HubError {
    pub(super) fn cache(path: &Path, source: std::io::Error) -> Self {
        Self::Cache { path: path.to_owned(), source }
    }

    /// Whether the same request may succeed a moment later.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Broken { .. } => true,
            Self::Status { status, .. } => *status == 429 || *status >= 500,
            _ => false,
        }
    }
}
