//! What our own commands write.

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

/// Says what failed; the exit code of a failure.
pub(crate) fn fail(message: &str) -> ExitCode {
    complain(&format!("error: {message}\n"));
    ExitCode::FAILURE
}

/// Says what is wrong with the arguments; the exit code for that, as Python's argparse has it.
pub(crate) fn usage(message: &str) -> ExitCode {
    complain(&format!("deepspeed: error: {message}\n"));
    ExitCode::from(2)
}

/// Writes a result to standard output. A reader that has gone (`| head`) is no failure.
pub(crate) fn print(text: &str) -> ExitCode {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            fail(&format!("cannot write to standard output: {error}"))
        }
        _ => ExitCode::SUCCESS,
    }
}

/// Writes to standard error; when that is closed there is nobody left to tell.
pub(crate) fn complain(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}
