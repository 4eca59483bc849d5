//! A run that goes on from a checkpoint against the run that was never interrupted: bit for bit.

use std::fs;
use std::path::Path;

use buzzer_train::{
    Checkpoint, CheckpointError, CheckpointJob, CheckpointWriter, HostMoments, checkpoint_steps,
    newest_checkpoint,
};
use buzzer_weights::{Adapter, attach_adapter, extract_adapter};
use serde_json::json;

use super::*;

/// Everything that may go wrong at once: dropout, rows of several epochs, a last step with fewer rows, few warm-up steps.
fn run_settings(accumulation: usize, eight_bit: bool) -> TrainSettings {
    TrainSettings {
        accumulation,
        epochs: 2.5,
        dropout: 0.1,
        warmup_ratio: 0.2,
        optimizer: OptimizerSettings { eight_bit, ..settings().optimizer },
        ..settings()
    }
}

fn checkpoint(trainer: &Trainer<Flex>, dropout: f64) -> Checkpoint {
    Checkpoint {
        adapter: extract_adapter(trainer.model(), &lora(), dropout, None),
        state: trainer.state(),
        fingerprint: json!({"rows": {"train": 8}, "dtype": "F32"}),
        records: json!({"first_loss": "4.25"}),
    }
}

fn take(trainer: &mut Trainer<Flex>, steps: usize) {
    for _ in 0..steps {
        trainer.step().unwrap().unwrap();
    }
}

/// Takes the steps that are left, and gives every loss, norm and factor as bits.
fn finish(trainer: &mut Trainer<Flex>) -> (Vec<[u64; 2]>, Vec<u32>) {
    let bits = |report: StepReport| [report.loss.to_bits(), report.grad_norm.to_bits()];
    let steps = std::iter::from_fn(|| trainer.step().unwrap()).map(bits).collect();
    (steps, factors(trainer.model()).into_iter().map(f32::to_bits).collect())
}

fn resumed(checkpoint: &Checkpoint, rows: &[PackedRow], settings: &TrainSettings) -> Trainer<Flex> {
    let mut model = base();
    attach_adapter(&mut model, &checkpoint.adapter, Path::new("checkpoint")).unwrap();
    Trainer::resume(model, rows.to_vec(), settings.clone(), &checkpoint.state).unwrap()
}

#[test]
fn a_run_goes_on_from_any_step_as_if_it_had_not_stopped() {
    let rows = packed(24);
    let folder = tempfile::tempdir().unwrap();
    for (accumulation, eight_bit) in [(1, false), (2, true), (3, false)] {
        let settings = run_settings(accumulation, eight_bit);
        let mut whole = trainer(&rows, &settings);
        let total = whole.total_steps() as usize;
        let (steps, bits) = finish(&mut whole);
        assert!(total >= 4 && whole.cursor().epoch == 2, "{total} steps");
        for stop in 0..=total {
            let mut first = trainer(&rows, &settings);
            take(&mut first, stop);
            let path = folder.path().join(format!("{accumulation}-{stop}"));
            let written = checkpoint(&first, settings.dropout);
            written.write(&path).unwrap();
            drop(first);
            let read = Checkpoint::read(&path).unwrap();
            assert_eq!(read, written);
            let mut second = resumed(&read, &rows, &settings);
            assert_eq!(second.state(), read.state);
            let (rest, found) = finish(&mut second);
            assert!(rest == steps[stop..] && found == bits, "8 bits {eight_bit}, stopped after {stop}");
            assert_eq!(second.state(), whole.state());
        }
    }
}

#[test]
fn a_state_of_another_run_is_refused() {
    let rows = packed(24);
    let settings = run_settings(1, false);
    let mut trainer = trainer(&rows, &settings);
    trainer.step().unwrap();
    let state = trainer.state();
    let refused = |rows: &[PackedRow], settings: &TrainSettings, word: &str| {
        let error = Trainer::resume(base(), rows.to_vec(), settings.clone(), &state).unwrap_err();
        assert!(matches!(error, TrainError::State { .. }), "{error:?}");
        assert!(error.to_string().contains(word), "{error}");
    };
    refused(&rows[1..], &settings, "rows");
    refused(&rows, &TrainSettings { epochs: 3.0, ..settings.clone() }, "epochs");
    refused(&rows, &TrainSettings { accumulation: 2, ..settings.clone() }, "rows in a step");
    refused(&rows, &TrainSettings { seed: 2, ..settings.clone() }, "seed");
    refused(&rows, &run_settings(1, true), "moments of q_proj in block 0");
    let mut foreign = state.clone();
    let pair = foreign.moments.first_entry().unwrap().into_mut();
    pair[0] = HostMoments::Full { first: vec![0.0; 3], second: vec![0.0; 3] };
    let error = Trainer::resume(base(), rows.clone(), settings.clone(), &foreign).unwrap_err();
    assert!(error.to_string().contains("moments of q_proj in block 0"), "{error}");
}

