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
//! Places are stored as they are computed, or in 8 bits with a scale for each place and head ([`int8`]).
//!
//! Bytes moved for a token with s places before it: 2 s g k elements read, or 2 s g (k + 4) bytes in 8 bits. The reference
//! gathers the pages of all sequences and runs attention isolated by document, one document a sequence.

#[cfg(feature = "cubecl")]
pub(crate) mod cube;
#[cfg(feature = "cubecl")]
mod cube_int8;
mod host;
pub mod int8;

use std::ops::Range;
use std::sync::OnceLock;

use burn::tensor::backend::Backend;
use burn::tensor::{BasicOps, DType, Int, Tensor, TensorData};

use crate::{AttentionIndex, Heads, KernelBackend, RotaryAngles, SEPARATE};
use int8::Int8Rows;

pub(crate) use host::{attend_on_host, store_on_host};

/// The page that belongs to no sequence: rows that only fill up a batch write to it and read it.
pub const SCRATCH_PAGE: u32 = 0;

/// How places are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageFormat {
    /// As floats of this dtype.
    Float(DType),
    /// In 8 bits; see [`int8`].
    Int8,
}

/// Keys and values of one block, in pages, which are written where they lie.
#[derive(Debug)]
pub enum Pages<B: Backend> {
    /// As floats.
    Float(FloatPages<B>),
    /// In 8 bits.
    Int8(Int8Pages<B>),
}

/// [`Pages`] as floats.
#[derive(Debug)]
pub struct FloatPages<B: Backend> {
    /// `[places, g k]`, the places of a page side by side.
    pub keys: Tensor<B, 2>,
    /// `[places, g k]`.
    pub values: Tensor<B, 2>,
}

/// [`Pages`] in 8 bits.
#[derive(Debug)]
pub struct Int8Pages<B: Backend> {
    /// A row for each place, the places of a page side by side.
    pub keys: Int8Rows<B>,
    /// The same.
    pub values: Int8Rows<B>,
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
    gathered: OnceLock<Gathered<B>>,
    #[cfg(feature = "cubecl")]
    tables: OnceLock<Tables<B>>,
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
            gathered: OnceLock::new(),
            #[cfg(feature = "cubecl")]
            tables: OnceLock::new(),
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

impl PageFormat {
    /// Bytes of the keys and values of one place in one block.
    #[must_use]
    pub fn place_bytes(self, heads: Heads) -> usize {
        2 * heads.keys
            * match self {
                Self::Float(dtype) => heads.width * dtype.size(),
                Self::Int8 => int8::head_bytes(heads.width),
            }
    }
}

impl<B: Backend> Pages<B> {
    /// So many places, all zero.
    #[must_use]
    pub fn zeros(places: usize, heads: Heads, format: PageFormat, device: &B::Device) -> Self {
        let width = heads.keys * heads.width;
        match format {
            PageFormat::Float(dtype) => {
                let empty = || zeros([places, width], dtype, device);
                Self::Float(FloatPages { keys: empty(), values: empty() })
            }
            PageFormat::Int8 => {
                let empty = || Int8Rows::zeros(places, heads, device);
                Self::Int8(Int8Pages { keys: empty(), values: empty() })
            }
        }
    }

    /// Makes places zero.
    pub fn clear(&mut self, places: Range<usize>) {
        match self {
            Self::Float(FloatPages { keys, values }) => {
                [keys, values].into_iter().for_each(|all| clear(all, &places));
            }
            Self::Int8(Int8Pages { keys, values }) => {
                for Int8Rows { codes, scales } in [keys, values] {
                    clear(codes, &places);
                    clear(scales, &places);
                }
            }
        }
    }

