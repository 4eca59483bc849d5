//! Every reader against files that were damaged on purpose: an error or a value each time, no panic, and no more memory than
//! the file accounts for.
//!
//! Mutations are drawn from a fixed seed, so that a failure comes again; `BUZZER_HOSTILE_SECONDS` makes each reader go
//! on for that long. `fuzz/` hands inputs to the same readers, guided by coverage, where there is a nightly compiler.

#![allow(clippy::unwrap_used, reason = "a test's helpers may panic as its tests do")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

#[path = "../../../../fuzz/src/readers.rs"]
#[allow(unreachable_pub, reason = "public in the crate that it is shared with")]
mod readers;

use readers::Reader;

/// Inputs per reader where nothing says how long.
const INPUTS: usize = 4000;
/// What a reader may hold for itself; patterns are compiled into tables of some hundred kilobytes.
const OWN_BYTES: usize = 1 << 20;
/// What it may hold for every byte of the input: floats of two bytes become four, and names and shapes of a header that
/// says little in few bytes become structures.
const BYTES_PER_BYTE: usize = 64;

/// The system's allocator, counting what each thread holds.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // While a thread ends its counters are gone, and nothing is asked of it any more.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(held.get())));
    });
}

// SAFETY: every call is passed on to the system's allocator as it came; counting allocates nothing, because the counters
// are plain cells with constant first values.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A generator that is written out here, so that no library changes what a number stands for.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    fn pick<'a, T: ?Sized>(&mut self, from: &[&'a T]) -> &'a T {
        from[self.below(from.len())]
    }
}

/// Pieces that mean something to one reader or another.
const TOKENS: [&[u8]; 44] = [
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\0\0\0\0\0\0\0\x80",
    b"\x7f",
    b"\x80",
    b"0",
    b"-1",
    b"1e400",
    b"18446744073709551615",
    b"9223372036854775808",
    b"1.5",
    b"null",
    b"true",
    b"\"\"",
    b"[]",
    b"{}",
    b"[[[[[[[[[[[[[[[[[[[[",
    b"{\"a\":{\"a\":{\"a\":",
    b",",
    b":",
    b"\"",
    b"../",
    b"/",
    b"\\u0000",
    b"lm_head.weight",
    b"\"__metadata__\":{}",
    b"F64",
    b"F4",
    b"BF16",
    b"(",
    b"t",
    b"R",
    b"Q",
    b"u.",
    b"q\0h\0",
    b"cos\nsystem\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"PK\x01\x02",
    b"PK\x05\x06",
    b"GGUF\x03\0\0\0",
    b"\x05\0\0\0\0\0\0\0llama",
    b"\x09\0\0\0\x08\0\0\0",
    b"\0\0\0\0\x01\0\0\0",
];

/// A few damages to one of the seeds.
fn mutated(random: &mut Random, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = seeds[random.below(seeds.len())].clone();
    for _ in 0..1 + random.below(4) {
        let at = near_a_part_that_counts(random, bytes.len());
        let length = 1 + random.below(8);
        let end = bytes.len().min(at + length);
        match random.below(8) {
            0 => bytes.truncate(at),
            1 => drop(bytes.splice(at..at, random.pick(&TOKENS).iter().copied())),
            2 => drop(bytes.splice(at..end, random.pick(&TOKENS).iter().copied())),
            3 => drop(bytes.drain(at..end)),
            4 => {
                let other = &seeds[random.below(seeds.len())];
                let from = random.below(other.len());
                let part = other[from..other.len().min(from + random.below(64))].to_vec();
                drop(bytes.splice(at..end, part));
            }
            5 => {
                let part = bytes[at..end].to_vec();
                drop(bytes.splice(at..at, part));
            }
            _ => bytes[at..end].iter_mut().for_each(|byte| *byte = random.next() as u8),
        }
    }
    bytes
}

/// Headers stand at the beginning of a file or at its end.
fn near_a_part_that_counts(random: &mut Random, length: usize) -> usize {
    match random.below(4) {
        0 => random.below(length.min(64)),
        1 => length - random.below(length.min(512)) - usize::from(length > 0),
        _ => random.below(length),
    }
}

