//! How a program ends when it cannot go on.

use std::error::Error;
use std::fmt;
use std::process::ExitCode;

use crate::print_error_line;

/// A message for the user and the exit status.
pub struct Failure {
    status: u8,
    message: String,
}

impl Failure {
    /// A check that ran and failed: status 1.
    #[must_use]
    pub fn check(message: impl Into<String>) -> Self {
        Self { status: 1, message: message.into() }
    }

    /// A plan that needs more memory than there is: status 3.
    #[must_use]
    pub fn does_not_fit(message: impl Into<String>) -> Self {
        Self { status: 3, message: message.into() }
    }

    /// What went wrong.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The same, with the place where it was found in front.
    #[must_use]
    pub fn at(self, place: &str) -> Self {
        Self { message: format!("{place}: {}", self.message), ..self }
    }

    /// Bad arguments or input: status 2.
    #[must_use]
    pub fn input(message: impl Into<String>) -> Self {
        Self { status: 2, message: message.into() }
    }
}

impl Failure {
    /// The same, with what else can be done.
    #[must_use]
    pub fn advise(self, advice: impl fmt::Display) -> Self {
        Self { message: format!("{}; {advice}", self.message), ..self }
    }
}

/// Library errors end a program with status 2: nearly all are about what it was given.
impl<E: Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::input(error.to_string())
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// Ends a program: prints what went wrong, if anything did.
pub fn finish(result: Result<(), Failure>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            print_error_line(format_args!("error: {}", failure.message));
            ExitCode::from(failure.status)
        }
    }
}
