//! Runs the programs as a user would, on small inputs, and on input that is wrong.
//!
//! Every wrong input must end with status 2 and a message that names the place; every report must hold what tools
//! outside the project read.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

#[cfg(unix)]
#[path = "programs/resume.rs"]
mod resume;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

#[path = "../src/hub/server.rs"]
#[allow(dead_code, reason = "the tests beside it use the rest")]
mod server;

use server::{Reply, Repository, Server};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// A program built beside this test. Cargo builds the examples of a package before it runs the package's tests.
fn path_of(name: &str) -> PathBuf {
    let here = std::env::current_exe().unwrap();
    here.parent().unwrap().parent().unwrap().join("examples").join(name)
}

fn program(name: &str, args: &[&str]) -> Output {
    let path = path_of(name);
    let mut command = Command::new(&path);
    command.args(args).current_dir(root());
    command.output().unwrap_or_else(|error| panic!("{}: {error}; build the examples first", path.display()))
}

/// [`program`] with variables of the environment.
fn program_with(variables: &[(&str, &str)], name: &str, args: &[&str]) -> Output {
    let mut command = Command::new(path_of(name));
    command.args(args).current_dir(root()).envs(variables.iter().copied());
    command.env_remove("HF_TOKEN").env_remove("HF_HUB_CACHE").output().unwrap()
}

#[track_caller]
fn succeeds(name: &str, args: &[&str]) -> String {
    let output = program(name, args);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{name} {args:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// Ends with status 2 and says all of `words`.
#[track_caller]
fn refuses(name: &str, args: &[&str], words: &[&str]) {
    ends_with(2, name, args, words);
}

/// Ends with a status and says all of `words` on the error stream, which is given back.
#[track_caller]
fn ends_with(status: i32, name: &str, args: &[&str], words: &[&str]) -> String {
    let output = program(name, args);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(status), "{name} {args:?}: {message}");
    for word in words {
        assert!(message.contains(word), "`{word}` is missing in: {message}");
    }
    message
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// A copy of the shipped model that a test may damage.
fn model_copy() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(root().join("datasets/tiny-llama").join(file), dir.path().join(file)).unwrap();
    }
    dir
}

fn clue_file(content: &[u8]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("clues.csv"), content).unwrap();
    dir
}

const SHORT: [&str; 6] = ["--steps", "2", "--eval-limit", "6", "--evaluations", "1"];

