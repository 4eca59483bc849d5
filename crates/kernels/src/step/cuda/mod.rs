//! The program on a CUDA device: one kernel a step.
//!
//! Its blocks all run at a time and meet after every product, so nothing is launched in between, and each fetches the weights of the
//! next product while it waits for the others. The kernel is CUDA C++ and not CubeCL, because that needs a launch whose blocks
//! are promised to run at a time, `mma` on factors that are unpacked in registers, copies into shared memory that nobody
//! waits for, and a barrier across the device. See `docs/decisions/0014-steps-as-one-kernel.md`.

mod build;
mod driver;
mod layout;
mod outline;

use std::collections::BTreeMap;
use std::ffi::c_void;

use burn::tensor::{Shape, Tensor};
use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::CudaRuntime;
use cudarc::driver::{CudaContext, result as cuda, sys};

use self::build::{Built, Kept, Tables};
use self::driver::{Driver, Kernel};
use self::layout::{Needs, Product, Share, Step, THREADS, Variant, words};
use self::outline::{FROM_RESIDUAL, Outline};
use super::{StepError, StepProgram, StepRow, StepRunner};
use crate::device::{Cube, primitive, tensor};
use crate::limits::Limits;
use crate::pinned::Pinned;
use crate::{ChosenToken, Pages};

/// Rows of a step that there are kernels for.
const ROWS: [usize; 3] = [32, 16, 8];

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
) -> Result<Box<dyn StepRunner<Cube<CudaRuntime>>>, StepError> {
    Ok(Box::new(CudaRunner::new(program, pages)?))
}

/// Bytes of the device that [`runner`] takes besides what the program names; 0 if there is none.
pub(crate) fn bytes(program: &StepProgram<Cube<CudaRuntime>>) -> usize {
    let limits = CudaContext::new(program.embedding.device().index).and_then(|context| Limits::of(&context));
    limits.ok().and_then(|limits| Outline::new(program, &limits).ok()).map_or(0, |outline| outline.bytes())
}

/// Memory for what a step computes: addresses, or bytes before there are any.
#[derive(Clone, Copy, Debug)]
struct Room {
    residual: u64,
    joined: u64,
    logits: u64,
    attended: u64,
    log_sums: u64,
    heads_result: u64,
    partial: u64,
    arrived: u64,
    squares: u64,
    normalised: u64,
    activated: u64,
    low_rank: u64,
    barrier: u64,
    numbers: u64,
}

/// Shapes of a program.
#[derive(Clone, Copy, Debug)]
struct Shapes {
    needs: Needs,
    vocabulary: usize,
    /// Pages of a sequence at most.
    table: usize,
    /// Logarithm of a page's tokens.
    page_shift: u32,
    /// Tokens of a sequence at most.
    context: usize,
    most_rows: usize,
}

/// What steps of so many rows need.
#[derive(Clone, Copy, Debug)]
struct Ready {
    share: Share,
    /// Times that the blocks meet.
    meetings: u32,
}

#[derive(Debug)]
struct CudaRunner {
    // Before the driver, whose context they are loaded into.
    kernels: BTreeMap<Variant, Kernel>,
    ready: BTreeMap<usize, Ready>,
    /// Ids, lengths and pages of the rows, as `room.numbers` has them during a step.
    numbers: Pinned<i32>,
    /// Each row's likeliest token, -1 where there is none, and then the bits of their log-probabilities.
    choices: Pinned<i32>,
    driver: Driver,
    products: Vec<Product>,
    shapes: Shapes,
    room: Room,
    /// The memory of `room.logits`.
    logits: CubeTensor<CudaRuntime>,
    tables: Tables,
    kept: Kept,
    bf16: bool,
    /// What the barrier has counted.
    passed: u32,
    /// Rows of the last step.
    rows: usize,
    /// Whether something was asked of the device that the next step needs.
    behind: bool,
}

// SAFETY: the driver's handles may be used from any thread that has bound the context, which every method does first.
unsafe impl Send for CudaRunner {}

