//! Writes the sample data set: plain facts and wordings in, clues and statements out.
//!
//! `datasets/sample/facts/RELATION.tsv` holds facts, `datasets/sample/wordings.tsv` says how each relation is worded.
//! Every fact meets every wording of its relation. The program trades variety for control: each clue is a template, so a
//! tiny model can learn it, and wording k airs only in season k, so a split by air date holds out unseen wordings.
//! Equal input gives equal bytes: order, dates, values and categories come from a hash of the text, never from a clock.
//!
//! It refuses facts that would make bad clues: a question met twice, an answer standing in its own question, an empty
//! cell, a slot without a column. Exit status: 0 done, 1 `--check` found a difference, 2 bad arguments or input.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use serde::Serialize;

/// Clue wordings per relation, one a season; equal for all, so that a season holds out the same wordings for every fact.
const SEASONS: usize = 6;
/// The year of the first season.
const FIRST_YEAR: usize = 2001;
/// Shows in a season: one a month, always on the 15th.
const SHOWS: usize = 12;
/// Fewest statements a fact is told in.
const STATEMENTS: usize = 3;
/// The seven columns of the clue file known from Kaggle.
const HEADER: &str = "Show Number,Air Date,Round,Category,Value,Question,Answer\n";

/// Makes datasets/sample/clues.csv and statements.txt from the facts and wordings beside them.
#[derive(Parser)]
struct Args {
    /// Folder with facts/ and wordings.tsv; the two files are written into it
    #[arg(long, default_value = "datasets/sample")]
    dir: PathBuf,
    /// Write nothing into the folder; compare, and exit with status 1 if a file differs
    #[arg(long)]
    check: bool,
    /// Folder for report.json
    #[arg(long)]
    out: Option<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("{path}: {1}; see that it exists and may be read or written", path = .0.display())]
    Io(PathBuf, std::io::Error),
    #[error("{path}:{1}: {2}", path = .0.display())]
    Line(PathBuf, usize, String),
    #[error("{path} differs from what the facts make; run make_sample without --check", path = .0.display())]
    Differs(PathBuf),
}

/// Turns an I/O error at `path` into this program's.
fn at(path: &Path) -> impl Fn(std::io::Error) -> Error {
    move |source| Error::Io(path.to_owned(), source)
}

/// One tab-separated file: a header, then rows as wide as it.
struct Table {
    path: PathBuf,
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    fn read(path: PathBuf) -> Result<Self, Error> {
        let text = std::fs::read_to_string(&path).map_err(at(&path))?;
        let split = |line: &str| line.split('\t').map(str::to_owned).collect();
        let mut lines = text.lines().map(split);
        let header: Vec<String> = lines.next().unwrap_or_default();
        let rows: Vec<Vec<String>> = lines.collect();
        let table = Self { path, header, rows };
        for (i, row) in table.rows.iter().enumerate() {
            if row.len() != table.header.len() {
                return Err(
                    table.error(i, format!("{} cells, the header has {}", row.len(), table.header.len()))
                );
            }
            if row.iter().any(|cell| cell.trim().is_empty() || cell.trim() != cell) {
                return Err(table.error(i, "a cell is empty or has space around it".into()));
            }
        }
        Ok(table)
    }

    fn expect_header(&self, names: &[&str]) -> Result<(), Error> {
        if self.header.len() >= names.len() && self.header.iter().zip(names).all(|(have, want)| have == want)
        {
            return Ok(());
        }
        let what = format!("the header must begin with the columns {}", names.join(", "));
        Err(Error::Line(self.path.clone(), 1, what))
    }

    /// An error at row `i` (counted from 0, below the header).
    fn error(&self, i: usize, what: String) -> Error {
        Error::Line(self.path.clone(), i + 2, what)
    }
}

/// How the facts of one relation are told.
#[derive(Default)]
struct Wordings {
    category: Vec<String>,
    clue: Vec<String>,
    statement: Vec<String>,
}

/// Counts for the report and the README.
#[derive(Default, Debug, Serialize)]
struct Counts {
    relations: usize,
    facts: usize,
    clues: usize,
    statements: usize,
    facts_of: BTreeMap<String, usize>,
}

/// What the facts make.
struct Sample {
    clues: String,
    statements: String,
    counts: Counts,
}

/// Rows under way, each with the hash that places it.
#[derive(Default)]
struct Rows {
    clues: Vec<(u64, String)>,
    statements: Vec<(u64, String)>,
    /// Normalised question -> the place it came from.
    seen: HashMap<String, String>,
}

