//! Training against its definitions: plain autodiff over the whole model, differences of the loss, other batch sizes.
//!
//! The models here are small but crooked: no width is a power of two, heads are grouped, norms are not 1, weights are in
//! four bits, rows hold several documents and end in padding.

#![allow(clippy::unwrap_used, reason = "a test's helpers may panic as its tests do")]

#[path = "../../../kernels/tests/common/noise.rs"]
mod noise;
mod resume;

use std::collections::BTreeMap;

use burn::backend::Autodiff;
use burn::module::{AutodiffModule, Module, ModuleMapper, Param};
use burn::tensor::activation::log_softmax;
use burn::tensor::backend::AutodiffBackend;
use burn::tensor::{DType, Int, Tensor, TensorData};
use burn_flex::Flex;
use buzzer_data::{Batch, LossOn, PackOptions, PackedRow, RowOrder, pack};
use buzzer_kernels::{Dropout, Nf4Tensor};
use buzzer_model::{Block, BlockContext, Llama, LlamaConfig, LoraSettings, Target, Weight};
use buzzer_text::Example;
use buzzer_train::{
    DeviceBatch, LoraGradients, LoraOptimizer, OptimizerSettings, PassSettings, PretrainSettings, Pretrainer,
    Schedule, ScheduleKind, StepReport, TrainError, TrainSettings, Trainer, backward_by_blocks, mean_loss,
};
use noise::noise;

type Ad = Autodiff<Flex>;

const VOCABULARY: usize = 61;

fn noisy<const D: usize>(dims: [usize; D], seed: u64) -> Tensor<Flex, D> {
    Tensor::from_data(TensorData::new(noise(dims.iter().product(), seed), dims), &Default::default())
}

/// Gives every weight noise, and every norm noise around 1.
struct Roughen(u64);

impl ModuleMapper<Flex> for Roughen {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<Flex, D>>) -> Param<Tensor<Flex, D>> {
        self.0 += 1;
        param.map(|old| match D {
            1 => noisy(old.dims(), self.0).mul_scalar(0.3).add_scalar(1.0),
            _ => noisy(old.dims(), self.0).mul_scalar(0.5),
        })
    }
}

fn config() -> LlamaConfig {
    LlamaConfig::new(VOCABULARY, 24, 40, 3, 4, 2, 6)
}

fn lora() -> LoraSettings {
    LoraSettings { rank: 4, alpha: 8.0, rslora: false, targets: Target::ALL.to_vec() }
}

/// A frozen base in four bits, with fresh factors.
fn base() -> Llama<Flex> {
    let mut model = Llama::<Flex>::init(&config(), 0, &Default::default()).map(&mut Roughen(0));
    for block in &mut model.blocks {
        for (place, target) in Target::ALL.into_iter().enumerate() {
            let linear = block.linear_mut(target);
            let (dims, values) = (linear.weight.dims(), host(linear.weight.dense(DType::F32)));
            let double = place.is_multiple_of(2);
            linear.weight = Weight::Nf4(Nf4Tensor::quantize(&values, dims, double, &Default::default()));
        }
    }
    model.add_lora(&lora(), 7);
    model
}

/// The base with factors as in the middle of training, when B is not zero.
fn trained() -> Llama<Flex> {
    let mut model = base();
    let mut seed = 100;
    change_factors(&mut model, |_, [a, b]| {
        seed += 1;
        [a, noisy(b.dims(), seed).mul_scalar(0.2)]
    });
    model
}

fn change_factors(
    model: &mut Llama<Flex>,
    mut change: impl FnMut((usize, Target), [Tensor<Flex, 2>; 2]) -> [Tensor<Flex, 2>; 2],
) {
    for (layer, block) in model.blocks.iter_mut().enumerate() {
        for target in Target::ALL {
            if let Some(lora) = &mut block.linear_mut(target).lora {
                let [a, b] = change((layer, target), [lora.a.val(), lora.b.val()]);
                lora.a = Param::from_tensor(a);
                lora.b = Param::from_tensor(b);
            }
        }
    }
}

