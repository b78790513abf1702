//! `deepspeed man`: manual pages, from the types that parse the arguments.

use std::{io, path::PathBuf, process::ExitCode};

use clap::{Args, ValueHint};
use clap_mangen::Man;

use crate::{
    commands,
    output::{fail, print},
};

/// The arguments of `deepspeed man`.
#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// One of the commands, for its page; without it the page of the launch
    command: Option<String>,
    /// Write all pages into this folder, which is made: deepspeed.1, deepspeed-config.1, ...
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, conflicts_with = "command")]
    dir: Option<PathBuf>,
}

/// Runs `deepspeed man`.
pub(crate) fn run(args: &ManArgs) -> ExitCode {
    match &args.dir {
        Some(dir) => match write_all(dir) {
            Ok(count) => print(&format!("{count} pages in {}\n", dir.display())),
            Err(error) => fail(&error.to_string()),
        },
        None => match page(args.command.as_deref()) {
            Ok(Some((_, page))) => print(&page),
            Ok(None) => {
                let known: Vec<&str> = commands::COMMANDS.iter().map(|command| command.name).collect();
                let wanted = args.command.as_deref().unwrap_or_default();
                fail(&format!("there is no command `{wanted}`; there are {}", known.join(", ")))
            }
            Err(error) => fail(&error.to_string()),
        },
    }
}

/// The name and the text of a page; `None` where there is no such command.
fn page(word: Option<&str>) -> io::Result<Option<(&'static str, String)>> {
    let (name, command) = match word {
        None => ("deepspeed", commands::tree()),
        Some(word) => match commands::find(word) {
            Some(command) => (command.page, (command.describe)()),
            None => return Ok(None),
        },
    };
    let mut bytes = Vec::new();
    Man::new(command.name(name)).render(&mut bytes)?;
    Ok(Some((name, String::from_utf8_lossy(&bytes).into_owned())))
}

fn write_all(dir: &PathBuf) -> io::Result<usize> {
    fs_err::create_dir_all(dir)?;
    let words = commands::COMMANDS.iter().map(|command| Some(command.name));
    let mut count = 0;
    for word in std::iter::once(None).chain(words) {
        if let Some((name, text)) = page(word)? {
            fs_err::write(dir.join(format!("{name}.1")), text)?;
            count += 1;
        }
    }
    Ok(count)
}