fn read_wordings(dir: &Path) -> Result<BTreeMap<String, Wordings>, Error> {
    let table = Table::read(dir.join("wordings.tsv"))?;
    table.expect_header(&["relation", "kind", "text"])?;
    let mut all: BTreeMap<String, Wordings> = BTreeMap::new();
    for (i, row) in table.rows.iter().enumerate() {
        let [relation, kind, text] = row.as_slice() else {
            continue;
        };
        let wordings = all.entry(relation.clone()).or_default();
        let (subject, answer) = (text.contains("{subject}"), text.contains("{answer}"));
        match kind.as_str() {
            "category" => wordings.category.push(text.clone()),
            "clue" if subject && !answer => wordings.clue.push(text.clone()),
            "clue" => {
                return Err(table.error(i, "a clue names {subject} and never {answer}".into()));
            }
            "statement" if subject && answer => wordings.statement.push(text.clone()),
            "statement" => {
                return Err(table.error(i, "a statement names {subject} and {answer}".into()));
            }
            other => {
                return Err(table.error(i, format!("kind is category, clue or statement, not {other}")));
            }
        }
    }
    for (relation, w) in &all {
        if w.clue.len() != SEASONS || w.statement.len() < STATEMENTS || w.category.is_empty() {
            let what =
                format!("{relation} needs a category, {SEASONS} clues and {STATEMENTS} or more statements");
            return Err(table.error(table.rows.len(), what));
        }
    }
    Ok(all)
}

/// Puts a fact into a template's slots; the first letter becomes a capital. `Err` names a slot that is no column.
fn fill(template: &str, header: &[String], row: &[String]) -> Result<String, String> {
    let mut text = template.to_owned();
    for (name, cell) in header.iter().zip(row) {
        text = text.replace(&format!("{{{name}}}"), cell);
    }
    if text.contains(['{', '}']) {
        return Err(format!("the wording '{template}' names a slot that is no column"));
    }
    if let Some((at, first)) = text.char_indices().find(|(_, c)| c.is_alphanumeric()) {
        text.replace_range(at..at + first.len_utf8(), &first.to_uppercase().to_string());
    }
    Ok(text)
}

/// Lower-case words with single spaces between and one at each end, so that whole words can be looked for.
fn words(text: &str) -> String {
    let lower = text.to_lowercase();
    let words: Vec<&str> = lower.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).collect();
    format!(" {} ", words.join(" "))
}

