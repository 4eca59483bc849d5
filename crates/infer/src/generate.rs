//! Decoding a batch of prompts with a key-value cache.

use burn::tensor::{Int, Tensor, TensorData};
use buzzer_kernels::KernelBackend;
use buzzer_model::{KvCache, Llama};

use crate::{InferError, Sampler, Sampling};

/// The document of padding in front of a short prompt.
const PADDING: i32 = -1;

/// What to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// Tokens of an answer at most.
    pub max_new_tokens: usize,
    /// How to choose each.
    pub sampling: Sampling,
    /// Tokens that end an answer and are no part of it, such as the end token.
    pub stop: Vec<u32>,
}

/// An answer, and how likely the model held it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Generated {
    /// The new token ids, without the one that ended them.
    pub ids: Vec<u32>,
    /// Natural logarithm of the probability of these tokens, and of the one that ended them if one did, before
    /// temperature and filters.
    pub log_prob: f64,
}

/// As [`generate_scored`], without the probabilities.
///
/// # Errors
/// As there.
pub fn generate<B: KernelBackend>(
    model: &Llama<B>,
    prompts: &[Vec<u32>],
    options: &GenerateOptions,
    on_token: impl FnMut(usize, u32),
) -> Result<Vec<Vec<u32>>, InferError> {
    let answers = generate_scored(model, prompts, options, on_token)?;
    Ok(answers.into_iter().map(|answer| answer.ids).collect())
}

/// Answers prompts together: the new token ids of each, without the token that ended it, and their probability.
///
/// `on_token` hears of every new token as it comes, with its prompt's place. Greedy answers do not depend on the batch
/// but for rounding. An answer ends early where the model's context does.
///
/// # Errors
/// If a prompt is empty or leaves no room for an answer, a setting makes no sense, or the model gives NaN.
pub fn generate_scored<B: KernelBackend>(
    model: &Llama<B>,
    prompts: &[Vec<u32>],
    options: &GenerateOptions,
    mut on_token: impl FnMut(usize, u32),
) -> Result<Vec<Generated>, InferError> {
    options.sampling.check()?;
    check(prompts, model.config().max_position_embeddings)?;
    let mut answers = vec![Generated::default(); prompts.len()];
    if prompts.is_empty() || options.max_new_tokens == 0 {
        return Ok(answers);
    }
    let mut decoding = Decoding::start(model, prompts, options);
    loop {
        let logits = decoding.logits.clone().into_data().iter::<f32>().collect::<Vec<f32>>();
        let width = model.config().vocab_size;
        for (row, logits) in decoding.rows.iter_mut().zip(logits.chunks(width)) {
            if row.ended {
                continue;
            }
            let answer = &mut answers[row.prompt];
            let so_far = prompts[row.prompt].len() + answer.ids.len();
            let next = row.sampler.next(logits);
            let next = next.ok_or(InferError::NotANumber { index: row.prompt, tokens: so_far })?;
            answer.log_prob += log_prob(logits, next);
            row.ended = options.stop.contains(&next);
            if !row.ended {
                answer.ids.push(next);
                on_token(row.prompt, next);
                row.last = next;
                row.ended = answer.ids.len() == options.max_new_tokens
                    || so_far + 1 == model.config().max_position_embeddings;
            }
        }
        if decoding.rows.iter().all(|row| row.ended) {
            return Ok(answers);
        }
        decoding.drop_ended();
        decoding.advance(model);
    }
}

fn check(prompts: &[Vec<u32>], context: usize) -> Result<(), InferError> {
    for (index, prompt) in prompts.iter().enumerate() {
        if prompt.is_empty() {
            return Err(InferError::EmptyPrompt { index });
        }
        if prompt.len() >= context {
            return Err(InferError::PromptTooLong { index, tokens: prompt.len(), context });
        }
    }
    Ok(())
}

/// Logarithm of a token's probability: its logit less the logarithm of the sum of all exponentials.
fn log_prob(logits: &[f32], token: u32) -> f64 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from((logit - most).exp())).sum();
    f64::from(logits[token as usize] - most) - sum.ln()
}

/// One row of the batch.
struct Row {
    prompt: usize,
    sampler: Sampler,
    last: u32,
    position: i32,
    ended: bool,
}

/// A batch between two steps.
struct Decoding<B: KernelBackend> {
    rows: Vec<Row>,
    cache: KvCache<B>,
    /// `[b, v]`, of the tokens to come.
    logits: Tensor<B, 2>,
}

