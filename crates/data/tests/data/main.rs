//! Tests of the data crate through its public face, in one binary so that polars is linked once.
//!
//! Every clue here was invented for these tests. What needs real files looks for `../shared` beside the repository and
//! says so where it is not there.

#![allow(clippy::unwrap_used, reason = "a test's helpers may panic as its tests do")]

mod cleaning;
mod columns;
mod damaged;
mod formats;
mod order;
mod packing;
mod real;
mod support;