#[test]
fn a_short_run_leaves_what_the_contract_promises() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let mut args = SHORT.to_vec();
    args.extend(["--out", text(&out)]);
    let said = succeeds("finetune", &args);
    assert!(said.contains("rows read") && said.contains('⟦') && said.contains("expected"), "{said}");
    let report = json(&out.join("report.json"));
    let paths = [
        "/device",
        "/model/parameters",
        "/model/trainable",
        "/data/rows_read",
        "/data/rows_kept",
        "/data/dropped",
        "/packing/rows",
        "/packing/documents",
        "/packing/tokens",
        "/packing/efficiency",
        "/steps",
        "/loss/first",
        "/loss/last",
        "/tokens_per_second",
        "/peak_memory_bytes",
        "/planned_memory_bytes",
        "/eval/before/exact_match",
        "/eval/before/f1",
        "/eval/before/n",
        "/eval/after/exact_match",
        "/eval/after/f1",
        "/eval/after/n",
        "/adapter",
        "/seconds",
    ];
    for path in paths {
        assert!(report.pointer(path).is_some_and(|value| !value.is_null()), "{path} in {report}");
    }
    assert_eq!(report["steps"], 2);
    assert_eq!(report["eval"]["after"]["n"], 6);
    let losses = &report["eval_loss"][0];
    assert!(losses["loss"] == losses["answers"] && losses["all"].as_f64().unwrap() > 0.0, "{losses}");

    let records = fs::read_to_string(report["records"].as_str().unwrap()).unwrap();
    let records: Vec<Value> = records.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let kinds: Vec<&str> = records.iter().map(|record| record["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["accuracy", "step", "step", "held-out", "accuracy"]);
    assert_eq!(records[2]["loss"], report["loss"]["last"]);
    assert_eq!(records[3]["loss_answers"], losses["answers"]);
    assert_eq!(records[4]["exact_match"], report["eval"]["after"]["exact_match"]);
    let events = fs::read(out.join("tensorboard/events.out.tfevents.buzzer")).unwrap();
    assert!(events.windows(18).any(|bytes| bytes == b"loss/train_answers"));
    assert!(fs::read_to_string(report["plot"].as_str().unwrap()).unwrap().contains("held out: answers"));
    // A pipe gets whole lines.
    assert!(said.lines().any(|line| line.starts_with("step      2 of 2")) && !said.contains('\r'), "{said}");

    let adapter = out.join("adapter");
    let evaluated = dir.path().join("evaluated");
    succeeds("evaluate", &["--adapter", text(&adapter), "--eval-limit", "6", "--out", text(&evaluated)]);
    assert_eq!(json(&evaluated.join("report.json"))["eval"], report["eval"]["after"]);
    succeeds("generate", &["--adapter", text(&adapter), "This city is the capital of France"]);
}

const JUDGED: [&str; 5] = ["--device", "cpu", "--eval-limit", "40", "--out"];

#[test]
fn an_evaluation_says_how_sure_it_is_and_compares_itself() {
    let dir = tempfile::tempdir().unwrap();
    let [first, second] = ["first", "second"].map(|name| dir.path().join(name));
    let evaluate =
        |out: &Path, more: &[&str]| succeeds("evaluate", &[&JUDGED[..], &[text(out)], more].concat());
    let said = evaluate(&first, &[]);
    for line in
        ["result", "triviaqa", "phrasing", "leaks", "confident", "precision", "by round", "by category"]
    {
        assert!(said.lines().any(|said| said.starts_with(line)), "{line} is missing in {said}");
    }
    let report = json(&first.join("report.json"));
    assert_eq!(report["eval"]["n"], 40);
    assert_eq!(report["eval"]["exact_match"], report["assessment"]["all"]["exact_match"]);
    for facet in ["round", "value", "decade", "answer_type", "category"] {
        let groups = report["assessment"]["by"][facet].as_array().unwrap();
        assert_eq!(groups.iter().map(|group| group["n"].as_u64().unwrap()).sum::<u64>(), 40, "{facet}");
    }
    assert_eq!(report["assessment"]["precision"]["at_70"]["n"], 28);
    assert_eq!(report["assessment"]["calibration"]["n"], 40);
    assert!(fs::read_to_string(report["plot"].as_str().unwrap()).unwrap().starts_with("<svg"));
    let lines = fs::read_to_string(first.join("predictions.jsonl")).unwrap();
    let predictions: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let right = predictions.iter().filter(|prediction| prediction["exact_match"] == true).count();
    assert_eq!(predictions.len(), 40);
    assert_eq!(report["eval"]["exact_match"].as_f64().unwrap(), right as f64 / 40.0);
    assert!(predictions.iter().all(|prediction| prediction["log_prob"].as_f64().unwrap() < 0.0));
    let leaked = predictions.iter().filter(|prediction| !prediction["leak"].is_null()).count() as u64;
    let leaks = &report["assessment"]["leaks"];
    assert_eq!(leaked, leaks["exact"].as_u64().unwrap() + leaks["near"].as_u64().unwrap());

    let said = evaluate(&second, &["--by", "round", "--compare", text(&first)]);
    assert!(said.contains("p = 1.0000") && !said.contains("by value"), "{said}");
    let compared = &json(&second.join("report.json"))["compared"][0];
    assert_eq!((&compared["n"], &compared["only_first"]), (&Value::from(40), &Value::from(0)));
    assert_eq!(compared["both"].as_u64().unwrap(), right as u64);

    let third = dir.path().join("third");
    evaluate(&third, &["--cache-dtype", "int8"]);
    let log_probs = [&first, &third].map(|run| {
        let lines = fs::read_to_string(run.join("predictions.jsonl")).unwrap();
        let log_prob = |line| serde_json::from_str::<Value>(line).unwrap()["log_prob"].as_f64().unwrap();
        lines.lines().map(log_prob).collect::<Vec<f64>>()
    });
    assert_eq!(log_probs[1].len(), 40);
    assert!(log_probs[0] != log_probs[1], "keys and values were not in 8 bits");
}

#[test]
fn clues_to_judge_may_come_from_a_file_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let sample = fs::read_to_string(root().join("datasets/sample/clues.csv")).unwrap();
    let file = dir.path().join("own.csv");
    fs::write(&file, sample.lines().take(9).collect::<Vec<_>>().join("\n")).unwrap();
    let out = dir.path().join("out");
    let all = ["--data", text(&file), "--all", "--device", "cpu"];
    let said = succeeds("evaluate", &[&all[..], &["--out", text(&out)]].concat());
    assert!(!said.contains("leaks"), "{said}");
    assert_eq!(json(&out.join("report.json"))["eval"]["n"], 8);
    let train = ["--train", "datasets/sample/clues.csv", "--out", text(&out)];
    succeeds("evaluate", &[&all[..], &train].concat());
    let report = json(&out.join("report.json"));
    assert_eq!(report["assessment"]["leaks"]["exact"], 8);
    assert_eq!(report["assessment"]["leaks"]["without_any"]["n"], 0);
    assert_eq!(report["leak_check"]["clues"], 4056);
}

#[test]
fn evaluations_that_make_no_sense_are_refused_before_any_answer() {
    let sample = "datasets/sample/clues.csv";
    refuses("evaluate", &["--train", sample], &["--train", sample, "not held out"]);
    refuses("evaluate", &["--train", "no/such/file.csv"], &["no/such/file.csv"]);
    refuses("evaluate", &["--by", "colour"], &["--by", "`colour`", "answer_type"]);
    refuses("evaluate", &["--all", "--split", "air-date"], &["--all", "--split"]);
    refuses("evaluate", &["--compare", "no/such/run"], &["predictions.jsonl", "--compare"]);
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("predictions.jsonl"), "{\"row\": 1}\n").unwrap();
    refuses("evaluate", &["--compare", text(dir.path())], &["predictions.jsonl line 1", "category"]);
    fs::write(dir.path().join("predictions.jsonl"), "").unwrap();
    refuses("evaluate", &["--compare", text(dir.path())], &["no clue in common", "--eval-limit"]);
}