fn host<const D: usize>(tensor: Tensor<Flex, D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// All factors, A before B, block by block.
fn factors(model: &Llama<Flex>) -> Vec<f32> {
    model.loras().flat_map(|(_, _, lora)| [host(lora.a.val()), host(lora.b.val())].concat()).collect()
}

/// All gradients in the same order.
fn flat(gradients: &LoraGradients<Flex>) -> Vec<f32> {
    gradients.factors.values().flatten().flat_map(|gradient| host(gradient.clone())).collect()
}

/// `|found - expected| / |expected|`, Euclidean.
fn distance(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square = |value: f32| f64::from(value) * f64::from(value);
    let error: f64 = found.iter().zip(expected).map(|(found, expected)| square(found - expected)).sum();
    let whole: f64 = expected.iter().map(|&expected| square(expected)).sum();
    (error / whole).sqrt()
}

#[track_caller]
fn close(found: f64, expected: f64, bound: f64) {
    assert!((found - expected).abs() <= bound * expected.abs(), "{found} where {expected} is expected");
}

/// A document of noise whose second half is the answer.
fn document(length: usize, seed: u64) -> Example {
    let id = |number: f32| ((number + 1.0) / 2.0 * (VOCABULARY - 1) as f32) as u32;
    let loss_mask = (0..length).map(|place| place >= length / 2).collect();
    Example { ids: noise(length, seed).into_iter().map(id).collect(), loss_mask }
}

/// Documents of 3 to 9 tokens in rows of at most 16.
fn packed(documents: u64) -> Vec<PackedRow> {
    let examples: Vec<_> = (0..documents).map(|seed| document(3 + (seed * 5 % 7) as usize, seed)).collect();
    pack(&examples, &PackOptions { row_len: 16, ..PackOptions::default() }).rows
}

/// A row of these documents in this order.
fn row(documents: &[Example], loss_on: LossOn) -> PackedRow {
    let mut row = PackedRow::default();
    for (number, document) in documents.iter().enumerate() {
        let options = PackOptions { row_len: 64, loss_on, ..PackOptions::default() };
        let alone = pack(std::slice::from_ref(document), &options).rows.remove(0);
        row.documents.extend(alone.documents.iter().map(|_| number as i32));
        row.ids.extend(alone.ids);
        row.positions.extend(alone.positions);
        row.labels.extend(alone.labels);
    }
    row
}

fn collated(rows: &[PackedRow]) -> Batch {
    Batch::collate(&rows.iter().collect::<Vec<_>>(), None)
}

fn on_device(rows: &[PackedRow]) -> DeviceBatch<Flex> {
    DeviceBatch::new(&collated(rows), &Default::default())
}

fn settings() -> TrainSettings {
    TrainSettings {
        batch_rows: 2,
        accumulation: 1,
        epochs: 1.0,
        learning_rate: 2e-3,
        schedule: ScheduleKind::Cosine,
        warmup_ratio: 0.0,
        optimizer: OptimizerSettings { weight_decay: 0.01, ..OptimizerSettings::default() },
        dropout: 0.0,
        seed: 1,
        checkpoint_every: 1,
    }
}

fn trainer(rows: &[PackedRow], settings: &TrainSettings) -> Trainer<Flex> {
    Trainer::new(base(), rows.to_vec(), settings.clone()).unwrap()
}

/// Mean loss of a batch under autodiff, from logits that are held whole.
fn tracked_loss(model: &Llama<Ad>, batch: &DeviceBatch<Flex>, dropout: Option<Dropout>) -> Tensor<Ad, 1> {
    let lift = |ids: &Tensor<Flex, 2, Int>| Tensor::<Ad, 2, Int>::from_inner(ids.clone());
    let context = BlockContext::rows(model.config(), lift(&batch.documents), lift(&batch.positions));
    let hidden = model.hidden(lift(&batch.ids), &context, dropout);
    let logits = model.logits(batch.at_head(hidden, Tensor::from_inner));
    let targets = batch.targets.clone().into_data().iter::<i32>().collect::<Vec<_>>();
    let bearing = targets.iter().enumerate().filter(|(_, target)| **target >= 0);
    let (rows, targets): (Vec<i32>, Vec<i32>) = bearing.map(|(row, target)| (row as i32, *target)).unzip();
    let line = |values: Vec<i32>| {
        let length = values.len();
        Tensor::<Ad, 1, Int>::from_data(TensorData::new(values, [length]), &Default::default())
    };
    let chosen = line(targets).reshape([batch.loss_tokens, 1]);
    log_softmax(logits.select(0, line(rows)), 1).gather(1, chosen).mean().neg()
}

/// Mean loss and its gradients by autodiff over the whole model at once.
fn plain_autodiff(
    model: &Llama<Flex>,
    batch: &DeviceBatch<Flex>,
    dropout: Option<Dropout>,
) -> (f64, LoraGradients<Flex>) {
    let mut model = Llama::<Ad>::from_inner(model.clone());
    let track = |block: &mut Block<Ad>| {
        for target in Target::ALL {
            let lora = block.linear_mut(target).lora.as_mut().unwrap();
            lora.a = lora.a.clone().set_require_grad(true);
            lora.b = lora.b.clone().set_require_grad(true);
        }
    };
    model.blocks.iter_mut().for_each(track);
    let loss = tracked_loss(&model, batch, dropout);
    let mut grads = loss.clone().backward();
    let mut take = |factor: &Param<Tensor<Ad, 2>>| factor.val().grad_remove(&mut grads).unwrap();
    let pairs = model.loras().map(|(layer, target, lora)| ((layer, target), [take(&lora.a), take(&lora.b)]));
    (f64::from(loss.into_scalar()), LoraGradients { factors: pairs.collect::<BTreeMap<_, _>>() })
}

#[test]
fn block_by_block_equals_autodiff_over_the_whole_model() {
    let model = trained();
    let rows = packed(9);
    let host_batch = Batch::collate(&rows.iter().collect::<Vec<_>>(), Some(18));
    assert!(rows.len() > 1 && host_batch.documents.contains(&-1) && host_batch.documents.contains(&1));
    let batch = DeviceBatch::new(&host_batch, &Default::default());
    let scale = 1.0 / batch.loss_tokens as f64;
    for (dropout, checkpoint_every) in [None, Some(Dropout { probability: 0.2, key: 3 })]
        .into_iter()
        .flat_map(|d| [1, 2, 3, 5].map(|n| (d, n)))
    {
        let (loss, expected) = plain_autodiff(&model, &batch, dropout);
        let found = backward_by_blocks(
            &model,
            &batch,
            &PassSettings { dropout, checkpoint_every, ..PassSettings::new(scale) },
        );
        close(found.loss_sum() * scale, loss, 1e-5);
        assert_eq!(found.gradients.factors.len(), 3 * 7);
        for (place, expected) in &expected.factors {
            for (found, expected) in found.gradients.factors[place].iter().zip(expected) {
                let error = distance(&host(found.clone()), &host(expected.clone()));
                assert!(error < 1e-5, "{place:?} with {dropout:?}, every {checkpoint_every}: {error}");
            }
        }
    }
    let (mean, targets) = mean_loss(&model, &batch);
    assert_eq!(targets, batch.loss_tokens);
    close(mean, backward_by_blocks(&model, &batch, &PassSettings::new(scale)).loss_sum() * scale, 1e-6);
}

#[test]
fn the_loss_rises_along_the_gradient_by_its_norm() {
    let model = trained();
    let batch = on_device(&packed(9));
    let scale = 1.0 / batch.loss_tokens as f64;
    for dropout in [None, Some(Dropout { probability: 0.2, key: 3 })] {
        let gradients =
            backward_by_blocks(&model, &batch, &PassSettings { dropout, ..PassSettings::new(scale) })
                .gradients;
        let norm = gradients.norm();
        let at = |distance: f64| {
            let mut moved = model.clone();
            change_factors(&mut moved, |place, [a, b]| {
                let [da, db] = gradients.factors[&place].clone();
                [a + da.mul_scalar(distance / norm), b + db.mul_scalar(distance / norm)]
            });
            backward_by_blocks(&moved, &batch, &PassSettings { dropout, ..PassSettings::new(scale) })
                .loss_sum()
                * scale
        };
        close((at(5e-3) - at(-5e-3)) / 1e-2, norm, 5e-3);
    }
}

#[test]
fn a_batch_in_parts_equals_the_whole_batch() {
    let rows = packed(40);
    let whole = TrainSettings { batch_rows: 4, accumulation: 1, epochs: 2.0, ..settings() };
    let parts = TrainSettings { batch_rows: 1, accumulation: 4, ..whole.clone() };
    let (mut whole, mut parts) = (trainer(&rows, &whole), trainer(&rows, &parts));
    let before = factors(whole.model());
    while let Some(expected) = whole.step().unwrap() {
        let found = parts.step().unwrap().unwrap();
        close(found.loss, expected.loss, 1e-5);
        close(found.grad_norm, expected.grad_norm, 1e-5);
        let counts =
            |report: StepReport| (report.step, report.tokens, report.loss_tokens, report.learning_rate);
        assert_eq!(counts(found), counts(expected));
    }
    assert!(whole.steps_done() >= 5 && parts.step().unwrap().is_none());
    let (found, expected) = (factors(parts.model()), factors(whole.model()));
    let error = distance(&found, &expected);
    assert!(error < 1e-5, "{error}");
    assert!(distance(&before, &expected) > 1e-2, "nothing was learned");
}

#[test]
fn a_seed_decides_a_run_bit_for_bit() {
    let rows = packed(30);
    let run = |seed| {
        let mut trainer = trainer(&rows, &TrainSettings { dropout: 0.1, seed, ..settings() });
        let losses: Vec<_> = (0..5).map(|_| trainer.step().unwrap().unwrap().loss.to_bits()).collect();
        let factors: Vec<_> = factors(trainer.model()).into_iter().map(f32::to_bits).collect();
        (losses, factors)
    };
    let first = run(1);
    assert_eq!(first, run(1));
    let other = run(2);
    assert!(first.0 != other.0 && first.1 != other.1);
    // One row has one order, so that only the mask differs. While B is zero the loss does not feel it.
    let masked = |seed| {
        let settings = TrainSettings { dropout: 0.1, seed, ..settings() };
        trainer(&rows[..1], &settings).step().unwrap().unwrap()
    };
    assert_eq!(masked(1).loss, masked(2).loss);
    assert_ne!(masked(1).grad_norm, masked(2).grad_norm);
}

#[test]
fn a_handful_of_rows_is_learned_by_heart() {
    let rows = packed(8);
    let settings = TrainSettings { epochs: 60.0, learning_rate: 2e-2, ..settings() };
    let mut trainer = trainer(&rows, &settings);
    let before = trainer.evaluate(&rows).unwrap();
    let mut last = f64::NAN;
    while let Some(report) = trainer.step().unwrap() {
        last = report.loss;
    }
    let after = trainer.evaluate(&rows).unwrap();
    assert!(before > 3.0 && after < 0.3 * before && last < 0.3 * before, "{before} to {after} ({last})");
}

#[test]
fn documents_in_a_row_do_not_feel_each_other() {
    let model = trained();
    let (first, second) = (document(7, 1), document(9, 2));
    let [one, two] =
        [&first, &second].map(|document| on_device(&[row(std::slice::from_ref(document), LossOn::All)]));
    let together = on_device(&[row(&[first.clone(), second.clone()], LossOn::All)]);
    let [(one_mean, one_count), (two_mean, two_count)] = [&one, &two].map(|batch| mean_loss(&model, batch));
    let (mean, count) = mean_loss(&model, &together);
    assert_eq!((one_count, two_count, count), (6, 8, 14));
    close(mean, (6.0 * one_mean + 8.0 * two_mean) / 14.0, 1e-5);

    let mut sum = backward_by_blocks(&model, &one, &PassSettings::new(1.0)).gradients;
    sum.add(backward_by_blocks(&model, &two, &PassSettings::new(1.0)).gradients);
    let found = backward_by_blocks(&model, &together, &PassSettings::new(1.0)).gradients;
    let error = distance(&flat(&found), &flat(&sum));
    assert!(error < 1e-5, "{error}");

    // Without loss on the other document its tokens do not matter at all, wherever it stands.
    let loud = Example { loss_mask: vec![true; 7], ..first };
    for place in [0, 1] {
        let pass = |other: Example| {
            let mut documents = vec![loud.clone()];
            documents.insert(place, Example { loss_mask: vec![false; 9], ..other });
            let batch = on_device(&[row(&documents, LossOn::Answers)]);
            assert_eq!(batch.loss_tokens, 6);
            backward_by_blocks(&model, &batch, &PassSettings::new(1.0))
        };
        let (before, after) = (pass(second.clone()), pass(document(9, 55)));
        close(after.loss_sum(), before.loss_sum(), 1e-6);
        assert!(distance(&flat(&after.gradients), &flat(&before.gradients)) < 1e-6);
        close(before.loss_sum(), 6.0 * one_mean, 1e-5);
    }
}

#[test]
fn only_answers_bear_loss_where_only_they_are_asked_for() {
    let model = trained();
    let row = row(&[document(9, 1), document(6, 2)], LossOn::Answers);
    let batch = on_device(std::slice::from_ref(&row));
    assert_eq!(batch.loss_tokens, 5 + 3);
    // By hand: the answers' tokens, each by the logits of the token before it.
    let context = BlockContext::rows(model.config(), batch.documents.clone(), batch.positions.clone());
    let log_p = host(log_softmax(model.logits(model.hidden(batch.ids.clone(), &context, None)), 1));
    let loss = |place: usize| f64::from(-log_p[(place - 1) * VOCABULARY + row.ids[place] as usize]);
    let answers: f64 = (4..9).chain(9 + 3..9 + 6).map(loss).sum();
    close(mean_loss(&model, &batch).0, answers / 8.0, 1e-5);
    close(backward_by_blocks(&model, &batch, &PassSettings::new(0.125)).loss_sum(), answers, 1e-5);
}

#[test]
fn one_pass_gives_the_losses_of_several_labellings() {
    let trainer = trainer(&packed(8), &settings());
    let documents = [(12, 1), (3, 2), (16, 3), (5, 4), (9, 5)].map(|(length, seed)| document(length, seed));
    let [all, answers] = [LossOn::All, LossOn::Answers]
        .map(|loss_on| documents.each_ref().map(|one| row(std::slice::from_ref(one), loss_on)));
    let nothing = [PackedRow { labels: vec![-100; all[0].ids.len()], ..all[0].clone() }];
    let alone = |rows: &[PackedRow]| trainer.evaluate(rows).unwrap();
    for (first, second) in [(&all, &answers), (&answers, &all)] {
        let both = trainer.evaluate_each(&[first, second]);
        close(both[0].unwrap(), alone(first), 1e-5);
        close(both[1].unwrap(), alone(second), 1e-5);
    }
    assert!((alone(&all) - alone(&answers)).abs() > 1e-3);
    let [none, some] = [0, 1].map(|place| trainer.evaluate_each(&[&nothing, &all[..1]])[place]);
    assert!(none.is_none() && some.is_some());
    assert!(trainer.evaluate_each(&[]).is_empty());
}

#[test]
fn an_evaluation_is_the_mean_over_targets_and_not_over_batches() {
    let trainer = trainer(&packed(8), &settings());
    let rows = [(12, 1), (3, 2), (5, 3)].map(|(length, seed)| row(&[document(length, seed)], LossOn::All));
    let alone = |row: &PackedRow| mean_loss(trainer.model(), &on_device(std::slice::from_ref(row)));
    let sum: f64 = rows.iter().map(alone).map(|(mean, count)| mean * count as f64).sum();
    close(trainer.evaluate(&rows).unwrap(), sum / (11 + 2 + 4) as f64, 1e-5);
    assert_eq!(trainer.evaluate(&[]), None);
    assert_eq!(trainer.evaluate(&[row(&[document(1, 4)], LossOn::All)]), None);
}

#[test]
fn a_loss_that_is_no_number_names_the_step_and_changes_nothing() {
    // One row alone has the last token of the vocabulary, and only that token's embedding is broken.
    let mut rows: Vec<_> = (0..6).map(|seed| row(&[document(8, seed)], LossOn::All)).collect();
    let broken = RowOrder::new(rows.len(), settings().seed, 0).rows()[3];
    rows[broken].ids[4] = VOCABULARY as u32 - 1;
    let mut model = base();
    model.embedding = model.embedding.map(|table| {
        let poison = Tensor::full([1, 24], f32::NAN, &Default::default());
        table.slice_assign([VOCABULARY - 1..VOCABULARY, 0..24], poison)
    });
    let mut trainer = Trainer::new(model, rows, TrainSettings { batch_rows: 1, ..settings() }).unwrap();
    for step in 1..=3 {
        assert_eq!(trainer.step().unwrap().unwrap().step, step);
    }
    let (before, state) = (factors(trainer.model()), trainer.state());
    // The step stays the next one, with the rows that it had.
    for _ in 0..2 {
        let error = trainer.step().unwrap_err();
        assert!(
            matches!(error, TrainError::NonFinite { step: 4, what: "loss", value, .. } if value.is_nan()),
            "{error:?}"
        );
    }
    assert_eq!(trainer.state(), state);
    let error = trainer.step().unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("step 4: the loss is NaN, first in the embedding") && text.contains("--lr"),
        "{text}"
    );
    assert_eq!(factors(trainer.model()), before);
    assert_eq!(trainer.steps_done(), 3);
}

