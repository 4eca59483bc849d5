//! One renderer for training and answering: the prompt begins the example, the mask is the rest.

use buzzer_text::{Fields, Renderer, Template, TextError, Tokenizer, show_masked};

use crate::support::{all, nasty_texts, trained};

#[test]
fn the_prompt_begins_the_example_and_the_mask_is_the_answer_and_the_end() {
    let texts = nasty_texts(600, 7);
    for (name, tokenizer) in all() {
        for template in Template::ALL {
            let renderer = Renderer::new(tokenizer.clone(), template);
            for three in texts.windows(3) {
                let fields = Fields { category: &three[0], question: &three[1], answer: &three[2] };
                check(name, &renderer, &fields);
            }
        }
    }
}

fn check(name: &str, renderer: &Renderer, fields: &Fields<'_>) {
    let (tokenizer, template) = (renderer.tokenizer(), renderer.template());
    let example = renderer.example(fields).unwrap();
    let [given, wanted] = template.given_and_wanted(fields);
    let prompt = renderer.prompt(fields.category, given).unwrap();
    let (begin, end) = (tokenizer.bos_id(), tokenizer.eos_id());
    assert!(example.ids.starts_with(&prompt), "{name}: {fields:?}");
    assert_eq!(example.loss_mask.len(), example.ids.len());
    assert!(
        example.loss_mask.iter().enumerate().all(|(i, &mask)| mask == (i >= prompt.len())),
        "{name}: {fields:?}"
    );
    assert_eq!((example.ids[0], *example.ids.last().unwrap()), (begin, end));
    let inside = &example.ids[1..example.ids.len() - 1];
    assert!(!inside.contains(&begin) && !inside.contains(&end), "{name}: {fields:?}");
    let whole = template.prompt(fields.category, given) + &template.completion(wanted);
    assert_eq!(inside, tokenizer.encode(&whole).unwrap(), "{name}: {fields:?}");
    let answer = &example.ids[prompt.len()..];
    let spaced = |text: &str| if name == "bytes" { format!(" {text}") } else { text.replace('▁', " ") };
    assert_eq!(tokenizer.decode(answer).unwrap(), spaced(wanted), "{name}: {fields:?}");
}

#[test]
fn many_at_once_are_the_same_as_one_by_one_and_in_order() {
    let texts = nasty_texts(5000, 8);
    let fields: Vec<_> =
        texts.windows(3).map(|t| Fields { category: &t[0], question: &t[1], answer: &t[2] }).collect();
    for (name, tokenizer) in all() {
        let renderer = Renderer::new(tokenizer, Template::Category);
        let together = renderer.examples(&fields).unwrap();
        assert_eq!(together.len(), fields.len());
        for (example, fields) in together.iter().zip(&fields).step_by(13) {
            assert_eq!(*example, renderer.example(fields).unwrap(), "{name}: {fields:?}");
        }
        assert!(renderer.examples(&[]).unwrap().is_empty());
    }
}

#[test]
fn a_shown_row_has_its_loss_between_brackets() {
    let renderer = Renderer::new(trained(), Template::Question);
    let fields = Fields { category: "", question: "Who keeps the lighthouse?", answer: "the keeper 😀" };
    let shown = show_masked(renderer.tokenizer(), &renderer.example(&fields).unwrap());
    assert_eq!(shown, "<s>### Question: Who keeps the lighthouse?\n ### Answer:⟦ the keeper 😀</s>⟧");
}

#[test]
fn a_piece_across_the_answers_beginning_is_refused() {
    // `:▁` is one piece here, so a prompt that ends in a colon is no beginning of the whole.
    let bytes = spanning_tokenizer();
    let tokenizer = Tokenizer::from_bytes(&bytes).unwrap();
    let renderer = Renderer::new(tokenizer, Template::Question);
    let fields = Fields { category: "", question: "q", answer: "a" };
    let error = renderer.example(&fields).unwrap_err();
    assert!(matches!(error, TextError::PromptNotPrefix { .. }), "{error}");
    let TextError::Example { index, source } = renderer.examples(&[fields; 3]).unwrap_err() else {
        panic!("a failing example among many names its place");
    };
    assert!(index == 0 && matches!(*source, TextError::PromptNotPrefix { .. }));
    let chat = Renderer::new(renderer.tokenizer().clone(), Template::Chat);
    let example = chat.example(&fields).unwrap();
    assert!(example.ids.starts_with(&chat.prompt("", "q").unwrap()));
}

#[test]
fn a_tokenizer_with_pieces_across_words_still_agrees_with_the_plain_library() {
    let bytes = spanning_tokenizer();
    let tokenizer = Tokenizer::from_bytes(&bytes).unwrap();
    let oracle = crate::support::oracle(&tokenizer);
    for text in nasty_texts(500, 9).iter().map(String::as_str).chain(["a: b: c", ":  :"]) {
        let expected = oracle.encode(text, false).unwrap();
        assert_eq!(tokenizer.encode(text).unwrap(), expected.get_ids(), "{text:?}");
    }
}

fn spanning_tokenizer() -> Vec<u8> {
    crate::loading::edited(|json| {
        let vocab = json["model"]["vocab"].as_object_mut().unwrap();
        let next = vocab.len();
        vocab.insert(":▁".to_owned(), next.into());
        let merges = json["model"]["merges"].as_array_mut().unwrap();
        merges.insert(0, serde_json::json!([":", "▁"]));
    })
}
