//! The engine against the training forward pass without cache, and against itself: alone, in a crowd, and short of
//! memory.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use burn::backend::Autodiff;
use burn::tensor::activation::{log_softmax, softmax};
use burn::tensor::{DType, Tensor, TensorData};
use burn_flex::Flex;
use buzzer_infer::{
    Answer, CacheDtype, Engine, EngineSettings, Event, FinishReason, InferError, Request, RequestId,
    Sampling, Usage,
};
use buzzer_kernels::KernelBackend;
use buzzer_model::{BlockContext, Llama, LlamaConfig, LoraSet, LoraSettings, Target, Weight};
use buzzer_text::Tokenizer;
use buzzer_weights::{Quantization, load_llama};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Ids of [`Tokenizer::byte_level_test`].
const VOCAB: usize = 259;
/// Small pages, batches and chunks, so that every border is crossed.
const SMALL: EngineSettings = EngineSettings {
    budget_bytes: 1 << 20,
    cache_dtype: CacheDtype::Compute,
    page_tokens: 4,
    max_batch: 5,
    prefill_chunk: 7,
    step_programs: true,
};

/// The same, and the same with keys and values in 8 bits.
const BOTH: [EngineSettings; 2] = [SMALL, EngineSettings { cache_dtype: CacheDtype::Int8, ..SMALL }];

/// Larger weights than the initial ones, so that the likeliest token is not a matter of rounding.
fn model() -> Llama<Flex> {
    let mut model = Llama::<Flex>::init(&LlamaConfig::tiny_test(VOCAB), 3, &Default::default());
    model.embedding = model.embedding.map(|table| table.mul_scalar(40.0));
    model
}

fn engine(settings: EngineSettings) -> Engine<Flex> {
    Engine::new(model(), settings).unwrap()
}

/// Bytes of so many pages: a head of a token has 8 numbers of 4 bytes, or 8 of one byte and a scale of 4.
fn bytes_of_pages(pages: usize, cache_dtype: CacheDtype) -> usize {
    let config = LlamaConfig::tiny_test(VOCAB);
    let head = match cache_dtype {
        CacheDtype::Compute => config.head_dim * 4,
        CacheDtype::Int8 => config.head_dim + 4,
    };
    pages * 2 * config.num_hidden_layers * SMALL.page_tokens * config.num_key_value_heads * head
}

/// Logits of the token after a text, from the training forward pass.
fn logits(model: &Llama<Flex>, ids: &[u32]) -> Vec<f32> {
    let t = ids.len();
    let row = |values: Vec<i32>| Tensor::from_data(TensorData::new(values, [1, t]), &Default::default());
    let context = BlockContext::rows(model.config(), row(vec![0; t]), row((0..t as i32).collect()));
    let ids = row(ids.iter().map(|&id| id as i32).collect());
    let logits = model.logits(model.hidden(ids, &context, None).narrow(0, t - 1, 1));
    logits.into_data().iter::<f32>().collect()
}

fn likeliest(logits: &[f32]) -> u32 {
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|&logit| logit == best).unwrap() as u32
}

/// The greedy answer without cache: the whole text is run again for every token.
fn without_cache(model: &Llama<Flex>, prompt: &[u32], new: usize) -> Vec<u32> {
    let mut ids = prompt.to_vec();
    for _ in 0..new {
        ids.push(likeliest(&logits(model, &ids)));
    }
    ids.split_off(prompt.len())
}

fn tokens(answers: &[Answer]) -> Vec<Vec<u32>> {
    answers.iter().map(|answer| answer.tokens.clone()).collect()
}

/// A prompt of so many tokens that look random.
fn prompt(seed: u64, length: usize) -> Vec<u32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    (0..length).map(|_| 3 + random.next_u32() % 256).collect()
}

fn assert_empty(engine: &Engine<Flex>) {
    let load = engine.load();
    assert_eq!((load.waiting, load.running, load.pages_held), (0, 0, 0));
    assert_eq!(load.pages_available, load.pages);
}

