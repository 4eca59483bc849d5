//! Attention of new tokens over keys and values that lie in pages.
//!
//! ```text
//! o[i] = softmax(q[i] Kᵀ / √k) V     K, V: keys and values of the places 0 ..= position[i] of i's sequence
//! ```
//!
//! Kwon et al., "PagedAttention", <https://arxiv.org/abs/2309.06180>. A page holds the keys and values of so many
//! neighbouring tokens of a sequence; a sequence is a list of pages, and sequences whose texts begin alike may list
//! the same page. Rows are new tokens: joined heads `[n, (h + 2 g) k]` as for [`attention`](crate::attention),
//! first turned by their positions and put into their pages ([`store`]), then attended for ([`reference()`]). Within
//! a pass, all rows are stored before one is attended for, so a sequence may list pages that another one fills in
//! the same pass.
//!
//! Bytes moved for a token with s places before it: 2 s g k elements read. The reference gathers the pages of all
//! sequences and runs attention isolated by document, one document a sequence.

#[cfg(feature = "cubecl")]
pub(crate) mod cube;
mod host;

use std::cell::OnceCell;
use std::ops::Range;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData};

use crate::{AttentionIndex, Heads, KernelBackend, RotaryAngles, SEPARATE};

pub(crate) use host::{attend_on_host, store_on_host};

/// The page that belongs to no sequence: rows that only fill up a batch write to it and read it.
pub const SCRATCH_PAGE: u32 = 0;

/// Keys and values of one block, in pages, which are written where they lie.
#[derive(Debug)]
pub struct Pages<B: Backend> {
    /// `[places, g k]`, the places of a page side by side.
    pub keys: Tensor<B, 2>,
    /// `[places, g k]`.
    pub values: Tensor<B, 2>,
}

/// A sequence in one pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PagedSequence {
    /// Its pages in order, those of the new tokens included.
    pub pages: Vec<u32>,
    /// Its tokens, the new ones included.
    pub length: usize,
    /// How many of them are new: the rows of this pass.
    pub rows: usize,
}

/// The sequences of one pass. Their rows follow each other in this order.
#[derive(Debug)]
pub struct PagedIndex<B: Backend> {
    sequences: Vec<PagedSequence>,
    page_tokens: usize,
    device: B::Device,
    gathered: OnceCell<Gathered<B>>,
    #[cfg(feature = "cubecl")]
    tables: OnceCell<Tables<B>>,
}

/// Where everything lies, for a device to look up.
#[cfg(feature = "cubecl")]
#[derive(Clone, Debug)]
pub(crate) struct Tables<B: Backend> {
    /// The place of each row `[n]`; then the lengths of the sequences of one row `[m]` that come first; then their
    /// pages `[m, p]`.
    pub(crate) numbers: Tensor<B, 1, Int>,
    /// m.
    pub(crate) singles: usize,
    /// p: a power of two.
    pub(crate) pages: usize,
    /// The longest of those sequences.
    pub(crate) longest: usize,
}

/// The pages of some sequences, one after the other, as keys of an attention isolated by document.
#[derive(Clone, Debug)]
struct Gathered<B: Backend> {
    /// `[p]`: a power of two, so that the tensors of different passes have few sizes.
    pages: Tensor<B, 1, Int>,
    /// Of queries `[1, n]` and keys `[1, p page_tokens]`.
    index: AttentionIndex<B>,
}

impl PagedSequence {
    /// The positions of its rows.
    #[must_use]
    pub fn positions(&self) -> Range<usize> {
        self.length - self.rows..self.length
    }

    /// The place of a position.
    #[must_use]
    pub fn place(&self, position: usize, page_tokens: usize) -> usize {
        self.pages[position / page_tokens] as usize * page_tokens + position % page_tokens
    }
}

