//! `deepspeed completions`: completions for shells, from the types that parse the arguments.

use std::process::ExitCode;

use clap::{Args, ValueEnum};
use clap_complete::{Shell, generate};

use crate::{
    commands,
    output::{fail, print},
};

/// Other names of the command.
const ALIASES: [&str; 2] = ["ds", "deepspeed.pt"];

/// The arguments of `deepspeed completions`.
#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    shell: KnownShell,
}

/// A shell that completions are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum KnownShell {
    Bash,
    Zsh,
    Fish,
}

/// Runs `deepspeed completions`.
pub(crate) fn run(args: &CompletionsArgs) -> ExitCode {
    match text(args.shell) {
        Ok(text) => print(&text),
        Err(error) => fail(&format!("the completions are no text: {error}")),
    }
}

fn text(shell: KnownShell) -> Result<String, std::string::FromUtf8Error> {
    let kind = match shell {
        KnownShell::Bash => Shell::Bash,
        KnownShell::Zsh => Shell::Zsh,
        KnownShell::Fish => Shell::Fish,
    };
    let mut bytes = Vec::new();
    generate(kind, &mut commands::tree(), "deepspeed", &mut bytes);
    let text = String::from_utf8(bytes)?;
    let aliases = ALIASES.join(" ");
    Ok(match shell {
        KnownShell::Bash => format!("{text}\ncomplete -F _deepspeed -o bashdefault -o default {aliases}\n"),
        KnownShell::Zsh => {
            text.replacen("#compdef deepspeed\n", &format!("#compdef deepspeed {aliases}\n"), 1)
        }
        KnownShell::Fish => {
            let wraps = ALIASES.map(|alias| format!("complete -c {alias} -w deepspeed\n"));
            format!("{text}\n{}", wraps.concat())
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_and_every_alias_is_completed() {
        for shell in [KnownShell::Bash, KnownShell::Zsh, KnownShell::Fish] {
            let text = text(shell).unwrap();
            for word in commands::COMMANDS.iter().map(|command| command.name).chain(ALIASES) {
                assert!(text.contains(word), "{shell:?}: {word}");
            }
            for flag in ["num_gpus", "shared-folder", "world"] {
                assert!(text.contains(flag), "{shell:?}: {flag}");
            }
        }
    }
}