#[test]
fn a_gradient_that_is_no_number_changes_nothing() {
    let mut model = base();
    // While B is zero nothing comes through to the loss, but B's gradient is as large as the scale.
    model.blocks[2].linear_mut(Target::Down).lora.as_mut().unwrap().scale = f64::from(f32::MAX);
    let mut trainer = Trainer::new(model, packed(8), settings()).unwrap();
    let (before, state) = (factors(trainer.model()), trainer.state());
    let error = trainer.step().unwrap_err();
    assert!(matches!(error, TrainError::NonFinite { step: 1, what: "gradient norm", .. }), "{error:?}");
    assert_eq!(factors(trainer.model()), before);
    assert_eq!(trainer.state(), state);
    assert_eq!(trainer.steps_done(), 0);
}

#[test]
fn wrong_settings_name_their_flag() {
    let refused = |flag: &str, change: &dyn Fn(&mut TrainSettings)| {
        let mut settings = settings();
        change(&mut settings);
        let error = Trainer::<Flex>::new(base(), packed(4), settings).unwrap_err();
        assert!(matches!(error, TrainError::Setting { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.starts_with(&format!("{flag} ")) && text.contains("choose"), "{text}");
    };
    refused("--batch", &|settings| settings.batch_rows = 0);
    refused("--accumulate", &|settings| settings.accumulation = 0);
    for wrong in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        refused("--epochs", &|settings| settings.epochs = wrong);
        refused("--lr", &|settings| settings.learning_rate = wrong);
        refused("--max-grad-norm", &|settings| settings.optimizer.max_grad_norm = Some(wrong));
    }
    for wrong in [-0.1, 1.0, f64::NAN] {
        refused("--dropout", &|settings| settings.dropout = wrong);
    }
    for wrong in [-0.1, 1.1, f64::NAN] {
        refused("--warmup", &|settings| settings.warmup_ratio = wrong);
    }
    for wrong in [-0.1, f64::NAN, f64::INFINITY] {
        refused("--weight-decay", &|settings| settings.optimizer.weight_decay = wrong);
    }
    for wrong in [-0.1, 1.0, f64::NAN] {
        refused("beta_1", &|settings| settings.optimizer.beta_1 = wrong);
        refused("beta_2", &|settings| settings.optimizer.beta_2 = wrong);
    }
    for wrong in [0.0, -1.0, f64::NAN] {
        refused("epsilon", &|settings| settings.optimizer.epsilon = wrong);
    }
    let text = "triangle".parse::<ScheduleKind>().unwrap_err().to_string();
    assert!(text.starts_with("--schedule triangle ") && text.contains("cosine"), "{text}");
}

#[test]
fn nothing_to_train_is_an_error_that_says_what_to_do() {
    let error = Trainer::<Flex>::new(base(), vec![], settings()).unwrap_err();
    assert!(matches!(error, TrainError::NoRows) && error.to_string().contains("--row-len"), "{error}");
    let bare = Llama::<Flex>::init(&config(), 0, &Default::default());
    let error = Trainer::new(bare, packed(4), settings()).unwrap_err();
    assert!(matches!(error, TrainError::NoFactors) && error.to_string().contains("--targets"), "{error}");
    let silent = row(&[document(1, 0)], LossOn::All);
    let error = trainer(&[silent.clone(), silent], &settings()).step().unwrap_err();
    assert!(matches!(error, TrainError::NoTargets { step: 1 }), "{error:?}");
    assert!(error.to_string().contains("step 1") && error.to_string().contains("--loss-on all"), "{error}");
}

#[test]
fn a_batch_without_targets_does_not_disturb_the_rest_of_its_step() {
    let (silent, loud) = (row(&[document(1, 0)], LossOn::All), row(&[document(8, 1)], LossOn::All));
    let two = TrainSettings { batch_rows: 1, accumulation: 2, ..settings() };
    let one = TrainSettings { accumulation: 1, ..two.clone() };
    let two = trainer(&[silent, loud.clone()], &two).step().unwrap().unwrap();
    let one = trainer(&[loud], &one).step().unwrap().unwrap();
    assert_eq!((two.loss, two.grad_norm), (one.loss, one.grad_norm));
    assert_eq!((two.tokens, two.loss_tokens), (9, 7));
}

#[test]
fn a_run_takes_exactly_its_steps() {
    // Rows of 7 tokens and 6 targets each.
    let rows: Vec<_> = (0..10).map(|seed| row(&[document(7, seed)], LossOn::All)).collect();
    let cases = [(1.0, vec![4, 4, 2]), (0.5, vec![4, 1]), (0.01, vec![1]), (2.5, vec![4, 4, 4, 4, 4, 4, 1])];
    for (epochs, rows_of_steps) in cases {
        let settings =
            TrainSettings { batch_rows: 2, accumulation: 2, epochs, warmup_ratio: 0.1, ..settings() };
        let (total, steps) = settings.length(rows.len());
        assert_eq!((total, steps), (rows_of_steps.iter().sum(), rows_of_steps.len() as u64));
        let mut trainer = trainer(&rows, &settings);
        assert_eq!(trainer.total_steps(), steps);
        let reports: Vec<_> = std::iter::from_fn(|| trainer.step().unwrap()).collect();
        assert!(trainer.step().unwrap().is_none());
        assert_eq!(trainer.steps_done(), steps);
        assert!(reports.iter().map(|report| report.step).eq(1..=steps));
        assert_eq!(reports.iter().map(|report| report.tokens / 7).collect::<Vec<_>>(), rows_of_steps);
        assert!(reports.iter().all(|report| report.loss_tokens * 7 == report.tokens * 6));
        let schedule = Schedule::new(ScheduleKind::Cosine, settings.learning_rate, 1, steps);
        let rates = (0..steps).map(|step| schedule.rate(step));
        assert!(reports.iter().map(|report| report.learning_rate).eq(rates));
        let cursor = trainer.cursor();
        assert_eq!(cursor.epoch as usize * rows.len() + cursor.position as usize, total);
    }
}

#[test]
fn gradients_are_clipped_together() {
    let pass = backward_by_blocks(&trained(), &on_device(&packed(9)), &PassSettings::new(1.0));
    let whole = flat(&pass.gradients);
    let norm = whole.iter().map(|&value| f64::from(value) * f64::from(value)).sum::<f64>().sqrt();
    for (most, factor) in [(None, 1.0), (Some(norm * 2.0), 1.0), (Some(norm / 4.0), 0.25)] {
        let clipping = OptimizerSettings { max_grad_norm: most, ..OptimizerSettings::default() };
        close(pass.gradients.norm(), norm, 1e-5);
        close(clipping.clip_factor(norm), factor, 1e-5);
        // One step with the limit is one step without, of gradients that were multiplied before.
        let mut scaled = pass.gradients.clone();
        for gradient in scaled.factors.values_mut().flatten() {
            gradient.inplace(|gradient| gradient.mul_scalar(factor));
        }
        let free = OptimizerSettings { max_grad_norm: None, ..clipping };
        let stepped = |settings, gradients| {
            let mut model = trained();
            let mut optimizer = LoraOptimizer::new(settings);
            let norm = optimizer.step(&mut model, gradients, 1e-3);
            (norm, factors(&model))
        };
        let (found_norm, found) = stepped(clipping, pass.gradients.clone());
        close(found_norm, norm, 1e-5);
        let (_, expected) = stepped(free, scaled);
        assert!(distance(&found, &expected) < 1e-6);
    }
}

fn pretrainer(tied: bool, seed: u64) -> Pretrainer<Flex> {
    pretrainer_in(DType::F32, tied, seed)
}

fn pretrainer_in(dtype: DType, tied: bool, seed: u64) -> Pretrainer<Flex> {
    clipped_pretrainer(None, dtype, tied, seed)
}

fn clipped_pretrainer(max_grad_norm: Option<f64>, dtype: DType, tied: bool, seed: u64) -> Pretrainer<Flex> {
    let optimizer = OptimizerSettings { max_grad_norm, ..OptimizerSettings::default() };
    let schedule = Schedule::new(ScheduleKind::Constant, 1e-2, 0, 1);
    let config = config().with_tie_word_embeddings(tied);
    Pretrainer::new(&config, PretrainSettings { optimizer, schedule, seed, dtype }, &Default::default())
}

#[test]
fn a_whole_model_learns_a_tiny_corpus() {
    let batch = collated(&packed(12));
    for tied in [false, true] {
        let run = |seed| {
            let mut trainer = pretrainer(tied, seed);
            assert_eq!(trainer.model().head.is_none(), tied);
            let losses: Vec<_> = (0..40).map(|_| trainer.step(&batch).unwrap().loss).collect();
            (losses, host(trainer.model().embedding.val()))
        };
        let first = run(1);
        let losses = &first.0;
        close(losses[0], (VOCABULARY as f64).ln(), 0.05);
        assert!(losses[39] < 0.3 * losses[0], "tied {tied}: {losses:?}");
        assert_eq!(first, run(1));
        assert_ne!(first.0, run(2).0);
    }
}

/// Asks for every weight's gradient.
struct Track;

impl ModuleMapper<Ad> for Track {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<Ad, D>>) -> Param<Tensor<Ad, D>> {
        param.set_require_grad(true)
    }
}