impl<B: Backend> PagedIndex<B> {
    /// An index.
    ///
    /// # Panics
    /// If a sequence has more tokens than its pages hold, or fewer than rows.
    #[must_use]
    pub fn new(sequences: Vec<PagedSequence>, page_tokens: usize, device: &B::Device) -> Self {
        for sequence in &sequences {
            let PagedSequence { pages, length, rows } = sequence;
            assert!(
                *rows <= *length && *length <= pages.len() * page_tokens,
                "{rows} rows of {length} tokens in {} pages of {page_tokens}",
                pages.len()
            );
        }
        Self {
            sequences,
            page_tokens,
            device: device.clone(),
            gathered: OnceCell::new(),
            #[cfg(feature = "cubecl")]
            tables: OnceCell::new(),
        }
    }

    /// The sequences.
    #[must_use]
    pub fn sequences(&self) -> &[PagedSequence] {
        &self.sequences
    }

    /// Tokens a page holds.
    #[must_use]
    pub fn page_tokens(&self) -> usize {
        self.page_tokens
    }

    /// Where its tensors lie.
    #[must_use]
    pub fn device(&self) -> &B::Device {
        &self.device
    }

    /// n: rows of all sequences.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.sequences.iter().map(|sequence| sequence.rows).sum()
    }

    /// The position of each row `[1, n]`.
    #[must_use]
    pub fn positions(&self) -> Tensor<B, 2, Int> {
        let positions = self.sequences.iter().flat_map(PagedSequence::positions);
        let positions: Vec<i32> = positions.map(|position| position as i32).collect();
        let n = positions.len();
        Tensor::from_data(TensorData::new(positions, [1, n]), &self.device)
    }

    /// Of each row its sequence and its position.
    pub(crate) fn each_row(&self) -> impl Iterator<Item = (&PagedSequence, usize)> {
        self.sequences
            .iter()
            .flat_map(|sequence| sequence.positions().map(move |position| (sequence, position)))
    }

    /// Rows that are neighbours in a page: the first row, the first place, and their number.
    fn runs(&self) -> Vec<[usize; 3]> {
        let mut runs: Vec<[usize; 3]> = Vec::new();
        for (row, (sequence, position)) in self.each_row().enumerate() {
            let place = sequence.place(position, self.page_tokens);
            match runs.last_mut() {
                Some([_, first, count]) if *first + *count == place => *count += 1,
                _ => runs.push([row, place, 1]),
            }
        }
        runs
    }

    #[cfg(feature = "cubecl")]
    pub(crate) fn tables(&self) -> &Tables<B> {
        self.tables.get_or_init(|| {
            let places =
                self.each_row().map(|(sequence, position)| sequence.place(position, self.page_tokens));
            let mut numbers: Vec<i32> = places.map(|place| place as i32).collect();
            let singles = self.sequences.iter().take_while(|sequence| sequence.rows == 1);
            let singles = &self.sequences[..singles.count()];
            let used = |sequence: &PagedSequence| sequence.length.div_ceil(self.page_tokens);
            let pages = singles.iter().map(used).max().unwrap_or(0).next_power_of_two();
            numbers.extend(singles.iter().map(|sequence| sequence.length as i32));
            for sequence in singles {
                let own = sequence.pages[..used(sequence)].iter().map(|&page| page as i32);
                numbers.extend(own.chain(std::iter::repeat(SCRATCH_PAGE as i32)).take(pages));
            }
            let count = numbers.len();
            Tables {
                numbers: Tensor::from_data(TensorData::new(numbers, [count]), &self.device),
                singles: singles.len(),
                pages,
                longest: singles.iter().map(|sequence| sequence.length).max().unwrap_or(0),
            }
        })
    }
}

impl<B: KernelBackend> PagedIndex<B> {
    /// The pages of all sequences but the first so many, which a backend may have a better way for. The first call
    /// decides how many those are.
    fn gathered(&self, after: usize) -> &Gathered<B> {
        self.gathered.get_or_init(|| self.gather(after))
    }

