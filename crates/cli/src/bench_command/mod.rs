//! `deepspeed bench comm`: how fast collectives are, between ranks of this host or of several.
//!
//! ```text
//!   deepspeed bench comm ---- starts ----> deepspeed (a launch like any other) ---> ranks: what is measured
//!        |      shared memory                                                        |
//!        <--------------- one line of JSON for each measurement, from rank 0 --------+
//! ```
//!
//! With `--backend shm` the ranks are this command itself ([`rank`]) and meet in a segment that this process makes; with gloo and nccl
//! they are `python -m deepspeed.comm.benchmark`.

mod job;
mod rank;
mod result;

use std::{
    ffi::OsString,
    io::{BufRead, BufReader, IsTerminal},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    thread,
};

use clap::{Args, Subcommand, ValueEnum, ValueHint};
use deepspeed_comm::{Options, Segment};
use deepspeed_core::DType;
use deepspeed_monitor::memory::parse_bytes;
use indicatif::{ProgressBar, ProgressStyle};
use signal_hook::{consts::signal, iterator::Signals};

use crate::output::{complain, fail, print, usage};

use self::job::{Cell, Job, Operation, sizes};
use self::result::{Header, Measured};

pub(crate) use rank::{RANK_COMMAND, rank_main};

/// The arguments of `deepspeed bench`.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Measure collectives: time, and the bandwidth that this comes to
    ///
    /// algbw is size / time. busbw is algbw times 2(n-1)/n for all_reduce, (n-1)/n for all_gather, reduce_scatter and
    /// all_to_all, and 1 for broadcast, with n ranks: what each rank's link carries, whatever n is.
    Comm(CommArgs),
}

/// What carries the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Backend {
    /// Our shared memory, between ranks of this host
    Shm,
    /// torch.distributed with gloo
    Gloo,
    /// torch.distributed with NCCL
    Nccl,
}

#[derive(Debug, Args)]
struct CommArgs {
    /// What carries the bytes
    #[arg(long, value_enum, default_value_t = Backend::Shm, ignore_case = true)]
    backend: Backend,
    /// Ranks on each host [default: the cores or GPUs, at least 2; with a hostfile its slots]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    ranks: Option<u32>,
    /// Which collectives [default: all that the backend has]
    #[arg(long, value_enum, value_name = "NAME,...", value_delimiter = ',')]
    op: Vec<Operation>,
    /// Which dtypes: fp32, bf16, fp16
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', default_value = "fp32")]
    dtype: Vec<DType>,
    /// The smallest size: 4KiB, 1MB
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, default_value = "4KiB")]
    min: u64,
    /// The largest size
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, default_value = "64MiB")]
    max: u64,
    /// Each size is so many times the one before
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u64).range(2..))]
    factor: u64,
    /// Calls that are measured, of each size
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    trials: u32,
    /// Calls before them
    #[arg(long, value_name = "N", default_value_t = 5)]
    warmups: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// gloo, nccl: the hosts and their slots
    #[arg(short = 'f', short_alias = 'H', long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    hostfile: Option<PathBuf>,
    /// gloo, nccl: use only these: HOST[:SLOT[,SLOT...]][@HOST...]
    #[arg(short = 'i', long, value_name = "SLOTS")]
    include: Option<String>,
    /// gloo, nccl: use all but these
    #[arg(short = 'e', long, value_name = "SLOTS")]
    exclude: Option<String>,
    /// gloo, nccl: how to reach the hosts, as for a launch
    #[arg(long, value_name = "NAME")]
    launcher: Option<String>,
    /// gloo, nccl: further arguments for that program
    #[arg(long = "launcher_args", alias = "launcher-args", value_name = "ARGS", allow_hyphen_values = true)]
    launcher_args: Option<String>,
}

/// Runs `deepspeed bench`.
pub(crate) fn run(args: &BenchArgs) -> ExitCode {
    let What::Comm(args) = &args.what;
    match args.backend {
        Backend::Shm => shared_memory(args),
        Backend::Gloo | Backend::Nccl => torch(args),
    }
}

/// The measurements, or what is wrong with the wish for them.
fn cells(args: &CommArgs) -> Result<Vec<Cell>, String> {
    if args.min == 0 || args.min > args.max {
        return Err(format!("--min {} is not between 1 and --max {}", args.min, args.max));
    }
    let all: Vec<Operation> = Operation::value_variants()
        .iter()
        .copied()
        .filter(|op| args.backend != Backend::Shm || op.is_ours())
        .collect();
    let ops = if args.op.is_empty() { all } else { args.op.clone() };
    let mut cells = Vec::new();
    for op in ops {
        if args.backend == Backend::Shm && !op.is_ours() {
            return Err(format!("our shared memory has no {}; --backend gloo has", op.name()));
        }
        for dtype in &args.dtype {
            if args.backend == Backend::Shm && op == Operation::AllReduce && *dtype != DType::F32 {
                if args.op.is_empty() {
                    complain(
                        "deepspeed: our shared memory all-reduces fp32 only: other dtypes of it are left out\n",
                    );
                    continue;
                }
                return Err("our shared memory all-reduces fp32 only; --dtype fp32".to_owned());
            }
            cells.extend(sizes(args.min, args.max, args.factor).map(|bytes| Cell {
                op,
                dtype: *dtype,
                bytes,
            }));
        }
    }
    Ok(cells)
}