/// Takes every weight's gradient, in the model's order.
struct Take<'a> {
    grads: &'a mut <Ad as AutodiffBackend>::Gradients,
    found: Vec<f32>,
}

impl ModuleMapper<Ad> for Take<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<Ad, D>>) -> Param<Tensor<Ad, D>> {
        self.found.extend(host(param.val().grad_remove(self.grads).unwrap()));
        param
    }
}

/// Takes every weight, in the model's order.
struct Weights(Vec<f32>);

impl ModuleMapper<Flex> for Weights {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<Flex, D>>) -> Param<Tensor<Flex, D>> {
        self.0.extend(host(param.val()));
        param
    }
}

fn weights(model: Llama<Flex>) -> Vec<f32> {
    let mut weights = Weights(Vec::new());
    let _ = model.map(&mut weights);
    weights.0
}

#[test]
fn a_whole_models_first_step_goes_against_every_gradient() {
    let rows = packed(12);
    for tied in [false, true] {
        let mut trainer = pretrainer(tied, 3);
        let before = trainer.model();
        let model = Llama::<Ad>::from_inner(before.clone()).map(&mut Track);
        let loss = tracked_loss(&model, &on_device(&rows), None);
        let mut grads = loss.clone().backward();
        let mut take = Take { grads: &mut grads, found: Vec::new() };
        let parameters = model.config().parameters();
        let _ = model.map(&mut take);
        let gradients = take.found;
        assert_eq!(gradients.len(), parameters);

        let evaluated = trainer.evaluate([collated(&rows), collated(&rows)]).unwrap();
        let report = trainer.step(&collated(&rows)).unwrap();
        close(report.loss, f64::from(loss.into_scalar()), 1e-5);
        close(evaluated, report.loss, 1e-6);
        let norm = gradients.iter().map(|gradient| f64::from(*gradient).powi(2)).sum::<f64>().sqrt();
        close(report.grad_norm, norm, 1e-4 * norm);
        assert_eq!((report.step, report.learning_rate), (1, 1e-2));
        // Adam's first change is the learning rate, against the sign of the gradient.
        let (before, after) = (weights(before), weights(trainer.model()));
        let mut clear = 0;
        for ((before, after), gradient) in before.iter().zip(&after).zip(&gradients) {
            if gradient.abs() > 1e-5 {
                let change = after - before;
                assert!((change + 1e-2 * gradient.signum()).abs() < 1e-4, "{change} where it is {gradient}");
                clear += 1;
            }
        }
        assert!(clear * 2 > parameters, "{clear} of {parameters}");
    }
}

