//! Whether a run fits where it is to run, and what would fit if it does not.

use std::fmt::Write;

use buzzer::burn::tensor::DType;
use buzzer::data::{LossOn, Packing};
use buzzer::kernels::{Card, CardModel, KernelBackend};
use buzzer::model::LlamaConfig;
use buzzer::train::{Engine, FrozenFormat, MemoryPlan, PlanSettings, Shape, StepWork};
use buzzer::{Device, DeviceJob};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::model::QuantizationArg;
use crate::output::{available_memory_bytes, bytes};
use crate::{Corpus, Failure, Recipe, print_error_line};

/// What compiled kernels take of a card beside the tensors, once its free memory is known. An estimate.
const KERNELS_BYTES: u64 = 128 << 20;
/// Tokens of a clue, as the project's design page has it (34.7 were measured, see `docs/log.md`), and the share of them that
/// are its answer's.
const MEAN_CLUE: f64 = 37.8;
const ANSWER_SHARE: f64 = 0.12;
/// How full rows of a thousand tokens become.
const EFFICIENCY: f64 = 0.997;
/// Rows are not proposed to be shorter than this.
const SHORTEST_ROW: usize = 128;
/// What is proposed for `--checkpoint-every`: inputs of fewer blocks are kept, and those between computed again.
const SPARSER: [usize; 3] = [2, 4, 6];

/// Limits of a run.
#[derive(Args, Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LimitArgs {
    /// Plan for no more memory than this, in GiB; on a CUDA card the rest is taken away
    #[arg(long, value_name = "GIB")]
    pub memory_limit: Option<f64>,
}

/// The dtype to compute in, as an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DtypeArg {
    /// 32 bits, everywhere
    F32,
    /// 16 bits with the range of f32, on CUDA cards from compute capability 8.0 on
    Bf16,
    /// 16 bits, on CUDA cards
    F16,
}

/// The dtype asked for, or the best one of the device, given by name and, if it is a CUDA card, compute capability.
///
/// # Errors
/// If the device does not compute in it.
pub fn compute_dtype(
    asked: Option<DtypeArg>,
    device: &str,
    capability: Option<u32>,
) -> Result<DType, Failure> {
    match (asked, capability) {
        (Some(DtypeArg::F32), _) | (None, None) => Ok(DType::F32),
        (Some(asked), None) => Err(Failure::input(format!(
            "--dtype {}: {device} computes in f32 only; leave --dtype out, or use --device cuda",
            asked.name()
        ))),
        (Some(DtypeArg::Bf16), Some(old @ ..80)) => Err(Failure::input(format!(
            "--dtype bf16: {device} has compute capability {}.{} and no bf16; use --dtype f16",
            old / 10,
            old % 10
        ))),
        (None | Some(DtypeArg::Bf16), Some(80..)) => Ok(DType::BF16),
        (None | Some(DtypeArg::F16), Some(_)) => Ok(DType::F16),
    }
}

impl DtypeArg {
    fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }
}

/// Where a run takes place, and what it may use there.
#[derive(Clone, Debug)]
pub struct Budget {
    /// The device's or card's name.
    pub name: String,
    /// Bytes that tensors may take, if that is known.
    pub usable_bytes: Option<u64>,
    /// The row of the table that describes the card.
    pub model: Option<CardModel>,
    /// What is computed in.
    pub dtype: DType,
    engine: Engine,
}

impl Budget {
    /// A card that is not here.
    ///
    /// # Errors
    /// If it does not compute in the dtype.
    pub fn of_card(model: CardModel, dtype: Option<DtypeArg>) -> Result<Self, Failure> {
        Ok(Self {
            name: model.flag.to_owned(),
            usable_bytes: Some(model.usable_bytes),
            dtype: compute_dtype(dtype, model.flag, Some(model.compute_capability))?,
            model: Some(model),
            engine: Engine::Card,
        })
    }

    /// The device that a program runs on, with the memory that is free now.
    ///
    /// # Errors
    /// If it does not compute in the dtype.
    pub fn of_device<B: KernelBackend>(
        name: Device,
        device: &B::Device,
        dtype: Option<DtypeArg>,
    ) -> Result<Self, Failure> {
        let card = B::card(device);
        let capability = card.as_ref().and_then(|card| card.compute_capability);
        let dtype = compute_dtype(dtype, &name.to_string(), capability)?;
        Ok(match card {
            Some(card) => Self {
                usable_bytes: card.free_bytes.map(|free| free.saturating_sub(KERNELS_BYTES)),
                model: CardModel::of(&card),
                name: card.name,
                dtype,
                engine: Engine::Card,
            },
            None => Self {
                name: name.to_string(),
                usable_bytes: available_memory_bytes(),
                model: None,
                dtype,
                engine: Engine::Host,
            },
        })
    }

