//! Runs that are killed, interrupted, cut off from their terminal or out of room, and go on to the bits of a run that was not.
//!
//! `BUZZER_KILLS` sets how often a run is killed, and `BUZZER_SEED` at which moments.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::{ends_with, json, path_of, refuses, root, succeeds, text};

/// A run of many short steps, with few clues held out.
const RUN: [&str; 18] = [
    "--device",
    "cpu",
    "--batch",
    "2",
    "--row-len",
    "64",
    "--dropout",
    "0.1",
    "--eval-fraction",
    "0.01",
    "--eval-limit",
    "4",
    "--evaluations",
    "3",
    "--save-every",
    "2",
    "--keep",
    "3",
];
const FULL: &[&str] = &[];
const FRUGAL: &[&str] = &["--optimizer", "adamw8", "--accumulate", "2"];

/// What `metrics.jsonl` says of a run's steps and measurements, but for what a clock or the system tells.
fn records(out: &Path) -> Vec<Value> {
    const OF_THE_MOMENT: [&str; 5] =
        ["time", "seconds", "tokens_per_second", "loss_tokens_per_second", "memory_bytes"];
    let text = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let record = |line: &str| {
        let mut record: Value = serde_json::from_str(line).unwrap();
        let fields = record.as_object_mut().unwrap();
        OF_THE_MOMENT.iter().for_each(|name| drop(fields.remove(*name)));
        record
    };
    text.lines().map(record).collect()
}

/// What must not depend on interruptions.
#[derive(Debug, PartialEq)]
struct Outcome {
    adapters: [Vec<u8>; 2],
    report: Vec<Value>,
}

fn outcome(out: &Path) -> Outcome {
    let report = json(&out.join("report.json"));
    let fields =
        ["/steps", "/skipped_steps", "/interrupted", "/loss", "/eval_loss", "/eval", "/data", "/packing"];
    Outcome {
        adapters: ["adapter", "adapter-best"]
            .map(|name| fs::read(out.join(name).join("adapter_model.safetensors")).unwrap()),
        report: fields.map(|field| report.pointer(field).unwrap().clone()).to_vec(),
    }
}

/// A run of so many steps and what it leaves if nothing happens to it.
struct Case {
    dir: TempDir,
    args: Vec<String>,
    expected: Outcome,
    records: Vec<Value>,
    span: Duration,
}

impl Case {
    fn new(steps: u32, more: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let steps = steps.to_string();
        let args: Vec<String> =
            [&RUN[..], more, &["--steps", &steps]].concat().into_iter().map(str::to_owned).collect();
        let whole = dir.path().join("whole");
        let started = Instant::now();
        let mut line: Vec<&str> = args.iter().map(String::as_str).collect();
        line.extend(["--out", text(&whole)]);
        succeeds("finetune", &line);
        let span = started.elapsed();
        Self { expected: outcome(&whole), records: records(&whole), span, dir, args }
    }

    fn out(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn spawn(&self, out: &Path, more: &[&str]) -> Child {
        Command::new(path_of("finetune"))
            .args(&self.args)
            .args(["--out", text(out)])
            .args(more)
            .current_dir(root())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// A run that has begun to train.
    fn begun(&self, out: &Path) -> Child {
        let child = self.spawn(out, &[]);
        until(|| out.join("checkpoints/step-000000").is_dir());
        child
    }

    /// Goes on with a run, for which its folder is enough, and compares.
    #[track_caller]
    fn goes_on(&self, out: &Path) -> String {
        let said = succeeds("finetune", &["--resume", text(out)]);
        assert!(said.lines().any(|line| line.starts_with("resumed")), "{said}");
        assert!(outcome(out) == self.expected, "other bits after: {said}");
        said
    }

    /// Every step was recorded once, as in the run that nothing happened to.
    #[track_caller]
    fn recorded_once(&self, out: &Path) {
        let records = records(out);
        let of_steps = records.iter().filter(|record| record["kind"] == "step");
        let steps: Vec<u64> = of_steps.map(|record| record["step"].as_u64().unwrap()).collect();
        let count = json(&out.join("report.json"))["steps"].as_u64().unwrap();
        assert_eq!(steps, (1..=count).collect::<Vec<_>>());
        assert_eq!(records, self.records);
    }
}

#[track_caller]
fn until(happened: impl Fn() -> bool) {
    let started = Instant::now();
    while !happened() {
        assert!(started.elapsed() < Duration::from_secs(60), "it did not happen");
        sleep(Duration::from_millis(1));
    }
}

fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
}

/// Whether these tests run under `nohup` or the like.
fn hang_up_is_ignored() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.is_some_and(|mask| u64::from_str_radix(mask.trim(), 16).unwrap() & 1 == 1)
}

