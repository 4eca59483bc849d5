//! Buzzer: fine-tune Llama 2 on question-and-answer corpora, and use the result.
//!
//! One import for the crates below it, in the order in which data flows, and the choice of a device. There is nothing
//! else here: what a crate does is documented in the crate.
//!
//! An answer from a base and an adapter, as it comes:
//!
//! ```
//! use buzzer::burn::tensor::DType;
//! use buzzer::infer::{Engine, EngineSettings, Request};
//! use buzzer::kernels::Cpu;
//! use buzzer::text::{Renderer, Template, Tokenizer};
//! use buzzer::weights::{Adapter, Quantization, attach_adapter, load_llama};
//! # use buzzer::model::{LoraSettings, Target};
//! # let base = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../datasets/tiny-llama"));
//! # let folder = tempfile::tempdir()?;
//! # let adapter = folder.path();
//! # let settings = LoraSettings { rank: 4, alpha: 8.0, rslora: false, targets: Target::ALL.to_vec() };
//! # let mut model = load_llama::<Cpu>(base, Quantization::Nf4Double, DType::F32, &Default::default())?;
//! # model.add_lora(&settings, 1);
//! # buzzer::weights::extract_adapter(&model, &settings, 0.0, None).write(adapter)?;
//!
//! let mut model = load_llama::<Cpu>(base, Quantization::Nf4Double, DType::F32, &Default::default())?;
//! attach_adapter(&mut model, &Adapter::read(adapter)?, adapter)?;
//! let renderer = Renderer::new(Tokenizer::from_file(base)?, Template::Question);
//! let mut engine = Engine::new(model, EngineSettings::default())?.with_tokenizer(renderer.tokenizer().clone());
//! for event in engine.stream(Request::new(renderer.prompt("", "This city is the capital of France")?))? {
//!     print!("{}", event?.text());
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub use buzzer_data as data;
pub use buzzer_eval as eval;
pub use buzzer_infer as infer;
pub use buzzer_kernels as kernels;
pub use buzzer_model as model;
pub use buzzer_text as text;
pub use buzzer_train as train;
pub use buzzer_weights as weights;

/// Burn, in the version that these crates are built with.
pub use burn;

mod device;

pub use device::{Device, DeviceError, DeviceJob};