impl<B: KernelBackend> Decoding<B> {
    /// Runs the prompts, padded on the left.
    fn start(model: &Llama<B>, prompts: &[Vec<u32>], options: &GenerateOptions) -> Self {
        let device = model.device();
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let dims = [prompts.len(), longest];
        let mut columns = [const { Vec::<i32>::new() }; 3];
        for prompt in prompts {
            let padding = longest - prompt.len();
            let [ids, documents, positions] = &mut columns;
            ids.extend(std::iter::repeat_n(0, padding).chain(prompt.iter().map(|&id| id as i32)));
            documents.extend(std::iter::repeat_n(PADDING, padding).chain(prompt.iter().map(|_| 0)));
            positions.extend(std::iter::repeat_n(0, padding).chain(0..prompt.len() as i32));
        }
        let [ids, documents, positions] =
            columns.map(|column| Tensor::<B, 2, Int>::from_data(TensorData::new(column, dims), &device));
        let capacity = longest + options.max_new_tokens;
        let mut cache = KvCache::new(model.config(), prompts.len(), capacity, model.dtype(), &device);
        let hidden = model.hidden_cached(ids, documents, positions, &mut cache);
        let [_, d] = hidden.dims();
        let last = hidden.reshape([prompts.len(), longest, d]).narrow(1, longest - 1, 1);
        let row = |(place, prompt): (usize, &Vec<u32>)| Row {
            prompt: place,
            sampler: Sampler::new(options.sampling, place as u64),
            last: 0,
            position: prompt.len() as i32,
            ended: false,
        };
        Self {
            rows: prompts.iter().enumerate().map(row).collect(),
            cache,
            logits: model.logits(last.reshape([prompts.len(), d])),
        }
    }

    /// Leaves out the ended rows once they are half of the batch; before, copying the cache costs more than it saves.
    fn drop_ended(&mut self) {
        let alive: Vec<i32> =
            (0..).zip(&self.rows).filter(|(_, row)| !row.ended).map(|(place, _)| place).collect();
        if alive.len() * 2 > self.rows.len() {
            return;
        }
        let count = alive.len();
        let places = Tensor::<B, 1, Int>::from_data(TensorData::new(alive, [count]), &self.logits.device());
        self.cache.keep_rows(places);
        self.rows.retain(|row| !row.ended);
    }

    /// Runs the tokens just chosen.
    fn advance(&mut self, model: &Llama<B>) {
        let device = model.device();
        let dims = [self.rows.len(), 1];
        let column =
            |values: Vec<i32>| Tensor::<B, 2, Int>::from_data(TensorData::new(values, dims), &device);
        let ids = column(self.rows.iter().map(|row| row.last as i32).collect());
        let positions = column(self.rows.iter().map(|row| row.position).collect());
        let documents = column(vec![0; self.rows.len()]);
        self.logits = model.logits(model.hidden_cached(ids, documents, positions, &mut self.cache));
        self.rows.iter_mut().for_each(|row| row.position += 1);
    }
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;
    use buzzer_kernels::AttentionIndex;
    use buzzer_model::{BlockContext, LlamaConfig};

    use super::*;

    fn model() -> Llama<Flex> {
        let mut model = Llama::<Flex>::init(&LlamaConfig::tiny_test(50), 3, &Default::default());
        // Larger weights than the initial ones, so that the likeliest token is not a matter of rounding.
        model.embedding = model.embedding.map(|table| table.mul_scalar(40.0));
        model
    }

    fn greedy(new: usize) -> GenerateOptions {
        GenerateOptions { max_new_tokens: new, sampling: Sampling::default(), stop: vec![] }
    }

    /// The answer without cache: the whole text is run again for every token.
    fn without_cache(model: &Llama<Flex>, prompt: &[u32], new: usize) -> Vec<u32> {
        let mut ids: Vec<i32> = prompt.iter().map(|&id| id as i32).collect();
        for _ in 0..new {
            let t = ids.len();
            let row =
                |values: Vec<i32>| Tensor::from_data(TensorData::new(values, [1, t]), &Default::default());
            let context = BlockContext::rows(model.config(), row(vec![0; t]), row((0..t as i32).collect()));
            let logits = model.logits(model.hidden(row(ids.clone()), &context, None).narrow(0, t - 1, 1));
            ids.push(logits.argmax(1).into_data().iter::<i32>().next().unwrap());
        }
        ids[prompt.len()..].iter().map(|&id| id as u32).collect()
    }

