//! What packing must keep, for random documents of every length and every option.
//!
//! A document's tokens here are `number * SPAN + place`, so a token tells where it came from.

use std::collections::{BTreeMap, HashMap};

use burn_dataset::Dataset;
use buzzer_data::{Batch, LossOn, PackOptions, Packed, PackedRow, Packing, pack};
use buzzer_text::Example;
use serde::Deserialize;

use crate::support::{between, seeded};

const SPAN: u32 = 4096;

fn documents(lengths: &[usize], seed: u64) -> Vec<Example> {
    let mut generator = seeded(seed);
    let mut document = |(number, &len): (usize, &usize)| {
        let prompt = between(&mut generator, 0, len);
        Example {
            ids: (0..len as u32).map(|place| number as u32 * SPAN + place).collect(),
            loss_mask: (0..len).map(|place| place >= prompt).collect(),
        }
    };
    lengths.iter().enumerate().map(&mut document).collect()
}

/// Cases of every kind: clue-like lengths, rows of one document, documents longer than a row, no documents.
fn cases() -> Vec<(Vec<Example>, PackOptions)> {
    let mut generator = seeded(3);
    let mut cases = Vec::new();
    for case in 0..240 {
        let row_len = [1, 2, 7, 63, 64, 65, 128, 1024][case % 8];
        let longest = [3, row_len / 2 + 1, row_len, row_len + 9, 80][case % 5];
        let count = between(&mut generator, 0, 300);
        let lengths: Vec<usize> = (0..count).map(|_| between(&mut generator, 1, longest)).collect();
        let options = PackOptions {
            packing: [Packing::Isolated, Packing::None, Packing::Wrapped][case % 3],
            row_len,
            loss_on: [LossOn::All, LossOn::Answers][case / 2 % 2],
            seed: case as u64,
        };
        cases.push((documents(&lengths, case as u64), options));
    }
    cases
}

fn whole_documents(packing: Packing) -> bool {
    packing != Packing::Wrapped
}

#[test]
fn rows_are_rectangles_without_holes_and_within_their_length() {
    for (examples, options) in cases() {
        for row in &pack(&examples, &options).rows {
            let len = row.ids.len();
            assert!(len <= options.row_len, "{options:?}");
            assert_eq!([row.positions.len(), row.documents.len(), row.labels.len()], [len; 3], "{options:?}");
        }
    }
}

#[test]
fn every_document_is_packed_whole_and_once_or_counted_as_too_long() {
    for (examples, options) in cases().iter().filter(|(_, options)| whole_documents(options.packing)) {
        let packed = pack(examples, options);
        let mut seen: BTreeMap<Vec<u32>, usize> = BTreeMap::new();
        for row in &packed.rows {
            row.ids
                .chunk_by(|a, b| a / SPAN == b / SPAN)
                .for_each(|ids| *seen.entry(ids.to_vec()).or_default() += 1);
        }
        let fits = |example: &&Example| example.ids.len() <= options.row_len;
        let fitting: Vec<_> = examples.iter().filter(fits).collect();
        let expected =
            fitting.iter().filter(|example| !example.ids.is_empty()).map(|example| (example.ids.clone(), 1));
        assert_eq!(seen, expected.collect(), "{options:?}");
        assert_eq!(packed.report.documents, fitting.len());
        assert_eq!(packed.report.too_long, examples.len() - fitting.len());
    }
}

#[test]
fn no_attention_pair_crosses_a_document_and_positions_restart() {
    for (examples, options) in cases().iter().filter(|(_, options)| whole_documents(options.packing)) {
        for row in &pack(examples, options).rows {
            check_isolation(row);
        }
    }
}

fn check_isolation(row: &PackedRow) {
    for query in 0..row.ids.len() {
        assert_eq!(row.positions[query], row.ids[query] % SPAN);
        // A query sees a key if it stands before it in the same document: by number, and by origin.
        let sees = |key: usize| row.documents[key] == row.documents[query];
        let may = |key: usize| row.ids[key] / SPAN == row.ids[query] / SPAN;
        assert!((0..=query).all(|key| sees(key) == may(key)));
    }
    assert!(row.documents.is_sorted() && row.documents.first().is_none_or(|&first| first == 0));
}