impl CudaRunner {
    fn new(
        program: &StepProgram<Cube<CudaRuntime>>,
        pages: &[Pages<Cube<CudaRuntime>>],
    ) -> Result<Self, StepError> {
        let driver = Driver::open(primitive(program.embedding.clone()).device.index)?;
        let Built { products, shapes, room, logits, tables, kept, bf16 } =
            build::build(program, pages, &driver.limits)?;
        let (kernels, ready) = (BTreeMap::new(), BTreeMap::new());
        let Shapes { most_rows, table, .. } = shapes;
        let (numbers, choices) = (Pinned::new(most_rows * (2 + table))?, Pinned::new(2 * most_rows)?);
        Ok(Self {
            kernels,
            ready,
            numbers,
            choices,
            driver,
            products,
            shapes,
            room,
            logits,
            tables,
            kept,
            bf16,
            passed: 0,
            rows: 0,
            behind: true,
        })
    }

    /// Puts ids, lengths and pages of the rows where the device copies them from; gives how many numbers that is.
    fn set_numbers(&mut self, rows: &[StepRow]) -> Result<usize, StepError> {
        let Shapes { most_rows, table, context, vocabulary, .. } = self.shapes;
        let (ids, rest) = self.numbers.values().split_at_mut(most_rows);
        let (lengths, tables) = rest.split_at_mut(most_rows);
        for (place, StepRow { id, sequence }) in rows.iter().enumerate() {
            let (pages, length) = (&sequence.pages, sequence.length);
            if sequence.rows != 1
                || pages.len() > table
                || *id as usize >= vocabulary
                || length as usize > context
            {
                return Err(refused(format!(
                    "row {place}: token {id}, {} new tokens of {length}, {} pages",
                    sequence.rows,
                    pages.len()
                )));
            }
            ids[place] = *id as i32;
            lengths[place] = length as i32;
            let own = &mut tables[place * table..][..pages.len()];
            own.iter_mut().zip(pages).for_each(|(number, page)| *number = *page as i32);
        }
        Ok(2 * most_rows + rows.len() * table)
    }

    /// What the kernel is told of a step of n rows.
    fn step(&self, n: usize, share: &Share) -> Result<Step, StepError> {
        let (Shapes { needs, most_rows, .. }, room, tables) = (self.shapes, self.room, self.tables);
        let heads = needs.heads;
        Ok(Step {
            products: tables.products,
            barrier: room.barrier,
            embedding: tables.embedding,
            ids: room.numbers,
            residual: room.residual,
            normalised: room.normalised,
            activated: room.activated,
            low_rank: room.low_rank,
            pairs: tables.pairs,
            dynamic: tables.dynamic,
            logits: room.logits,
            choices: self.choices.address()?,
            joined: room.joined,
            lengths: room.numbers + 4 * most_rows as u64,
            tables: room.numbers + 8 * most_rows as u64,
            turns: tables.turns,
            attended: room.attended,
            log_sums: room.log_sums,
            result: room.heads_result,
            partial: room.partial,
            arrived: room.arrived,
            squares: room.squares,
            count: self.products.len() as i32,
            n: n as i32,
            d: needs.hidden as i32,
            vocabulary: self.shapes.vocabulary as i32,
            round: share.round as i32,
            work_bytes: share.work as i32,
            most_low_rank: (n * needs.ranks) as i32,
            table: self.shapes.table as i32,
            page_shift: self.shapes.page_shift as i32,
            heads: heads.queries as i32,
            key_heads: heads.keys as i32,
            splits: share.splits as i32,
            scale: 1.0 / (heads.width as f32).sqrt(),
            most_tiles: needs.most_tiles() as i32,
        })
    }

    /// Tells the kernel for n rows what the step is, if the last one that it ran was another.
    fn tell(&mut self, n: usize) -> Result<(), StepError> {
        let share = self.ready[&n].share;
        if self.kernels[&share.variant].told == Some(n) {
            return Ok(());
        }
        // SAFETY: a step has no gaps.
        let step = unsafe { words(&[self.step(n, &share)?]) };
        let stream = self.driver.stream.raw();
        if let Some(kernel) = self.kernels.get_mut(&share.variant) {
            // SAFETY: the place is a `Step`; the driver has copied memory that is not its own when the call returns.
            unsafe { cuda::memcpy_htod_async(kernel.step, &step, stream) }?;
            kernel.told = Some(n);
        }
        Ok(())
    }