    #[test]
    fn the_cache_changes_nothing_alone_or_in_a_batch() {
        let model = model();
        let prompts = [vec![1, 7, 9, 30, 2], vec![4], vec![11, 12, 13], vec![40; 9]];
        let expected: Vec<_> = prompts.iter().map(|prompt| without_cache(&model, prompt, 12)).collect();
        assert_eq!(generate(&model, &prompts, &greedy(12), |_, _| {}).unwrap(), expected);
        for (prompt, expected) in prompts.iter().zip(&expected) {
            let alone = generate(&model, std::slice::from_ref(prompt), &greedy(12), |_, _| {}).unwrap();
            assert_eq!(alone[0], *expected);
        }
    }

    #[test]
    fn probabilities_are_those_of_the_whole_text() {
        let model = model();
        let prompts = [vec![1, 7, 9, 30, 2], vec![4]];
        let whole = generate(&model, &prompts, &greedy(6), |_, _| {}).unwrap();
        // A token that comes up only after the third place, so that the answer has four tokens and its end.
        let stop = whole[0][4];
        assert!(!whole[0][..4].contains(&stop));
        let options = GenerateOptions { stop: vec![stop], ..greedy(6) };
        let answer = generate_scored(&model, &prompts, &options, |_, _| {}).unwrap().swap_remove(0);
        assert_eq!(answer.ids, whole[0][..4]);
        let text: Vec<i32> = prompts[0].iter().chain(&whole[0][..5]).map(|&id| id as i32).collect();
        let t = text.len();
        let row = |values: Vec<i32>| Tensor::from_data(TensorData::new(values, [1, t]), &Default::default());
        let context = BlockContext::rows(model.config(), row(vec![0; t]), row((0..t as i32).collect()));
        let logits = model.logits(model.hidden(row(text.clone()), &context, None));
        let log_probs: Vec<f32> =
            burn::tensor::activation::log_softmax(logits, 1).into_data().iter::<f32>().collect();
        let expected: f64 =
            (4..t - 1).map(|place| f64::from(log_probs[place * 50 + text[place + 1] as usize])).sum();
        assert!((answer.log_prob - expected).abs() < 1e-3, "{}, expected {expected}", answer.log_prob);
        assert!(answer.log_prob < 0.0);
    }

    #[test]
    fn rows_end_on_their_own_and_the_rest_goes_on() {
        let model = model();
        let prompts: Vec<Vec<u32>> = (1..9).map(|id| vec![id, id + 20]).collect();
        let whole = generate(&model, &prompts, &greedy(10), |_, _| {}).unwrap();
        let stop = whole[0][2];
        let options = GenerateOptions { stop: vec![stop], ..greedy(10) };
        let mut heard = vec![Vec::new(); prompts.len()];
        let stopped = generate(&model, &prompts, &options, |row, id| heard[row].push(id)).unwrap();
        for (stopped, whole) in stopped.iter().zip(&whole) {
            let end = whole.iter().position(|&id| id == stop).unwrap_or(whole.len());
            assert_eq!(stopped[..], whole[..end]);
        }
        assert_eq!(heard, stopped);
    }

    #[test]
    fn prompts_that_cannot_be_answered_are_errors() {
        let model = model();
        let error =
            |prompts: &[Vec<u32>]| generate(&model, prompts, &greedy(1), |_, _| {}).unwrap_err().to_string();
        assert!(error(&[vec![1], vec![]]).contains("prompt 1"));
        assert!(error(&[vec![1; 256]]).contains("256"));
        let at_the_edge = generate(&model, &[vec![1; 255]], &greedy(5), |_, _| {}).unwrap();
        assert_eq!(at_the_edge[0].len(), 1);
        assert!(generate(&model, &[], &greedy(5), |_, _| {}).unwrap().is_empty());
    }

    #[test]
    fn padding_is_seen_by_nobody() {
        let rows = |values: [[i32; 3]; 1]| Tensor::<Flex, 2, Int>::from_data(values, &Default::default());
        let index = AttentionIndex::rows(rows([[PADDING, 0, 0]]), rows([[0, 0, 1]]));
        let forbidden: Vec<bool> = index.forbidden().into_data().iter::<bool>().collect();
        assert_eq!(forbidden, [false, true, true, true, false, true, true, false, false]);
    }
}