    fn gather(&self, after: usize) -> Gathered<B> {
        let sequences = &self.sequences[after..];
        let [mut pages, mut key_documents, mut key_positions] = [const { Vec::<i32>::new() }; 3];
        let [mut query_documents, mut query_positions] = [const { Vec::<i32>::new() }; 2];
        for (document, sequence) in (0..).zip(sequences) {
            let used = sequence.length.div_ceil(self.page_tokens);
            pages.extend(sequence.pages[..used].iter().map(|&page| page as i32));
            let places = used * self.page_tokens;
            key_documents
                .extend((0..places).map(|at| if at < sequence.length { document } else { SEPARATE }));
            key_positions.extend(0..places as i32);
            query_documents.extend(std::iter::repeat_n(document, sequence.rows));
            query_positions.extend(sequence.positions().map(|position| position as i32));
        }
        let count = pages.len().next_power_of_two();
        pages.resize(count, SCRATCH_PAGE as i32);
        key_documents.resize(count * self.page_tokens, SEPARATE);
        key_positions.resize(count * self.page_tokens, 0);
        let row = |values: Vec<i32>| {
            let length = values.len();
            Tensor::<B, 2, Int>::from_data(TensorData::new(values, [1, length]), &self.device)
        };
        Gathered {
            pages: row(pages).reshape([count]),
            index: AttentionIndex {
                query_documents: row(query_documents),
                query_positions: row(query_positions),
                key_documents: row(key_documents),
                key_positions: row(key_positions),
                ranges: None,
            }
            .prepared(),
        }
    }
}

impl<B: Backend> Pages<B> {
    /// So many places of g k columns, all zero.
    #[must_use]
    pub fn zeros(places: usize, heads: Heads, dtype: DType, device: &B::Device) -> Self {
        let width = heads.keys * heads.width;
        // Made as one row: a device may leave gaps between short rows, and places follow each other without.
        let empty = || Tensor::<B, 1>::zeros([places * width], (device, dtype)).reshape([places, width]);
        Self { keys: empty(), values: empty() }
    }

    /// Keys and values of the places of some pages `[1, g, p page_tokens, k]`.
    fn gather(&self, pages: &Tensor<B, 1, Int>, heads: Heads, page_tokens: usize) -> [Tensor<B, 4>; 2] {
        let [places, width] = self.keys.dims();
        let [p] = pages.dims();
        [&self.keys, &self.values].map(|all| {
            let all = all.clone().reshape([places / page_tokens, page_tokens * width]);
            let some = all.select(0, pages.clone());
            some.reshape([1, p * page_tokens, heads.keys, heads.width]).swap_dims(1, 2)
        })
    }
}

/// Turns queries and keys of joined rows `[n, (h + 2 g) k]` by their positions, puts keys and values into their
/// pages, and gives the queries `[n, h k]`.
///
/// Attention of several sequences together multiplies values that a row must not see by a weight of zero, and zero times NaN or
/// infinity is NaN. So of a row and head whose values are not all finite, the values that are not become zero and the key
/// NaN: it makes the results of its own sequence NaN, and those of no other.
#[must_use]
pub fn store<B: KernelBackend>(
    rows: Tensor<B, 2>,
    angles: &RotaryAngles<B>,
    heads: Heads,
    pages: &mut Pages<B>,
    index: &PagedIndex<B>,
) -> Tensor<B, 2> {
    let rows = B::rotary(rows, angles, heads.queries + heads.keys);
    let (queries, width) = (heads.queries * heads.width, heads.keys * heads.width);
    let column = |first| rows.clone().narrow(1, first, width);
    let [keys, values] = contained(column(queries), column(queries + width), heads);
    for [row, place, count] in index.runs() {
        let part = |all: &Tensor<B, 2>| all.clone().narrow(0, row, count);
        let target = [place..place + count, 0..width];
        pages.keys.inplace(|all| all.slice_assign(target.clone(), part(&keys)));
        pages.values.inplace(|all| all.slice_assign(target, part(&values)));
    }
    rows.narrow(1, 0, queries)
}

