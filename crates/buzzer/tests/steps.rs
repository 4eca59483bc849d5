//! Passes of single tokens as one program, against the same operations one by one, on a CUDA device where there is one.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use buzzer::burn::module::Param;
use buzzer::burn::tensor::{DType, Distribution, Tensor};
use buzzer::infer::{Answer, Engine, EngineSettings, Request};
use buzzer::kernels::{Cuda, CudaDevice, cuda_cards};
use buzzer::model::{Llama, LlamaConfig, LoraSettings, Target};

/// Tokens of an answer.
const NEW: usize = 24;
/// How much log-probabilities may differ: two ways to round in 16 bits.
const BOUND: f32 = 2e-2;

fn model(config: &LlamaConfig, dtype: DType, rank: usize, device: &CudaDevice) -> Llama<Cuda> {
    let mut model = Llama::<Cuda>::random_frozen(config, dtype, device);
    if rank > 0 {
        // Two of the layers that share an input have no correction.
        let targets = vec![Target::Q, Target::V, Target::O, Target::Up, Target::Down];
        model.add_lora(&LoraSettings { rank, alpha: 2.0 * rank as f64, rslora: false, targets }, 7);
        for block in &mut model.blocks {
            for target in Target::ALL {
                let Some(lora) = &mut block.linear_mut(target).lora else { continue };
                let noise = Tensor::random(
                    lora.b.val().dims(),
                    Distribution::Normal(0.0, 0.05),
                    (device, DType::F32),
                );
                lora.b = Param::from_tensor(noise);
            }
        }
    }
    model
}

/// Prompts of different lengths, some longer than a block of attention has places at a time.
fn prompt(request: usize, vocabulary: usize) -> Vec<u32> {
    let length = 1 + (request * 37) % 150;
    (0..length).map(|place| ((request * 7919 + place * 104_729 + 13) % vocabulary) as u32).collect()
}

fn answers(model: &Llama<Cuda>, requests: usize, step_programs: bool) -> Vec<Answer> {
    let settings = EngineSettings { step_programs, ..EngineSettings::default() };
    let mut engine = Engine::new(model.clone(), settings).unwrap();
    let vocabulary = model.config().vocab_size;
    let request = |number: usize| Request {
        log_probs: Some(2),
        ..Request::new(prompt(number, vocabulary)).with_max_new_tokens(NEW)
    };
    let answers = engine.complete((0..requests).map(request), |_, _| {}).unwrap();
    if step_programs {
        assert!(engine.step_launches(requests).unwrap().is_some(), "steps were run as a program");
    }
    answers
}

/// Log-probabilities agree as long as the tokens do, and tokens differ only where two are nearly as likely.
fn same(what: &str, found: &Answer, expected: &Answer) -> (usize, f32) {
    let mut worst = 0.0_f32;
    for (place, (own, other)) in found.log_probs.iter().zip(&expected.log_probs).enumerate() {
        let error = (own.top[0].1 - other.top[0].1).abs();
        assert!(error <= BOUND, "{what}, token {place}: {:?} for {:?}", own.top, other.top);
        worst = worst.max(error);
        if found.tokens[place] != expected.tokens[place] {
            let gap = other.top[0].1 - other.top[1].1;
            assert!(gap <= 2.0 * BOUND, "{what}, token {place}: {:?} for {:?}", own.top, other.top);
            return (place, worst);
        }
    }
    (found.tokens.len(), worst)
}

fn compare(config: &LlamaConfig, dtype: DType, rank: usize, device: &CudaDevice) {
    let model = model(config, dtype, rank, device);
    for requests in [1, 3, 8, 13, 32] {
        let (found, expected) = (answers(&model, requests, true), answers(&model, requests, false));
        let what = format!("{dtype:?}, rank {rank}, {requests} requests, heads {}", config.head_dim);
        let all: Vec<_> =
            found.iter().zip(&expected).map(|(found, expected)| same(&what, found, expected)).collect();
        let tokens: usize = all.iter().map(|(tokens, _)| tokens).sum();
        let worst = all.iter().map(|(_, worst)| *worst).fold(0.0, f32::max);
        println!("{what}: {tokens} of {} tokens alike, log-probabilities within {worst:.4}", requests * NEW);
    }
}

#[test]
fn programs_give_what_the_operations_give() {
    if cuda_cards() == 0 {
        println!("skipped: no CUDA device");
        return;
    }
    let device = CudaDevice::new(0);
    // The last tile of the head is not full; columns of the down layer are shared out unevenly.
    let wide = LlamaConfig::new(1003, 512, 1792, 2, 4, 4, 128);
    let grouped = LlamaConfig::new(500, 512, 768, 3, 8, 2, 64);
    for dtype in [DType::F16, DType::BF16] {
        compare(&wide, dtype, 64, &device);
        compare(&wide, dtype, 0, &device);
        compare(&grouped, dtype, 24, &device);
        compare(&grouped, dtype, 5, &device);
    }
}

#[test]
fn a_model_in_f32_runs_its_operations_one_by_one() {
    if cuda_cards() == 0 {
        println!("skipped: no CUDA device");
        return;
    }
    let config = LlamaConfig::new(500, 512, 768, 1, 8, 2, 64);
    let model = Llama::<Cuda>::random_frozen(&config, DType::F32, &CudaDevice::new(0));
    let mut engine = Engine::new(model, EngineSettings::default()).unwrap();
    engine.complete([Request::new(vec![1, 2]).with_max_new_tokens(3)], |_, _| {}).unwrap();
    let refusal = engine.step_launches(1).unwrap_err().to_string();
    assert!(refusal.contains("F32"), "{refusal}");
}