#[test]
fn the_cache_changes_nothing_alone_or_in_a_batch() {
    let model = model();
    let prompts = [prompt(1, 5), prompt(2, 1), prompt(3, 19), prompt(4, 8), prompt(5, 4), prompt(6, 30)];
    let expected: Vec<_> = prompts.iter().map(|prompt| without_cache(&model, prompt, 12)).collect();
    assert!(expected.iter().any(|answer| answer[3..].iter().any(|id| *id != answer[2])), "a dull model");
    let requests = || prompts.iter().map(|prompt| Request::new(prompt.clone()).with_max_new_tokens(12));
    for settings in [SMALL, EngineSettings::default(), EngineSettings { prefill_chunk: 1, ..SMALL }] {
        let mut engine = engine(settings);
        assert_eq!(tokens(&engine.complete(requests(), |_, _| {}).unwrap()), expected);
        for (request, expected) in requests().zip(&expected) {
            assert_eq!(tokens(&engine.complete([request], |_, _| {}).unwrap())[0], *expected);
        }
        assert_empty(&engine);
    }
}

#[test]
fn greedy_tokens_are_those_of_transformers() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden/small");
    if !dir.is_dir() {
        println!("skipped: {} is not here", dir.display());
        return;
    }
    let tokenizer = Tokenizer::from_file(&dir.join("model")).unwrap();
    let model =
        load_llama::<Flex>(&dir.join("model"), Quantization::None, DType::F32, &Default::default()).unwrap();
    let golden = fs::read_to_string(dir.join("greedy_base.json")).unwrap();
    let golden: serde_json::Value = serde_json::from_str(&golden).unwrap();
    let ids = |value: &serde_json::Value| -> Vec<u32> { serde_json::from_value(value.clone()).unwrap() };
    let cases = golden.as_array().unwrap();
    let (prompts, mut expected): (Vec<_>, Vec<_>) =
        cases.iter().map(|case| (ids(&case["input_ids"]), ids(&case["output_ids"]))).unzip();
    for (prompt, expected) in prompts.iter().zip(&expected) {
        assert_eq!(without_cache(&model, prompt, expected.len()), *expected);
    }
    let end = tokenizer.eos_id();
    expected.iter_mut().for_each(|ids| ids.retain(|&id| id != end));
    let mut engine = Engine::new(model, EngineSettings::default()).unwrap().with_tokenizer(tokenizer);
    let request = |prompt: &Vec<u32>| Request::new(prompt.clone()).with_max_new_tokens(24);
    let answers = engine.complete(prompts.iter().map(request), |_, _| {}).unwrap();
    assert_eq!(tokens(&answers), expected);
    for ((prompt, expected), case) in prompts.iter().zip(&expected).zip(cases) {
        let answers = engine.complete([request(prompt)], |_, _| {}).unwrap();
        assert_eq!(answers[0].tokens, *expected);
        assert_eq!(answers[0].text.trim(), case["text"].as_str().unwrap().trim());
    }
}

/// What a request of the crowd was asked and what came of it.
struct Visitor {
    request: Request,
    cancelled: bool,
    answer: Answer,
    ended: bool,
}

fn visitor(random: &mut ChaCha8Rng) -> Visitor {
    let mut draw = |below: u32| random.next_u32() % below;
    // Some begin alike, so that they share pages.
    let length = 1 + draw(40) as usize;
    let prompt = if draw(3) == 0 { prompt(7, length) } else { prompt(u64::from(draw(1000)), length) };
    let request = Request::new(prompt).with_max_new_tokens(1 + draw(20) as usize);
    let request = Request { log_probs: Some(2), ..request };
    Visitor { request, cancelled: draw(6) == 0, answer: Answer::default(), ended: false }
}

fn take_in(engine: &mut Engine<Flex>, visitors: &mut BTreeMap<RequestId, Visitor>) {
    for event in engine.step().unwrap() {
        let visitor = visitors.get_mut(&event.request()).unwrap();
        assert!(!visitor.ended, "nothing follows the end");
        visitor.ended = visitor.answer.add(event);
    }
}

#[test]
fn a_crowd_is_served_from_little_memory() {
    for settings in BOTH {
        let budget_bytes = bytes_of_pages(33, settings.cache_dtype);
        serve_a_crowd(EngineSettings { budget_bytes, ..settings });
    }
}