    /// The same place with no more memory than the limit.
    ///
    /// # Errors
    /// If the limit is no positive number.
    pub fn limited(mut self, limits: LimitArgs) -> Result<Self, Failure> {
        if let Some(limit) = limits.bytes()? {
            self.usable_bytes = Some(self.usable_bytes.map_or(limit, |usable| usable.min(limit)));
        }
        Ok(self)
    }

    /// Expected seconds of a step, from the table. A prediction; none in f32, for which the table has no rates.
    #[must_use]
    pub fn predict(&self, work: StepWork) -> Option<f64> {
        let model = self.model.filter(|_| self.dtype != DType::F32)?;
        Some(model.seconds(work.flop, work.bytes))
    }
}

impl LimitArgs {
    /// # Errors
    /// If the limit is no positive number.
    pub fn check(self) -> Result<(), Failure> {
        self.bytes().map(drop)
    }

    fn bytes(self) -> Result<Option<u64>, Failure> {
        match self.memory_limit {
            None => Ok(None),
            Some(gib) if gib > 0.0 && gib.is_finite() => Ok(Some((gib * f64::from(1 << 30)) as u64)),
            Some(gib) => Err(Failure::input(format!(
                "--memory-limit {gib}: not possible; choose a positive number of GiB"
            ))),
        }
    }

    /// Takes the rest of a CUDA card away from this process; elsewhere the limit holds for the plan only.
    ///
    /// # Errors
    /// If the card has less memory than the limit.
    pub fn enforce(self, device: Device) -> Result<(), Failure> {
        let limit = self.bytes()?;
        match (device, limit) {
            #[cfg(feature = "cuda")]
            (Device::Cuda(index), Some(limit)) => {
                let taken = buzzer::kernels::limit_memory(index, limit).map_err(|reason| {
                    Failure::input(format!("--memory-limit: {reason}; choose a lower one"))
                })?;
                crate::say!("memory    {} of {device} set aside, {} left", bytes(taken), bytes(limit));
            }
            _ => {}
        }
        Ok(())
    }
}

/// Sizes of a corpus, packed.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct CorpusSize {
    /// Rows.
    pub rows: usize,
    /// Documents in them.
    pub documents: usize,
    /// Tokens in them.
    pub tokens: usize,
    /// Tokens of a document.
    pub mean_len: f64,
    /// Tokens of the longest, where that is known.
    pub longest: Option<usize>,
    /// Share of the tokens that bear loss.
    pub loss_share: f64,
}

impl CorpusSize {
    /// Of packed rows.
    #[must_use]
    pub fn of(corpus: &Corpus) -> Self {
        let report = &corpus.train.report;
        Self {
            rows: report.rows,
            documents: report.documents,
            tokens: report.tokens,
            mean_len: report.mean_len,
            longest: Some(report.longest),
            loss_share: report.loss_tokens as f64 / report.tokens.max(1) as f64,
        }
    }

    /// Of so many clues of a mean length, the usual one if none is given.
    #[must_use]
    pub fn assumed(clues: usize, mean_len: Option<f64>, recipe: &Recipe) -> Self {
        let mean_len = mean_len.unwrap_or(MEAN_CLUE);
        let tokens = (clues as f64 * mean_len).round();
        let rows = match recipe.packing.packing {
            Packing::None => clues as f64,
            Packing::Isolated | Packing::Wrapped => tokens / (recipe.packing.row_len as f64 * EFFICIENCY),
        };
        Self {
            rows: rows.ceil() as usize,
            documents: clues,
            tokens: tokens as usize,
            mean_len,
            longest: None,
            loss_share: if recipe.packing.loss_on == LossOn::All { 1.0 } else { ANSWER_SHARE },
        }
    }
}

/// A run's plan, and what it was made from.
#[derive(Clone, Debug)]
pub struct RunPlan {
    /// What memory depends on.
    pub settings: PlanSettings,
    /// Memory by part.
    pub memory: MemoryPlan,
    /// What a step computes and moves.
    pub work: StepWork,
    budget: Budget,
    longest: Option<usize>,
}