/// Keys and values `[n, g k]` with what is not finite among the values in the keys instead.
fn contained<B: Backend>(keys: Tensor<B, 2>, values: Tensor<B, 2>, heads: Heads) -> [Tensor<B, 2>; 2] {
    let [n, width] = values.dims();
    let each = [n, heads.keys, heads.width];
    let endless = values.clone().is_finite().bool_not();
    let broken = endless.clone().reshape(each).any_dim(2).expand(each).reshape([n, width]);
    [keys.mask_fill(broken, f32::NAN), values.mask_fill(endless, 0.0)]
}

/// The composition of plain operations: queries `[n, h k]` to `[n, h k]`.
#[must_use]
pub fn reference<B: KernelBackend>(
    q: Tensor<B, 2>,
    heads: Heads,
    pages: &Pages<B>,
    index: &PagedIndex<B>,
) -> Tensor<B, 2> {
    after(0, q, heads, pages, index)
}

/// Attention of the rows `[n, h k]` of all sequences but the first so many.
pub(crate) fn after<B: KernelBackend>(
    sequences: usize,
    q: Tensor<B, 2>,
    heads: Heads,
    pages: &Pages<B>,
    index: &PagedIndex<B>,
) -> Tensor<B, 2> {
    let [n, width] = q.dims();
    let gathered = index.gathered(sequences);
    let [k, v] = pages.gather(&gathered.pages, heads, index.page_tokens());
    let q = q.reshape([1, n, heads.queries, heads.width]).swap_dims(1, 2);
    let o = <B as KernelBackend>::attention(q, k, v, &gathered.index).o;
    o.swap_dims(1, 2).reshape([n, width])
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;
    use crate::testing::{close, noisy};

    const HEADS: Heads = Heads { queries: 4, keys: 2, width: 6 };
    const PAGE: usize = 4;

    fn sequence(pages: &[u32], length: usize, rows: usize) -> PagedSequence {
        PagedSequence { pages: pages.to_vec(), length, rows }
    }

    /// A sequence that is in the middle of its text, one that begins, a filler and a single row, out of order in
    /// memory.
    fn index() -> PagedIndex<Flex> {
        let sequences = vec![
            sequence(&[9, 2], 7, 3),
            sequence(&[1, 5, 3], 9, 9),
            sequence(&[0], 1, 1),
            sequence(&[7, 4], 5, 1),
        ];
        PagedIndex::new(sequences, PAGE, &Default::default())
    }

    fn angles(index: &PagedIndex<Flex>) -> RotaryAngles<Flex> {
        RotaryAngles::new(index.positions(), HEADS.width, 100.0)
    }

    fn noisy_pages() -> Pages<Flex> {
        let dims = [10 * PAGE, HEADS.keys * HEADS.width];
        Pages { keys: noisy(dims, 1), values: noisy(dims, 2) }
    }

    /// Rows, what is stored of them, and the result, by whatever computes it.
    fn both(
        store: impl Fn(Tensor<Flex, 2>, &mut Pages<Flex>, &PagedIndex<Flex>) -> Tensor<Flex, 2>,
        attend: impl Fn(Tensor<Flex, 2>, &Pages<Flex>, &PagedIndex<Flex>) -> Tensor<Flex, 2>,
    ) -> (Pages<Flex>, Tensor<Flex, 2>) {
        let (index, mut pages) = (index(), noisy_pages());
        let rows = noisy::<Flex, 2>([index.rows(), 8 * HEADS.width], 3);
        let q = store(rows, &mut pages, &index);
        let o = attend(q, &pages, &index);
        (pages, o)
    }

    fn by_reference() -> (Pages<Flex>, Tensor<Flex, 2>) {
        both(
            |rows, pages, index| store(rows, &angles(index), HEADS, pages, index),
            |q, pages, index| reference(q, HEADS, pages, index),
        )
    }

    #[test]
    fn the_host_gives_what_the_reference_gives() {
        let (pages, o) = by_reference();
        let (host_pages, host_o) = both(
            |rows, pages, index| Flex::paged_store(rows, &angles(index), HEADS, pages, index),
            |q, pages, index| Flex::paged_attention(q, HEADS, pages, index),
        );
        close(host_pages.keys, pages.keys, 1e-6);
        close(host_pages.values, pages.values, 0.0);
        close(host_o, o, 1e-6);
    }

    #[test]
    fn each_sequence_gets_the_attention_of_its_own_tokens() {
        let (pages, o) = by_reference();
        let index = index();
        let rows = noisy::<Flex, 2>([index.rows(), 8 * HEADS.width], 3);
        let q = Flex::rotary(rows, &angles(&index), 6).narrow(1, 0, 4 * HEADS.width);
        let mut row = 0;
        for sequence in index.sequences() {
            let places: Vec<i32> = (0..sequence.length).map(|at| sequence.place(at, PAGE) as i32).collect();
            let places = Tensor::<Flex, 1, Int>::from_data(&places[..], &Default::default());
            let [k, v] = [&pages.keys, &pages.values].map(|all| {
                all.clone()
                    .select(0, places.clone())
                    .reshape([1, sequence.length, 2, HEADS.width])
                    .swap_dims(1, 2)
            });
            let line = |range: Range<usize>| {
                let positions: Vec<i32> = range.map(|at| at as i32).collect();
                let t = positions.len();
                Tensor::<Flex, 2, Int>::from_data(TensorData::new(positions, [1, t]), &Default::default())
            };
            let (queries, keys) = (line(sequence.positions()), line(0..sequence.length));
            let alone = AttentionIndex {
                query_documents: queries.zeros_like(),
                query_positions: queries,
                key_documents: keys.zeros_like(),
                key_positions: keys,
                ranges: None,
            };
            let q = q.clone().narrow(0, row, sequence.rows);
            let q = q.reshape([1, sequence.rows, 4, HEADS.width]).swap_dims(1, 2);
            let expected = crate::attention::reference(q, k, v, &alone).swap_dims(1, 2);
            let expected = expected.reshape([sequence.rows, 4 * HEADS.width]);
            close(o.clone().narrow(0, row, sequence.rows), expected, 1e-6);
            row += sequence.rows;
        }
    }

    #[test]
    fn a_value_that_is_no_number_stays_in_its_sequence() {
        let (_, whole) = by_reference();
        let index = index();
        // The second sequence's fourth row, of nine; of its two heads of keys the second.
        let (row, column) = (3 + 3, 7 * HEADS.width + 1);
        for endless in [f32::NAN, f32::INFINITY] {
            let (pages, o) = both(
                |rows, pages, index| {
                    let one = Tensor::full([1, 1], endless, &Default::default());
                    let rows = rows.slice_assign([row..row + 1, column..column + 1], one);
                    store(rows, &angles(index), HEADS, pages, index)
                },
                |q, pages, index| reference(q, HEADS, pages, index),
            );
            assert!(!pages.values.is_finite().bool_not().any().into_scalar());
            let own = index.sequences()[0].rows..index.sequences()[0].rows + index.sequences()[1].rows;
            let (found, whole) = (o.to_data(), whole.to_data());
            let (found, whole) = (found.as_slice::<f32>().unwrap(), whole.as_slice::<f32>().unwrap());
            let width = HEADS.queries * HEADS.width;
            for (at, (found, whole)) in found.iter().zip(whole).enumerate() {
                // Rows from the broken one on see it, with the heads that share its head of keys.
                let sees = (row..own.end).contains(&(at / width)) && at % width >= width / 2;
                assert_eq!(found.is_nan(), sees, "{endless} at {at}");
                assert!(sees || found == whole, "{endless} at {at}: {found} for {whole}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "9 tokens in 2 pages of 4")]
    fn a_sequence_longer_than_its_pages_is_a_mistake() {
        let _ = PagedIndex::<Flex>::new(vec![sequence(&[1, 2], 9, 1)], PAGE, &Default::default());
    }
}