/// The tokens of an answer are those that are expected. In 8 bits a sum that is rounded otherwise in another batch may move a key
/// or a value to the next code, so there an answer may go another way where two tokens are about as likely.
fn assert_same(answer: &Answer, expected: &Answer, cache_dtype: CacheDtype) {
    let mut pairs = answer.tokens.iter().zip(&expected.tokens);
    let Some(place) = pairs.position(|(token, expected)| token != expected) else { return };
    let [(_, first), (_, second)] = expected.log_probs[place].top[..] else { panic!("the two likeliest") };
    let near = cache_dtype == CacheDtype::Int8 && first - second < 0.02;
    assert!(near, "{:?} for {:?}, ahead by {}", answer.tokens, expected.tokens, first - second);
}

fn serve_a_crowd(settings: EngineSettings) {
    let mut random = ChaCha8Rng::seed_from_u64(11);
    let mut crowd = engine(settings);
    assert_eq!(crowd.load().pages, 32);
    let (mut visitors, mut steps, mut waited) = (BTreeMap::new(), 0, false);
    while visitors.len() < 200 || !crowd.is_idle() {
        for _ in 0..random.next_u32() % 4 {
            if visitors.len() < 200 {
                let visitor = visitor(&mut random);
                visitors.insert(crowd.submit(visitor.request.clone()).unwrap(), visitor);
            }
        }
        // One that was marked is cancelled at some time, perhaps after its end.
        if random.next_u32().is_multiple_of(3) {
            let marked: Vec<_> =
                visitors.iter().filter(|(_, visitor)| visitor.cancelled && !visitor.ended).collect();
            if let Some(&(&id, _)) = marked.get(random.next_u32() as usize % marked.len().max(1)) {
                crowd.cancel(id).unwrap();
            }
        }
        waited |= crowd.load().waiting > 0 && crowd.load().running < settings.max_batch;
        take_in(&mut crowd, &mut visitors);
        steps += 1;
        assert!(steps < 10_000, "it does not end");
    }
    assert_empty(&crowd);
    assert!(waited, "the budget was never short");
    let mut cancelled = 0;
    let mut alone = engine(settings);
    for visitor in visitors.values() {
        assert!(visitor.ended);
        let expected = alone.complete([visitor.request.clone()], |_, _| {}).unwrap().remove(0);
        let answer = &visitor.answer;
        assert_same(answer, &expected, settings.cache_dtype);
        if answer.reason == FinishReason::Cancelled {
            cancelled += 1;
            assert!(visitor.cancelled && answer.tokens.len() <= expected.tokens.len());
        } else {
            assert_eq!(answer.reason, FinishReason::Length);
            assert_eq!(answer.tokens.len(), expected.tokens.len());
        }
    }
    assert!(cancelled > 10, "{cancelled} were cancelled");
    let shared = visitors.values().filter(|visitor| visitor.answer.usage.cached_tokens > 0).count();
    assert!(shared > 10, "{shared} shared pages");
}

/// What an engine of its own answers, for each prompt.
fn alone(settings: EngineSettings, prompts: &[Vec<u32>], new: usize) -> Vec<Vec<u32>> {
    let answer = |prompt: &Vec<u32>| {
        let request = Request::new(prompt.clone()).with_max_new_tokens(new);
        engine(settings).complete([request], |_, _| {}).unwrap().remove(0).tokens
    };
    prompts.iter().map(answer).collect()
}

#[test]
fn a_common_beginning_is_computed_once_even_in_one_step() {
    for settings in BOTH {
        let settings = EngineSettings { prefill_chunk: 64, ..settings };
        let mut engine = engine(settings);
        let beginning = prompt(1, 13);
        let with = |end: u32| [&beginning[..], &[end]].concat();
        let prompts = [with(20), with(30), with(20), beginning[..8].to_vec()];
        let expected = alone(settings, &prompts, 6);
        let requests = prompts.map(|prompt| Request::new(prompt).with_max_new_tokens(6));
        let answers = engine.complete(requests.clone(), |_, _| {}).unwrap();
        assert_eq!(tokens(&answers), expected);
        // Three whole pages of four; of eight tokens one page, since the last token is always computed.
        let cached: Vec<_> = answers.iter().map(|answer| answer.usage.cached_tokens).collect();
        assert_eq!(cached, [0, 12, 12, 4]);
        assert_eq!(answers[1].usage, Usage { prompt_tokens: 14, cached_tokens: 12, new_tokens: 6 });
        // Later too, when nobody holds the pages any more; and what was answered can be built on.
        assert_empty(&engine);
        let longer = [requests[0].prompt.clone(), answers[0].tokens.clone()].concat();
        let expected = alone(settings, std::slice::from_ref(&longer), 3).remove(0);
        let again = engine.complete([Request::new(longer).with_max_new_tokens(3)], |_, _| {}).unwrap();
        assert_eq!((again[0].usage.cached_tokens, &again[0].tokens), (16, &expected));
    }
}