#[test]
fn a_base_made_of_clues_can_be_fine_tuned() {
    let dir = tempfile::tempdir().unwrap();
    let [base, records, run] = ["base", "records", "run"].map(|name| dir.path().join(name));
    let small =
        ["--row-len", "64", "--batch", "4", "--vocab", "512", "--hidden", "64", "--intermediate", "192"];
    let of_clues =
        ["--clues", "--eval-limit", "20", "--packing", "wrapped", "--steps", "6", "--evaluations", "2"];
    let folders = ["--out", text(&base), "--records", text(&records), "--device", "cpu"];
    succeeds("make_base", &[&small[..], &of_clues, &folders].concat());
    let report = json(&base.join("report.json"));
    assert_eq!((&report["statements"], &report["steps"]), (&3380.into(), &6.into()));
    let lines = fs::read_to_string(records.join("metrics.jsonl")).unwrap();
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of_kind = |kind: &str| lines.iter().filter(|line| line["kind"] == kind).collect::<Vec<_>>();
    let (steps, held_out) = (of_kind("step"), of_kind("held-out"));
    assert_eq!((steps.len(), held_out.len()), (6, 2));
    assert_eq!((&steps[5]["tokens"], &steps[5]["loss_on"]), (&256.into(), &"all".into()));
    assert!(held_out[1]["loss_all"].as_f64() < held_out[0]["loss_all"].as_f64(), "{held_out:?}");
    assert_eq!(held_out[1]["loss_all"], report["loss"]["held_out"]);
    let base = text(&base);
    let few = ["--preset", "small", "--steps", "2", "--eval-limit", "4", "--device", "cpu"];
    succeeds("finetune", &[&few[..], &["--model", base, "--out", text(&run)]].concat());
}

#[test]
fn a_writer_of_clues_is_trained_judged_and_asked() {
    let dir = tempfile::tempdir().unwrap();
    let [run, judged, written] = ["run", "judged", "written"].map(|name| dir.path().join(name));
    let clue = ["--template", "clue", "--device", "cpu"];
    let few = ["--steps", "4", "--batch", "2", "--eval-limit", "4", "--out", text(&run)];
    let output = succeeds("finetune", &[&clue[..], &few].concat());
    assert!(output.contains("### Clue:⟦") && output.contains("giving its answer away"), "{output}");
    let report = json(&run.join("report.json"));
    assert_eq!((&report["eval"]["after"]["n"], &report["recipe"]["template"]), (&4.into(), &"clue".into()));
    assert_eq!(report["recipe"]["answer"]["max_new_tokens"], 80);
    let adapter = run.join("adapter");
    let with = [&clue[..], &["--adapter", text(&adapter)]].concat();

    succeeds("evaluate", &[&with[..], &["--eval-limit", "6", "--out", text(&judged)]].concat());
    let report = json(&judged.join("report.json"));
    let real = &report["style"]["real"];
    assert_eq!((&real["n"], &real["copied"]["value"]), (&6.into(), &0.0.into()));
    assert!(real["words"]["value"].as_f64().unwrap() > 3.0 && real["questions"]["value"] == 0.0, "{real}");
    assert_eq!((&report["style"]["written"]["n"], &report["known_clues"]), (&6.into(), &3380.into()));
    assert_eq!(fs::read_to_string(judged.join("written.jsonl")).unwrap().lines().count(), 6);

    let ask = |seed: &str| {
        let wanted =
            ["--category", "WORLD CAPITALS", "--answer", "Paris", "--count", "2", "--sample-seed", seed];
        succeeds("generate", &[&with[..], &wanted, &["--out", text(&written)]].concat());
        json(&written.join("report.json"))["answers"].clone()
    };
    let clues = ask("1");
    assert_eq!((clues.as_array().unwrap().len(), &clues[0]["answer"]), (2, &"Paris".into()));
    // Each clue has a seed of its own.
    assert!(clues[0]["clue"] != clues[1]["clue"] && ask("1") == clues && ask("2")[0] == clues[1], "{clues}");
    // A category is enough.
    succeeds("generate", &[&with[..], &["--category", "WORLD CAPITALS"]].concat());
}

#[test]
fn writing_and_answering_are_not_mixed_up() {
    let clue = ["--template", "clue"];
    refuses("evaluate", &[&clue[..], &["--compare", "runs/other"]].concat(), &["--compare", "leave it out"]);
    refuses("generate", &clue, &["--category", "name one"]);
    refuses("generate", &[&clue[..], &["--category", "INNS", "It is an inn"]].concat(), &["--template clue"]);
    refuses("generate", &["--answer", "Paris"], &["--answer", "--template clue"]);
    refuses("generate", &["--count", "2", "It is an inn"], &["--count", "--file"]);
}

#[test]
fn bases_that_make_no_sense_are_refused() {
    refuses(
        "make_base",
        &["--hidden", "100", "--heads", "3"],
        &["--hidden 100", "--heads 3", "multiple of 6"],
    );
    refuses("make_base", &["--row-len", "1"], &["--row-len 1", "two tokens"]);
    refuses("make_base", &["--statements", "none.txt"], &["none.txt"]);
    refuses("make_base", &["--clues", "--data", "none.csv"], &["none.csv"]);
    refuses("make_base", &["--dtype", "f16", "--device", "cpu"], &["--dtype f16", "f32 only"]);
}

