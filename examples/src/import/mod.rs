//! Training scripts of others as recipes: keyword arguments of transformers, PEFT, TRL and bitsandbytes in Python, a notebook or
//! JSON.
//!
//! Literals are read and nothing is run. What it trades: a value that is computed is not known here, and is listed with what else
//! has no counterpart. What it refuses: files that are no such text, and settings that no run could have.

mod arguments;
mod python;
mod rules;

pub(crate) use arguments::{Import, Left, Taken, import_recipe};
