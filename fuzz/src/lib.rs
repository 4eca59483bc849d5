//! What the fuzz targets share.

pub mod readers;

use std::path::Path;

use readers::Reader;

/// The reader of a target, made once in its thread.
///
/// # Panics
/// If there is none of that name.
#[must_use]
pub fn reader(name: &str) -> Reader {
    let forms = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/weights/tests/weights/forms");
    Reader::all(&forms).into_iter().find(|reader| reader.name == name).expect("a reader of that name")
}

/// A fuzz target that hands its input to the reader of its name.
#[macro_export]
macro_rules! target {
    ($name:literal) => {
        thread_local! {
            static READER: $crate::readers::Reader = $crate::reader($name);
        }
        libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
            READER.with(|reader| reader.accepts(bytes));
        });
    };
}