#[test]
fn one_flag_holds_out_the_clues_aired_last() {
    let dir = tempfile::tempdir().unwrap();
    let args = ["--split", "air-date", "--eval-fraction", "0.01", "--out", text(dir.path())];
    succeeds("evaluate", &[&["--device", "cpu", "--eval-limit", "4"], &args[..]].concat());
    let data = &json(&dir.path().join("report.json"))["data"];
    let held_out = data["held_out"].as_u64().unwrap();
    assert!((41..200).contains(&held_out), "{data}");
    assert!(data["held_out_from"].as_str().unwrap() > "2006-06-01", "{data}");
    refuses("evaluate", &["--split", "air-date", "--eval-from", "2006-01-01"], &["--split", "--eval-from"]);
}

#[test]
fn a_runs_own_recipe_runs_it_again() {
    let dir = tempfile::tempdir().unwrap();
    let [first, second] = ["first", "second"].map(|name| dir.path().join(name));
    let odd = ["--rank", "3", "--targets", "qv", "--dropout", "0.1", "--lr", "0.004", "--max-grad-norm", "0"];
    let more = ["--seed", "5", "--batch", "3", "--accumulate", "2", "--packing", "none", "--limit", "900"];
    succeeds("finetune", &[&SHORT[..], &odd, &more, &["--out", text(&first)]].concat());
    let recipe = first.join("recipe.toml");
    succeeds("finetune", &["--recipe", text(&recipe), "--out", text(&second)]);
    let read = |run: &Path, name: &str| fs::read(run.join(name)).unwrap();
    for name in ["recipe.toml", "adapter/adapter_model.safetensors"] {
        assert!(read(&first, name) == read(&second, name), "{name}");
    }
    assert_eq!(json(&second.join("report.json"))["eval"]["after"]["n"], 6);
    // A flag goes before the file, and the plan reads the same file.
    let said = succeeds("plan", &["--recipe", text(&recipe), "--batch", "2", "--no-measurement"]);
    assert!(said.contains("2 x ") && said.contains("of 4 rows"), "{said}");
}

#[test]
fn recipes_that_make_no_sense_are_refused_with_their_line() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("own.toml");
    let refused = |recipe: &str, words: &[&str]| {
        fs::write(&file, recipe).unwrap();
        refuses("finetune", &["--recipe", text(&file)], &[&[text(&file)], words].concat());
    };
    refused("[train.optimizer]\nweight_dekay = 0.1\n", &["line 2", "[train.optimizer]", "`weight_decay`"]);
    refused("\n[lora]\nrank = 2.5\n", &["line 3", "lora.rank", "2.5"]);
    refused("[lora\n", &["line 1"]);
    refuses("finetune", &["--recipe", "no/such.toml"], &["--recipe no/such.toml"]);
}

#[test]
fn a_training_script_becomes_a_recipe() {
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("train.py");
    let source = "rank = 6\nc = LoraConfig(r=rank, lora_alpha=12, target_modules=['q_proj'])\n\
                  t = TrainingArguments(optim='paged_adamw_32bit', max_steps=2, group_by_length=True)\n";
    fs::write(&script, source).unwrap();
    let out = dir.path().join("out");
    let said = succeeds("import-recipe", &[text(&script), "--out", text(&out)]);
    assert!(said.contains("line 3: group_by_length = True"), "{said}");
    let report = json(&out.join("report.json"));
    assert_eq!(report["left"].as_array().unwrap().len(), 1);
    let recipe = report["recipe"].as_str().unwrap();
    assert_eq!(fs::read_to_string(recipe).unwrap(), succeeds("import-recipe", &[text(&script)]));
    let run = ["--recipe", recipe, "--batch", "1", "--eval-limit", "2", "--evaluations", "0"];
    succeeds("finetune", &[&run[..], &["--out", text(&dir.path().join("run"))]].concat());
    let report = json(&dir.path().join("run/report.json"));
    assert_eq!((&report["steps"], &report["recipe"]["lora"]["rank"]), (&2.into(), &6.into()));
    refuses("import-recipe", &["no/such.py"], &["no/such.py"]);
}

#[test]
fn the_same_seed_gives_the_same_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = |name: &str, seed: &str| {
        let out = dir.path().join(name);
        let mut args = SHORT.to_vec();
        args.extend(["--seed", seed, "--dropout", "0.1", "--out", text(&out)]);
        succeeds("finetune", &args);
        fs::read(out.join("adapter/adapter_model.safetensors")).unwrap()
    };
    let first = adapter("a", "0");
    assert!(first == adapter("b", "0"));
    assert!(first != adapter("c", "1"));
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_saves_its_adapter_and_ends_well() {
    use std::io::{BufRead, BufReader};
    use std::process::Stdio;
    let dir = tempfile::tempdir().unwrap();
    let mut run = Command::new(path_of("finetune"))
        .args(["--epochs", "1000", "--eval-limit", "4", "--evaluations", "0", "--out", text(dir.path())])
        .current_dir(root())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(run.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.starts_with("before")));
    std::thread::sleep(std::time::Duration::from_secs(2));
    assert!(Command::new("kill").args(["-INT", &run.id().to_string()]).status().unwrap().success());
    assert!(lines.any(|line| line.starts_with("stopped")));
    lines.for_each(drop);
    assert_eq!(run.wait().unwrap().code(), Some(0));
    assert_eq!(json(&dir.path().join("report.json"))["interrupted"], true);
    let loaded = ["--adapter", text(&dir.path().join("adapter")), "--eval-limit", "4"].map(str::to_owned);
    succeeds("evaluate", &loaded.iter().map(String::as_str).collect::<Vec<_>>());
}