/// Settings that fit where others do not.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Proposal {
    /// `--batch`.
    pub batch: usize,
    /// `--accumulate`.
    pub accumulate: usize,
    /// `--row-len`.
    pub row_len: usize,
    /// `--checkpoint-every`.
    pub checkpoint_every: usize,
    /// Whether moments are held in 8 bits: `--optimizer adamw8`.
    pub eight_bit: bool,
    /// What they take.
    pub planned_memory_bytes: usize,
}

impl RunPlan {
    /// The plan of a recipe on a model and a corpus.
    #[must_use]
    pub fn new(
        config: &LlamaConfig,
        recipe: &Recipe,
        quantization: QuantizationArg,
        corpus: &CorpusSize,
        budget: &Budget,
    ) -> Self {
        // Without packing a row is as long as its document.
        let longest = corpus.longest.filter(|_| recipe.packing.packing == Packing::None);
        let row_len = recipe.packing.row_len.min(longest.unwrap_or(usize::MAX));
        let settings = PlanSettings {
            config: config.clone(),
            lora: recipe.lora.clone(),
            shape: Shape { batch_rows: recipe.train.batch_rows, row_len },
            accumulation: recipe.train.accumulation,
            frozen: match quantization {
                QuantizationArg::None => FrozenFormat::Dense,
                QuantizationArg::Nf4 => FrozenFormat::Nf4,
                QuantizationArg::Nf4Double => FrozenFormat::Nf4Double,
            },
            element: budget.dtype.size(),
            eight_bit: recipe.train.optimizer.eight_bit,
            dropout: recipe.train.dropout > 0.0,
            checkpoint_every: recipe.train.checkpoint_every,
            loss_share: corpus.loss_share,
            engine: budget.engine,
        };
        let document_len =
            if recipe.packing.packing == Packing::Wrapped { row_len as f64 } else { corpus.mean_len };
        Self {
            memory: MemoryPlan::new(&settings),
            work: StepWork::new(&settings, document_len),
            settings,
            budget: budget.clone(),
            longest: corpus.longest,
        }
    }

    /// Whether it fits; it does where nothing is known of the memory.
    #[must_use]
    pub fn fits(&self) -> bool {
        self.budget.usable_bytes.is_none_or(|usable| self.memory.total() as u64 <= usable)
    }

    /// The parts, one a line, the sum, and what there is.
    #[must_use]
    pub fn describe(&self) -> String {
        let Shape { batch_rows, row_len } = self.settings.shape;
        let mut out = format!(
            "plan      {batch_rows} x {row_len} tokens on {}, {:?}\n",
            self.budget.name, self.budget.dtype
        );
        for (part, size) in self.memory.parts().into_iter().filter(|&(_, size)| size > 0) {
            let _ = writeln!(out, "          {part:<26} {:>12}", bytes(size as u64));
        }
        let _ = write!(out, "          {:<26} {:>12}", "together", bytes(self.memory.total() as u64));
        if let Some(usable) = self.budget.usable_bytes {
            let _ = write!(out, " of {}", bytes(usable));
        }
        out
    }

    /// # Errors
    /// With status 3 and a proposal if it does not fit.
    pub fn check(&self) -> Result<(), Failure> {
        let Some(usable) = self.budget.usable_bytes.filter(|_| !self.fits()) else { return Ok(()) };
        let advice = match self.propose() {
            Some(proposal) => format!(
                "this fits and keeps the tokens of a step: {} ({})",
                proposal.flags(&self.settings),
                bytes(proposal.planned_memory_bytes as u64)
            ),
            None => "no smaller batch, shorter row, recomputation or 8-bit optimizer state fits; use a smaller model, a lower --rank \
                     or a card with more memory"
                .into(),
        };
        Err(Failure::does_not_fit(format!(
            "the plan needs {} and {} has {} for tensors; {advice}",
            bytes(self.memory.total() as u64),
            self.budget.name,
            bytes(usable)
        )))
    }

