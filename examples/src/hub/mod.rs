//! Models, adapters and data from the Hugging Face hub, by name instead of by path.
//!
//! A name becomes a folder of the cache that Hugging Face's libraries share, so what one of them has fetched is not fetched
//! again. This stands with the programs because it reads the environment, waits for a network and prints; the library crates
//! open files. Names, addresses and places in the cache are hf-hub's; why its transfers are not used is told in
//! `docs/decisions/0011-fetching-from-the-hub.md`. What it trades: one request for a branch whose files are all here, which
//! shows whether it has moved on. What it refuses: names and hashes that lead out of the cache, and bytes other than those
//! that were announced.

mod choose;
mod error;
mod name;
#[cfg(test)]
mod server;
mod settings;
mod snapshot;
#[cfg(test)]
mod tests;
mod transfer;

use std::path::{Path, PathBuf};

use hf_hub::Cache;
use hf_hub::api::RepoInfo;
use ureq::config::RedirectAuthHeaders;
use ureq::http::Response;
use ureq::typestate::WithoutBody;
use ureq::{Agent, Body, RequestBuilder};

pub use error::HubError;
pub use name::RepoName;
pub use settings::{HubSettings, Patience};

use crate::Failure;
use snapshot::Snapshot;

/// A listing is longer than this only by malice.
const LISTING_BYTES: u64 = 64 << 20;
/// Characters of the hub's own words in an error.
const SAID: usize = 200;

/// What a program needs of a repository.
#[derive(Clone, Copy, Debug)]
pub enum Wanted<'a> {
    /// A model's configuration and tokenizer.
    Description,
    /// A whole model, in one form of its weights.
    Model,
    /// A PEFT adapter.
    Adapter,
    /// One file.
    File(&'a str),
}

/// The folder that an argument means: what lies at the path, or else the files of the repository of that name.
///
/// # Errors
/// If there is nothing at the path, it reads like a name on the hub, and the files cannot be had from there.
pub fn local(path: &Path, wanted: Wanted<'_>) -> Result<PathBuf, Failure> {
    match RepoName::of_model(path) {
        Some(name) if !path.exists() => Ok(Hub::new(HubSettings::from_env()?).fetch(&name, wanted)?),
        _ => Ok(path.to_owned()),
    }
}

/// The file that an argument means: what lies at the path, or what `hub:org/name/file` names.
///
/// # Errors
/// If it begins with `hub:` and cannot be had.
pub fn local_file(path: &Path) -> Result<PathBuf, Failure> {
    match RepoName::of_data(path)? {
        Some((name, file)) if !path.exists() => {
            let folder = Hub::new(HubSettings::from_env()?).fetch(&name, Wanted::File(&file))?;
            Ok(folder.join(file))
        }
        _ => Ok(path.to_owned()),
    }
}

/// A hub and the cache of what came from it.
#[derive(Debug)]
pub struct Hub {
    settings: HubSettings,
    cache: Cache,
    agent: Agent,
}

impl Hub {
    /// A hub; nothing is asked of it yet.
    #[must_use]
    pub fn new(settings: HubSettings) -> Self {
        let silence = Some(settings.patience.silence);
        let config = Agent::config_builder()
            .user_agent(concat!("buzzer/", env!("CARGO_PKG_VERSION")))
            // Lengths and ranges are those of the file and not of what a server would make of it.
            .accept_encoding("identity")
            .http_status_as_error(false)
            // Files come from other hosts, which the token is none of the business of.
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .timeout_resolve(silence)
            .timeout_connect(silence)
            .timeout_recv_response(silence)
            .timeout_per_read(silence)
            .build();
        Self { cache: Cache::new(settings.cache.clone()), agent: config.into(), settings }
    }

    /// Makes sure that the files are here, and gives their folder.
    ///
    /// If the hub cannot be reached and the cache holds what is wanted, that is taken, and the error stream says so.
    ///
    /// # Errors
    /// If the files are neither here nor to be had.
    pub fn fetch(&self, name: &RepoName, wanted: Wanted<'_>) -> Result<PathBuf, HubError> {
        let cached = self.cached(name);
        if self.settings.offline {
            let nothing = || self.offline(name, "the repository");
            return cached.ok_or_else(nothing)?.collect(wanted);
        }
        if let Some(snapshot) =
            cached.as_ref().filter(|snapshot| name.is_commit() && snapshot.is_whole(wanted))
        {
            return Ok(snapshot.folder());
        }
        let error = match self.listed(name) {
            Ok(snapshot) => {
                let folder = snapshot.collect(wanted)?;
                snapshot.remember()?;
                return Ok(folder);
            }
            Err(error) => error,
        };
        let kept = cached.filter(|snapshot| error.may_pass() && snapshot.is_whole(wanted)).ok_or(error)?;
        eprintln!(
            "offline   {} does not answer; {name} is taken from the cache, commit {}",
            self.settings.endpoint,
            kept.commit()
        );
        Ok(kept.folder())
    }