/// An adapter after two steps, for the model that ships here.
fn short_adapter(dir: &Path) -> PathBuf {
    let out = dir.join("run");
    let mut args = SHORT.to_vec();
    args.extend(["--eval-limit", "0", "--evaluations", "0", "--lr", "0.02", "--out", text(&out)]);
    args.drain(2..6);
    succeeds("finetune", &args);
    out.join("adapter")
}

#[test]
fn merged_models_answer_like_base_and_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = short_adapter(dir.path());
    // Format, and the mean divergence from base and live adapter that its rounding may cause.
    let cases = [
        ("safetensors-f16", 1e-6),
        ("safetensors-bf16", 1e-4),
        ("nf4", 0.5),
        ("nf4-double", 0.5),
        ("gguf-f16", 1e-6),
        ("gguf-q8_0", 1e-3),
        ("gguf-q4_0", 0.5),
    ];
    for (format, bound) in cases {
        let out = dir.path().join(format);
        let args =
            ["--adapter", text(&adapter), "--format", format, "--eval-limit", "6", "--out", text(&out)];
        let said = succeeds("merge", &args);
        assert!(said.contains("rounded to NF4") && said.contains("base in NF4 + adapter"), "{said}");
        let report = json(&out.join("report.json"));
        let [live, trained] = [0, 1].map(|row| report["parity"][row].clone());
        let number = |row: &Value, path: &str| row.pointer(path).and_then(Value::as_f64).unwrap();
        let divergence = number(&live, "/kl_divergence/mean");
        assert!((0.0..bound).contains(&divergence), "{format}: {divergence}");
        assert!(number(&live, "/logit_difference/largest") >= number(&live, "/logit_difference/mean"));
        assert_eq!(number(&live, "/answers/n"), 6.0);
        assert!(number(&trained, "/kl_divergence/mean") > 1e-4, "{format}: {trained}");
        // The folder stands by itself: other programs take it.
        succeeds("evaluate", &["--model", text(&out), "--quantization", "none", "--eval-limit", "2"]);
        refuses("merge", &args, &[text(&out), "not empty", "--out"]);
    }
    let four_bits = dir.path().join("nf4");
    let out = dir.path().join("again");
    let args =
        ["--base", text(&four_bits), "--adapter", text(&adapter), "--eval-limit", "4", "--out", text(&out)];
    let said = succeeds("merge", &args);
    assert!(said.contains("NF4 weights, restored"), "{said}");
    let parity = json(&out.join("report.json"))["parity"].clone();
    assert!(
        parity.as_array().unwrap().len() == 1 && parity[0]["kl_divergence"]["mean"].as_f64().unwrap() < 1e-6
    );
}

#[test]
fn a_merge_takes_the_tokenizer_that_was_named() {
    let base = model_copy();
    let named = base.path().join("named.json");
    let content = fs::read(base.path().join("tokenizer.json")).unwrap();
    // The same tokenizer in other bytes, and beside it one that would be refused.
    let compact = serde_json::from_slice::<Value>(&content).unwrap().to_string();
    assert_ne!(compact.as_bytes(), content);
    fs::write(&named, &compact).unwrap();
    fs::write(base.path().join("tokenizer.json"), "{}").unwrap();
    fs::write(base.path().join("tokenizer.model"), "another").unwrap();
    fs::write(base.path().join("special_tokens_map.json"), r#"{"pad_token": "<unk>"}"#).unwrap();
    let out = base.path().join("out");
    let args =
        ["--model", text(base.path()), "--tokenizer", text(&named), "--eval-limit", "0", "--out", text(&out)];
    succeeds("merge", &args);
    assert_eq!(fs::read_to_string(out.join("tokenizer.json")).unwrap(), compact);
    assert!(!out.join("tokenizer.model").exists() && !out.join("named.json").exists());
    assert!(out.join("special_tokens_map.json").exists());
    refuses("merge", &["--model", text(base.path()), "--eval-limit", "0"], &["tokenizer.json"]);
}

#[test]
fn merges_that_make_no_sense_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let refused = |args: &[&str], words: &[&str]| {
        refuses("merge", &[args, &["--out", text(&out)]].concat(), words);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{args:?}");
    };
    refused(&["--format", "onnx"], &["--format", "gguf-q8_0"]);
    refused(&["--adapter", "no/such/adapter"], &["no/such/adapter", "--adapter"]);
    refused(&["--shard-size", "0"], &["--shard-size"]);
    refused(&["--base", "no/such/model"], &["no/such/model", "--model"]);
    refused(&["--data", "no/such/clues.csv"], &["no/such/clues.csv", "--data"]);
    refused(&["--eval-from", "2100-01-01"], &["no clue for evaluation"]);
}

/// What a full disk does: the system refuses to write on, here from 800 KiB in one file on.
#[cfg(unix)]
#[test]
fn a_disk_that_fills_up_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    for format in ["safetensors-f16", "nf4", "gguf-q8_0"] {
        let out = dir.path().join("out");
        let limit = if format == "safetensors-f16" { 800 } else { 100 };
        let command = format!(
            "trap '' XFSZ; ulimit -f {}; exec \"$0\" --format {format} --eval-limit 0 --out \"$1\"",
            2 * limit
        );
        let output = Command::new("sh")
            .args(["-c", &command, text(&path_of("merge")), text(&out)])
            .current_dir(root())
            .output()
            .unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains("cannot write") && message.contains("--out"), "{message}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{format}");
    }
}

