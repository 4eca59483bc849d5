//! Products on a CUDA device whose driver is taken for an older one, where the host keeps order. A process of its own, because
//! the driver is taken for older by all of it.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a test's helpers may panic as its tests do")]

mod common;

use burn::tensor::{DType, Tensor, TensorData};
use burn_flex::Flex;
use buzzer_kernels::qlora_linear::Input;
use buzzer_kernels::{Cuda, FrozenWeight, KernelBackend, LinearPart};
use common::{Device, noise};

/// CUDA 12.4, the last one without events of a context.
const DRIVER: u32 = 12_040;
/// Rows large enough that a product is still running when the host has submitted what reads its result.
const ROWS: usize = 1024;
const WIDTH: usize = 1024;
const ROUNDS: usize = 16;
/// Of sums of [`ROUNDS`] results in f32.
const BOUND: f32 = 2e-4;

/// Σ of x₁, x₂, …, where x is half the product of the last x and the weight, and a number that differs each time: a product that
/// begins early or is read early is seen.
fn chain<B: KernelBackend>(device: &B::Device) -> Vec<f32> {
    let tensor = |seed, dims: [usize; 2], scale: f32| {
        let values: Vec<f32> = noise(dims[0] * dims[1], seed).iter().map(|value| value * scale).collect();
        Tensor::<B, 2>::from_data(TensorData::new(values, dims), (device, DType::F32))
    };
    let weight = tensor(1, [WIDTH, WIDTH], 1.0 / (WIDTH as f32).sqrt());
    let parts = [LinearPart { weight: FrozenWeight::Dense(weight), lora: None }];
    let mut x = tensor(2, [ROWS, WIDTH], 1.0);
    let mut sum = x.zeros_like();
    for round in 0..ROUNDS {
        let input = Input { x: x.clone().into(), dropped: x, residual: None };
        x = B::qlora_project(input, &parts).y * 0.5 + (round as f32).cos();
        sum = sum + x.clone();
    }
    sum.into_data().to_vec().unwrap()
}

#[test]
fn the_host_keeps_order_on_an_older_driver() {
    if buzzer_kernels::cuda_cards() == 0 {
        println!("skipped: no CUDA device");
        return;
    }
    buzzer_kernels::assume_driver(DRIVER);
    let device = Device::<cubecl::cuda::CudaRuntime>::new(0);
    let card = Cuda::card(&device).unwrap();
    println!("{card:?}");
    assert_eq!(card.driver, Some(DRIVER));
    assert_eq!(card.without_compiler, None);
    let reason = card.without_library.or(card.library_waits).unwrap();
    assert!(reason.contains("12.4") || reason.contains("libcublasLt"), "{reason}");
    let (found, expected) = (chain::<Cuda>(&device), chain::<Flex>(&Default::default()));
    let error = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(error <= BOUND, "{error}");
}