    /// Submits a step of n rows with so many numbers, which are there.
    fn submit(&mut self, n: usize, numbers: usize) -> Result<(), StepError> {
        self.tell(n)?;
        let Ready { share, meetings } = self.ready[&n];
        let kernel = &self.kernels[&share.variant];
        let stream = self.driver.stream.raw();
        let blocks = self.driver.limits.processors as u32;
        let mut passed = self.passed;
        let mut arguments = [(&raw mut passed).cast::<c_void>()];
        // SAFETY: the argument is what the kernel declares, and is copied before the call returns. Addresses are those of memory
        // that the runner keeps until the step is done, and sizes were made from its shapes.
        unsafe {
            cuda::memcpy_htod_async(self.room.numbers, &self.numbers.values()[..numbers], stream)?;
            sys::cuLaunchCooperativeKernel(
                kernel.function,
                blocks,
                1,
                1,
                THREADS as u32,
                1,
                1,
                share.shared as u32,
                stream,
                arguments.as_mut_ptr(),
            )
            .result()?;
        }
        self.passed = self.passed.wrapping_add(meetings.wrapping_mul(blocks));
        Ok(())
    }
}

impl StepRunner<Cube<CudaRuntime>> for CudaRunner {
    fn most_rows(&self) -> usize {
        self.shapes.most_rows
    }

    fn launches(&self) -> usize {
        1
    }

    fn prepare(&mut self, rows: usize) -> Result<(), StepError> {
        if rows == 0 || rows > self.shapes.most_rows {
            return Err(refused(format!("{rows} rows, where 1 to {} can be run", self.shapes.most_rows)));
        }
        if self.ready.contains_key(&rows) {
            return Ok(());
        }
        let Needs { plain, heads, .. } = self.shapes.needs;
        let share = Share::new(rows, &self.shapes.needs, &self.driver.limits)
            .ok_or_else(|| refused(format!("no room for {rows} rows in shared memory")))?;
        self.driver.stream.bind()?;
        if !self.kernels.contains_key(&share.variant) {
            let kernel = self.driver.compile(share.variant, self.bf16, plain, heads.width)?;
            self.kernels.insert(share.variant, kernel);
        }
        if self.driver.resident(&self.kernels[&share.variant], share.shared)? == 0 {
            return Err(refused(format!("no block with {} bytes of shared memory runs", share.shared)));
        }
        let meetings = share.meetings(&self.products, FROM_RESIDUAL);
        self.ready.insert(rows, Ready { share, meetings });
        Ok(())
    }

    fn follow(&mut self) {
        self.behind = true;
    }

    fn run(&mut self, rows: &[StepRow]) -> Result<Vec<Option<ChosenToken>>, StepError> {
        let n = rows.len();
        self.prepare(n)?;
        let numbers = self.set_numbers(rows)?;
        self.driver.stream.bind()?;
        if self.behind {
            // Asking for an address waits until everything before has been submitted.
            self.kept.settle()?;
            self.driver.stream.follow()?;
            self.behind = false;
        }
        self.submit(n, numbers)?;
        self.driver.stream.finish()?;
        self.rows = n;
        let (ids, log_probs) = self.choices.values()[..2 * n].split_at(n);
        let chosen = |(&id, &log_prob): (&i32, &i32)| {
            let log_prob = Some(f32::from_bits(log_prob.cast_unsigned()));
            Some(ChosenToken { id: u32::try_from(id).ok()?, log_prob })
        };
        Ok(ids.iter().zip(log_probs).map(chosen).collect())
    }

    fn logits(&self) -> Tensor<Cube<CudaRuntime>, 2> {
        let (rows, vocabulary) = (self.rows, self.shapes.vocabulary);
        let CubeTensor { client, device, handle, dtype, .. } = self.logits.clone();
        let behind = handle.size_in_used() - (rows * vocabulary * dtype.size()) as u64;
        let handle = handle.offset_end(behind);
        tensor(CubeTensor::new_contiguous(client, device, Shape::from([rows, vocabulary]), handle, dtype))
    }
}