/// Every file of a folder but the report, which comes later, finished or not.
fn weights_of(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(folder).unwrap().map(Result::unwrap);
    let mut files: Vec<_> = entries
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
        .filter(|(name, _)| name != "report.json" && !name.ends_with(".partial"))
        .collect();
    files.sort();
    files
}

/// `BUZZER_KILLS` sets how often; the moments are spread over the time that a merge takes, and past it.
#[cfg(unix)]
#[test]
fn a_killed_merge_leaves_the_whole_folder_or_none() {
    use std::time::{Duration, Instant};
    let kills = std::env::var("BUZZER_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(5_u32);
    let dir = tempfile::tempdir().unwrap();
    let adapter = short_adapter(dir.path());
    let (parent, out) = (dir.path().join("merged"), dir.path().join("merged/out"));
    for format in ["safetensors-bf16", "nf4-double", "gguf-q8_0"] {
        let whole = dir.path().join(format);
        let args = |out: &Path| {
            let args = [
                "--adapter",
                text(&adapter),
                "--format",
                format,
                "--eval-limit",
                "0",
                "--shard-size",
                "0.0002",
            ];
            [&args[..], &["--out", text(out)]].concat().iter().map(|&arg| arg.to_owned()).collect::<Vec<_>>()
        };
        let started = Instant::now();
        succeeds("merge", &args(&whole).iter().map(String::as_str).collect::<Vec<_>>());
        let span = started.elapsed();
        let expected = weights_of(&whole);
        let mut appeared = 0;
        for kill in 0..kills {
            // The first half of the time goes by before anything is written.
            let share = 0.3 + 0.8 * f64::from((kill * 7919 + 13) % kills.max(1)) / f64::from(kills);
            let mut run = Command::new(path_of("merge"))
                .args(args(&out))
                .current_dir(root())
                .stdout(std::process::Stdio::null())
                .spawn()
                .unwrap();
            std::thread::sleep(Duration::from_secs_f64(span.as_secs_f64() * share));
            run.kill().unwrap();
            run.wait().unwrap();
            if out.exists() {
                appeared += 1;
                assert!(weights_of(&out) == expected, "{format}, kill {kill}");
                fs::remove_dir_all(&out).unwrap();
            }
        }
        println!("{format}: {kills} kills within {span:?}, and {appeared} folders were whole by then");
        succeeds("merge", &args(&out).iter().map(String::as_str).collect::<Vec<_>>());
        assert!(weights_of(&out) == expected);
        // What the killed ones had begun is gone.
        assert_eq!(fs::read_dir(&parent).unwrap().count(), 1);
        fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn damaged_clue_files_are_refused_with_their_place() {
    let row = "a question,an answer\n";
    let cases: [(&[u8], &[&str]); 6] = [
        (b"", &["clues.csv", "empty"]),
        (b"question,answer\n", &["clues.csv", "header"]),
        (b"text,reply\nx,y\n", &["clues.csv", "question", "`text`", "`reply`", "--question-column"]),
        (b"question,answer\n\"never closed,y\n", &["row 1", "line 2", "quote"]),
        (b"question,answer\nx,y\nonly one field\n", &["row 2", "line 3", "cut short"]),
        (b"question,answer\nx,\xFF\n", &["line 2", "UTF-8"]),
    ];
    for (content, words) in cases {
        let dir = clue_file(content);
        refuses("finetune", &["--data", text(&dir.path().join("clues.csv"))], words);
    }
    refuses("finetune", &["--data", "no/such/file.csv"], &["no/such/file.csv", "--data"]);
    let dir = clue_file(format!("question,answer\n{row}").as_bytes());
    refuses(
        "finetune",
        &["--data", text(&dir.path().join("clues.csv")), "--eval-from", "2000-01-01"],
        &["row 1"],
    );
}

#[test]
fn damaged_models_are_refused_with_their_place() {
    let refused = |damage: &dyn Fn(&Path), words: &[&str]| {
        let dir = model_copy();
        damage(dir.path());
        refuses("generate", &["--model", text(dir.path()), "clue"], words);
    };
    let write = |name: &'static str, content: &'static str| {
        move |dir: &Path| fs::write(dir.join(name), content).unwrap()
    };
    refused(&|dir| fs::remove_file(dir.join("config.json")).unwrap(), &["config.json", "--model"]);
    refused(&write("config.json", r#"{"model_type": "gpt2"}"#), &["model_type", "gpt2", "llama"]);
    refused(&write("model.safetensors", "no"), &["model.safetensors"]);
    let index = r#"{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}"#;
    refused(&write("model.safetensors.index.json", index), &["model-00001-of-00002.safetensors"]);
    refused(
        &|dir| {
            let config = fs::read_to_string(dir.join("config.json")).unwrap();
            fs::write(dir.join("config.json"), config.replace("\"hidden_size\": 128", "\"hidden_size\": 64"))
                .unwrap();
        },
        &["model.embed_tokens.weight", "128", "64"],
    );
    refused(
        &|dir| {
            // The last two bytes of the file belong to a weight; all ones is a NaN in bf16.
            let mut bytes = fs::read(dir.join("model.safetensors")).unwrap();
            let end = bytes.len();
            bytes[end - 2..].copy_from_slice(&[0xFF, 0xFF]);
            fs::write(dir.join("model.safetensors"), bytes).unwrap();
        },
        &["model.safetensors", "NaN"],
    );
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    let dir = model_copy();
    let tokenizer = fs::read_to_string(dir.path().join("tokenizer.json")).unwrap();
    let mut tokenizer: Value = serde_json::from_str(&tokenizer).unwrap();
    tokenizer["model"]["vocab"]["extra"] = Value::from(5000);
    fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    refuses("generate", &["--model", text(dir.path()), "clue"], &["5000", "5001", "1024"]);
}

#[test]
fn flags_that_make_no_sense_are_named() {
    refuses("finetune", &["--rank", "0"], &["--rank"]);
    refuses("finetune", &["--targets", "q_proj,lm_head"], &["lm_head", "--targets"]);
    refuses("finetune", &["--lr=-1"], &["--lr"]);
    refuses("finetune", &["--batch", "0"], &["--batch"]);
    refuses("finetune", &["--device", "cuda"], &["cuda"]);
    refuses("finetune", &["--packing", "tight"], &["--packing", "isolated"]);
    refuses("generate", &["--top-p", "0", "clue"], &["--top-p"]);
    refuses("generate", &["--min-p", "2", "clue"], &["--min-p"]);
    refuses("generate", &["--repetition-penalty", "0", "clue"], &["--repetition-penalty"]);
    refuses("generate", &["--device", "cpu", "--cache-limit", "0", "clue"], &["--cache-limit", "bytes"]);
    refuses("generate", &["--cache-dtype", "int4", "clue"], &["--cache-dtype", "int4", "compute", "int8"]);
    refuses("generate", &["--adapter", "no/such/adapter", "clue"], &["no/such/adapter", "--adapter"]);
    refuses("generate", &["--file", "no/such/file", "x"], &["--file"]);
}

#[test]
fn the_notebooks_run_fits_a_t4() {
    let dir = tempfile::tempdir().unwrap();
    let said = succeeds("plan", &["--shape", "llama2-7b", "--card", "t4", "--out", text(dir.path())]);
    assert!(said.contains("4 x 1024") && said.contains("predicted") && said.contains("F16"), "{said}");
    let report = json(&dir.path().join("report.json"));
    assert_eq!((&report["fits"], &report["time"]), (&Value::from(true), &Value::from("predicted")));
    let parts = report["plan"].as_object().unwrap().values().map(|part| part.as_u64().unwrap());
    assert_eq!(report["planned_memory_bytes"], parts.sum::<u64>());
    assert!(report["steps"].as_u64().unwrap() > 1900 && report["seconds"].as_f64().unwrap() > 60.0);
}

#[test]
fn a_plan_that_does_not_fit_proposes_one_that_does() {
    let cases: [&[&str]; 6] = [
        &["--card", "t4", "--batch", "32"],
        &["--card", "t4", "--memory-limit", "7.6"],
        &["--card", "t4", "--memory-limit", "7.45"],
        &["--card", "t4", "--memory-limit", "7.3"],
        &["--card", "t4", "--memory-limit", "7.23"],
        &["--card", "t4", "--memory-limit", "6.6"],
    ];
    let mut proposed = String::new();
    for case in cases {
        let mut args = vec!["--shape", "llama2-7b"];
        args.extend(case);
        let message = ends_with(3, "plan", &args, &["this fits", "GiB"]);
        let flags = message.split("step: ").nth(1).unwrap().split(" (").next().unwrap().to_owned();
        proposed += &flags;
        // A flag that stands twice is refused, so those that the proposal changes go.
        let mut kept =
            args.chunks(2).filter(|pair| !flags.contains(pair[0])).flatten().copied().collect::<Vec<_>>();
        kept.extend(flags.split(' '));
        succeeds("plan", &kept);
    }
    for flag in ["--batch", "--accumulate", "--checkpoint-every", "--row-len", "--optimizer adamw8"] {
        assert!(proposed.contains(flag), "{flag} was never proposed: {proposed}");
    }
    ends_with(3, "plan", &["--shape", "llama2-70b", "--card", "t4"], &["t4", "no smaller batch"]);
}

#[test]
fn finetune_refuses_what_does_not_fit() {
    ends_with(
        3,
        "finetune",
        &["--device", "cpu", "--memory-limit", "0.005"],
        &["cpu", "this fits", "--batch"],
    );
    let said = succeeds("plan", &["--device", "cpu"]);
    assert!(said.contains("measured") && said.contains("525 of 4 rows"), "{said}");
}

#[test]
fn dtypes_and_cards_that_do_not_exist_are_named() {
    refuses("finetune", &["--device", "cpu", "--dtype", "bf16"], &["--dtype bf16", "cpu", "f32"]);
    refuses("generate", &["--device", "cpu", "--dtype", "f16", "clue"], &["--dtype f16", "cpu"]);
    refuses("plan", &["--card", "t4", "--dtype", "bf16"], &["--dtype bf16", "7.5", "--dtype f16"]);
    refuses("plan", &["--card", "b52"], &["b52", "t4", "h200"]);
    refuses("plan", &["--memory-limit", "0"], &["--memory-limit"]);
    refuses("plan", &["--checkpoint-every", "0"], &["--checkpoint-every"]);
}

#[test]
fn parity_passes_on_the_golden_run_and_fails_where_a_bound_is_broken() {
    let golden = root().join("../shared/golden/small");
    if !golden.is_dir() {
        println!("skipped: {} is not here", golden.display());
        return;
    }
    let out = tempfile::tempdir().unwrap();
    succeeds("parity", &["--golden", text(&golden), "--out", text(out.path())]);
    let report = json(&out.path().join("report.json"));
    assert!(report["checks"].as_array().unwrap().iter().all(|check| check["passed"] == true));
    refuses("parity", &["--golden", "no/such/dir"], &["no/such/dir"]);
}

/// A hub with the shipped model and clues, and an adapter.
fn hub(adapter: &Path) -> Server {
    let read = |folder: &Path, names: &[&str]| {
        let file = |name: &&str| ((*name).to_owned(), fs::read(folder.join(name)).unwrap());
        names.iter().map(file).collect::<Vec<_>>()
    };
    let tiny =
        read(&root().join("datasets/tiny-llama"), &["config.json", "model.safetensors", "tokenizer.json"]);
    let adapter = read(adapter, &["adapter_config.json", "adapter_model.safetensors"]);
    let clues = read(&root().join("datasets/sample"), &["clues.csv"]);
    Server::of(vec![
        Repository { files: tiny, ..Repository::model("buzzer/tiny", &[]) },
        Repository { files: adapter, ..Repository::model("buzzer/taught", &[]) },
        Repository { files: clues, ..Repository::data("buzzer/clues", &[]) },
    ])
}

#[test]
fn programs_take_names_on_the_hub_for_paths() {
    let dir = tempfile::tempdir().unwrap();
    let (adapter, home) = (short_adapter(dir.path()), dir.path().join("home"));
    let server = hub(&adapter);
    let endpoint = server.endpoint();
    let online = [("HF_HOME", text(&home)), ("HF_ENDPOINT", endpoint.as_str())];
    let run = |variables: &[(&str, &str)], name: &str, args: &[&str]| {
        let output = program_with(variables, name, args);
        let [said, message] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
        assert!(output.status.success(), "{name} {args:?}: {said}{message}");
        (said, message)
    };
    let asked = |path: &str| server.requests().iter().filter(|request| request.path.contains(path)).count();

    // A plan wants no weights.
    run(&online, "plan", &["--model", "buzzer/tiny", "--data", "hub:buzzer/clues/clues.csv", "--card", "t4"]);
    assert_eq!(asked("model.safetensors"), 0);
    let clue = "The state house of Ohio stands in this capital city";
    let of_hub = ["--model", "buzzer/tiny", "--adapter", "buzzer/taught", clue];
    let (answer, message) = run(&online, "generate", &of_hub);
    assert!(
        message.contains("fetched   model.safetensors") && !message.contains("fetched   config.json"),
        "{message}"
    );
    assert_eq!(answer, succeeds("generate", &["--adapter", text(&adapter), clue]));

    // The rest needs no hub.
    server.requests();
    let offline = [online[0], online[1], ("HF_HUB_OFFLINE", "1")];
    assert_eq!(run(&offline, "generate", &of_hub).0, answer);
    let (out, merged) = (dir.path().join("of-hub"), dir.path().join("merged"));
    let taught = ["--model", "buzzer/tiny", "--data", "hub:buzzer/clues/clues.csv", "--out", text(&out)];
    run(&offline, "finetune", &[&SHORT[..], &taught].concat());
    let config = json(&out.join("adapter/adapter_config.json"));
    assert_eq!(
        config["base_model_name_or_path"], "buzzer/tiny",
        "other libraries know the model by its name"
    );
    let recipe = fs::read_to_string(out.join("recipe.toml")).unwrap();
    for named in ["path = \"buzzer/tiny\"", "file = \"hub:buzzer/clues/clues.csv\""] {
        assert!(recipe.contains(named), "{named} is missing in {recipe}");
    }
    let parts =
        ["--base", "buzzer/tiny", "--adapter", "buzzer/taught", "--eval-limit", "0", "--out", text(&merged)];
    run(&offline, "merge", &parts);
    assert!(merged.join("model.safetensors").exists() && merged.join("tokenizer.json").exists());
    let judged = ["--model", "buzzer/tiny", "--data", "hub:buzzer/clues/clues.csv", "--eval-limit", "2"];
    run(&offline, "evaluate", &judged);
    assert_eq!(asked("/"), 0);
}

#[test]
fn a_hub_that_refuses_ends_a_program_with_advice() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(|_| Reply::new(401, &[("X-Error-Code", "GatedRepo")]));
    let endpoint = server.endpoint();
    let variables = [("HF_HOME", text(dir.path())), ("HF_ENDPOINT", endpoint.as_str())];
    let cases: [(&str, &[&str], &[&str]); 3] = [
        (
            "generate",
            &["--model", "meta-llama/Llama-2-7b-hf", "x"],
            &["meta-llama/Llama-2-7b-hf", "accept", "HF_TOKEN"],
        ),
        ("finetune", &["--data", "hub:org/clues/clues.csv"], &["/datasets/org/clues", "accept", "HF_TOKEN"]),
        ("evaluate", &["--data", "hub:clues.csv"], &["hub:clues.csv", "hub:org/name/file"]),
    ];
    for (name, args, words) in cases {
        let output = program_with(&variables, name, args);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    }
    // A folder that is here is never asked for, whatever it is called.
    server.requests();
    let output = program_with(&variables, "generate", &["--model", "datasets/tiny-llama", "x"]);
    assert!(output.status.success());
    assert!(server.requests().is_empty());
}