    /// The first that fits: a smaller batch, then one row with more recomputation, then shorter rows, then the same with
    /// moments in 8 bits. A step keeps its tokens. Rows stay long enough for the longest document.
    #[must_use]
    pub fn propose(&self) -> Option<Proposal> {
        let usable = self.budget.usable_bytes?;
        let PlanSettings { shape, accumulation, eight_bit, checkpoint_every: every, .. } = self.settings;
        let rows = shape.batch_rows * accumulation;
        let batches = (1..=shape.batch_rows).rev().filter(|batch| rows.is_multiple_of(*batch));
        let batches = batches.map(|batch| (batch, rows / batch, shape.row_len, every));
        let sparser = SPARSER.into_iter().filter(|&sparser| sparser > every);
        let sparser = sparser.map(|sparser| (1, rows, shape.row_len, sparser));
        let shortest = self.longest.unwrap_or(0).max(SHORTEST_ROW);
        let shorter = (1..).map(|halvings| (1, rows << halvings, shape.row_len >> halvings, every));
        let shorter = shorter.take_while(|&(_, _, row_len, _)| row_len >= shortest);
        let shapes: Vec<_> = batches.chain(sparser).chain(shorter).collect();
        let states = if eight_bit { vec![true] } else { vec![false, true] };
        let mut candidates = states.iter().flat_map(|&state| shapes.iter().map(move |&shape| (state, shape)));
        candidates.find_map(|(eight_bit, (batch, accumulate, row_len, checkpoint_every))| {
            let settings = PlanSettings {
                shape: Shape { batch_rows: batch, row_len },
                accumulation: accumulate,
                eight_bit,
                checkpoint_every,
                ..self.settings.clone()
            };
            let planned_memory_bytes = MemoryPlan::new(&settings).total();
            let proposal =
                Proposal { batch, accumulate, row_len, checkpoint_every, eight_bit, planned_memory_bytes };
            (planned_memory_bytes as u64 <= usable).then_some(proposal)
        })
    }
}

impl Proposal {
    /// The flags that turn the settings into these.
    #[must_use]
    pub fn flags(&self, from: &PlanSettings) -> String {
        let mut flags = Vec::new();
        if (self.batch, self.accumulate) != (from.shape.batch_rows, from.accumulation) {
            flags.push(format!("--batch {} --accumulate {}", self.batch, self.accumulate));
        }
        if self.row_len != from.shape.row_len {
            flags.push(format!("--row-len {}", self.row_len));
        }
        if self.checkpoint_every != from.checkpoint_every {
            flags.push(format!("--checkpoint-every {}", self.checkpoint_every));
        }
        if self.eight_bit && !from.eight_bit {
            flags.push("--optimizer adamw8".into());
        }
        flags.join(" ")
    }
}

/// Runs a program's job on a device.
///
/// # Errors
/// Those of the job, and if there is no such card.
pub fn run_on<T, J>(device: Device, job: J) -> Result<T, Failure>
where
    J: DeviceJob<Output = Result<T, Failure>>,
{
    #[cfg(feature = "cuda")]
    if let Device::Cuda(index) = device {
        let cards = buzzer::kernels::cuda_cards();
        if index >= cards {
            return Err(Failure::input(format!(
                "--device {device}: the driver offers {cards} CUDA cards, numbered from 0; use --device cpu"
            )));
        }
    }
    device.run(Checked(job))
}

/// A job on a device that can run it, after a line for the user if it runs slower than it might.
struct Checked<J>(J);

impl<T, J: DeviceJob<Output = Result<T, Failure>>> DeviceJob for Checked<J> {
    type Output = Result<T, Failure>;

    fn run<B: KernelBackend>(self, device: &B::Device) -> Self::Output {
        if let Some(card) = B::card(device) {
            if let Some(reason) = card.without_compiler {
                return Err(Failure::input(format!("{}: {reason}", card.name)));
            }
            if let Some(remark) = products_remark(&card) {
                print_error_line(format_args!("products  {remark}"));
            }
        }
        self.0.run::<B>(device)
    }
}

/// How large products are slower on a card than they might be.
fn products_remark(card: &Card) -> Option<String> {
    let Card { without_library, library_waits, .. } = card;
    let burn = without_library
        .as_ref()
        .map(|reason| format!("Burn multiplies instead of cuBLASLt, which is slower: {reason}"));
    burn.or_else(|| {
        let reason = library_waits.as_ref()?;
        Some(format!("the host waits before and after each product in cuBLASLt: {reason}"))
    })
}

/// Operations a second that the data sheet of the card here gives for a dtype; none in f32 and where there is no such card.
#[must_use]
pub fn peak_flops<B: KernelBackend>(device: &B::Device, dtype: DType) -> Option<f64> {
    let model = CardModel::of(&B::card(device)?).filter(|_| dtype != DType::F32)?;
    Some(model.matmul_flops)
}

/// The dtype that a program computes in on a device.
///
/// # Errors
/// If the device does not compute in the dtype asked for.
pub fn device_dtype<B: KernelBackend>(asked: Option<DtypeArg>, device: &B::Device) -> Result<DType, Failure> {
    let card = B::card(device);
    let name = card.as_ref().map_or("cpu", |card: &Card| &card.name);
    compute_dtype(asked, name, card.as_ref().and_then(|card| card.compute_capability))
}
