//! The program on a CUDA device: a handful of kernels an operation, submitted as one graph.
//!
//! The kernels are CUDA C++ and not CubeCL, because a graph needs a stream that can be captured, and CubeCL's are private;
//! because they need `mma` on factors that are unpacked in registers; and because one kernel waits for what another block of the
//! same launch has written. See `docs/decisions/0014-steps-as-one-graph.md`.

mod build;
mod driver;
mod layout;
mod outline;

use std::collections::HashMap;
use std::ffi::c_void;

use cubecl::cuda::CudaRuntime;
use cudarc::driver::{CudaContext, result as cuda, sys};

use self::build::{Built, Kept};
use self::driver::{Driver, Kernels, Limits};
use self::layout::{
    Attend, NORMALISED_BY_BLOCKS, Product, Share, THREADS, attention_splits, row_tiles, team,
};
use self::outline::{FROM_RESIDUAL, FROM_ROWS, Outline};
use super::{StepError, StepProgram, StepRow, StepRunner, StepTarget};
use crate::device::{Cube, primitive};
use crate::{Heads, Pages};

/// Rows of a step that there are kernels for.
const ROWS: [usize; 3] = [32, 16, 8];
/// The first cards on which a kernel may begin before the one in front of it has ended.
const EARLY_LAUNCHES: usize = 90;
/// Units of a warp.
const WARP: usize = 32;
/// Warps that share out a tile at most.
const MOST_TEAM: usize = 8;
/// Units of a block of attention.
const ATTENTION_UNITS: u32 = 128;

fn unsupported(what: impl Into<String>) -> StepError {
    StepError::Unsupported(what.into())
}

fn refused(what: impl Into<String>) -> StepError {
    StepError::Refused(what.into())
}

/// Puts a program onto its device.
pub(crate) fn runner(
    program: &StepProgram<Cube<CudaRuntime>>,
    pages: &[Pages<Cube<CudaRuntime>>],
) -> Result<Box<dyn StepRunner>, StepError> {
    Ok(Box::new(CudaRunner::new(program, pages)?))
}

/// Bytes of the device that [`runner`] takes besides what the program names; 0 if there is none.
pub(crate) fn bytes(program: &StepProgram<Cube<CudaRuntime>>) -> usize {
    let limits = CudaContext::new(program.embedding.device().index).and_then(|context| Limits::of(&context));
    limits.ok().and_then(|limits| Outline::new(program, &limits).ok()).map_or(0, |outline| outline.bytes())
}

/// What a product is between.
#[derive(Clone, Copy, Debug)]
struct Ends {
    /// Whether its rows are the result of attention, where they are not the residual stream.
    after_attention: bool,
    target: StepTarget,
}

/// One launch of a step.
#[derive(Clone, Copy, Debug)]
#[allow(clippy::large_enum_variant, reason = "a list of some hundred, and the larger one is the usual one")]
enum Launch {
    Product(Product, Ends),
    Attend(Attend),
}

/// Memory for what a step computes: addresses, or bytes before there are any.
#[derive(Clone, Copy, Debug)]
struct Room {
    residual: u64,
    joined: u64,
    logits: u64,
    attended: u64,
    log_sums: u64,
    heads_arrived: u64,
    heads_result: u64,
    normalised: u64,
    activated: u64,
    low_rank: u64,
    partials: u64,
    arrived: u64,
    ready: u64,
    numbers: u64,
    choices: u64,
}

/// Shapes of a program.
#[derive(Clone, Copy, Debug)]
struct Shapes {
    heads: Heads,
    hidden: usize,
    vocabulary: usize,
    /// Pages of a sequence at most.
    table: usize,
    most_rows: usize,
    products: usize,
}

/// A captured step.
#[derive(Debug)]
struct Graph(sys::CUgraphExec);

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: nothing else has the graph.
        unsafe { cuda::graph::exec_destroy(self.0) }.ok();
    }
}

#[derive(Debug)]
struct CudaRunner {
    // Before the driver, whose stream they were captured on.
    graphs: HashMap<usize, Graph>,
    kernels: HashMap<usize, Kernels>,
    driver: Driver,
    launches: Vec<Launch>,
    embedding: u64,
    shapes: Shapes,
    room: Room,
    kept: Kept,
    bf16: bool,
    /// Rows of the last step.
    rows: usize,
}

// SAFETY: the driver's handles may be used from any thread that has bound the context, which every method does first.
unsafe impl Send for CudaRunner {}