fn forms() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/weights/forms")
}

/// Whole inputs of a reader.
fn seeds(reader: &str) -> Vec<Vec<u8>> {
    let files: &[&str] = match reader {
        "safetensors" => &[
            "adapters/patterns/adapter_model.safetensors",
            "adapters/some-layers/adapter_model.safetensors",
            "bnb-int8/model.safetensors",
            "bnb-fp4/model.safetensors",
        ],
        "pytorch" => &["bin-odd/views.bin", "bin-odd/transposed.bin", "bin-odd/legacy.bin"],
        "pickle" => return pickles(),
        "index" => return vec![index()],
        "gguf" => &["gguf/model.gguf"],
        "config" => &["hf/config.json", "bnb-nf4-dq/config.json", "bnb-int8/config.json"],
        "params" => &["meta/params.json"],
        "adapter_config" => &[
            "adapters/patterns/adapter_config.json",
            "adapters/rslora-regex/adapter_config.json",
            "adapters/some-layers/adapter_config.json",
            "adapters/all-linear-bin/adapter_config.json",
            "refused/dora/adapter_config.json",
        ],
        "adapter" => {
            &["adapters/patterns/adapter_model.safetensors", "adapters/all-linear-bin/adapter_model.bin"]
        }
        other => panic!("no seeds for {other}"),
    };
    files.iter().map(|file| fs::read(forms().join(file)).unwrap()).collect()
}

/// The pickles of real archives: from protocol to end.
fn pickles() -> Vec<Vec<u8>> {
    let inside = |file: &&str| {
        let bytes = fs::read(forms().join(file)).unwrap();
        let start =
            bytes.windows(3).position(|part| part == b"\x80\x02}" || part == b"\x80\x04\x95").unwrap();
        let end = bytes[start..].windows(3).position(|part| part == b".PK").unwrap();
        bytes[start..start + end + 1].to_vec()
    };
    ["bin-odd/views.bin", "bin-odd/transposed.bin"].iter().map(inside).collect()
}

/// Every tensor of the sample, by turns in the two shards of the reader's folder.
fn index() -> Vec<u8> {
    let model = buzzer_weights::Checkpoint::open(&forms().join("hf")).unwrap();
    let map: serde_json::Map<_, _> = model
        .names()
        .enumerate()
        .map(|(i, name)| (name.to_owned(), ["a.safetensors", "b.bin"][i % 2].into()))
        .collect();
    serde_json::json!({"metadata": {}, "weight_map": map}).to_string().into_bytes()
}

/// The most that reading these bytes held, and whether they were accepted.
fn measured(reader: &Reader, bytes: &[u8]) -> (usize, bool) {
    let before = HELD.get();
    PEAK.set(before);
    let accepted = reader.accepts(bytes);
    ((PEAK.get() - before).unsigned_abs(), accepted)
}

#[test]
fn damaged_files_are_errors_and_cost_nothing() {
    let time =
        std::env::var("BUZZER_HOSTILE_SECONDS").ok().map(|text| Duration::from_secs(text.parse().unwrap()));
    for reader in Reader::all(&forms()) {
        let seeds = seeds(reader.name);
        assert!(seeds.iter().any(|seed| reader.accepts(seed)), "no seed of `{}` is whole", reader.name);
        let (start, mut random, mut inputs, mut accepted) = (Instant::now(), Random(1), 0, 0);
        let mut most = 0;
        while time.map_or(inputs < INPUTS, |time| start.elapsed() < time) {
            let bytes = mutated(&mut random, &seeds);
            let result = catch_unwind(AssertUnwindSafe(|| measured(&reader, &bytes)));
            let name = reader.name;
            let Ok((held, whole)) = result else {
                fs::write(std::env::temp_dir().join(format!("hostile-{name}")), &bytes).unwrap();
                panic!(
                    "input {inputs} of the reader `{name}` panics; it is in the temporary folder as hostile-{name}"
                );
            };
            let bound = OWN_BYTES + BYTES_PER_BYTE * bytes.len();
            assert!(held <= bound, "input {inputs} of `{name}`: {held} bytes held for {} bytes", bytes.len());
            most = most.max(held);
            accepted += usize::from(whole);
            inputs += 1;
        }
        println!("{}: {inputs} inputs, {accepted} of them accepted, at most {most} bytes held", reader.name);
    }
}