/// A model of one block whose MLP gives nothing, so that what its attention may differ by goes straight to the last norm.
fn attention_alone() -> Llama<Flex> {
    let config = LlamaConfig::new(VOCAB, 32, 48, 1, 4, 2, 8).with_max_position_embeddings(256);
    let mut model = Llama::<Flex>::init(&config, 3, &Default::default());
    for target in [Target::Q, Target::K, Target::V, Target::O] {
        let linear = model.blocks[0].linear_mut(target);
        linear.weight = Weight::frozen(linear.weight.dense(DType::F32).mul_scalar(4.0));
    }
    let nothing = Tensor::zeros([32, 48], &Default::default());
    model.blocks[0].linear_mut(Target::Down).weight = Weight::frozen(nothing);
    model
}

/// The standard deviation of the log-probability of a token after a text, if every key and value is off by a rounding of its own
/// between -s / 2 and s / 2, s being 1 / 127 of its head's largest number: to first order √(Σ (∂ log p / ∂x · s)² / 12).
fn log_prob_deviation(model: &Llama<Flex>, ids: &[u32], token: u32) -> f64 {
    let (t, heads, block) = (ids.len(), model.config().heads(), &model.blocks[0]);
    let (h, g, k) = (heads.queries, heads.keys, heads.width);
    let row = |values: Vec<i32>| Tensor::from_data(TensorData::new(values, [1, t]), &Default::default());
    let context = BlockContext::rows(model.config(), row(vec![0; t]), row((0..t as i32).collect()));
    let weight = |target| block.linear(target).weight.dense(DType::F32).transpose();
    let x = model.embed(row(ids.iter().map(|&id| id as i32).collect()));
    let normed = Flex::rms_norm(x.clone(), block.norms()[0].clone(), model.config().rms_norm_eps);
    let rows = Tensor::cat([Target::Q, Target::K, Target::V].map(weight).to_vec(), 1);
    let rows = Flex::rotary(normed.matmul(rows), &context.angles, h + g);
    let part = |first: usize, count: usize| {
        rows.clone().narrow(1, first * k, count * k).reshape([t, count, k]).swap_dims(0, 1)
    };
    let [keys, values] = [part(h, g), part(h + g, g)];
    let steps = [&keys, &values].map(|x| x.clone().abs().max_dim(2).div_scalar(127.0));
    let lift = |x: Tensor<Flex, 3>| Tensor::<Autodiff<Flex>, 3>::from_inner(x).require_grad();
    let (keys, values, q) = (lift(keys), lift(values), lift(part(0, h).narrow(1, t - 1, 1)));
    // Neighbouring queries share a head of keys.
    let shared = |x: &Tensor<Autodiff<Flex>, 3>| {
        x.clone().unsqueeze_dim::<4>(1).expand([g, h / g, t, k]).reshape([h, t, k])
    };
    let scores = q.matmul(shared(&keys).transpose()).div_scalar((k as f64).sqrt());
    let o = softmax(scores, 2).matmul(shared(&values)).reshape([1, h * k]);
    let out = |x: Tensor<Flex, 2>| Tensor::<Autodiff<Flex>, 2>::from_inner(x);
    let x = out(x.narrow(0, t - 1, 1)) + o.matmul(out(weight(Target::O)));
    let size = x.clone().square().mean_dim(1).add_scalar(model.config().rms_norm_eps).sqrt();
    let logits = (x / size).matmul(out(model.head_weight().transpose()));
    let gradients = log_softmax(logits, 1).narrow(1, token as usize, 1).sum().backward();
    let variance = |x: &Tensor<Autodiff<Flex>, 3>, step: &Tensor<Flex, 3>| {
        let moved = x.grad(&gradients).unwrap() * step.clone();
        moved.square().sum().into_scalar() / 12.0
    };
    f64::from(variance(&keys, &steps[0]) + variance(&values, &steps[1])).sqrt()
}

