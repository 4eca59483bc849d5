//! Tokenizers, nasty texts and the oracle that the other modules share.

use std::path::PathBuf;

use buzzer_text::Tokenizer;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use tokenizers::Tokenizer as HfTokenizer;

/// Text of this project's own, enough for a few hundred merges.
pub(crate) const CORPUS: &str = include_str!("corpus.txt");

/// A file of the folder beside the repository, if it is there.
pub(crate) fn shared(name: &str) -> Option<PathBuf> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared").join(name);
    if !path.exists() {
        eprintln!("skipped: {} is not there", path.display());
        return None;
    }
    Some(path)
}

/// Llama 2's own tokenizer, if it is there.
pub(crate) fn llama() -> Option<Tokenizer> {
    let path = shared("tokenizer/llama2/tokenizer.json")?;
    Some(Tokenizer::from_file(&path).unwrap())
}

/// A small tokenizer of Llama 2's kind.
pub(crate) fn trained() -> Tokenizer {
    Tokenizer::train_llama_style(CORPUS.lines(), 400).unwrap()
}

/// Every tokenizer at hand, with a name for messages.
pub(crate) fn all() -> Vec<(&'static str, Tokenizer)> {
    let mut all = vec![("bytes", Tokenizer::byte_level_test()), ("trained", trained())];
    all.extend(llama().map(|tokenizer| ("llama", tokenizer)));
    all
}

/// The same tokenizer as the library reads it, without what a trainer must not inherit.
pub(crate) fn oracle(tokenizer: &Tokenizer) -> HfTokenizer {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    tokenizer.save(&path).unwrap();
    let mut inner = HfTokenizer::from_file(&path).unwrap();
    inner.with_truncation(None).unwrap();
    inner.with_padding(None);
    inner.set_encode_special_tokens(true);
    inner
}

/// A generator of one seed.
pub(crate) fn seeded(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// A number below `bound`.
pub(crate) fn below(generator: &mut ChaCha8Rng, bound: usize) -> usize {
    (generator.next_u64() % bound as u64) as usize
}

const PARTS: &[&str] = &[
    " ",
    "  ",
    "       ",
    "▁",
    "▁▁",
    "\n",
    "\r\n",
    "\t",
    "\u{a0}",
    "\u{3000}",
    "\u{200b}",
    "\u{feff}",
    "\0",
    "<s>",
    "</s>",
    "<unk>",
    "<0x41>",
    "<0x0A>",
    "###",
    "### Answer:",
    "[INST]",
    "[/INST]",
    "the",
    "The",
    "of",
    "a",
    "A",
    "é",
    "e\u{301}",
    "ß",
    "Ж",
    "中",
    "文",
    "カ",
    "ع",
    "ש",
    "ก",
    "😀",
    "👩\u{200d}🚀",
    "🇫🇷",
    "\u{10ffff}",
    "\u{fffd}",
    "'",
    "\"",
    "\\\"",
    "``",
    "''",
    "...",
    "—",
    "½",
    "1984",
    "$2,000",
    "http://x.y/z?q=1",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
];

/// Texts that break naive tokenizing: written ones, then random ones.
pub(crate) fn nasty_texts(random: usize, seed: u64) -> Vec<String> {
    let written = [
        "",
        " ",
        "   ",
        "a",
        " a",
        "  a",
        "a ",
        "a  ",
        "a   b",
        "▁",
        " ▁ ",
        "▁a▁",
        "a▁b",
        "<s>",
        " <s> ",
        "x<s>y</s>z",
        "<s><s>",
        "</s></s>",
        "\n",
        " \n ",
        "a\n b",
        "### Question: ",
        "Ünïcödé  ßpaces ",
        "😀😀 😀",
        "e\u{301}\u{301}",
    ];
    let mut generator = seeded(seed);
    let mut random_text = |_| {
        let parts = 1 + below(&mut generator, 12);
        (0..parts).map(|_| PARTS[below(&mut generator, PARTS.len())]).collect::<String>()
    };
    let random: Vec<String> = (0..random).map(&mut random_text).collect();
    written.into_iter().map(str::to_owned).chain(random).collect()
}
