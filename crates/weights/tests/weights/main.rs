//! Tests of the weights crate through its public face, in one binary.
//!
//! What needs real files looks for `../shared` beside the repository and says so where it is not there.

#![allow(clippy::unwrap_used, reason = "a test's helpers may panic as its tests do")]

mod external;
mod files;
mod forms;
mod gguf;
mod load;
mod merge;
mod support;
