//! What a program of single tokens takes on a CUDA device against what is planned for it. A process of its own, because the
//! allocator's books are those of the process.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use buzzer::burn::tensor::DType;
use buzzer::infer::{CacheDtype, Engine};
use buzzer::kernels::{Cuda, CudaDevice, KernelBackend, PageFormat, StepError, cuda_cards};
use buzzer::model::{Llama, LlamaConfig, LoraSettings, PagedCache, Target};

const PAGE_TOKENS: usize = 16;
/// What the allocator rounds a tensor up by at most.
const ROUNDED_BYTES: usize = 512;
/// Tensors of a program: its room, its tables, and two factors for each correction.
const MOST_TENSORS: usize = 20 + 2 * 2 * Target::ALL.len();

#[test]
fn a_program_takes_what_is_planned() {
    if cuda_cards() == 0 {
        println!("skipped: no CUDA device");
        return;
    }
    let device = CudaDevice::new(0);
    let config = LlamaConfig::new(1003, 512, 1792, 2, 4, 4, 128);
    // A rank that serves as it is, and one whose factors are filled up.
    for rank in [64, 24] {
        let mut model = Llama::<Cuda>::random_frozen(&config, DType::F16, &device);
        let targets = Target::ALL.to_vec();
        model.add_lora(&LoraSettings { rank, alpha: 16.0, rslora: false, targets }, 7);
        let format = PageFormat::Float(DType::F16);
        let cache = PagedCache::<Cuda>::new(&config, 4, PAGE_TOKENS, format, &device);
        let loras = model.lora_set().cast(DType::F16);
        let program = model.step_program(&loras, PAGE_TOKENS, format);
        let in_use = || Cuda::allocated(&device).unwrap().in_use as usize;
        let before = in_use();
        let runner = Cuda::step_runner(&program, cache.pages()).unwrap();
        let (taken, planned) =
            (in_use() - before, Engine::step_bytes(&model, PAGE_TOKENS, CacheDtype::Compute));
        println!("rank {rank}: {taken} bytes taken, {planned} planned, {} rows", runner.most_rows());
        assert!(taken >= planned && taken <= planned + MOST_TENSORS * ROUNDED_BYTES, "{taken}, {planned}");
    }
    there_is_no_program_for_a_cache_in_8_bits(&config, &device);
}

/// Not a test of its own, because what it allocates would be counted in the other one.
fn there_is_no_program_for_a_cache_in_8_bits(config: &LlamaConfig, device: &CudaDevice) {
    let model = Llama::<Cuda>::random_frozen(config, DType::F16, device);
    let cache = PagedCache::<Cuda>::new(config, 4, PAGE_TOKENS, PageFormat::Int8, device);
    let program = model.step_program(&model.lora_set(), PAGE_TOKENS, cache.format());
    let refused = Cuda::step_runner(&program, cache.pages()).unwrap_err();
    assert!(matches!(&refused, StepError::Unsupported(why) if why.contains("8 bits")), "{refused}");
    assert_eq!(Engine::step_bytes(&model, PAGE_TOKENS, CacheDtype::Int8), 0);
}