impl CudaRunner {
    fn new(
        program: &StepProgram<Cube<CudaRuntime>>,
        pages: &[Pages<Cube<CudaRuntime>>],
    ) -> Result<Self, StepError> {
        let driver = Driver::open(primitive(program.embedding.clone()).device.index)?;
        let Built { launches, embedding, shapes, room, kept, bf16 } =
            build::build(program, pages, &driver.limits)?;
        let (graphs, kernels) = (HashMap::new(), HashMap::new());
        Ok(Self { graphs, kernels, driver, launches, embedding, shapes, room, kept, bf16, rows: 0 })
    }

    fn kernels(&mut self, n: usize) -> Result<Kernels, StepError> {
        let tiles = row_tiles(n);
        if let Some(kernels) = self.kernels.get(&tiles) {
            return Ok(*kernels);
        }
        let kernels = self.driver.compile(tiles, self.bf16, self.shapes.heads.width)?;
        self.kernels.insert(tiles, kernels);
        Ok(kernels)
    }

    /// Ids, lengths and pages of the rows, as `room.numbers` has them.
    fn numbers(&self, rows: &[StepRow]) -> Result<Vec<i32>, StepError> {
        let Shapes { most_rows, table, .. } = self.shapes;
        let mut numbers = vec![0; 2 * most_rows + rows.len() * table];
        for (place, StepRow { id, sequence }) in rows.iter().enumerate() {
            let pages = &sequence.pages;
            if sequence.rows != 1 || pages.len() > table || *id as usize >= self.shapes.vocabulary {
                return Err(refused(format!(
                    "row {place}: token {id}, {} new tokens, {} pages",
                    sequence.rows,
                    pages.len()
                )));
            }
            numbers[place] = *id as i32;
            numbers[most_rows + place] = sequence.length as i32;
            let own = &mut numbers[2 * most_rows + place * table..][..pages.len()];
            own.iter_mut().zip(pages).for_each(|(number, page)| *number = *page as i32);
        }
        Ok(numbers)
    }

    /// Submits the kernels of a step of n rows one by one.
    fn submit(&self, n: usize, kernels: &Kernels) -> Result<(), StepError> {
        let Room { residual, ready, numbers, logits, choices, .. } = self.room;
        let (d, products) = (self.shapes.hidden as i32, self.shapes.products as i32);
        let rows = (n as u32, 1, 1);
        let units = THREADS as u32;
        let ids = numbers;
        launch(
            &self.driver,
            kernels.embed,
            rows,
            units,
            0,
            &mut [
                place(&self.embedding),
                place(&ids),
                place(&residual),
                place(&d),
                place(&ready),
                place(&products),
            ],
        )?;
        let mut number = 0;
        for operation in &self.launches {
            match operation {
                Launch::Product(product, _) => {
                    self.submit_product(n, kernels, product, number)?;
                    number += 1;
                }
                Launch::Attend(attend) => self.submit_attention(n, kernels, attend)?,
            }
        }
        let vocabulary = self.shapes.vocabulary as i32;
        launch(
            &self.driver,
            kernels.choose,
            rows,
            units,
            0,
            &mut [place(&logits), place(&vocabulary), place(&choices)],
        )
    }

    fn submit_product(
        &self,
        n: usize,
        kernels: &Kernels,
        product: &Product,
        number: usize,
    ) -> Result<(), StepError> {
        let limits = &self.driver.limits;
        let share = Share::new(n, product.inner as usize, product.ranks as usize, limits)
            .ok_or_else(|| refused(format!("no room for {n} rows in shared memory")))?;
        let resident = limits.processors * self.driver.resident(kernels, share.shared)?;
        let blocks = resident / share.splits;
        let warps = THREADS / WARP;
        if blocks == 0 {
            return Err(refused(format!("{} blocks do not run at a time", share.splits)));
        }
        let mut product = Product {
            n: n as i32,
            splits: share.splits as i32,
            chunk: share.chunk as i32,
            team: team(product.tiles as usize, blocks * warps, warps.min(MOST_TEAM)) as i32,
            a_chunks: share.a_chunks as i32,
            ready: self.room.ready + 4 * number as u64,
            ..*product
        };
        if product.source == FROM_RESIDUAL && n > NORMALISED_BY_BLOCKS {
            self.submit_norm(n, kernels, &product)?;
            (product.source, product.rows_in) = (FROM_ROWS, self.room.normalised);
        }
        let blocks = ((blocks * share.splits) as u32, 1, 1);
        let shared = share.shared as u32;
        launch(&self.driver, kernels.product, blocks, THREADS as u32, shared, &mut [place(&product)])
    }

    fn submit_norm(&self, n: usize, kernels: &Kernels, product: &Product) -> Result<(), StepError> {
        let Product { residual, norm, epsilon, inner, .. } = product;
        let units = THREADS as u32;
        let to = self.room.normalised;
        launch(
            &self.driver,
            kernels.normalise,
            (n as u32, 1, 1),
            units,
            0,
            &mut [place(residual), place(norm), place(epsilon), place(inner), place(&to)],
        )
    }

