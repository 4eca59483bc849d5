//! The stream of rows: every row once an epoch, and a saved cursor goes on where it stopped.

use buzzer_data::{Cursor, RowOrder, RowStream};

use crate::support::{between, seeded};

#[test]
fn a_saved_cursor_continues_identically_whatever_the_batches() {
    let mut generator = seeded(2);
    for _ in 0..300 {
        let rows = between(&mut generator, 1, 40);
        let seed = between(&mut generator, 0, 1000) as u64;
        let mut stream = RowStream::new(rows, seed);
        for _ in 0..between(&mut generator, 0, 20) {
            stream.next(between(&mut generator, 0, 9));
        }
        let saved = serde_json::to_string(&stream.cursor()).unwrap();
        let cursor: Cursor = serde_json::from_str(&saved).unwrap();
        let mut resumed = RowStream::resume(rows, cursor);
        let one_by_one: Vec<usize> = (0..100).flat_map(|_| stream.next(1)).collect();
        assert_eq!(one_by_one, resumed.next(100), "{cursor:?} of {rows}");
    }
}

#[test]
fn every_epoch_holds_every_row_once() {
    let mut stream = RowStream::new(101, 9);
    for epoch in 0..20 {
        let cursor = stream.cursor();
        assert_eq!((cursor.epoch, cursor.position), (epoch, 0));
        let mut rows = stream.next(101);
        assert_eq!(rows, RowOrder::new(101, 9, epoch).rows());
        rows.sort_unstable();
        assert!(rows.into_iter().eq(0..101));
    }
}

#[test]
fn a_place_is_as_likely_as_any_other() {
    // 6,000 epochs of 6 rows: each row comes first about 1,000 times (standard deviation 29).
    let mut first = [0_usize; 6];
    for epoch in 0..6000 {
        first[RowOrder::new(6, 1, epoch).rows()[0]] += 1;
    }
    assert!(first.iter().all(|count| (870..1130).contains(count)), "{first:?}");
}

#[test]
fn the_order_is_pinned_across_versions() {
    // A change here makes running jobs resume wrongly.
    assert_eq!(RowOrder::new(8, 42, 0).rows(), PINNED[0]);
    assert_eq!(RowOrder::new(8, 42, 1).rows(), PINNED[1]);
}

const PINNED: [[usize; 8]; 2] = [[4, 7, 0, 1, 3, 2, 6, 5], [6, 3, 7, 0, 4, 2, 1, 5]];