#[test]
fn log_probabilities_in_8_bits_differ_as_roundings_of_keys_and_values_let_them() {
    let model = attention_alone();
    for (seed, length) in [(1, 5), (2, 33), (3, 90)] {
        let ids = prompt(seed, length);
        let [exact, found] = BOTH.map(|settings| {
            let request = Request { log_probs: Some(8), ..Request::new(ids.clone()).with_max_new_tokens(1) };
            let mut engine = Engine::new(model.clone(), settings).unwrap();
            let answer = engine.complete([request], |_, _| {}).unwrap().remove(0);
            BTreeMap::from_iter(answer.log_probs[0].top.iter().copied())
        });
        let mut furthest = 0.0_f64;
        for (&token, exact) in &exact {
            let Some(found) = found.get(&token) else { continue };
            let (off, deviation) =
                (f64::from((exact - found).abs()), log_prob_deviation(&model, &ids, token));
            assert!(off <= 5.0 * deviation, "{length} tokens, {token}: {off}, {deviation} expected");
            furthest = furthest.max(off / deviation);
        }
        // Eight of them: all far below the expected size would mean that nothing was rounded.
        assert!(furthest > 0.3, "{length} tokens: {furthest} deviations at most");
    }
}

/// A model with corrections that matter, by seed.
fn with_lora(seed: u64) -> Llama<Flex> {
    let mut model = model();
    let targets = if seed.is_multiple_of(2) { Target::ALL.to_vec() } else { vec![Target::V, Target::Down] };
    model.add_lora(&LoraSettings { rank: 3, alpha: 6.0, rslora: false, targets }, seed);
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    for block in &mut model.blocks {
        for target in Target::ALL {
            if let Some(lora) = &mut block.linear_mut(target).lora {
                let dims = lora.b.val().dims();
                let noise = |_| random.next_u32() as f32 / u32::MAX as f32 - 0.5;
                let values = (0..dims[0] * dims[1]).map(noise).collect::<Vec<f32>>();
                lora.b =
                    lora.b.clone().map(|b| Tensor::from_data(TensorData::new(values, dims), &b.device()));
            }
        }
    }
    model
}

#[test]
fn adapters_are_chosen_per_request_in_one_batch() {
    let models = [with_lora(1), with_lora(2), model(), with_lora(3)];
    let names = [None, Some("two"), Some("base"), Some("three")];
    let mut engine = Engine::new(models[0].clone(), SMALL).unwrap();
    engine.add_adapter("two", models[1].lora_set()).unwrap();
    engine.add_adapter("base", LoraSet::none(models[0].config())).unwrap();
    engine.add_adapter("three", models[3].lora_set()).unwrap();
    // The same prompts for all, so that a page of one adapter must not be taken for another's.
    let prompts = [prompt(1, 9), prompt(2, 3), prompt(1, 9)];
    let (mut requests, mut expected) = (Vec::new(), Vec::new());
    for prompt in &prompts {
        for (model, name) in models.iter().zip(names) {
            expected.push(without_cache(model, prompt, 8));
            let adapter = name.map(str::to_owned);
            requests.push(Request { adapter, ..Request::new(prompt.clone()).with_max_new_tokens(8) });
        }
    }
    assert!(expected[..4].iter().enumerate().all(|(i, a)| expected[..i].iter().all(|b| a != b)));
    let answers = engine.complete(requests, |_, _| {}).unwrap();
    assert_eq!(tokens(&answers), expected);
    assert!(answers[8..].iter().any(|answer| answer.usage.cached_tokens == 8));
    let taken = engine.add_adapter("two", models[1].lora_set()).unwrap_err().to_string();
    assert!(taken.contains("`two`"), "{taken}");
    let other = LoraSet::<Flex>::none(&LlamaConfig::new(VOCAB, 32, 48, 3, 4, 2, 8));
    let misfit = engine.add_adapter("other", other).unwrap_err().to_string();
    assert!(misfit.contains("other") && misfit.contains('3') && misfit.contains('2'), "{misfit}");
    // As many blocks, but wider ones.
    let mut wide = Llama::<Flex>::init(&LlamaConfig::new(VOCAB, 40, 48, 2, 4, 2, 8), 1, &Default::default());
    wide.add_lora(&LoraSettings { rank: 3, alpha: 6.0, rslora: false, targets: vec![Target::Up] }, 1);
    let misfit = engine.add_adapter("wide", wide.lora_set()).unwrap_err().to_string();
    for piece in ["`wide`", "up_proj in layer 0", "[48, 40]", "[48, 32]"] {
        assert!(misfit.contains(piece), "`{piece}` is missing in: {misfit}");
    }
}