#[test]
fn every_target_is_predicted_once_and_no_other_token_is() {
    for (examples, options) in cases().iter().filter(|(_, options)| whole_documents(options.packing)) {
        let packed = pack(examples, options);
        let mut times: HashMap<u32, usize> = HashMap::new();
        for row in &packed.rows {
            for (place, (&id, &label)) in
                row.ids.iter().zip(&row.labels).enumerate().filter(|(_, (_, label))| **label != -100)
            {
                assert_eq!(label, id as i32);
                // The token before it, which predicts it, is its own document's.
                assert_eq!(row.ids[place - 1] + 1, id);
                *times.entry(id).or_default() += 1;
            }
        }
        let targets =
            examples.iter().filter(|example| example.ids.len() <= options.row_len).flat_map(|example| {
                let pairs = example.ids.iter().zip(&example.loss_mask).skip(1);
                pairs.filter(|(_, answer)| **answer || options.loss_on == LossOn::All).map(|(&id, _)| (id, 1))
            });
        assert_eq!(times, targets.collect(), "{options:?}");
        assert_eq!(packed.report.loss_tokens, times.len());
    }
}

#[test]
fn the_report_adds_up() {
    for (examples, options) in cases() {
        let Packed { rows, report } = pack(&examples, &options);
        let given: usize = examples.iter().map(|example| example.ids.len()).sum();
        let tokens: usize = rows.iter().map(|row| row.ids.len()).sum();
        assert_eq!((report.rows, report.tokens), (rows.len(), tokens), "{options:?}");
        assert_eq!(report.tokens + report.tokens_dropped, given, "{options:?}");
        assert_eq!(report.documents + report.too_long, examples.len(), "{options:?}");
        assert_eq!(report.longest, examples.iter().map(|example| example.ids.len()).max().unwrap_or(0));
        let places = rows.len() * options.row_len;
        let efficiency = if places == 0 { 0.0 } else { tokens as f64 / places as f64 };
        assert!((report.efficiency - efficiency).abs() < 1e-12);
    }
}

#[test]
fn the_same_seed_gives_the_same_rows_and_another_gives_others() {
    for (examples, options) in cases() {
        assert_eq!(pack(&examples, &options), pack(&examples, &options));
    }
    let examples = documents(&(0..500).map(|i| 20 + i % 60).collect::<Vec<_>>(), 1);
    let of_seed = |seed| pack(&examples, &PackOptions { seed, ..PackOptions::default() });
    assert_ne!(of_seed(0).rows, of_seed(1).rows);
    assert_eq!(of_seed(0).report.tokens, of_seed(1).report.tokens);
}

/// Best fit in order of falling length, the slow and obvious way: the free room of every row.
fn rooms_of_plain_best_fit(lengths: &[usize], row_len: usize) -> Vec<usize> {
    let mut lengths: Vec<usize> = lengths.iter().copied().filter(|&len| len <= row_len).collect();
    lengths.sort_unstable_by(|a, b| b.cmp(a));
    let mut rooms: Vec<usize> = Vec::new();
    for len in lengths {
        match rooms.iter_mut().filter(|room| **room >= len).min() {
            Some(room) => *room -= len,
            None => rooms.push(row_len - len),
        }
    }
    rooms.sort_unstable();
    rooms
}

#[test]
fn isolated_rows_are_as_full_as_plain_best_fit_makes_them() {
    for (examples, options) in cases().iter().filter(|(_, options)| options.packing == Packing::Isolated) {
        let lengths: Vec<usize> = examples.iter().map(|example| example.ids.len()).collect();
        let rows = pack(examples, options).rows;
        let mut rooms: Vec<usize> = rows.iter().map(|row| options.row_len - row.ids.len()).collect();
        rooms.sort_unstable();
        assert_eq!(rooms, rooms_of_plain_best_fit(&lengths, options.row_len), "{options:?}");
    }
}

#[test]
fn clue_like_lengths_fill_rows_to_the_brim() {
    let mut generator = seeded(4);
    let lengths: Vec<usize> = (0..20_000).map(|_| between(&mut generator, 15, 60)).collect();
    for row_len in [512, 1024, 2048] {
        let options = PackOptions { row_len, ..PackOptions::default() };
        let report = pack(&documents(&lengths, 4), &options).report;
        assert!(report.efficiency >= 0.995, "{row_len}: {}", report.efficiency);
    }
}