/// FNV-1a, then SplitMix64's finish so that short texts spread over all bits.
fn hash(text: &str) -> u64 {
    let fnv = |h: u64, b: u8| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3);
    let h = text.bytes().fold(0xcbf2_9ce4_8422_2325, fnv);
    let h = (h ^ (h >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let h = (h ^ (h >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    h ^ (h >> 31)
}

/// A number below `n`, drawn from bits of `h` that no other draw uses.
fn draw(h: u64, slot: u32, n: usize) -> usize {
    ((h >> (16 * slot)) & 0xffff) as usize % n
}

/// A CSV field after RFC 4180: in quotes where it holds a comma, a quote or a line break; quotes are doubled.
fn quote(field: &str) -> String {
    if field.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", field.replace('"', "\"\""))
    } else {
        field.to_owned()
    }
}

fn csv_row(season: usize, categories: &[String], question: &str, answer: &str) -> String {
    let h = hash(question);
    let month = draw(h, 0, SHOWS);
    let (round, step) = [("Jeopardy!", 200), ("Double Jeopardy!", 400)][draw(h, 1, 2)];
    let value = match step * (1 + draw(h, 2, 5)) {
        v if v < 1000 => format!("${v}"),
        v => format!("${},{:03}", v / 1000, v % 1000),
    };
    let (show, date) = (1 + SHOWS * season + month, format!("{}-{:02}-15", FIRST_YEAR + season, month + 1));
    let category = &categories[draw(h, 3, categories.len())];
    let [category, value, question, answer] = [category, &value, question, answer].map(quote);
    format!("{show},{date},{round},{category},{value},{question},{answer}\n")
}

impl Rows {
    fn add_fact(&mut self, table: &Table, i: usize, wordings: &Wordings) -> Result<(), Error> {
        let (header, row) = (&table.header, &table.rows[i]);
        let answer = &row[1];
        for (season, template) in wordings.clue.iter().enumerate() {
            let question = fill(template, header, row).map_err(|what| table.error(i, what))?;
            let key = words(&question);
            if key.contains(&words(answer)) {
                return Err(
                    table.error(i, format!("the answer '{answer}' stands in the question '{question}'"))
                );
            }
            let place = format!("{}:{}", table.path.display(), i + 2);
            if let Some(before) = self.seen.insert(key, place) {
                return Err(table.error(i, format!("{before} asks '{question}' too")));
            }
            self.clues.push((hash(&question), csv_row(season, &wordings.category, &question, answer)));
        }
        for template in &wordings.statement {
            let text = fill(template, header, row).map_err(|what| table.error(i, what))?;
            self.statements.push((hash(&text), text + "\n"));
        }
        Ok(())
    }
}

fn make(dir: &Path) -> Result<Sample, Error> {
    let (mut rows, mut counts) = (Rows::default(), Counts::default());
    for (relation, wordings) in read_wordings(dir)? {
        let table = Table::read(dir.join("facts").join(format!("{relation}.tsv")))?;
        table.expect_header(&["subject", "answer"])?;
        for i in 0..table.rows.len() {
            rows.add_fact(&table, i, &wordings)?;
        }
        counts.relations += 1;
        counts.facts += table.rows.len();
        counts.facts_of.insert(relation, table.rows.len());
    }
    (counts.clues, counts.statements) = (rows.clues.len(), rows.statements.len());
    let join = |mut rows: Vec<(u64, String)>| {
        rows.sort();
        rows.into_iter().map(|(_, text)| text).collect::<String>()
    };
    Ok(Sample { clues: HEADER.to_owned() + &join(rows.clues), statements: join(rows.statements), counts })
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    std::fs::write(path, text).map_err(at(path))
}

fn compare(path: &Path, text: &str) -> Result<(), Error> {
    let have = std::fs::read(path).map_err(at(path))?;
    if have == text.as_bytes() { Ok(()) } else { Err(Error::Differs(path.into())) }
}

fn run(args: &Args) -> Result<(), Error> {
    let sample = make(&args.dir)?;
    let act = if args.check { compare } else { write };
    act(&args.dir.join("clues.csv"), &sample.clues)?;
    act(&args.dir.join("statements.txt"), &sample.statements)?;
    let report = format!("{:#}\n", serde_json::json!(sample.counts));
    if let Some(out) = &args.out {
        std::fs::create_dir_all(out).map_err(at(out))?;
        write(&out.join("report.json"), &report)?;
    }
    print!("{report}");
    Ok(())
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("make_sample: {error}");
            ExitCode::from(if matches!(error, Error::Differs(_)) { 1 } else { 2 })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The committed folder, found from the package's folder and from the workspace's root alike.
    fn dir() -> PathBuf {
        let folders = ["datasets/sample", "../datasets/sample"].map(PathBuf::from);
        folders.into_iter().find(|d| d.join("wordings.tsv").exists()).unwrap()
    }

    #[test]
    fn committed_files_are_what_the_program_makes() {
        let sample = make(&dir()).unwrap();
        compare(&dir().join("clues.csv"), &sample.clues).unwrap();
        compare(&dir().join("statements.txt"), &sample.statements).unwrap();
    }

    #[test]
    fn counts_are_as_promised_and_stand_in_the_readme() {
        let counts = make(&dir()).unwrap().counts;
        assert!(counts.clues >= 2_000 && counts.facts >= 400 && counts.relations >= 14, "{counts:?}");
        assert_eq!(counts.clues, SEASONS * counts.facts);
        assert!(counts.statements >= STATEMENTS * counts.facts);
        let readme = std::fs::read_to_string(dir().join("README.md")).unwrap();
        let Counts { relations, facts, clues, statements, .. } = counts;
        let line = format!("{relations} relations, {facts} facts, {clues} clues, {statements} statements");
        assert!(readme.contains(&line), "README.md lacks: {line}");
        for (relation, facts) in counts.facts_of {
            assert!(
                readme.contains(&format!("| {relation} | {facts} |")),
                "README.md lacks {relation} {facts}"
            );
        }
    }

    #[test]
    fn every_facts_file_is_used() {
        let wordings = read_wordings(&dir()).unwrap();
        for entry in std::fs::read_dir(dir().join("facts")).unwrap() {
            let name = entry.unwrap().path();
            assert!(
                wordings.contains_key(name.file_stem().unwrap().to_str().unwrap()),
                "{name:?} has no wordings"
            );
        }
    }

    #[test]
    fn fields_are_quoted_as_rfc_4180_says() {
        assert_eq!(quote("plain"), "plain");
        assert_eq!(quote("Washington, D.C."), "\"Washington, D.C.\"");
        assert_eq!(quote("wrote \"Ulysses\""), "\"wrote \"\"Ulysses\"\"\"");
    }

    #[test]
    fn bad_facts_are_refused_with_their_place() {
        let header: Vec<String> = ["subject", "answer"].map(String::from).into();
        let table = |rows: &[[&str; 2]]| Table {
            path: "x.tsv".into(),
            header: header.clone(),
            rows: rows.iter().map(|r| r.map(String::from).into()).collect(),
        };
        let wordings =
            Wordings { category: vec!["C".into()], clue: vec!["This & {subject}".into()], statement: vec![] };
        let told = |t: &Table| (0..t.rows.len()).try_for_each(|i| Rows::default().add_fact(t, i, &wordings));
        let leak = told(&table(&[["fine", "answer"], ["Peru Lima Peru", "Lima"]])).unwrap_err().to_string();
        assert!(leak.starts_with("x.tsv:3: ") && leak.contains("stands in the question"), "{leak}");
        let twice = table(&[["same", "one"], ["same", "two"]]);
        let mut rows = Rows::default();
        rows.add_fact(&twice, 0, &wordings).unwrap();
        assert!(rows.add_fact(&twice, 1, &wordings).unwrap_err().to_string().contains("x.tsv:2 asks"));
    }
}