#[test]
fn a_seed_draws_the_same_alone_and_in_a_crowd() {
    let sampling = Sampling { temperature: 1.5, top_k: 50, top_p: 0.95, min_p: 0.01, ..Sampling::default() };
    let request = |seed: u64| {
        let sampling = Sampling { seed, repetition_penalty: 1.0 + (seed % 2) as f64 / 5.0, ..sampling };
        Request::new(prompt(9, 6)).with_max_new_tokens(15).with_sampling(sampling)
    };
    let together = engine(SMALL).complete((0..12).map(request), |_, _| {}).unwrap();
    for (seed, answer) in (0..12).zip(&together) {
        let mut engine = engine(EngineSettings { prefill_chunk: 2, ..SMALL });
        assert_eq!(engine.complete([request(seed)], |_, _| {}).unwrap()[0].tokens, answer.tokens);
    }
    assert!(together.iter().skip(1).all(|answer| answer.tokens != together[0].tokens));
}

#[test]
fn log_probabilities_are_those_of_the_forward_pass() {
    let request = Request { log_probs: Some(3), ..Request::new(prompt(2, 11)).with_max_new_tokens(5) };
    let mut engine = engine(SMALL);
    let answer = engine.complete([request.clone()], |_, _| {}).unwrap().remove(0);
    assert_eq!(answer.log_probs.len(), 5);
    let mut text = request.prompt;
    for (token, found) in answer.tokens.iter().zip(&answer.log_probs) {
        let logits = logits(engine.model(), &text);
        let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        let expected = f64::from(logits[*token as usize]) - sum.ln();
        assert!((f64::from(found.chosen) - expected).abs() < 1e-4, "{} {expected}", found.chosen);
        assert_eq!((found.top.len(), found.top[0]), (3, (*token, found.chosen)));
        assert!(found.top.is_sorted_by(|a, b| a.1 >= b.1));
        text.push(*token);
    }
}

#[test]
fn what_cannot_be_answered_is_refused_with_a_reason() {
    let mut engine = engine(SMALL);
    let mut refused = |request: Request| engine.submit(request).unwrap_err();
    assert!(matches!(refused(Request::new(vec![])), InferError::EmptyPrompt));
    let long = refused(Request::new(vec![5; 256]));
    assert!(matches!(long, InferError::PromptTooLong { tokens: 256, context: 256 }), "{long}");
    let unknown = refused(Request::new(vec![5]).with_adapter("nobody"));
    assert!(unknown.to_string().contains("`nobody`") && unknown.to_string().contains("none"), "{unknown}");
    let token = refused(Request::new(vec![5, 300]));
    assert!(matches!(token, InferError::UnknownToken { token: 300, place: 1, vocab: VOCAB }), "{token}");
    assert!(matches!(refused(Request::new(vec![5]).with_stop("x")), InferError::NoTokenizer));
    let penalty = Sampling { repetition_penalty: -1.0, ..Sampling::default() };
    assert!(
        refused(Request::new(vec![5]).with_sampling(penalty)).to_string().contains("--repetition-penalty")
    );
    assert_empty(&engine);
    let mut engine = engine.with_tokenizer(Tokenizer::byte_level_test());
    assert!(engine.submit(Request::new(vec![5]).with_stop("")).unwrap_err().to_string().contains("stop"));
    // One bad request of several leaves none of them behind.
    assert!(engine.complete([Request::new(vec![5]), Request::new(vec![])], |_, _| {}).is_err());
    assert!(engine.is_idle());
}

