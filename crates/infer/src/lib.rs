//! Prompts to answers: many requests at once over one model.
//!
//! [`Engine`] takes [`Request`]s and gives [`Event`]s. Prompts run in chunks beside the answers in progress,
//! requests join and leave at every step, keys and values lie in pages that requests with a common beginning share,
//! and each request chooses its adapter and its way of sampling. What it trades: the cache's memory is taken at the
//! start. What it refuses: an empty prompt, one that leaves no room for an answer, an adapter or a token that it
//! does not know, a request that would not fit into its cache alone; and to print anything.
//!
//! A base and an adapter from their folders, and an answer as it comes:
//!
//! ```
//! use burn::tensor::DType;
//! use burn_flex::Flex;
//! use buzzer_infer::{Engine, EngineSettings, Request};
//! use buzzer_text::{Renderer, Template, Tokenizer};
//! use buzzer_weights::{Adapter, Quantization, attach_adapter, load_llama};
//! # use buzzer_model::{LoraSettings, Target};
//! # let base = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../datasets/tiny-llama"));
//! # let folder = tempfile::tempdir()?;
//! # let adapter = folder.path();
//! # let settings = LoraSettings { rank: 4, alpha: 8.0, rslora: false, targets: Target::ALL.to_vec() };
//! # let mut model = load_llama::<Flex>(base, Quantization::Nf4Double, DType::F32, &Default::default())?;
//! # model.add_lora(&settings, 1);
//! # buzzer_weights::extract_adapter(&model, &settings, 0.0, None).write(adapter)?;
//!
//! let mut model = load_llama::<Flex>(base, Quantization::Nf4Double, DType::F32, &Default::default())?;
//! attach_adapter(&mut model, &Adapter::read(adapter)?, adapter)?;
//! let renderer = Renderer::new(Tokenizer::from_file(base)?, Template::Question);
//! let mut engine = Engine::new(model, EngineSettings::default())?.with_tokenizer(renderer.tokenizer().clone());
//! for event in engine.stream(Request::new(renderer.prompt("", "This city is the capital of France")?))? {
//!     print!("{}", event?.text());
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod engine;
mod error;
mod joining;
mod pages;
mod request;
mod sampling;
mod sequence;
mod settings;
mod steps;
mod stream;
mod text;

pub use engine::{Engine, Load};
pub use error::InferError;
pub use request::{Answer, Event, FinishReason, LogProb, Request, RequestId, Usage};
pub use sampling::Sampling;
pub use settings::{CacheDtype, EngineSettings};
pub use stream::Stream;
