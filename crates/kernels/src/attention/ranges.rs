//! Which tiles of queries can see which tiles of keys.
//!
//! Two small kernels turn documents and positions into a code for each pair of tiles and, for each tile, the first
//! and last tile of the other side that it meets, so that the cost of attention follows the length of documents and
//! not the length of rows. The test is on intervals: it may keep a pair that holds nothing, and never drops one that
//! holds something. It trades one `i32` for each pair of tiles for main kernels that read a code and do no more.

use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::SEPARATE;
use super::device::{Tokens, tokens};
use crate::device::uninitialized;

/// No query of the tile sees a key of the other.
pub(super) const SKIP: i32 = 0;
/// Some pairs may be hidden: the mask has to be applied.
pub(super) const MASKED: i32 = 1;
/// Both tiles are complete and every query sees every key.
pub(super) const FULL: i32 = 2;

const UNITS: u32 = 64;

/// What the main kernels read: codes `[b, query tiles, key tiles]`, and the half-open range of tiles of the other
/// side for each query tile `[b, query tiles, 2]` and for each key tile `[b, key tiles, 2]`.
#[derive(Clone, Debug)]
pub(crate) struct Ranges<R: CubeRuntime> {
    pub(crate) edge: usize,
    pub(crate) codes: CubeTensor<R>,
    pub(crate) rows: CubeTensor<R>,
    pub(crate) columns: CubeTensor<R>,
}

impl<R: CubeRuntime> Ranges<R> {
    /// Codes for tiles of `edge` queries and `edge` keys.
    pub(crate) fn new(index: &[CubeTensor<R>; 4], edge: usize) -> Self {
        let [b, t] = [0, 1].map(|i| index[0].meta.shape()[i]);
        let s = index[2].meta.shape()[1];
        let tiles = [t.div_ceil(edge), s.div_ceil(edge)];
        let codes = uninitialized(&index[0], [b, tiles[0], tiles[1]], index[0].dtype);
        let rows = uninitialized(&index[0], [b, tiles[0], 2], index[0].dtype);
        // SAFETY: the kernel reads tokens below the shapes' ends and writes one code for each pair and one range for
        // each row, which is what was allocated.
        unsafe {
            pair_codes::launch_unchecked::<R>(
                &index[0].client,
                CubeCount::Static(tiles[0] as u32, b as u32, 1),
                CubeDim::new_1d(UNITS),
                tokens(&index[0], &index[1]),
                tokens(&index[2], &index[3]),
                codes.clone().into_tensor_arg(),
                rows.clone().into_tensor_arg(),
                edge,
            );
        }
        let columns = columns_of(&codes);
        Self { edge, codes, rows, columns }
    }
}

/// The half-open range of query tiles of each key tile `[b, key tiles, 2]`.
fn columns_of<R: CubeRuntime>(codes: &CubeTensor<R>) -> CubeTensor<R> {
    let [b, _, tiles] = [0, 1, 2].map(|i| codes.meta.shape()[i]);
    let columns = uninitialized(codes, [b, tiles, 2], codes.dtype);
    // SAFETY: units past the last key tile end at once; the others write their own range.
    unsafe {
        column_ranges::launch_unchecked::<R>(
            &codes.client,
            CubeCount::Static((tiles as u32).div_ceil(UNITS), b as u32, 1),
            CubeDim::new_1d(UNITS),
            codes.clone().into_tensor_arg(),
            columns.clone().into_tensor_arg(),
        );
    }
    columns
}