fn setting(name: &str, usual: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}

#[test]
fn a_run_that_is_killed_again_and_again_ends_with_the_same_bits() {
    let kills = setting("BUZZER_KILLS", 3) as u32;
    let mut state = setting("BUZZER_SEED", 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1_u64 << 53) as f64
    };
    for more in [FULL, FRUGAL] {
        let case = Case::new(16 * kills, more);
        let out = case.out("killed");
        let mut moments = Vec::new();
        for _ in 0..kills {
            let mut run = case.spawn(&out, &["--resume"]);
            // On average all kills together come within the time of one run.
            sleep(case.span.mul_f64(2.0 * random() / f64::from(kills)));
            let alive = run.try_wait().unwrap().is_none();
            run.kill().unwrap();
            run.wait().unwrap();
            let newest = newest_step(&out);
            moments.push(format!("{} at step {newest:?}", if alive { "killed" } else { "over" }));
        }
        println!("{more:?}, {} steps in {:?}: {}", 16 * kills, case.span, moments.join(", "));
        case.goes_on(&out);
        case.recorded_once(&out);
    }
}

/// The steps of the checkpoints, whole or not, from the oldest on.
fn steps_of(out: &Path) -> Vec<u64> {
    let entries = fs::read_dir(out.join("checkpoints")).into_iter().flatten().flatten();
    let step = |entry: fs::DirEntry| entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok();
    let mut steps: Vec<u64> = entries.filter_map(step).collect();
    steps.sort_unstable();
    steps
}

fn newest_step(out: &Path) -> Option<u64> {
    steps_of(out).last().copied()
}

#[test]
fn a_run_that_is_told_to_end_saves_itself_and_goes_on() {
    let case = Case::new(60, FULL);
    for name in ["-INT", "-TERM", "-HUP"] {
        if name == "-HUP" && hang_up_is_ignored() {
            println!("skipped: a hang-up is ignored here, and so by what is started here");
            continue;
        }
        let out = case.out(name);
        let mut run = case.begun(&out);
        signal(&run, name);
        let said = std::io::read_to_string(run.stdout.take().unwrap()).unwrap();
        assert_eq!(run.wait().unwrap().code(), Some(0), "{said}");
        assert!(said.contains("stopped") && said.contains("--resume"), "{said}");
        let report = json(&out.join("report.json"));
        assert_eq!(report["interrupted"], true);
        assert!(report["eval"]["after"].is_null() && report["steps"].as_u64().unwrap() < 60);
        let newest = format!("checkpoints/step-{:06}", newest_step(&out).unwrap());
        assert_eq!(report["steps"].as_u64(), newest_step(&out));
        succeeds("generate", &["--adapter", text(&out.join(newest)), "This city is the capital of France"]);
        case.goes_on(&out);
        case.recorded_once(&out);
    }
}

#[test]
fn a_run_outlives_its_terminal() {
    let case = Case::new(30, FULL);
    let out = case.out("lost");
    let mut run = case.begun(&out);
    drop((run.stdout.take(), run.stderr.take()));
    assert_eq!(run.wait().unwrap().code(), Some(0));
    assert!(outcome(&out) == case.expected);
}

#[test]
fn a_damaged_checkpoint_is_passed_over_with_a_warning() {
    let case = Case::new(12, FRUGAL);
    let out = case.out("whole");
    let damaged = out.join("checkpoints/step-000012/optimizer.safetensors");
    let bytes = fs::read(&damaged).unwrap();
    fs::write(&damaged, &bytes[..bytes.len() / 2]).unwrap();
    let before = steps_of(&out).into_iter().rev().nth(1);
    let said = case.goes_on(&out);
    let warning = said.lines().find(|line| line.starts_with("warning")).unwrap();
    assert!(warning.contains("step-000012/optimizer.safetensors"), "{warning}");
    assert_eq!(json(&out.join("report.json"))["resumed_from"].as_u64(), before);
    assert!(fs::read(&damaged).unwrap() == bytes, "it was not written anew");
}

