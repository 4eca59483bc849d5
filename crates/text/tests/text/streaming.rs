//! Decoding by parts: never half a character, and the parts are the whole.

use buzzer_text::{StreamDecoder, Tokenizer};
use rand_chacha::rand_core::RngCore;

use crate::support::{all, below, llama, nasty_texts, oracle, seeded};

fn parts(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    let mut decoder = StreamDecoder::new(tokenizer);
    let mut parts: Vec<String> = ids.iter().filter_map(|&id| decoder.push(id).unwrap()).collect();
    assert!(parts.iter().all(|part| !part.is_empty()));
    parts.push(decoder.finish().unwrap());
    parts
}

/// What bytes say, character by character: a byte that begins none becomes U+FFFD.
fn lossy(mut bytes: &[u8]) -> String {
    let mut out = String::new();
    while !bytes.is_empty() {
        let character = (1..=bytes.len().min(4)).find_map(|len| std::str::from_utf8(&bytes[..len]).ok());
        out.push_str(character.unwrap_or("\u{FFFD}"));
        bytes = &bytes[character.map_or(1, str::len)..];
    }
    out
}

/// Bytes as a model might emit them: some random, some whole characters, some characters cut.
fn random_bytes(generator: &mut impl RngCore) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..1 + generator.next_u32() % 8 {
        let character =
            ["é", "中", "😀", "a", " ", "\u{10ffff}"][generator.next_u32() as usize % 6].as_bytes();
        match generator.next_u32() % 3 {
            0 => bytes.push(generator.next_u32() as u8),
            1 => bytes.extend_from_slice(character),
            _ => bytes.extend_from_slice(&character[..1 + generator.next_u32() as usize % character.len()]),
        }
    }
    bytes
}

#[test]
fn parts_of_encoded_texts_hold_whole_characters_and_add_up() {
    for (name, tokenizer) in all() {
        for text in nasty_texts(1000, 3) {
            let ids = tokenizer.encode(&text).unwrap();
            let parts = parts(&tokenizer, &ids);
            assert_eq!(parts.concat(), tokenizer.decode(&ids).unwrap(), "{name}: {text:?}");
            if !text.contains('\u{FFFD}') {
                assert!(parts.iter().all(|part| !part.contains('\u{FFFD}')), "{name}: {text:?}: {parts:?}");
            }
            // A literal `▁` decodes to a space, as it does in sentencepiece.
            let spaced = if name == "bytes" { text } else { text.replace('▁', " ") };
            assert_eq!(parts.concat(), spaced, "{name}");
        }
    }
}

#[test]
fn byte_fallback_waits_for_the_character() {
    let tokenizer = Tokenizer::byte_level_test();
    let mut decoder = StreamDecoder::new(&tokenizer);
    let mut push = |byte: u8| decoder.push(u32::from(byte) + 3).unwrap();
    let [first, second, third, fourth] = <[u8; 4]>::try_from("😀".as_bytes()).unwrap();
    assert_eq!(push(b'a').as_deref(), Some("a"));
    assert_eq!((push(first), push(second), push(third)), (None, None, None));
    assert_eq!(push(fourth).as_deref(), Some("😀"));
    assert_eq!((push(first), push(second)), (None, None));
    assert_eq!(push(b'b').as_deref(), Some("\u{FFFD}\u{FFFD}b"));
    assert_eq!(push(first), None);
    assert_eq!(decoder.finish().unwrap(), "\u{FFFD}");
    assert_eq!(decoder.finish().unwrap(), "");
}

#[test]
fn random_bytes_stream_as_they_decode_and_at_most_three_wait() {
    let tokenizer = Tokenizer::byte_level_test();
    let mut generator = seeded(4);
    for _ in 0..5000 {
        let bytes = random_bytes(&mut generator);
        let ids: Vec<u32> = bytes.iter().map(|&byte| u32::from(byte) + 3).collect();
        assert_eq!(tokenizer.decode(&ids).unwrap(), lossy(&bytes), "{bytes:x?}");
        assert_eq!(parts(&tokenizer, &ids).concat(), lossy(&bytes), "{bytes:x?}");
        let mut decoder = StreamDecoder::new(&tokenizer);
        let mut out = String::new();
        for (done, &id) in ids.iter().enumerate() {
            out.extend(decoder.push(id).unwrap());
            let told = &lossy(&bytes)[..out.len()];
            assert_eq!(out, told, "{bytes:x?}");
            let waiting = lossy(&bytes[..=done]).chars().count() - out.chars().count();
            assert!(waiting <= 3, "{bytes:x?}");
        }
    }
}

/// What ids say, read off the vocabulary: ids 3 to 258 are bytes in every tokenizer here.
fn spelt(tokenizer: &Tokenizer, ids: &[u32], strips: bool) -> String {
    let (mut out, mut bytes) = (String::new(), Vec::new());
    for &id in ids {
        match id {
            0..3 => {}
            3..259 => bytes.push((id - 3) as u8),
            _ => {
                let Some(piece) = tokenizer.token(id) else { continue };
                out += &lossy(&std::mem::take(&mut bytes));
                out += &piece.replace('▁', " ");
            }
        }
    }
    out += &lossy(&bytes);
    out.strip_prefix(' ').filter(|_| strips).map(str::to_owned).unwrap_or(out)
}

#[test]
fn random_ids_of_any_kind_decode_as_they_are_spelt_and_add_up() {
    let mut generator = seeded(5);
    for (name, tokenizer) in all() {
        for _ in 0..2000 {
            // Special tokens and ids past the end of the vocabulary are among them; bytes are frequent.
            let mut id = |_| match below(&mut generator, 2) {
                0 => below(&mut generator, 262) as u32,
                _ => below(&mut generator, tokenizer.vocab_size() + 3) as u32,
            };
            let ids: Vec<u32> = (0..12).map(&mut id).collect();
            let expected = spelt(&tokenizer, &ids, name != "bytes");
            assert_eq!(tokenizer.decode(&ids).unwrap(), expected, "{name}: {ids:?}");
            assert_eq!(parts(&tokenizer, &ids).concat(), expected, "{name}: {ids:?}");
        }
    }
}

#[test]
fn a_decoder_is_new_again_after_its_end() {
    let Some(tokenizer) = llama() else { return };
    let ids = tokenizer.encode("Who is it?").unwrap();
    let mut decoder = StreamDecoder::new(&tokenizer);
    for _ in 0..2 {
        let mut out: String = ids.iter().filter_map(|&id| decoder.push(id).unwrap()).collect();
        out.push_str(&decoder.finish().unwrap());
        assert_eq!(out, "Who is it?");
    }
}

#[test]
fn valid_texts_decode_as_in_the_plain_library() {
    for (name, tokenizer) in all() {
        let oracle = oracle(&tokenizer);
        for text in nasty_texts(1000, 6) {
            let ids = tokenizer.encode(&text).unwrap();
            assert_eq!(
                tokenizer.decode(&ids).unwrap(),
                oracle.decode(&ids, true).unwrap(),
                "{name}: {text:?}"
            );
        }
    }
}
