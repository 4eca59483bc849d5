//! Where the hub and its cache are, and how patient to be: what the environment says to all of Hugging Face's libraries.
//!
//! The variables are those of `huggingface_hub`
//! (<https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables>); hf-hub knows only two of them.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use super::HubError;

const ENDPOINT: &str = "https://huggingface.co";

/// Where to look for repositories, and as whom.
#[derive(Clone, Debug)]
pub struct HubSettings {
    /// Folder of the shared cache.
    pub cache: PathBuf,
    /// Address of the hub, without a slash at its end.
    pub endpoint: String,
    /// Access token.
    pub token: Option<String>,
    /// Whether only the cache may be asked.
    pub offline: bool,
    /// When to give up.
    pub patience: Patience,
}

/// When to give up on a connection.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Attempts without a single new byte between them.
    pub attempts: u32,
    /// Pause before the second attempt; it doubles with each further one.
    pub pause: Duration,
    /// Longest silence of the other side.
    pub silence: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { attempts: 4, pause: Duration::from_secs(1), silence: Duration::from_secs(30) }
    }
}

impl HubSettings {
    /// What the environment says.
    ///
    /// # Errors
    /// If no place for the cache follows from it, or its endpoint is no address.
    pub fn from_env() -> Result<Self, HubError> {
        Self::from_variables(|name| std::env::var_os(name))
    }

    pub(super) fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, HubError> {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let path = |name: &str| set(name).map(PathBuf::from);
        let text = |name: &str| set(name).and_then(|value| value.into_string().ok());
        let home = path("HF_HOME")
            .or_else(|| Some(path("XDG_CACHE_HOME")?.join("huggingface")))
            .or_else(|| Some(path("HOME")?.join(".cache/huggingface")))
            .or_else(|| Some(path("USERPROFILE")?.join(".cache/huggingface")))
            .ok_or(HubError::NoHome)?;
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        if !["https://", "http://"].iter().any(|scheme| endpoint.starts_with(scheme)) {
            return Err(HubError::Endpoint { found: endpoint });
        }
        let from_file = || {
            let file = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
            fs::read_to_string(file).ok()
        };
        let token = text("HF_TOKEN").or_else(from_file).map(|token| token.trim().to_owned());
        let offline = text("HF_HUB_OFFLINE").is_some_and(|value| is_yes(&value));
        Ok(Self {
            cache: path("HF_HUB_CACHE").unwrap_or_else(|| home.join("hub")),
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: token.filter(|token| !token.is_empty()),
            offline,
            patience: Patience::default(),
        })
    }
}

/// As Hugging Face's libraries read a switch.
fn is_yes(value: &str) -> bool {
    ["1", "on", "yes", "true"].contains(&value.to_lowercase().as_str())
}