#[test]
fn a_whole_model_computed_in_bf16_keeps_weights_in_f32_and_learns_alike() {
    let batch = collated(&packed(12));
    let run = |dtype| {
        let mut trainer = pretrainer_in(dtype, false, 1);
        let losses: Vec<f64> = (0..40).map(|_| trainer.step(&batch).unwrap().loss).collect();
        assert_eq!(trainer.model().dtype(), DType::F32);
        losses
    };
    let (exact, rounded) = (run(DType::F32), run(DType::BF16));
    assert_ne!(exact, rounded);
    // bf16 has eight bits.
    close(rounded[0], exact[0], 1e-2 * exact[0]);
    assert!(rounded[39] < 0.3 * rounded[0], "{rounded:?}");
}

#[test]
fn a_whole_model_repeats_bit_for_bit_where_its_gradient_is_clipped() {
    let batch = collated(&packed(12));
    let run = || {
        let mut trainer = clipped_pretrainer(Some(0.1), DType::F32, false, 3);
        let reports: Vec<_> = (0..6).map(|_| trainer.step(&batch).unwrap()).collect();
        assert!(reports.iter().all(|report| report.grad_norm > 0.1), "{reports:?}");
        let numbers: Vec<_> = reports.iter().map(|report| (report.loss, report.grad_norm)).collect();
        (numbers, weights(trainer.model()))
    };
    let first = run();
    for _ in 0..4 {
        assert_eq!(run(), first);
    }
}

#[test]
fn a_whole_model_refuses_a_batch_without_targets() {
    let mut trainer = pretrainer(false, 3);
    let before = weights(trainer.model());
    let error = trainer.step(&collated(&[row(&[document(1, 0)], LossOn::All)])).unwrap_err();
    assert!(matches!(error, TrainError::NoTargets { step: 1 }), "{error:?}");
    assert_eq!(weights(trainer.model()), before);
}
