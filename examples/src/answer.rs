//! Answering clues in batches and judging the answers.

use std::sync::Once;

use buzzer::data::Clue;
use buzzer::eval::{Scores, judge};
use buzzer::infer::{
    Answer, CacheDtype, Engine, EngineSettings, Event, FinishReason, InferError, Request, Sampling,
};
use buzzer::kernels::KernelBackend;
use buzzer::model::{Llama, PagedCache};
use buzzer::text::{Fields, Renderer, Template};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::{Failure, print_error_line};

/// Tokens of a page of the cache.
const PAGE_TOKENS: usize = 16;

/// How clues are written unless something else is asked for: at most so many tokens, at such a temperature. The likeliest clue for a
/// category is one and the same, so writing has to be random.
pub(crate) const WRITING: [(&str, &str); 2] = [("max_new_tokens", "80"), ("temperature", "0.8")];

/// How to answer.
#[derive(Args, Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AnswerArgs {
    /// Tokens of an answer at most; with --template clue 80 if not given
    #[arg(long, value_name = "N", default_value_t = Self::default().max_new_tokens,
          default_value_if("template", "clue", WRITING[0].1))]
    pub max_new_tokens: usize,
    /// 0 takes the likeliest token; higher is more random; with --template clue 0.8 if not given
    #[arg(long, value_name = "T", default_value_t = Self::default().temperature,
          default_value_if("template", "clue", WRITING[1].1))]
    pub temperature: f64,
    /// Choose among the K likeliest tokens only; 0 for all
    #[arg(long, value_name = "K", default_value_t = Self::default().top_k)]
    pub top_k: usize,
    /// Choose among the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = Self::default().top_p)]
    pub top_p: f64,
    /// Choose among tokens with at least this share of the likeliest one's probability; 0 for all
    #[arg(long, value_name = "P", default_value_t = Self::default().min_p)]
    pub min_p: f64,
    /// Make tokens that were there before less likely by this factor; 1 for no penalty
    #[arg(long, value_name = "F", default_value_t = Self::default().repetition_penalty)]
    pub repetition_penalty: f64,
    /// Seed of sampled answers; each clue of a file has one of its own
    #[arg(long, value_name = "N", default_value_t = Self::default().sample_seed)]
    pub sample_seed: u64,
    /// GiB for keys and values, and for what steps keep, at most
    #[arg(long, value_name = "GIB", default_value_t = Self::default().cache_limit)]
    pub cache_limit: f64,
    /// How keys and values are stored
    #[arg(long, value_enum, default_value_t)]
    pub cache_dtype: CacheDtypeArg,
    /// Clues answered together
    #[arg(long, value_name = "N", default_value_t = Self::default().answer_batch,
          value_parser = clap::value_parser!(u32).range(1..))]
    pub answer_batch: u32,
}

/// [`CacheDtype`] as an argument.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CacheDtypeArg {
    /// In the dtype to compute in
    #[default]
    Compute,
    /// In 8 bits: more answers at a time for the same memory; on CUDA one operation at a time, which is slower
    Int8,
}

impl From<CacheDtypeArg> for CacheDtype {
    fn from(argument: CacheDtypeArg) -> Self {
        match argument {
            CacheDtypeArg::Compute => Self::Compute,
            CacheDtypeArg::Int8 => Self::Int8,
        }
    }
}

/// A clue and what the model said: an answer to it, or, where clues are written, another clue for its category and answer.
#[derive(Clone, Debug)]
pub struct Answered {
    /// The clue.
    pub clue: Clue,
    /// What was wanted.
    pub template: Template,
    /// The answer, trimmed; empty if the prompt does not fit the model's context.
    pub answer: String,
    /// Natural logarithm of its probability; none if the clue does not fit.
    pub log_prob: Option<f64>,
}

impl Answered {
    /// What the prompt showed beside the category, and what the file has as the answer to it.
    #[must_use]
    pub fn given_and_expected(&self) -> [&str; 2] {
        self.template.given_and_wanted(&fields(&self.clue))
    }
}

/// A clue as a template takes it.
#[must_use]
pub fn fields(clue: &Clue) -> Fields<'_> {
    let Clue { category, question, answer, .. } = clue;
    Fields { category, question, answer }
}

impl Default for AnswerArgs {
    fn default() -> Self {
        Self {
            max_new_tokens: 24,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            sample_seed: 0,
            cache_limit: 4.0,
            cache_dtype: CacheDtypeArg::default(),
            answer_batch: 64,
        }
    }
}

impl AnswerArgs {
    /// # Errors
    /// If a number makes no sense.
    pub fn check(&self) -> Result<(), Failure> {
        if self.answer_batch == 0 {
            return Err(Failure::input("--answer-batch 0 is not possible; choose one clue or more"));
        }
        Ok(self.sampling(0).check()?)
    }