#[test]
fn the_context_ends_an_answer() {
    let mut engine = engine(SMALL);
    let answers =
        engine.complete([Request::new(vec![5; 255]), Request::new(vec![5; 250])], |_, _| {}).unwrap();
    assert_eq!(answers.iter().map(|answer| answer.tokens.len()).collect::<Vec<_>>(), [1, 6]);
    assert!(answers.iter().all(|answer| answer.reason == FinishReason::Length));
}

#[test]
fn no_new_tokens_are_an_answer_too() {
    let mut engine = engine(SMALL);
    let answer =
        engine.complete([Request::new(vec![5; 9]).with_max_new_tokens(0)], |_, _| {}).unwrap().remove(0);
    assert_eq!((answer.tokens.len(), answer.reason), (0, FinishReason::Length));
    assert_eq!(answer.usage, Usage { prompt_tokens: 9, cached_tokens: 0, new_tokens: 0 });
}

#[test]
fn a_budget_is_kept_and_one_that_is_too_small_is_named() {
    for settings in BOTH {
        let bytes = |pages: usize| bytes_of_pages(pages, settings.cache_dtype);
        let with = |budget_bytes| Engine::new(model(), EngineSettings { budget_bytes, ..settings });
        let none = with(bytes(1)).unwrap_err().to_string();
        assert!(none.contains(&bytes(1).to_string()), "{none}");
        assert_eq!(with(bytes(5) - 1).unwrap().load().pages, 3);
        // Three pages of four tokens; the answer's last token needs no place.
        let mut engine = with(bytes(4)).unwrap();
        let fits = Request::new(vec![5; 6]).with_max_new_tokens(7);
        let large = engine.submit(fits.clone().with_max_new_tokens(8)).unwrap_err();
        assert!(matches!(large, InferError::TooLarge { prompt: 6, new: 8, needed: 4, pages: 3 }), "{large}");
        let answers = engine.complete([fits.clone(), fits], |_, _| {}).unwrap();
        assert!(answers.iter().all(|answer| answer.tokens.len() == 7));
    }
    let zero = Engine::new(model(), EngineSettings { max_batch: 0, ..SMALL }).unwrap_err().to_string();
    assert!(zero.contains("max_batch"), "{zero}");
}

#[test]
fn a_budget_holds_more_pages_in_8_bits() {
    let budget_bytes = bytes_of_pages(12, CacheDtype::Compute);
    let pages = BOTH.map(|settings| {
        let settings = EngineSettings { budget_bytes, ..settings };
        // One page belongs to nobody.
        1 + engine(settings).load().pages
    });
    // 32 bytes to 12 for a head of a token.
    assert_eq!(pages, [12, 32]);
}

#[test]
fn stop_strings_and_stop_tokens_end_an_answer() {
    let tokenizer = Tokenizer::byte_level_test();
    let mut engine = engine(SMALL).with_tokenizer(tokenizer.clone());
    let request = Request { ignore_end: true, ..Request::new(prompt(3, 5)).with_max_new_tokens(14) };
    let whole = engine.complete([request.clone()], |_, _| {}).unwrap().remove(0);
    assert_eq!(whole.text, tokenizer.decode(&whole.tokens).unwrap());
    // The text from the fifth to the sixth character, whatever bytes those are made of.
    let places: Vec<usize> = whole.text.char_indices().map(|(place, _)| place).collect();
    let stop = &whole.text[places[4]..places[6]];
    let ends = whole.text.find(stop).unwrap();
    let stopped = engine.complete([request.clone().with_stop(stop)], |_, _| {}).unwrap().remove(0);
    assert_eq!((stopped.text.as_str(), stopped.reason), (&whole.text[..ends], FinishReason::StopString(0)));
    assert!(whole.tokens.starts_with(&stopped.tokens) && stopped.tokens.len() < 14);
    assert_eq!(stopped.usage.new_tokens, stopped.tokens.len());

    let token = *whole.tokens.iter().find(|&&token| token != whole.tokens[0]).unwrap();
    let first = whole.tokens.iter().position(|&other| other == token).unwrap();
    let request = Request { stop_tokens: vec![token], ..request };
    let stopped = engine.complete([request], |_, _| {}).unwrap().remove(0);
    assert_eq!((&stopped.tokens[..], stopped.reason), (&whole.tokens[..first], FinishReason::Stop));
    assert_empty(&engine);
}