    fn submit_attention(&self, n: usize, kernels: &Kernels, attend: &Attend) -> Result<(), StepError> {
        let heads = self.shapes.heads.queries;
        let splits = attention_splits(n, heads, &self.driver.limits);
        let attend = Attend { splits: splits as i32, ..*attend };
        let blocks = (heads as u32, n as u32, splits as u32);
        launch(&self.driver, kernels.attend, blocks, ATTENTION_UNITS, 0, &mut [place(&attend)])
    }

    /// The step of n rows as a graph.
    fn capture(&self, n: usize, kernels: &Kernels) -> Result<Graph, StepError> {
        let stream = self.driver.stream.raw();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive, and this thread alone submits to it. A capture that fails is ended all the same.
        unsafe {
            cuda::stream::begin_capture(stream, mode)?;
            let submitted = self.submit(n, kernels);
            let graph = cuda::stream::end_capture(stream)?;
            submitted?;
            let executable = cuda::graph::instantiate(graph, std::mem::zeroed());
            cuda::graph::destroy(graph)?;
            Ok(Graph(executable?))
        }
    }
}

impl StepRunner for CudaRunner {
    fn most_rows(&self) -> usize {
        self.shapes.most_rows
    }

    fn launches(&self) -> usize {
        self.launches.len() + 2
    }

    fn prepare(&mut self, rows: usize) -> Result<(), StepError> {
        if rows == 0 || rows > self.shapes.most_rows {
            return Err(refused(format!("{rows} rows, where 1 to {} can be run", self.shapes.most_rows)));
        }
        self.driver.stream.bind()?;
        if !self.graphs.contains_key(&rows) {
            let kernels = self.kernels(rows)?;
            let graph = self.capture(rows, &kernels)?;
            self.graphs.insert(rows, graph);
        }
        Ok(())
    }

    fn run(&mut self, rows: &[StepRow]) -> Result<Vec<Option<u32>>, StepError> {
        let n = rows.len();
        self.prepare(n)?;
        let numbers = self.numbers(rows)?;
        // Asking for an address waits until everything before has been submitted.
        self.kept.settle()?;
        self.driver.stream.follow()?;
        let mut choices = vec![0_i32; n];
        // SAFETY: the places hold `most_rows` sequences, and the vectors live until the stream is done.
        unsafe {
            cuda::memcpy_htod_async(self.room.numbers, &numbers, self.driver.stream.raw())?;
            cuda::graph::launch(self.graphs[&n].0, self.driver.stream.raw())?;
            cuda::memcpy_dtoh_async(&mut choices, self.room.choices, self.driver.stream.raw())?;
        }
        self.driver.stream.finish()?;
        self.rows = n;
        Ok(choices.into_iter().map(|choice| u32::try_from(choice).ok()).collect())
    }

    fn logits(&mut self) -> Result<Vec<f32>, StepError> {
        self.driver.stream.bind()?;
        let mut logits = vec![0.0; self.rows * self.shapes.vocabulary];
        // SAFETY: the last step wrote as many, and the vector lives until the stream is done.
        unsafe { cuda::memcpy_dtoh_async(&mut logits, self.room.logits, self.driver.stream.raw()) }?;
        self.driver.stream.finish()?;
        Ok(logits)
    }
}

/// A kernel's argument.
fn place<T>(value: &T) -> *mut c_void {
    std::ptr::from_ref(value).cast_mut().cast()
}

/// Submits a kernel. Where the card can, its blocks may begin before those of the kernel in front of it have ended; the kernels
/// wait for each other where they need to.
fn launch(
    driver: &Driver,
    kernel: sys::CUfunction,
    blocks: (u32, u32, u32),
    units: u32,
    shared: u32,
    arguments: &mut [*mut c_void],
) -> Result<(), StepError> {
    // SAFETY: an attribute is plain numbers, for which zero is a value.
    let mut early: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
    early.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    early.value.programmaticStreamSerializationAllowed = 1;
    let config = sys::CUlaunchConfig {
        gridDimX: blocks.0,
        gridDimY: blocks.1,
        gridDimZ: blocks.2,
        blockDimX: units,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: shared,
        hStream: driver.stream.raw(),
        attrs: &raw mut early,
        numAttrs: u32::from(driver.limits.compute_capability >= EARLY_LAUNCHES),
    };
    // SAFETY: the arguments are those that the kernel declares, and point at variables that live until the driver has copied
    // them, which it does at once. Addresses are those of tensors that the runner keeps, and sizes were made from their shapes.
    let status = unsafe {
        sys::cuLaunchKernelEx(&raw const config, kernel, arguments.as_mut_ptr(), std::ptr::null_mut())
    };
    Ok(status.result()?)
}