    fn sampling(&self, number: u64) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            seed: self.sample_seed.wrapping_add(number),
        }
    }

    /// An engine for prompts of at most so many tokens; its cache is no larger than they need.
    ///
    /// # Errors
    /// If the cache would hold nothing.
    pub fn engine<B: KernelBackend>(
        &self,
        model: &Llama<B>,
        renderer: &Renderer,
        longest_prompt: usize,
    ) -> Result<Engine<B>, Failure> {
        let max_batch = self.answer_batch as usize;
        let tokens =
            longest_prompt.saturating_add(self.max_new_tokens).min(model.config().max_position_embeddings);
        let cache_dtype = CacheDtype::from(self.cache_dtype);
        let format = cache_dtype.format(model.dtype());
        let page = PagedCache::<B>::page_bytes(model.config(), PAGE_TOKENS, format);
        // One page belongs to no clue.
        let pages = page * (max_batch * tokens.div_ceil(PAGE_TOKENS) + 1);
        let needed = pages + Engine::step_bytes(model, PAGE_TOKENS, cache_dtype);
        let limit = (self.cache_limit * (1_u64 << 30) as f64) as usize;
        let settings = EngineSettings {
            budget_bytes: needed.min(limit),
            cache_dtype,
            page_tokens: PAGE_TOKENS,
            max_batch,
            ..EngineSettings::default()
        };
        let engine = Engine::new(model.clone(), settings).map_err(|error| match error {
            InferError::BudgetTooSmall { .. } => {
                Failure::input(format!("--cache-limit {}: {error}", self.cache_limit))
            }
            error => error.into(),
        })?;
        Ok(engine.with_tokenizer(renderer.tokenizer().clone()))
    }

    /// A request; `number` is the clue's, for its seed.
    #[must_use]
    pub fn request(&self, prompt: Vec<u32>, number: u64) -> Request {
        Request::new(prompt).with_max_new_tokens(self.max_new_tokens).with_sampling(self.sampling(number))
    }
}

/// Answers clues; `done` hears after every answer how many there are.
///
/// # Errors
/// If a clue cannot be tokenized, a setting makes no sense, or the model gives NaN.
pub fn answer_clues<B: KernelBackend>(
    model: &Llama<B>,
    renderer: &Renderer,
    clues: &[Clue],
    args: &AnswerArgs,
    mut done: impl FnMut(usize),
) -> Result<Vec<Answered>, Failure> {
    let template = renderer.template();
    let prompt = |clue: &Clue| renderer.prompt(&clue.category, template.given_and_wanted(&fields(clue))[0]);
    let prompts = clues.iter().map(prompt).collect::<Result<Vec<_>, _>>()?;
    let context = model.config().max_position_embeddings;
    let places: Vec<usize> = (0..clues.len()).filter(|&place| prompts[place].len() < context).collect();
    let longest = places.iter().map(|&place| prompts[place].len()).max().unwrap_or(0);
    let empty =
        |clue: &Clue| Answered { clue: clue.clone(), template, answer: String::new(), log_prob: None };
    let mut answered: Vec<Answered> = clues.iter().map(empty).collect();
    let requests = places.iter().map(|&place| {
        let request = args.request(prompts[place].clone(), place as u64);
        Request { log_probs: Some(0), ..request }
    });
    let mut count = 0;
    let mut engine = args.engine(model, renderer, longest)?;
    let answers = engine.complete(requests, |_, event| {
        if matches!(event, Event::Finished { .. }) {
            count += 1;
            done(count);
        }
    })?;
    tell_step_refusal(&engine);
    for (&place, answer) in places.iter().zip(answers) {
        answered[place].answer = answer_text(&answer)?.to_owned();
        answered[place].log_prob = Some(answer.log_prob());
    }
    Ok(answered)
}

/// Says once a process what the device refused, if an engine answers more slowly for it.
pub fn tell_step_refusal<B: KernelBackend>(engine: &Engine<B>) {
    static TOLD: Once = Once::new();
    if let Some(refusal) = engine.step_refusal() {
        TOLD.call_once(|| {
            print_error_line(format_args!("answers   one operation at a time, which is slower: {refusal}"));
        });
    }
}

/// The text of an answer, trimmed.
///
/// # Errors
/// If the model gave NaN.
pub fn answer_text(answer: &Answer) -> Result<&str, Failure> {
    if answer.reason == FinishReason::NotANumber {
        let tokens = answer.usage.prompt_tokens + answer.usage.new_tokens;
        return Err(InferError::NotANumber { tokens }.into());
    }
    Ok(answer.text.trim())
}

/// Exact match and F1 of answers, or of written clues against the file's.
#[must_use]
pub fn judge_answers(answered: &[Answered]) -> Scores {
    judge(answered.iter().map(|answered| (answered.answer.as_str(), answered.given_and_expected()[1])))
}