    /// Keys and values of the places of some pages `[1, g, p page_tokens, k]`, those in 8 bits restored in a dtype.
    fn gather(
        &self,
        pages: &Tensor<B, 1, Int>,
        heads: Heads,
        page_tokens: usize,
        dtype: DType,
    ) -> [Tensor<B, 4>; 2] {
        let rows = match self {
            Self::Float(FloatPages { keys, values }) => {
                [keys, values].map(|all| places_of(all, pages, page_tokens))
            }
            Self::Int8(Int8Pages { keys, values }) => [keys, values].map(|Int8Rows { codes, scales }| {
                let codes = places_of(codes, pages, page_tokens);
                Int8Rows { codes, scales: places_of(scales, pages, page_tokens) }.restored(heads).cast(dtype)
            }),
        };
        let [places, _] = rows[0].dims();
        rows.map(|rows| rows.reshape([1, places, heads.keys, heads.width]).swap_dims(1, 2))
    }
}

/// Zeros whose rows follow each other without gaps, as places do. They are made as one row, since a device may leave gaps
/// between short rows.
fn zeros<B: Backend, K: BasicOps<B>>(
    [rows, width]: [usize; 2],
    dtype: DType,
    device: &B::Device,
) -> Tensor<B, 2, K> {
    Tensor::<B, 1, K>::zeros([rows * width], (device, dtype)).reshape([rows, width])
}

/// Makes some rows zero.
fn clear<B: Backend, K: BasicOps<B>>(all: &mut Tensor<B, 2, K>, rows: &Range<usize>) {
    let [_, width] = all.dims();
    let (dtype, device) = (all.dtype(), all.device());
    let zeros = Tensor::zeros([rows.len(), width], (&device, dtype));
    all.inplace(|all| all.slice_assign([rows.clone(), 0..width], zeros));
}

/// The places of some pages, in this order.
fn places_of<B: Backend, K: BasicOps<B>>(
    all: &Tensor<B, 2, K>,
    pages: &Tensor<B, 1, Int>,
    page_tokens: usize,
) -> Tensor<B, 2, K> {
    let [places, width] = all.dims();
    let [p] = pages.dims();
    let all = all.clone().reshape([places / page_tokens, page_tokens * width]);
    all.select(0, pages.clone()).reshape([p * page_tokens, width])
}

/// Puts rows into their places.
fn put<B: Backend, K: BasicOps<B>>(rows: &Tensor<B, 2, K>, all: &mut Tensor<B, 2, K>, index: &PagedIndex<B>) {
    let [_, width] = all.dims();
    for [row, place, count] in index.runs() {
        let rows = rows.clone().narrow(0, row, count);
        all.inplace(|all| all.slice_assign([place..place + count, 0..width], rows));
    }
}

/// Turns queries and keys of joined rows `[n, (h + 2 g) k]` by their positions, puts keys and values into their
/// pages, and gives the queries `[n, h k]`.
///
/// Attention of several sequences together multiplies values that a row must not see by a weight of zero, and zero times NaN or
/// infinity is NaN. So of a row and head whose values are not all finite, the values that are not become zero and the key
/// NaN: it makes the results of its own sequence NaN, and those of no other. In 8 bits the scale of such a key is NaN.
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
    match pages {
        Pages::Float(own) => {
            put(&keys, &mut own.keys, index);
            put(&values, &mut own.values, index);
        }
        Pages::Int8(own) => {
            for (rows, own) in [(keys, &mut own.keys), (values, &mut own.values)] {
                let Int8Rows { codes, scales } = Int8Rows::of(rows, heads);
                put(&codes, &mut own.codes, index);
                put(&scales, &mut own.scales, index);
            }
        }
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
    let (page_tokens, dtype) = (index.page_tokens(), q.dtype());
    after(0, q, heads, index, |some| pages.gather(some, heads, page_tokens, dtype))
}

/// Attention of the rows `[n, h k]` of all sequences but the first so many; `gather` gives keys and values of some pages
/// `[1, g, p page_tokens, k]`.
fn after<B: KernelBackend>(
    sequences: usize,
    q: Tensor<B, 2>,
    heads: Heads,
    index: &PagedIndex<B>,
    gather: impl FnOnce(&Tensor<B, 1, Int>) -> [Tensor<B, 4>; 2],
) -> Tensor<B, 2> {
    let [n, width] = q.dims();
    let gathered = index.gathered(sequences);
    let [k, v] = gather(&gathered.pages);
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

    const FORMATS: [PageFormat; 2] = [PageFormat::Float(DType::F32), PageFormat::Int8];

    fn noisy_pages(format: PageFormat) -> Pages<Flex> {
        let all = |seed| noisy::<Flex, 2>([10 * PAGE, HEADS.keys * HEADS.width], seed);
        match format {
            PageFormat::Float(_) => Pages::Float(FloatPages { keys: all(1), values: all(2) }),
            PageFormat::Int8 => {
                let [keys, values] = [all(1), all(2)].map(|all| Int8Rows::of(all, HEADS));
                Pages::Int8(Int8Pages { keys, values })
            }
        }
    }

    /// Keys and values as they are read.
    fn read(pages: &Pages<Flex>) -> [Tensor<Flex, 2>; 2] {
        match pages {
            Pages::Float(FloatPages { keys, values }) => [keys, values].map(Clone::clone),
            Pages::Int8(Int8Pages { keys, values }) => [keys, values].map(|rows| rows.restored(HEADS)),
        }
    }

    fn rows() -> Tensor<Flex, 2> {
        noisy([index().rows(), 8 * HEADS.width], 3)
    }

    /// What is stored of rows, and the result, by the composition of plain operations.
    fn by_reference(rows: Tensor<Flex, 2>, format: PageFormat) -> (Pages<Flex>, Tensor<Flex, 2>) {
        let (index, mut pages) = (index(), noisy_pages(format));
        let q = store(rows, &angles(&index), HEADS, &mut pages, &index);
        let o = reference(q, HEADS, &pages, &index);
        (pages, o)
    }

    /// The same on the host.
    fn by_host(rows: Tensor<Flex, 2>, format: PageFormat) -> (Pages<Flex>, Tensor<Flex, 2>) {
        let (index, mut pages) = (index(), noisy_pages(format));
        let q = Flex::paged_store(rows, &angles(&index), HEADS, &mut pages, &index);
        let o = Flex::paged_attention(q, HEADS, &pages, &index);
        (pages, o)
    }

    #[test]
    fn the_host_gives_what_the_reference_gives() {
        for format in FORMATS {
            let (pages, o) = by_reference(rows(), format);
            let (host_pages, host_o) = by_host(rows(), format);
            let ([keys, values], [host_keys, host_values]) = (read(&pages), read(&host_pages));
            close(host_keys, keys, 1e-6);
            close(host_values, values, 0.0);
            close(host_o, o, 1e-6);
        }
    }

    #[test]
    fn each_sequence_gets_the_attention_of_its_own_tokens() {
        FORMATS.into_iter().for_each(assert_own_attention);
    }

    fn assert_own_attention(format: PageFormat) {
        let (pages, o) = by_reference(rows(), format);
        let (index, all) = (index(), read(&pages));
        let q = Flex::rotary(rows(), &angles(&index), 6).narrow(1, 0, 4 * HEADS.width);
        let mut row = 0;
        for sequence in index.sequences() {
            let places: Vec<i32> = (0..sequence.length).map(|at| sequence.place(at, PAGE) as i32).collect();
            let places = Tensor::<Flex, 1, Int>::from_data(&places[..], &Default::default());
            let [k, v] = all.each_ref().map(|all| {
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

    fn largest(x: &[f32]) -> f32 {
        x.iter().fold(0.0, |most, x| most.max(x.abs()))
    }

    /// A score changes by ε = |q|₁ max |k| / (254 √k) at most, so all weights together by e²ᵋ - 1, and a value by max |v| / 254.
    #[test]
    fn in_8_bits_a_result_moves_no_further_than_half_a_step_lets_it() {
        let (index, [floats, codes]) = (index(), FORMATS.map(noisy_pages));
        let q = noisy::<Flex, 2>([index.rows(), 4 * HEADS.width], 4).mul_scalar(3.0);
        let numbers = |x: Tensor<Flex, 2>| x.into_data().to_vec::<f32>().unwrap();
        let [exact, found] =
            [&floats, &codes].map(|pages| numbers(reference(q.clone(), HEADS, pages, &index)));
        let [k, v] = read(&floats).map(|all| largest(&numbers(all)));
        let mut furthest = 0.0_f32;
        for (head, q) in numbers(q).chunks_exact(HEADS.width).enumerate() {
            let sum: f32 = q.iter().map(|x| x.abs()).sum();
            let epsilon = sum * k / (254.0 * (HEADS.width as f32).sqrt());
            let bound = v * (1.0 / 254.0 + (2.0 * epsilon).exp_m1()) + 1e-6;
            let own = head * HEADS.width..(head + 1) * HEADS.width;
            for (found, exact) in found[own.clone()].iter().zip(&exact[own]) {
                assert!((found - exact).abs() <= bound, "{found} for {exact}, which may move by {bound}");
                furthest = furthest.max((found - exact).abs());
            }
        }
        assert!(furthest > 1e-4, "nothing was in 8 bits");
    }

    /// A number that is none in the second sequence's fourth row, of nine, in the second of its two heads of keys.
    fn assert_contained(
        run: impl Fn(Tensor<Flex, 2>, PageFormat) -> (Pages<Flex>, Tensor<Flex, 2>),
        format: PageFormat,
        (endless, column): (f32, usize),
    ) {
        let (index, row) = (index(), 3 + 3);
        let one = Tensor::full([1, 1], endless, &Default::default());
        let broken = rows().slice_assign([row..row + 1, column..column + 1], one);
        let [found, whole] = [broken, rows()].map(|rows| run(rows, format).1.into_data());
        let own = index.sequences()[0].rows..index.sequences()[0].rows + index.sequences()[1].rows;
        let (found, whole) = (found.as_slice::<f32>().unwrap(), whole.as_slice::<f32>().unwrap());
        let width = HEADS.queries * HEADS.width;
        for (at, (found, whole)) in found.iter().zip(whole).enumerate() {
            // Rows from the broken one on see it, with the heads that share its head of keys.
            let sees = (row..own.end).contains(&(at / width)) && at % width >= width / 2;
            let what = format!("{endless} in column {column}, {format:?}, at {at}");
            assert_eq!(found.is_nan(), sees, "{what}");
            assert!(sees || found == whole, "{what}: {found} for {whole}");
        }
    }

    #[test]
    fn a_value_that_is_no_number_stays_in_its_sequence() {
        let (key, value) = (5 * HEADS.width + 1, 7 * HEADS.width + 1);
        for endless in [f32::NAN, f32::INFINITY] {
            for format in FORMATS {
                assert_contained(by_reference, format, (endless, value));
            }
            assert_contained(by_reference, PageFormat::Int8, (endless, key));
            assert_contained(by_host, PageFormat::Int8, (endless, key));
            assert_contained(by_host, PageFormat::Int8, (endless, value));
            let one = Tensor::full([1, 1], endless, &Default::default());
            let broken = rows().slice_assign([6..7, value..value + 1], one);
            for format in FORMATS {
                let [_, values] = read(&by_reference(broken.clone(), format).0);
                assert!(!values.is_finite().bool_not().any().into_scalar());
            }
        }
    }

    #[test]
    fn cleared_places_are_zero_and_no_others() {
        for format in FORMATS {
            let mut pages = noisy_pages(format);
            let whole = read(&pages);
            if let Pages::Int8(pages) = &mut pages {
                // What is left of a key that was no number.
                let nan = Tensor::full([1, 1], f32::NAN, &Default::default());
                pages.keys.scales.inplace(|scales| scales.slice_assign([6..7, 1..2], nan));
            }
            pages.clear(5..9);
            for (found, whole) in read(&pages).into_iter().zip(whole) {
                let width = HEADS.keys * HEADS.width;
                let zeros = Tensor::zeros([4, width], &Default::default());
                close(found, whole.slice_assign([5..9, 0..width], zeros), 0.0);
            }
        }
    }

    #[test]
    fn places_in_8_bits_take_a_byte_a_number_and_a_scale_a_head() {
        let heads = Heads { queries: 32, keys: 32, width: 128 };
        assert_eq!(PageFormat::Float(DType::F16).place_bytes(heads), 2 * 32 * 256);
        assert_eq!(PageFormat::Int8.place_bytes(heads), 2 * 32 * 132);
        // Six numbers are in two words.
        assert_eq!(PageFormat::Int8.place_bytes(HEADS), 2 * 2 * 12);
        let Pages::Int8(pages) = Pages::<Flex>::zeros(10, HEADS, PageFormat::Int8, &Default::default())
        else {
            panic!("in 8 bits")
        };
        assert_eq!((pages.keys.codes.dims(), pages.keys.scales.dims()), ([10, 4], [10, 2]));
    }

    #[test]
    #[should_panic(expected = "9 tokens in 2 pages of 4")]
    fn a_sequence_longer_than_its_pages_is_a_mistake() {
        let _ = PagedIndex::<Flex>::new(vec![sequence(&[1, 2], 9, 1)], PAGE, &Default::default());
    }
}
