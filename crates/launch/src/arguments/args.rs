//! The command line as it is written: flags and their values, not yet their meaning (that is [`crate::plan`]).

use crate::job::restart::RestartOn;
use clap::{ArgAction, Parser, ValueEnum};
use std::ffi::OsString;
use std::path::PathBuf;

/// Headings under which `--help` lists the flags.
mod heading {
    pub(super) const RESOURCES: &str = "Which ranks to start";
    pub(super) const MEETING: &str = "Where the ranks meet";
    pub(super) const PROGRAM: &str = "What each rank runs";
    pub(super) const CORES: &str = "Cores";
    pub(super) const RESTARTS: &str = "When something dies";
    pub(super) const OUTPUT: &str = "Output";
    pub(super) const HOSTS: &str = "Several hosts (without effect on one)";
}

/// The path that is searched when `--hostfile` is not given.
pub const DEFAULT_HOSTFILE: &str = "/job/hostfile";

/// The flags of the `deepspeed` command.
///
/// Names, aliases and defaults are those of DeepSpeed; `--dry_run` is ours, and a `--master_port` that is not given
/// means a free one instead of 29500.
#[derive(Debug, Clone, Parser)]
#[command(
    name = "deepspeed",
    bin_name = "deepspeed",
    version,
    about = "Start a training program on every GPU (or CPU core) of this machine and watch over it.",
    long_about = None,
    override_usage = "deepspeed [OPTIONS] <script.py> [script arguments]...",
    after_help = "Everything after the script goes to the script as it stands.\n\n\
                  Other commands, where no file of that name lies in this folder (each has --help):\n  \
                  deepspeed config check|explain|schema FILE   look at a ds_config.json\n  \
                  deepspeed memory FILE --params N             plan the memory of a run\n  \
                  deepspeed checkpoint inspect|verify|... DIR  look into checkpoints, convert, export\n  \
                  deepspeed report                             what is installed, and what a job would use\n  \
                  deepspeed doctor --hostfile FILE             examine the hosts before a job starts\n  \
                  deepspeed ssh -f FILE COMMAND                a command on every host\n  \
                  deepspeed bench comm                         measure collectives\n  \
                  deepspeed completions bash|zsh|fish          completions for a shell\n  \
                  deepspeed man                                the manual page",
    infer_long_args = true
)]
pub struct LaunchArgs {
    /// The hosts and their slots: lines of `<host> slots=<number>`
    #[arg(short = 'H', long, value_name = "FILE", help_heading = heading::RESOURCES,
          default_value = DEFAULT_HOSTFILE)]
    pub hostfile: PathBuf,

    /// Use only these: HOST[:SLOT[,SLOT...]][@HOST...]; without a hostfile the host is localhost
    #[arg(short = 'i', long, value_name = "SLOTS", help_heading = heading::RESOURCES, default_value = "",
          hide_default_value = true)]
    pub include: String,

    /// Use all but these, in the same form
    #[arg(short = 'e', long, value_name = "SLOTS", help_heading = heading::RESOURCES, default_value = "",
          hide_default_value = true)]
    pub exclude: String,

    /// Use the first N hosts of the hostfile [default: all]
    #[arg(long = "num_nodes", value_name = "N", help_heading = heading::RESOURCES, default_value_t = -1,
          hide_default_value = true, allow_negative_numbers = true)]
    pub num_nodes: i64,

    /// Use the first N GPUs (or cores) of each host [default: all]
    #[arg(long = "num_gpus", alias = "num_accelerators", value_name = "N", help_heading = heading::RESOURCES,
          default_value_t = -1, hide_default_value = true, allow_negative_numbers = true)]
    pub num_gpus: i64,

    /// The port on which rank 0 awaits the others [default: a free one]
    #[arg(long = "master_port", value_name = "PORT", help_heading = heading::MEETING,
          value_parser = clap::value_parser!(u16).range(1..))]
    pub master_port: Option<u16>,

    /// The address at which rank 0 awaits the others [default: 127.0.0.1, on several hosts that of the first]
    #[arg(long = "master_addr", value_name = "ADDRESS", help_heading = heading::MEETING, default_value = "",
          hide_default_value = true)]
    pub master_addr: String,

    /// Run the script as `python -m` does: the script is a module's name
    #[arg(long, help_heading = heading::PROGRAM)]
    pub module: bool,

    /// Run the script itself, without python
    #[arg(long = "no_python", help_heading = heading::PROGRAM)]
    pub no_python: bool,

    /// Do not pass --local_rank=N to the script
    #[arg(long = "no_local_rank", help_heading = heading::PROGRAM)]
    pub no_local_rank: bool,

    /// Give each rank its own cores
    #[arg(long = "bind_cores_to_rank", help_heading = heading::CORES)]
    pub bind_cores_to_rank: bool,

    /// The cores to share out, for example 0-7,16-23 [default: all physical cores]
    #[arg(long = "bind_core_list", value_name = "RANGES", help_heading = heading::CORES)]
    pub bind_core_list: Option<String>,

    /// After a failure start all ranks again, at most N times; the script goes on from its last complete checkpoint [default: 0]
    #[arg(long = "max_restarts", value_name = "N", help_heading = heading::RESTARTS, default_value_t = 0,
          hide_default_value = true)]
    pub max_restarts: u32,

    /// Only after these failures: rank-killed, out-of-memory, exit, exit=CODE, host-lost, hang [default: any]
    #[arg(long = "restart_on", value_name = "KIND[,KIND...]", help_heading = heading::RESTARTS, value_delimiter = ',')]
    pub restart_on: Vec<RestartOn>,

    /// Also write the output of each rank to <DIR>/<time>_rank<N>.log
    #[arg(long = "enable_each_rank_log", value_name = "DIR", help_heading = heading::OUTPUT,
          default_value = "None", hide_default_value = true)]
    pub enable_each_rank_log: PathBuf,

    /// Write this command's process id to <temporary folder>/<pid>.deepspeed while it runs
    #[arg(long = "save_pid", help_heading = heading::OUTPUT)]
    pub save_pid: bool,

    /// How much this command says about itself
    #[arg(long = "log_level", value_name = "LEVEL", help_heading = heading::OUTPUT, default_value = "info",
          ignore_case = true)]
    pub log_level: LogLevel,

    /// Say nothing but errors
    #[arg(short = 'q', long, help_heading = heading::OUTPUT)]
    pub quiet: bool,

    /// Print what would be started, with each rank's command line and environment, and start nothing
    #[arg(long = "dry_run", help_heading = heading::OUTPUT)]
    pub dry_run: bool,

    /// How to reach the other hosts: ssh, pdsh, openmpi, mpich, impi, mvapich or slurm [default: ssh]
    #[arg(long, value_name = "NAME", help_heading = heading::HOSTS)]
    pub launcher: Option<String>,

    /// Further arguments for that program, quoted as for a shell
    #[arg(long = "launcher_args", value_name = "ARGS", help_heading = heading::HOSTS, default_value = "",
          hide_default_value = true, allow_hyphen_values = true)]
    pub launcher_args: String,

    /// This machine's address as the hosts see it, for runners other than ssh [default: that on the way to them]
    #[arg(long = "launcher_addr", value_name = "ADDRESS", help_heading = heading::HOSTS, default_value = "",
          hide_default_value = true)]
    pub launcher_addr: String,

    /// The place of this host among the hosts, with --no_ssh
    #[arg(long = "node_rank", value_name = "N", help_heading = heading::HOSTS, default_value_t = -1,
          hide_default_value = true, allow_negative_numbers = true)]
    pub node_rank: i64,

    /// This command is started on every host by hand: start this one's ranks only
    #[arg(long = "no_ssh", help_heading = heading::HOSTS)]
    pub no_ssh: bool,

    /// Without effect: every host must answer before a rank starts
    #[arg(long = "no_ssh_check", help_heading = heading::HOSTS)]
    pub no_ssh_check: bool,

    /// The port of ssh
    #[arg(long = "ssh_port", value_name = "PORT", help_heading = heading::HOSTS)]
    pub ssh_port: Option<u16>,

    /// Reach a single host of the hostfile like several, if it is not this machine
    #[arg(long = "force_multi", help_heading = heading::HOSTS)]
    pub force_multi: bool,

    /// A script that the hosts' shell sources first: the environment with their deepspeed
    #[arg(long = "venv_script", value_name = "FILE", help_heading = heading::HOSTS)]
    pub venv_script: Option<PathBuf>,

    /// Find a good configuration first (tune, or tune and run); not built yet
    #[arg(long, value_name = "tune|run", help_heading = heading::PROGRAM, default_value = "",
          hide_default_value = true)]
    pub autotuning: String,

    /// The script and its arguments, verbatim
    #[arg(value_name = "SCRIPT AND ARGUMENTS", trailing_var_arg = true, required = true, action = ArgAction::Append,
          hide = true)]
    pub command: Vec<OsString>,
}