#[test]
fn damage_is_found_and_the_checkpoint_before_is_taken() {
    let root = tempfile::tempdir().unwrap();
    let mut trainer = trainer(&packed(24), &run_settings(1, true));
    let mut write = |steps: usize| {
        take(&mut trainer, steps);
        let path = root.path().join(format!("step-{:06}", trainer.steps_done()));
        checkpoint(&trainer, 0.1).write(&path).unwrap();
        path
    };
    let (older, newer) = (write(1), write(2));
    assert_eq!(newest_checkpoint(root.path()).unwrap().path, newer);
    let files: Vec<_> = fs::read_dir(&newer).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 5);
    for file in files {
        let whole = fs::read(&file).unwrap();
        let mut flipped = whole.clone();
        flipped[whole.len() / 2] ^= 4;
        let damages: [Option<&[u8]>; 4] = [None, Some(&[]), Some(&whole[..whole.len() / 2]), Some(&flipped)];
        for damage in damages {
            match damage {
                None => fs::remove_file(&file).unwrap(),
                Some(bytes) => fs::write(&file, bytes).unwrap(),
            }
            let found = newest_checkpoint(root.path()).unwrap();
            assert_eq!((found.path, found.damaged.len()), (older.clone(), 1), "{}", file.display());
            let message = found.damaged[0].to_string();
            assert!(message.contains("step-000003/") && message.contains("damaged"), "{message}");
            fs::write(&file, &whole).unwrap();
        }
    }
    assert_eq!(newest_checkpoint(root.path()).unwrap().path, newer);
}

#[test]
fn what_differs_is_named_with_both_values() {
    let checkpoint = checkpoint(&trainer(&packed(24), &run_settings(1, false)), 0.1);
    checkpoint.check_same(&json!({"rows": {"train": 8}, "dtype": "F32"})).unwrap();
    let error = checkpoint.check_same(&json!({"rows": {"train": 9}, "dtype": "F32"})).unwrap_err();
    assert!(matches!(error, CheckpointError::Different { step: 0, .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("rows.train is 8 there and 9 here") && !text.contains("dtype"), "{text}");
}

#[test]
fn checkpoints_are_written_one_at_a_time_and_the_best_is_kept() {
    let root = tempfile::tempdir().unwrap();
    let (dir, blocked) = (root.path().join("checkpoints"), root.path().join("blocked"));
    let mut trainer = trainer(&packed(24), &run_settings(1, false));
    let mut writer = CheckpointWriter::open(&dir, 2).unwrap();
    assert!(matches!(CheckpointWriter::open(&dir, 2), Err(CheckpointError::Busy { .. })));
    let mut save = |writer: &mut CheckpointWriter, best, best_adapter| {
        trainer.step().unwrap().unwrap();
        writer.save(CheckpointJob { checkpoint: checkpoint(&trainer, 0.1), best, best_adapter });
    };
    // The best adapter cannot be written at first: a file stands where its folder is to be.
    fs::write(&blocked, "in the way").unwrap();
    save(&mut writer, Some(1), Some(blocked.join("adapter")));
    assert!(writer.wait().unwrap().result.is_err() && writer.is_waiting());
    assert_eq!(checkpoint_steps(&dir), [0; 0]);
    fs::remove_file(&blocked).unwrap();
    assert!(writer.retry() && writer.is_busy());
    assert_eq!(writer.wait().unwrap().step, 1);
    assert!(!writer.is_waiting() && !writer.retry());
    let best = Adapter::read(&blocked.join("adapter")).unwrap();
    assert_eq!(Adapter::read(&dir.join("step-000001")).unwrap(), best);
    for _ in 0..4 {
        save(&mut writer, Some(1), None);
        writer.wait().unwrap().result.unwrap();
    }
    assert_eq!(checkpoint_steps(&dir), [1, 4, 5]);
    drop(writer);
    fs::create_dir(dir.join("step-000009.partial-1")).unwrap();
    drop(CheckpointWriter::open(&dir, 2).unwrap());
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 3);
}