#[test]
fn streams_give_what_complete_gives_and_a_dropped_one_leaves_nothing() {
    let mut engine = engine(SMALL).with_tokenizer(Tokenizer::byte_level_test());
    let request = Request { ignore_end: true, ..Request::new(prompt(3, 5)).with_max_new_tokens(14) };
    let other = engine.submit(request.clone()).unwrap();
    let mut answer = Answer::default();
    let ends: Vec<bool> =
        engine.stream(request.clone()).unwrap().map(|event| answer.add(event.unwrap())).collect();
    assert_eq!((ends.len(), ends.iter().filter(|&&end| end).count()), (15, 1));
    // The other request ran beside it, and its events were kept.
    let mut others = Answer::default();
    while !engine.is_idle() {
        for event in engine.step().unwrap() {
            assert_eq!(event.request(), other);
            others.add(event);
        }
    }
    assert_eq!((&others.tokens, &others.text), (&answer.tokens, &answer.text));
    let mut stream = engine.stream(request).unwrap();
    assert!(matches!(stream.next(), Some(Ok(Event::Token { .. }))));
    drop(stream);
    assert!(engine.is_idle());
    assert_empty(&engine);
}

#[test]
fn a_deadline_ends_what_runs_and_what_waits() {
    let mut engine = engine(EngineSettings { max_batch: 1, ..SMALL });
    let deadline = Some(Instant::now() + Duration::from_millis(30));
    let late = Request { deadline, ..Request::new(prompt(1, 4)).with_max_new_tokens(200) };
    let in_time = Request::new(prompt(1, 4)).with_max_new_tokens(2);
    let ids = [late.clone(), late, in_time].map(|request| engine.submit(request).unwrap());
    let mut answers = ids.map(|_| Answer::default());
    for event in engine.step().unwrap() {
        answers[event.request().0 as usize].add(event);
    }
    std::thread::sleep(Duration::from_millis(40));
    while !engine.is_idle() {
        for event in engine.step().unwrap() {
            answers[event.request().0 as usize].add(event);
        }
    }
    assert_eq!(
        answers.each_ref().map(|answer| answer.reason),
        [FinishReason::Deadline, FinishReason::Deadline, FinishReason::Length]
    );
    assert_eq!(answers.map(|answer| answer.tokens.len()), [1, 0, 2]);
    assert_empty(&engine);
}

#[test]
fn a_request_that_gives_nan_ends_alone() {
    let mut model = model();
    // Token 10 has an embedding that is no number, and is never the likeliest, since the head is another table.
    let nan = Tensor::<Flex, 2>::full([1, 32], f32::NAN, &Default::default());
    model.embedding = model.embedding.map(|table| table.slice_assign([10..11, 0..32], nan));
    for settings in BOTH {
        let budget_bytes = bytes_of_pages(9, settings.cache_dtype);
        let mut engine = Engine::new(model.clone(), EngineSettings { budget_bytes, ..settings }).unwrap();
        let good = Request::new(vec![5, 6, 7, 8, 9]).with_max_new_tokens(6);
        let bad = Request::new(vec![5, 6, 7, 8, 9, 10, 11, 12]).with_max_new_tokens(6);
        let alone = engine.complete([good.clone()], |_, _| {}).unwrap().remove(0);
        for _ in 0..3 {
            let answers = engine.complete([bad.clone(), good.clone(), bad.clone()], |_, _| {}).unwrap();
            assert_eq!(
                answers.iter().map(|answer| answer.reason).collect::<Vec<_>>(),
                [FinishReason::NotANumber, FinishReason::Length, FinishReason::NotANumber]
            );
            assert_eq!(answers[1].tokens, alone.tokens);
        }
        assert_empty(&engine);
    }
}

#[test]
fn an_engine_can_be_sent_to_a_thread() {
    let mut engine = engine(SMALL);
    let answers = std::thread::spawn(move || engine.complete([Request::new(vec![5])], |_, _| {}).unwrap());
    assert_eq!(answers.join().unwrap()[0].tokens.len(), 128);
}