/// How much the launcher says about itself; the names are those of Python's `logging`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum LogLevel {
    /// The whole plan too, as --dry_run prints it
    Debug,
    /// The start line, flags without effect
    Info,
    /// Doubtful settings
    #[value(alias = "warn")]
    Warning,
    /// Errors and the failure report only
    Error,
    /// As error
    #[value(alias = "fatal")]
    Critical,
}

impl LaunchArgs {
    /// The user's script: the first word that is not a flag.
    pub fn script(&self) -> &OsString {
        &self.command[0]
    }

    /// The words after the script.
    pub fn script_args(&self) -> &[OsString] {
        &self.command[1..]
    }

    /// The folder for per-rank logs; the word `None` means none, as in the original.
    pub fn rank_log_dir(&self) -> Option<&PathBuf> {
        (self.enable_each_rank_log.as_os_str() != "None").then_some(&self.enable_each_rank_log)
    }

    /// The level after `--quiet`.
    pub fn level(&self) -> LogLevel {
        if self.quiet { LogLevel::Error } else { self.log_level }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<LaunchArgs, clap::Error> {
        LaunchArgs::try_parse_from(std::iter::once("deepspeed").chain(words.iter().copied()))
    }

    #[test]
    fn every_word_after_the_script_belongs_to_the_script() {
        let args = parse(&[
            "--num_gpus",
            "2",
            "train.py",
            "--num_gpus",
            "7",
            "-q",
            "--deepspeed_config",
            "x",
            "--",
            "-h",
            "--version",
            "a b",
        ])
        .unwrap();
        assert_eq!(args.num_gpus, 2);
        assert!(!args.quiet);
        assert_eq!(args.script(), "train.py");
        assert_eq!(
            args.script_args(),
            ["--num_gpus", "7", "-q", "--deepspeed_config", "x", "--", "-h", "--version", "a b"]
        );
    }

    #[test]
    fn an_unknown_flag_before_the_script_is_an_error_with_the_nearest_name() {
        let error = parse(&["--num_gpsu", "2", "train.py"]).unwrap_err().to_string();
        assert!(error.contains("--num_gpsu") && error.contains("--num_gpus"), "{error}");
    }

    #[test]
    fn a_script_is_required() {
        assert_eq!(parse(&["--num_gpus", "2"]).unwrap_err().exit_code(), 2);
    }

    #[test]
    fn every_flag_of_the_original_parses() {
        let args = parse(&[
            "-H",
            "hosts",
            "-i",
            "a:0",
            "-e",
            "b",
            "--num_nodes",
            "-1",
            "--num_accelerators=3",
            "--master_port=1234",
            "--master_addr",
            "h",
            "--node_rank",
            "0",
            "--launcher",
            "slurm",
            "--launcher_args",
            "-x 1",
            "--module",
            "--no_python",
            "--no_local_rank",
            "--no_ssh",
            "--no_ssh_check",
            "--force_multi",
            "--save_pid",
            "--bind_cores_to_rank",
            "--bind_core_list",
            "0-3",
            "--enable_each_rank_log",
            "logs",
            "--ssh_port",
            "22",
            "--venv_script",
            "v.sh",
            "--autotuning",
            "run",
            "--log_level",
            "WARNING",
            "-q",
            "s",
        ])
        .unwrap();
        assert_eq!(args.num_gpus, 3);
        assert_eq!(args.launcher_args, "-x 1");
        assert_eq!(args.log_level, LogLevel::Warning);
        assert_eq!(args.rank_log_dir(), Some(&PathBuf::from("logs")));
        assert_eq!(parse(&["--hostfile", "h", "s"]).unwrap().hostfile, PathBuf::from("h"));
        assert_eq!(parse(&["s"]).unwrap().hostfile, PathBuf::from(DEFAULT_HOSTFILE));
    }

    #[test]
    fn flags_can_be_shortened_as_with_argparse() {
        assert_eq!(parse(&["--num_g", "2", "s"]).unwrap().num_gpus, 2);
        assert!(parse(&["--num_", "2", "s"]).is_err());
    }

    #[test]
    fn port_zero_is_refused() {
        assert!(parse(&["--master_port", "0", "s"]).is_err());
        assert!(parse(&["--master_port", "70000", "s"]).is_err());
    }
}
