//! Checks against this machine that come before the first process: the script is there, the port is free.

use crate::error::LaunchError;
use crate::nearest::nearest;
use crate::plan::surroundings::{find_on_path, is_executable};
use crate::plan::{Interpreter, LaunchPlan};
use crate::port;
use fs_err as fs;
use std::path::{Path, PathBuf};

/// Checks that the plan can start, and chooses the port where none is given.
///
/// # Errors
/// A missing script or program, with the nearest name; a port in use.
pub(crate) fn check(plan: &mut LaunchPlan) -> Result<(), LaunchError> {
    check_script(plan)?;
    // With `--no_ssh` only the host of rank 0 can tell whether the port is free.
    match plan.master_port {
        Some(port) if plan.first_rank() == 0 => port::check_free(port),
        Some(_) => Ok(()),
        None => {
            plan.meet_at(port::choose_free()?);
            Ok(())
        }
    }
}

/// Checks that there is something to run.
///
/// # Errors
/// A missing script or program, with the nearest name.
pub(crate) fn check_script(plan: &LaunchPlan) -> Result<(), LaunchError> {
    let script = Path::new(&plan.script);
    match plan.interpreter {
        Interpreter::Script if !script.exists() => {
            return Err(LaunchError::ScriptMissing {
                path: script.to_path_buf(),
                hint: nearest_file(script),
            });
        }
        // Where a module lies is python's own affair.
        Interpreter::Script | Interpreter::Module => {}
        Interpreter::None => check_program(script)?,
    }
    Ok(())
}

/// With `--no_python` the script must itself be executable; without a slash it is looked for on `PATH`.
fn check_program(program: &Path) -> Result<(), LaunchError> {
    let unusable = |what: String| LaunchError::ProgramUnusable { path: program.to_path_buf(), what };
    let is_name =
        program.components().count() == 1 && !program.as_os_str().as_encoded_bytes().contains(&b'/');
    if is_name {
        return match find_on_path(&program.to_string_lossy()) {
            Some(_) => Ok(()),
            None if program.exists() => Err(unusable(format!(
                "no folder of PATH has it; for the file in this folder write ./{}",
                program.display()
            ))),
            None => Err(unusable("no folder of PATH has it".to_owned())),
        };
    }
    if !program.exists() {
        return Err(LaunchError::ScriptMissing { path: program.to_path_buf(), hint: nearest_file(program) });
    }
    if !is_executable(program) {
        return Err(unusable(format!(
            "it is not executable; `chmod +x {}`, or leave --no_python out",
            program.display()
        )));
    }
    Ok(())
}

/// `; did you mean 'x'?` with the file in the script's folder whose name is nearest, or what is wrong with the folder.
fn nearest_file(script: &Path) -> String {
    let folder = match script.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    };
    if !folder.is_dir() {
        return format!("; there is no folder '{}'", folder.display());
    }
    let names: Vec<String> = fs::read_dir(&folder)
        .map(|entries| {
            entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
        })
        .unwrap_or_default();
    let wanted = script.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    match nearest(&wanted, names.iter().map(String::as_str)) {
        Some(near) => format!("; did you mean '{}'?", script.with_file_name(near).display()),
        None => match std::env::current_dir() {
            Ok(here) => format!(" (looked from {})", here.display()),
            Err(_) => String::new(),
        },
    }
}
