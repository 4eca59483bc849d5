//! The programs' bodies, one module each; `examples/NAME.rs` calls `NAME::main`.

pub mod evaluate;
pub mod finetune;
pub mod generate;
pub mod import_recipe;
pub mod make_base;
pub mod merge;
pub mod parity;
pub mod plan;