#[test]
fn unpacked_rows_are_the_documents_in_order() {
    let examples = documents(&[5, 3, 9, 1], 5);
    let options = PackOptions { packing: Packing::None, row_len: 5, ..PackOptions::default() };
    let packed = pack(&examples, &options);
    let rows: Vec<_> = packed.rows.iter().map(|row| row.ids.clone()).collect();
    assert_eq!(rows, [examples[0].ids.clone(), examples[1].ids.clone(), examples[3].ids.clone()]);
    assert_eq!((packed.report.too_long, packed.report.tokens_dropped), (1, 9));
}

#[derive(Deserialize)]
struct Trl {
    row_len: usize,
    documents: Vec<Vec<u32>>,
    rows: Vec<Vec<u32>>,
}

#[test]
fn wrapped_rows_are_those_of_trl_0_4_7() {
    let cases: Vec<Trl> = serde_json::from_str(include_str!("golden/trl_wrapped.json")).unwrap();
    assert!(cases.len() >= 7);
    for case in cases {
        let example = |ids: &Vec<u32>| Example { loss_mask: vec![true; ids.len()], ids: ids.clone() };
        let examples: Vec<_> = case.documents.iter().map(example).collect();
        let options =
            PackOptions { packing: Packing::Wrapped, row_len: case.row_len, ..PackOptions::default() };
        let packed = pack(&examples, &options);
        let rows: Vec<_> = packed.rows.iter().map(|row| row.ids.clone()).collect();
        assert_eq!(rows, case.rows);
        for row in &packed.rows {
            // TRL's labels are the ids, and the model's shift leaves the first out.
            assert_eq!(row.labels[0], -100);
            assert!(row.labels[1..].iter().zip(&row.ids[1..]).all(|(&label, &id)| label == id as i32));
            assert!(row.positions.iter().copied().eq(0..case.row_len as u32));
            assert!(row.documents.iter().all(|&document| document == 0));
        }
    }
}

#[test]
fn wrapped_rows_are_one_text_cut_evenly_and_only_the_rest_is_lost() {
    for (examples, options) in cases().iter().filter(|(_, options)| options.packing == Packing::Wrapped) {
        let text: Vec<u32> = examples.iter().flat_map(|example| example.ids.clone()).collect();
        let Packed { rows, report } = pack(examples, options);
        let packed: Vec<u32> = rows.iter().flat_map(|row| row.ids.clone()).collect();
        assert_eq!(packed, text[..text.len() / options.row_len * options.row_len]);
        assert_eq!(report.tokens_dropped, text.len() % options.row_len);
        assert!(rows.is_empty() || report.efficiency == 1.0);
    }
}

#[test]
fn a_row_length_of_nothing_packs_nothing() {
    let examples = documents(&[3, 4], 6);
    for packing in [Packing::Isolated, Packing::None, Packing::Wrapped] {
        let options = PackOptions { packing, row_len: 0, ..PackOptions::default() };
        let packed = pack(&examples, &options);
        assert_eq!((packed.report.tokens, packed.report.tokens_dropped), (0, 7));
    }
}

#[test]
fn packed_rows_are_a_burn_dataset_and_collate_into_rectangles() {
    let examples = documents(&[5, 4, 3, 2, 6], 7);
    let packed = pack(&examples, &PackOptions { row_len: 8, ..PackOptions::default() });
    assert_eq!(Dataset::len(&packed), packed.rows.len());
    assert_eq!(Dataset::get(&packed, 0).as_ref(), packed.rows.first());
    assert!(Dataset::get(&packed, packed.rows.len()).is_none());
    let rows: Vec<_> = packed.rows.iter().collect();
    let batch = Batch::collate(&rows, Some(8));
    assert_eq!((batch.rows, batch.len), (rows.len(), 8));
    assert_eq!((batch.tokens, batch.loss_tokens), (packed.report.tokens, packed.report.loss_tokens));
    for (number, row) in rows.iter().enumerate() {
        let places = number * 8..number * 8 + row.ids.len();
        assert_eq!(&batch.documents[places.clone()], row.documents);
        assert_eq!(&batch.labels[places.clone()], row.labels);
        assert!(batch.documents[places.end..(number + 1) * 8].iter().all(|&document| document == -1));
    }
}