fn shared_memory(args: &CommArgs) -> ExitCode {
    let several = [
        ("--hostfile", args.hostfile.is_some()),
        ("--include", args.include.is_some()),
        ("--exclude", args.exclude.is_some()),
        ("--launcher", args.launcher.is_some()),
        ("--launcher_args", args.launcher_args.is_some()),
    ];
    if let Some((flag, _)) = several.iter().find(|(_, given)| *given) {
        return usage(&format!(
            "{flag}: shared memory joins the ranks of one host; --backend gloo measures several"
        ));
    }
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let world = args.ranks.map_or_else(|| cores.clamp(2, deepspeed_comm::MAX_WORLD), |ranks| ranks as usize);
    let segment = match Segment::create(world, &Options::default()) {
        Ok(segment) => segment,
        Err(error) => return fail(&error.to_string()),
    };
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => return fail(&format!("this command does not find itself: {error}")),
    };
    let mut line: Vec<OsString> = vec!["--num_gpus".into(), world.to_string().into()];
    // No hostfile, be there one at the default place.
    line.push("--hostfile=/dev/null/none".into());
    line.extend(["--no_python".into(), "--no_local_rank".into(), program.into(), RANK_COMMAND.into()]);
    measure(args, line, |command| {
        command
            .env("DS_ACCELERATOR", "cpu")
            .env(rank::SEGMENT_VARIABLE, segment.handle().unwrap_or_default());
    })
}

fn torch(args: &CommArgs) -> ExitCode {
    let mut line: Vec<OsString> = Vec::new();
    let mut flag = |name: &str, value: Option<OsString>| {
        if let Some(value) = value {
            let mut word = OsString::from(format!("{name}="));
            word.push(value);
            line.push(word);
        }
    };
    flag("--hostfile", args.hostfile.clone().map(OsString::from));
    flag("--include", args.include.clone().map(OsString::from));
    flag("--exclude", args.exclude.clone().map(OsString::from));
    flag("--launcher", args.launcher.clone().map(OsString::from));
    flag("--launcher_args", args.launcher_args.clone().map(OsString::from));
    flag("--num_gpus", args.ranks.map(|ranks| ranks.to_string().into()));
    line.extend(["--module".into(), "--no_local_rank".into(), "deepspeed.comm.benchmark".into()]);
    measure(args, line, |command| {
        if args.backend == Backend::Gloo {
            command.env("DS_ACCELERATOR", "cpu");
        }
    })
}

/// Starts the launch, and shows what its rank 0 reports.
fn measure(args: &CommArgs, mut line: Vec<OsString>, prepare: impl FnOnce(&mut Command)) -> ExitCode {
    let cells = match cells(args) {
        Ok(cells) => cells,
        Err(what) => return usage(&what),
    };
    let count = cells.len() as u64;
    let backend = format!("{:?}", args.backend).to_lowercase();
    let job = Job { backend, cells, trials: args.trials, warmups: args.warmups };
    match serde_json::to_string(&job) {
        Ok(text) => line.push(text.into()),
        Err(error) => return fail(&error.to_string()),
    }
    let launcher = std::env::current_exe().unwrap_or_else(|_| Path::new("deepspeed").to_path_buf());
    let mut command = Command::new(launcher);
    command.arg("-q").args(line).stdin(Stdio::null()).stdout(Stdio::piped());
    // A Ctrl-C at the terminal reaches it once, through us.
    command.process_group(0);
    prepare(&mut command);
    let signals = Signals::new([signal::SIGINT, signal::SIGTERM, signal::SIGHUP]);
    let child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return fail(&format!("the launch cannot be started: {error}")),
    };
    if let Ok(mut signals) = signals {
        let process = rustix::process::Pid::from_child(&child);
        thread::spawn(move || {
            for number in signals.forever() {
                if let Some(signal) = rustix::process::Signal::from_named_raw(number) {
                    // Where it has ended meanwhile there is nobody left to tell.
                    let _ = rustix::process::kill_process(process, signal);
                }
            }
        });
    }
    show(args, count, child)
}

/// Prints the measurements as they come; the exit code is the launch's.
fn show(args: &CommArgs, count: u64, mut child: Child) -> ExitCode {
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(count) } else { ProgressBar::hidden() };
    let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} {eta}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let mut header: Option<Header> = None;
    let mut measured: Vec<Measured> = Vec::new();
    let lines = child.stdout.take().map(BufReader::new).into_iter().flat_map(BufRead::lines);
    // A line that cannot be read is the end of the launch, whose exit code tells.
    for line in lines.map_while(Result::ok) {
        let text = match result::parse(&line) {
            result::Line::Header(seen) => {
                let text = seen.render();
                header = Some(seen);
                text
            }
            result::Line::Measured(seen) => {
                let text = seen.render(header.as_ref().map_or(1, |header| header.world));
                measured.push(seen);
                bar.inc(1);
                text
            }
            result::Line::Other => {
                bar.suspend(|| complain(&format!("{line}\n")));
                continue;
            }
        };
        if !args.json {
            bar.suspend(|| print(&text));
        }
    }
    bar.finish_and_clear();
    let code = match child.wait() {
        Ok(status) => status.code().unwrap_or(1),
        Err(error) => return fail(&format!("waiting for the launch: {error}")),
    };
    if args.json
        && let Some(header) = &header
    {
        let rows: Vec<_> = measured.iter().map(|row| row.to_json(header.world)).collect();
        print(&format!("{:#}\n", serde_json::json!({ "run": header, "results": rows })));
    }
    let wrong: u64 = measured.iter().filter_map(|row| row.wrong).sum();
    if code == 0 && wrong > 0 {
        return fail(&format!("{wrong} elements came out wrong"));
    }
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
