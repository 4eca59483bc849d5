//! Answering clues in batches and judging the answers.

use buzzer::data::Clue;
use buzzer::eval::{Scores, judge};
use buzzer::infer::{GenerateOptions, Sampling, generate_scored};
use buzzer::kernels::KernelBackend;
use buzzer::model::Llama;
use buzzer::text::Renderer;
use clap::Args;

use crate::Failure;

/// How to answer.
#[derive(Args, Clone, Copy, Debug)]
pub struct AnswerArgs {
    /// Tokens of an answer at most
    #[arg(long, value_name = "N", default_value_t = 24)]
    pub max_new_tokens: usize,
    /// 0 takes the likeliest token; higher is more random
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub temperature: f64,
    /// Choose among the K likeliest tokens only; 0 for all
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub top_k: usize,
    /// Choose among the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub top_p: f64,
    /// Seed of sampled answers
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub sample_seed: u64,
    /// Clues answered together
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub answer_batch: u32,
}

/// A clue and what the model said.
#[derive(Clone, Debug)]
pub struct Answered {
    /// The clue.
    pub clue: Clue,
    /// The answer, trimmed; empty if the clue does not fit the model's context.
    pub answer: String,
    /// Natural logarithm of its probability; none if the clue does not fit.
    pub log_prob: Option<f64>,
}

impl AnswerArgs {
    /// The options of the engine.
    #[must_use]
    pub fn options(&self, eos: u32) -> GenerateOptions {
        let sampling = Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            seed: self.sample_seed,
        };
        GenerateOptions { max_new_tokens: self.max_new_tokens, sampling, stop: vec![eos] }
    }
}

/// Answers clues; `done` hears after every batch how many are answered.
///
/// Clues of like length go into one batch, since a batch is as long as its longest prompt.
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
    let tokenizer = renderer.tokenizer();
    let options = args.options(tokenizer.eos_id());
    let prompt = |clue: &Clue| renderer.prompt(&clue.category, &clue.question);
    let prompts = clues.iter().map(prompt).collect::<Result<Vec<_>, _>>()?;
    let mut places: Vec<usize> = (0..clues.len()).collect();
    places.retain(|&place| prompts[place].len() < model.config().max_position_embeddings);
    places.sort_by_key(|&place| prompts[place].len());
    let empty = |clue: &Clue| Answered { clue: clue.clone(), answer: String::new(), log_prob: None };
    let mut answered: Vec<Answered> = clues.iter().map(empty).collect();
    let mut count = 0;
    for places in places.chunks(args.answer_batch as usize) {
        let batch: Vec<Vec<u32>> = places.iter().map(|&place| prompts[place].clone()).collect();
        for (&place, said) in places.iter().zip(generate_scored(model, &batch, &options, |_, _| {})?) {
            answered[place].answer = tokenizer.decode(&said.ids)?.trim().to_owned();
            answered[place].log_prob = Some(said.log_prob);
        }
        count += places.len();
        done(count);
    }
    Ok(answered)
}

/// Exact match and F1 of answers.
#[must_use]
pub fn judge_answers(answered: &[Answered]) -> Scores {
    judge(answered.iter().map(|answered| (answered.answer.as_str(), answered.clue.answer.as_str())))
}