/// Least and greatest document and position of the tokens from `first` to `end`, those of [`SEPARATE`] left
/// out, and how many were left in. Document -1, which ends a row, counts as the greatest, so that documents ascend.
#[cube]
fn bounds(tokens: &Tokens, row: usize, first: usize, end: usize) -> Array<i32> {
    let greatest = i32::new(2147483647);
    let mut found = Array::<i32>::new(5usize);
    found[0] = greatest;
    found[1] = i32::new(-2147483647);
    found[2] = greatest;
    found[3] = i32::new(-2147483647);
    found[4] = i32::new(0);
    for i in first..end {
        let mut document =
            tokens.documents[row * tokens.documents.stride(0) + i * tokens.documents.stride(1)];
        let position = tokens.positions[row * tokens.positions.stride(0) + i * tokens.positions.stride(1)];
        if document != SEPARATE {
            if document == i32::new(-1) {
                document = greatest;
            }
            found[0] = min(found[0], document);
            found[1] = max(found[1], document);
            found[2] = min(found[2], position);
            found[3] = max(found[3], position);
            found[4] += 1;
        }
    }
    found
}

#[cube]
fn code_of(queries: &Array<i32>, keys: &Array<i32>, #[comptime] edge: usize) -> i32 {
    let whole = i32::cast_from(edge);
    let mut code = SKIP.runtime();
    let meet = queries[0] <= keys[1] && keys[0] <= queries[1] && queries[3] >= keys[2];
    if meet && queries[4] > 0 && keys[4] > 0 {
        code = MASKED.runtime();
        let one = queries[0] == queries[1] && keys[0] == keys[1] && queries[0] == keys[0];
        if one && queries[2] >= keys[3] && queries[4] == whole && keys[4] == whole {
            code = FULL.runtime();
        }
    }
    code
}

#[cube(launch_unchecked)]
fn pair_codes(
    queries: &Tokens,
    keys: &Tokens,
    codes: &mut Tensor<i32>,
    rows: &mut Tensor<i32>,
    #[comptime] edge: usize,
) {
    let (tile, row) = (CUBE_POS_X as usize, CUBE_POS_Y as usize);
    let t = queries.documents.shape(1);
    let s = keys.documents.shape(1);
    let key_tiles = codes.shape(2);
    let mut firsts = SharedMemory::<u32>::new(64usize);
    let mut ends = SharedMemory::<u32>::new(64usize);
    let mine = bounds(queries, row, tile * edge, min(tile * edge + edge, t));
    let place = row * codes.shape(1) + tile;
    let mut first = u32::cast_from(key_tiles);
    let mut end = 0u32;
    let mut other = UNIT_POS;
    while other < u32::cast_from(key_tiles) {
        let start = other as usize * edge;
        let theirs = bounds(keys, row, start, min(start + edge, s));
        let code = code_of(&mine, &theirs, edge);
        codes[place * key_tiles + other as usize] = code;
        if code != SKIP {
            first = min(first, other);
            end = other + 1;
        }
        other += 64;
    }
    firsts[UNIT_POS as usize] = first;
    ends[UNIT_POS as usize] = end;
    sync_cube();
    if UNIT_POS == 0 {
        for i in 1..64usize {
            first = min(first, firsts[i]);
            end = max(end, ends[i]);
        }
        rows[place * 2] = i32::cast_from(min(first, end));
        rows[place * 2 + 1] = i32::cast_from(end);
    }
}

#[cube(launch_unchecked)]
fn column_ranges(codes: &Tensor<i32>, columns: &mut Tensor<i32>) {
    let (tile, row) = ((CUBE_POS_X * 64 + UNIT_POS) as usize, CUBE_POS_Y as usize);
    let query_tiles = codes.shape(1);
    let key_tiles = codes.shape(2);
    if tile >= key_tiles {
        terminate!();
    }
    let mut first = u32::cast_from(query_tiles);
    let mut end = 0u32;
    for i in 0..query_tiles {
        if codes[(row * query_tiles + i) * key_tiles + tile] != SKIP {
            first = min(first, u32::cast_from(i));
            end = u32::cast_from(i) + 1;
        }
    }
    let place = (row * key_tiles + tile) * 2;
    columns[place] = i32::cast_from(min(first, end));
    columns[place + 1] = i32::cast_from(end);
}
