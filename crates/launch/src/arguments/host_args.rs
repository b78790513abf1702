//! Which hosts a tool looks at, and how they are reached: the flags that a launch has for that.

use crate::arguments::args::{DEFAULT_HOSTFILE, LaunchArgs};
use crate::error::LaunchError;
use clap::{Args, Parser, ValueHint};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The hosts of a tool. Names and meaning are those of a launch.
#[derive(Debug, Clone, Args)]
pub struct HostArgs {
    /// The hosts and their slots: lines of `<host> slots=<number>`
    #[arg(short = 'f', short_alias = 'H', long, value_name = "FILE", default_value = DEFAULT_HOSTFILE,
          value_hint = ValueHint::FilePath)]
    pub hostfile: PathBuf,

    /// Use only these: HOST[:SLOT[,SLOT...]][@HOST...]
    #[arg(short = 'i', long, value_name = "SLOTS", default_value = "", hide_default_value = true)]
    pub include: String,

    /// Use all but these, in the same form
    #[arg(short = 'e', long, value_name = "SLOTS", default_value = "", hide_default_value = true)]
    pub exclude: String,

    /// Use the first N hosts of the hostfile
    #[arg(long = "num_nodes", alias = "num-nodes", value_name = "N")]
    pub num_nodes: Option<u32>,

    /// Further arguments for ssh, quoted as for a shell
    #[arg(
        long = "launcher_args",
        alias = "launcher-args",
        value_name = "ARGS",
        default_value = "",
        hide_default_value = true,
        allow_hyphen_values = true
    )]
    pub launcher_args: String,

    /// The port of ssh
    #[arg(long = "ssh_port", alias = "ssh-port", value_name = "PORT")]
    pub ssh_port: Option<u16>,
}

impl HostArgs {
    /// The arguments of a launch on these hosts by ssh, with further flags.
    ///
    /// # Errors
    /// A hostfile that was named and is not there.
    pub(crate) fn as_launch(&self, flags: &[OsString]) -> Result<LaunchArgs, LaunchError> {
        if self.hostfile != Path::new(DEFAULT_HOSTFILE) && !self.hostfile.exists() {
            return Err(LaunchError::HostfileMissing { path: self.hostfile.clone() });
        }
        let mut words: Vec<OsString> = vec!["deepspeed".into()];
        let mut flag = |name: &str, value: OsString| {
            let mut word = OsString::from(format!("{name}="));
            word.push(value);
            words.push(word);
        };
        flag("--hostfile", self.hostfile.clone().into());
        flag("--launcher", "ssh".into());
        for (name, value) in [
            ("--include", &self.include),
            ("--exclude", &self.exclude),
            ("--launcher_args", &self.launcher_args),
        ] {
            if !value.is_empty() {
                flag(name, value.into());
            }
        }
        for (name, value) in [
            ("--num_nodes", self.num_nodes.map(|count| count.to_string())),
            ("--ssh_port", self.ssh_port.map(|port| port.to_string())),
        ] {
            if let Some(value) = value {
                flag(name, value.into());
            }
        }
        words.extend(["--force_multi".into(), "--no_python".into()]);
        words.extend(flags.iter().cloned());
        // What a rank would run; nothing is started from these arguments.
        words.push("none".into());
        LaunchArgs::try_parse_from(words).map_err(|error| LaunchError::Arguments { text: error.to_string() })
    }
}