/// A GGUF header: counts, and whatever follows.
fn gguf(tensors: u64, pairs: u64, rest: &[&[u8]]) -> Vec<u8> {
    let head = [
        b"GGUF".to_vec(),
        3_u32.to_le_bytes().into(),
        tensors.to_le_bytes().into(),
        pairs.to_le_bytes().into(),
    ];
    [head.concat(), rest.concat()].concat()
}

/// A tensor's entry, dimensions fastest first.
fn entry(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let dims_bytes: Vec<u8> = dims.iter().flat_map(|dim| dim.to_le_bytes()).collect();
    let count = (dims.len() as u32).to_le_bytes();
    [&text(name), &count[..], &dims_bytes, &kind.to_le_bytes(), &offset.to_le_bytes()].concat()
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

/// A list of a type that says how long it is, and has nothing in it.
fn list(kind: u32, length: u64) -> Vec<u8> {
    [text("a list"), 9_u32.to_le_bytes().into(), kind.to_le_bytes().into(), length.to_le_bytes().into()]
        .concat()
}

#[test]
fn gguf_headers_that_promise_too_much_are_refused_and_cost_nothing() {
    const HUGE: u64 = u64::MAX;
    // ggml's types of tensors, and GGUF's of values.
    const F32: u32 = 0;
    const Q8_0: u32 = 8;
    const TEXT: u32 = 8;
    const F64: u32 = 12;
    let reader = Reader::all(&forms()).into_iter().find(|reader| reader.name == "gguf").unwrap();
    let zeros = [0; 256];
    let cases: [(&str, Vec<u8>); 16] = [
        ("as many pairs as can be counted", gguf(0, HUGE, &[])),
        ("more pairs than follow", gguf(0, 1 << 14, &[&zeros])),
        ("more tensors than follow", gguf(1 << 17, 0, &[&zeros])),
        ("a key without end", gguf(0, 1, &[&HUGE.to_le_bytes()])),
        ("a key of a terabyte", gguf(0, 1, &[&(1_u64 << 40).to_le_bytes(), &zeros])),
        ("as many texts as can be counted", gguf(0, 1, &[&list(TEXT, HUGE), &zeros])),
        ("numbers whose bytes overflow", gguf(0, 1, &[&list(F64, HUGE / 4), &zeros])),
        ("a list of lists", gguf(0, 1, &[&list(9, 1 << 20), &list(9, 1 << 20)])),
        ("a product that overflows", gguf(1, 0, &[&entry("t", &[1 << 32, 1 << 32], F32, 0), &zeros])),
        ("bytes that overflow", gguf(1, 0, &[&entry("t", &[1 << 62], F32, 0), &zeros])),
        ("a terabyte of blocks", gguf(1, 0, &[&entry("t", &[32, 1 << 35], Q8_0, 0), &zeros])),
        ("an offset at the end of all numbers", gguf(1, 0, &[&entry("t", &[8], F32, HUGE - 31), &zeros])),
        ("no dimension", gguf(1, 0, &[&entry("t", &[], F32, 0), &zeros])),
        ("a thousand dimensions", gguf(1, 0, &[&entry("t", &[1; 1000], F32, 0), &zeros])),
        ("half a block", gguf(1, 0, &[&entry("t", &[48], Q8_0, 0), &zeros])),
        (
            "two tensors in one place",
            gguf(2, 0, &[&entry("a", &[8], F32, 0), &entry("b", &[8], F32, 0), &zeros]),
        ),
    ];
    for (what, bytes) in cases {
        let (held, accepted) = measured(&reader, &bytes);
        assert!(!accepted, "{what}");
        assert!(held <= 64 << 10, "{what}: {held} bytes held for {}", bytes.len());
    }
}
