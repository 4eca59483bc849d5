//! Errors of this crate: what a configuration lacks or asks for that is not here.

/// What can go wrong before a model is built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The text is no JSON object.
    #[error(
        "{origin}: not a model configuration: {message}; pass the folder of a Hugging Face Llama 2 model to --model"
    )]
    Parse {
        /// The file.
        origin: String,
        /// What the parser said.
        message: String,
    },
    /// Another architecture, or a variant of Llama that is computed differently.
    #[error(
        "{origin}: `{key}` is {found}, but this program runs only {supported}; give such a model to --model"
    )]
    Unsupported {
        /// The file.
        origin: String,
        /// The key of the configuration.
        key: &'static str,
        /// Its value.
        found: String,
        /// What would be understood.
        supported: &'static str,
    },
    /// A number is missing or out of range.
    #[error("{origin}: `{key}` {problem}; fetch the config.json that belongs to the weights of --model")]
    Number {
        /// The file.
        origin: String,
        /// The key of the configuration.
        key: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// A name that is none of the seven linears.
    #[error(
        "unknown linear `{0}`; --targets takes all, or a comma-separated list of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    )]
    UnknownTarget(String),
    /// A LoRA setting that makes no sense.
    #[error("{flag} {found} is not possible; choose {choose}")]
    Setting {
        /// The flag.
        flag: &'static str,
        /// Its value.
        found: String,
        /// What would be possible.
        choose: &'static str,
    },
}