    /// The revision as it was when something of it was last fetched.
    fn cached<'a>(&'a self, name: &'a RepoName) -> Option<Snapshot<'a>> {
        Snapshot::of_cache(self, name)
    }

    /// The revision as it is on the hub.
    fn listed<'a>(&'a self, name: &'a RepoName) -> Result<Snapshot<'a>, HubError> {
        let url = format!("{}/api/{}", self.settings.endpoint, name.repo().api_url());
        let info: RepoInfo = self.patiently(|| {
            let mut response = self.call(self.agent.get(&url), &url)?;
            self.check(name, &url, &response)?;
            response.body_mut().with_config().limit(LISTING_BYTES).read_json().map_err(|error| match error {
                ureq::Error::Json(error) => HubError::Answer { url: url.clone(), message: error.to_string() },
                error => unreachable(&url, error),
            })
        })?;
        Snapshot::of_hub(self, name, info)
    }

    /// Sends a request, with the token if it goes to the hub itself.
    fn call(&self, request: RequestBuilder<WithoutBody>, url: &str) -> Result<Response<Body>, HubError> {
        let token = self.settings.token.as_ref().filter(|_| origin(url) == origin(&self.settings.endpoint));
        let request = match token {
            Some(token) => request.header("Authorization", format!("Bearer {token}")),
            None => request,
        };
        request.call().map_err(|error| unreachable(url, error))
    }

    /// Tries again for a while if the other side does not answer, or not now.
    fn patiently<T>(&self, mut attempt: impl FnMut() -> Result<T, HubError>) -> Result<T, HubError> {
        let Patience { attempts, mut pause, .. } = self.settings.patience;
        for _ in 1..attempts {
            match attempt() {
                Err(error) if error.may_pass() => std::thread::sleep(pause),
                done => return done,
            }
            pause *= 2;
        }
        attempt()
    }

    /// Turns an answer that is not the one hoped for into what to do about it.
    fn check(&self, name: &RepoName, url: &str, response: &Response<Body>) -> Result<(), HubError> {
        let status = response.status();
        if status.is_success() || status.is_redirection() {
            return Ok(());
        }
        let (status, said) = (status.as_u16(), said(response));
        let (repo, page) = (name.id().to_owned(), self.page(name));
        let has_token = self.settings.token.is_some();
        Err(match (status, header(response, "X-Error-Code").unwrap_or_default()) {
            (401 | 403, "GatedRepo") => {
                HubError::Gated { repo, page, said, then: after_accepting(has_token) }
            }
            (401 | 404, "RepoNotFound") => HubError::NoRepository { repo, page, said },
            (404, "RevisionNotFound") => {
                HubError::NoRevision { repo, revision: name.revision().to_owned(), page }
            }
            (404, "EntryNotFound") => {
                let advice = "the repository may be changing just now, run the command again";
                HubError::Status { url: url.to_owned(), status, said, advice }
            }
            (401 | 403, _) if has_token => HubError::Token { page, status, said },
            (401 | 403 | 404, _) => HubError::NoRepository { repo, page, said },
            (429 | 500.., _) => {
                HubError::Status { url: url.to_owned(), status, said, advice: "try again in a few minutes" }
            }
            _ => HubError::Status { url: url.to_owned(), status, said, advice: "check HF_ENDPOINT" },
        })
    }

    /// Where people look at a repository.
    fn page(&self, name: &RepoName) -> String {
        format!("{}/{}", self.settings.endpoint, name.repo().url())
    }

    fn offline(&self, name: &RepoName, missing: &str) -> HubError {
        let missing = missing.to_owned();
        HubError::Offline { repo: name.to_string(), missing, cache: self.settings.cache.clone() }
    }
}

fn after_accepting(has_token: bool) -> &'static str {
    if has_token {
        "with the account whose token is set; a fine-grained token must also be allowed to read gated repositories"
    } else {
        "make a token of that account at https://huggingface.co/settings/tokens, and set HF_TOKEN to it"
    }
}

fn unreachable(url: &str, error: ureq::Error) -> HubError {
    HubError::Unreachable { url: url.to_owned(), source: Box::new(error) }
}

fn header<'a>(response: &'a Response<Body>, name: &str) -> Option<&'a str> {
    response.headers().get(name)?.to_str().ok()
}

/// The hub's own words about an error, in brackets.
fn said(response: &Response<Body>) -> String {
    let words = header(response, "X-Error-Message").unwrap_or_default();
    let words: String = words.chars().filter(|character| !character.is_control()).take(SAID).collect();
    if words.is_empty() { String::new() } else { format!(" (\"{words}\")") }
}

/// Scheme and host of an address.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |place| place + 3);
    let end = url[host..].find('/').map_or(url.len(), |place| host + place);
    &url[..end]
}