#[test]
fn what_is_kept_are_the_newest_and_the_best() {
    let case = Case::new(24, FULL);
    let out = case.out("whole");
    let kept = steps_of(&out);
    let losses = json(&out.join("report.json"))["eval_loss"].clone();
    let loss = |evaluation: &Value| evaluation["loss"].as_f64().unwrap();
    let losses = losses.as_array().unwrap();
    let best = losses.iter().min_by(|one, other| loss(one).total_cmp(&loss(other))).unwrap();
    assert_eq!(losses.len(), 3);
    assert!(kept.contains(&best["step"].as_u64().unwrap()) && kept.contains(&24), "{kept:?}, {losses:?}");
    assert!((3..=4).contains(&kept.len()), "{kept:?}");
}

#[test]
fn another_run_is_not_gone_on_with() {
    let case = Case::new(4, FULL);
    let out = case.out("whole");
    let differs = |more: &[&str], words: &[&str]| {
        refuses("finetune", &[&["--resume", text(&out)], more].concat(), words);
    };
    differs(&["--lr", "0.5"], &["step 4", "recipe.train.learning_rate is 0.003 there and 0.5 here", "--out"]);
    differs(&["--optimizer", "adamw8"], &["recipe.train.optimizer.eight_bit is false there and true here"]);
    differs(&["--limit", "2000"], &["rows.train ", "rows.train_hash"]);
    differs(&["--quantization", "nf4"], &[r#"base.quantization is "nf4-double" there and "nf4" here"#]);
    differs(&["--evaluations", "1"], &["evaluations is 3 there and 1 here"]);
    let again: Vec<&str> = case.args.iter().map(String::as_str).chain(["--out", text(&out)]).collect();
    ends_with(2, "finetune", &again, &[text(&out), "step 4", "--resume"]);
    refuses("finetune", &["--resume", "no/such/run"], &["no/such/run", "--resume"]);
    refuses("finetune", &["--save-every", "0"], &["--save-every", "10m"]);
    assert!(outcome(&out) == case.expected);
}

/// A file system of its own, of fixed size.
struct SmallDisk(TempDir);

impl SmallDisk {
    /// None where this process may not mount.
    fn mount(megabytes: u32) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let size = format!("size={megabytes}m");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &size, "tmpfs", text(dir.path())]).stderr(Stdio::null());
        mount.status().is_ok_and(|status| status.success()).then_some(Self(dir))
    }

    /// Takes all the room that is left, and what becomes free, until a program ends.
    fn fill_while(&self, program: &mut Child) -> PathBuf {
        let path = self.0.path().join("filler");
        let mut file = File::create(&path).unwrap();
        while program.try_wait().unwrap().is_none() {
            if file.write_all(&[0; 4096]).is_err() {
                sleep(Duration::from_millis(1));
            }
        }
        path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn a_disk_that_fills_up_while_training_costs_nothing_but_time() {
    let Some(disk) = SmallDisk::mount(24) else {
        println!("skipped: no file system can be mounted here");
        return;
    };
    let case = Case::new(60, FULL);
    let out = disk.0.path().join("run");
    let mut run = case.begun(&out);
    let filler = disk.fill_while(&mut run);
    let lines = BufReader::new(run.stdout.take().unwrap()).lines().map(Result::unwrap);
    let said: Vec<String> = lines.collect();
    let message = std::io::read_to_string(run.stderr.take().unwrap()).unwrap();
    assert_eq!(run.wait().unwrap().code(), Some(2), "{said:?} {message}");
    assert!(
        said.iter().any(|line| line.starts_with("warning") && line.contains("No space left")),
        "{said:?}"
    );
    for word in ["No space left", "--resume", text(&out)] {
        assert!(message.contains(word), "`{word}` is missing in: {message}");
    }
    let kept = newest_step(&out).unwrap();
    assert!(kept < 60, "it was full from the beginning");
    fs::remove_file(filler).unwrap();
    let said = case.goes_on(&out);
    assert!(said.contains(&format!("resumed   after step {kept}")), "{said}");
}
