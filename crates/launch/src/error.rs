//! What can go wrong before a rank has started: every variant says what, with which values, where, and what to do.

use std::io;
use std::path::PathBuf;

/// An error in the arguments, the hostfile, the filters, or in the start of the ranks.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// A hostfile line that is not `<host> slots=<number>`.
    #[error(
        "{}:{line}:{column}: hostfile contains a bad entry: {what}; unable to proceed with launching\n    {text}\n  \
         each line is `<host> slots=<number>`, for example `worker-1 slots=4`",
        path.display()
    )]
    HostfileBadEntry {
        /// The hostfile.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
        /// The offending line.
        text: String,
        /// What is wrong at that column.
        what: String,
    },

    /// A host that the hostfile lists twice.
    #[error(
        "{}:{line}: hostfile contains multiple entries for {host} (the first is on line {first_line}), unable to \
         proceed with launching; keep one of them",
        path.display()
    )]
    HostfileDuplicate {
        /// The hostfile.
        path: PathBuf,
        /// Line of the second entry, from 1.
        line: usize,
        /// Line of the first entry, from 1.
        first_line: usize,
        /// The host.
        host: String,
    },

    /// A hostfile that a tool was told to use and that is not there.
    #[error("hostfile {} does not exist", path.display())]
    HostfileMissing {
        /// The hostfile.
        path: PathBuf,
    },

    /// Arguments of a tool that a launch would refuse, too.
    #[error("{text}")]
    Arguments {
        /// What clap says of them.
        text: String,
    },

    /// A hostfile without a single entry.
    #[error(
        "{}: hostfile is empty or not formatted correctly, unable to proceed with launching; it needs lines of the \
         form `<host> slots=<number>`",
        path.display()
    )]
    HostfileEmpty {
        /// The hostfile.
        path: PathBuf,
    },

    /// An `--include` or `--exclude` text that does not parse.
    #[error(
        "{flag}: {what} at column {column} of `{text}`; the form is HOST[:SLOT[,SLOT...]][@HOST...], for example \
         `worker-1@worker-2:0,2`"
    )]
    FilterSyntax {
        /// `--include` or `--exclude`.
        flag: &'static str,
        /// The whole text.
        text: String,
        /// Column in characters, from 1.
        column: usize,
        /// What is wrong there.
        what: String,
    },

    /// Both filters at once.
    #[error("include_str and exclude_str are mutually exclusive: give --include or --exclude, not both")]
    IncludeAndExclude,

    /// A count together with a filter.
    #[error(
        "cannot specify num_nodes/gpus with include/exclude: {count} and {filter} are both given; drop one"
    )]
    CountWithFilter {
        /// The count flag given.
        count: &'static str,
        /// The filter flag given.
        filter: &'static str,
    },

    /// A count below one.
    #[error("{flag} is {value}; it must be at least 1 (or -1 for all)")]
    CountTooSmall {
        /// The flag.
        flag: &'static str,
        /// Its value.
        value: i64,
    },

    /// A count that no machine can bear.
    #[error("{flag} is {value}; at most {most} are possible")]
    CountTooLarge {
        /// The flag.
        flag: &'static str,
        /// Its value.
        value: i64,
        /// The limit.
        most: u32,
    },

    /// A filter that names a host that is not there.
    #[error("{flag}: hostname '{host}' not found in {place}{hint}")]
    UnknownHost {
        /// The flag.
        flag: &'static str,
        /// The name given.
        host: String,
        /// `hostfile <path>`, or what stands in for it.
        place: String,
        /// The nearest name and the known ones.
        hint: String,
    },

    /// A filter that names a slot that is not there.
    #[error("{flag}: no slot '{slot}' specified on host '{host}'; its slots are {available}")]
    UnknownSlot {
        /// The flag.
        flag: &'static str,
        /// The host.
        host: String,
        /// The slot given.
        slot: String,
        /// The slots of that host.
        available: String,
    },

    /// The filters leave no slot.
    #[error("no slot is left after {flag}; nothing to launch")]
    NothingLeft {
        /// The setting that removed the last one.
        flag: String,
    },

    /// `--num_nodes` above one without a hostfile.
    #[error(
        "--num_nodes={nodes} needs a hostfile that names the hosts (looked for {}); give one with --hostfile",
        looked_for.display()
    )]
    NodesWithoutHostfile {
        /// Nodes asked for.
        nodes: i64,
        /// The hostfile path that was tried.
        looked_for: PathBuf,
    },

    /// More nodes asked for than there are.
    #[error("--num_nodes={asked}, but {place} names only {there}")]
    TooFewNodes {
        /// Asked for.
        asked: i64,
        /// Known.
        there: usize,
        /// Where they are listed.
        place: String,
    },

    /// More GPUs asked for than there are.
    #[error("--num_gpus={asked}, but host '{host}' has only {there} ({which}){hint}")]
    TooFewGpus {
        /// Asked for.
        asked: i64,
        /// Known.
        there: usize,
        /// The host.
        host: String,
        /// Their numbers.
        which: String,
        /// Why there are not more, starting with a separator, or empty.
        hint: String,
    },

    /// The accelerator that was asked for is not there.
    #[error(
        "unable to proceed, no GPU resources available: DS_ACCELERATOR={accelerator}, but neither \
         /proc/driver/nvidia/gpus nor /dev/nvidia[0-9]* shows a GPU; unset DS_ACCELERATOR to run on the CPU cores"
    )]
    NoGpu {
        /// The value of `DS_ACCELERATOR`.
        accelerator: String,
    },

    /// `--no_ssh` on several hosts without this host's place among them.
    #[error(
        "--no_ssh starts the ranks of this host only, so --node_rank must say which of the {hosts} hosts it is (0 to {}); it \
         is {given}", hosts - 1
    )]
    NodeRank {
        /// The place given; -1 for none.
        given: i64,
        /// The number of hosts.
        hosts: usize,
    },

    /// A host's name that could be mistaken for something else on its way to the runner.
    #[error(
        "the host '{host}' cannot be reached by {runner}: a name has letters, digits and any of {signs}, and does not \
         begin with a dash"
    )]
    HostName {
        /// The name.
        host: String,
        /// The runner.
        runner: &'static str,
        /// What else a name may have with it.
        signs: String,
    },

    /// An address at which agents cannot call back.
    #[error(
        "agents cannot call back at {address}: {source}; give an address of this machine with --launcher_addr"
    )]
    Listen {
        /// The address.
        address: String,
        /// Why.
        source: io::Error,
    },

    /// The agent on a host cannot do its work.
    #[error("the agent: {what}")]
    Agent {
        /// Why.
        what: String,
    },

    /// A list in Slurm's environment that cannot be read.
    #[error("{variable}: {source}")]
    SlurmList {
        /// The variable.
        variable: &'static str,
        /// What is wrong.
        source: deepspeed_discovery::DiscoveryError,
    },

    /// `--launcher_args` with a quote that does not end.
    #[error("--launcher_args=`{text}`: the quote at column {column} does not end")]
    LauncherArgs {
        /// The whole text.
        text: String,
        /// Column in characters, from 1.
        column: usize,
    },

    /// A program that the launcher needs is not installed.
    #[error("launcher '{launcher}' not installed: no folder of PATH has `{program}`; {hint}")]
    LauncherMissing {
        /// The launcher.
        launcher: &'static str,
        /// Its program.
        program: &'static str,
        /// What to do.
        hint: &'static str,
    },

    /// Hosts on which nothing could be started.
    #[error("{}", list_problems(problems))]
    Hosts {
        /// Each host with what is wrong there.
        problems: Vec<(String, String)>,
    },

    /// A slot that is no GPU of its host.
    #[error("slot {slot} is no GPU of this host, which has {gpus} (slots 0 to {}); correct the hostfile", gpus.saturating_sub(1))]
    SlotWithoutGpu {
        /// The slot.
        slot: u32,
        /// The GPUs.
        gpus: usize,
    },

    /// The folder to work in is not there.
    #[error(
        "the folder '{}', in which the job was started, cannot be entered: {source}; it must be there on every host",
        folder.display()
    )]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// Why.
        source: io::Error,
    },

    /// The user ended it before the ranks ran.
    #[error("ended by {signal} before the ranks were started")]
    Interrupted {
        /// The signal's name.
        signal: &'static str,
        /// The exit code.
        code: u8,
    },

    /// Restarts of a job whose parts do not know of each other.
    #[error(
        "--max_restarts needs a launcher that sees every host, and with --no_ssh each sees its own only; leave one of \
         the two out"
    )]
    RestartByHand,

    /// A setting that this version knows but cannot do.
    #[error("{setting} is not built yet{hint}")]
    NotBuilt {
        /// The setting.
        setting: String,
        /// What to do instead, starting with a separator, or empty.
        hint: &'static str,
    },

    /// A value that the flag does not take.
    #[error("{flag}: unknown value '{value}'; known are {known}{nearest}")]
    UnknownValue {
        /// The flag.
        flag: &'static str,
        /// The value.
        value: String,
        /// The values it takes.
        known: String,
        /// `; did you mean ...?` or empty.
        nearest: String,
    },

    /// `--no_python` with `--module`.
    #[error("--no_python and --module contradict each other: a module needs python to run it; drop one")]
    ModuleWithoutPython,

    /// Core binding while the OpenMP runtime binds threads itself.
    #[error(
        "KMP_AFFINITY={value} is set, which binds threads by itself and contradicts --bind_cores_to_rank; unset \
         KMP_AFFINITY, or drop --bind_cores_to_rank"
    )]
    KmpAffinity {
        /// Its value.
        value: String,
    },

    /// A `--bind_core_list` that does not parse, or names cores that cannot be used.
    #[error("--bind_core_list=`{text}`: {what}; give ascending, disjoint ranges such as `0-7,16-23`")]
    CoreList {
        /// The whole text.
        text: String,
        /// What is wrong.
        what: String,
    },

    /// Fewer cores than ranks.
    #[error(
        "--bind_cores_to_rank: {cores} cores ({which}) cannot be shared out to {ranks} ranks, each needs at least \
         one; start fewer ranks or widen --bind_core_list"
    )]
    TooFewCores {
        /// Cores to share out.
        cores: usize,
        /// Where they come from.
        which: &'static str,
        /// Ranks that need them.
        ranks: usize,
    },

    /// The user's script does not exist.
    #[error("script '{}' does not exist{hint}", path.display())]
    ScriptMissing {
        /// The path as given.
        path: PathBuf,
        /// The nearest name in its folder, starting with a separator, or empty.
        hint: String,
    },

    /// With `--no_python`: the program is not there or cannot be executed.
    #[error("--no_python: cannot run '{}': {what}", path.display())]
    ProgramUnusable {
        /// The program as given.
        path: PathBuf,
        /// Why.
        what: String,
    },

    /// No interpreter.
    #[error(
        "no python found: none beside the deepspeed command, VIRTUAL_ENV is {virtual_env}, and PATH has no python3; \
         activate an environment, or give --no_python to run the program itself"
    )]
    PythonMissing {
        /// `not set` or its value.
        virtual_env: String,
    },

    /// The port for the ranks' meeting is taken.
    #[error(
        "--master_port={port}: the port is already in use{who}; choose another, or leave --master_port out and a \
         free one is chosen"
    )]
    PortInUse {
        /// The port.
        port: u16,
        /// ` by <process>` where it can be found out, else empty.
        who: String,
    },

    /// The port cannot be listened on for another reason.
    #[error("--master_port={port}: cannot listen on it: {source}")]
    PortUnusable {
        /// The port.
        port: u16,
        /// Why.
        source: io::Error,
    },

    /// No free port could be had.
    #[error("cannot find a free port for the ranks to meet on: {0}")]
    NoFreePort(#[source] io::Error),

    /// A rank could not be started.
    #[error("rank {rank} could not be started: {}: {source}", program.display())]
    Spawn {
        /// The rank.
        rank: usize,
        /// Its program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },

    /// A file operation (the message of the source names the path).
    #[error("{what}: {source}")]
    File {
        /// What it was for.
        what: &'static str,
        /// Why, with the path.
        source: io::Error,
    },

    /// A system call of the supervisor failed.
    #[error("{what} failed: {source}")]
    System {
        /// What it was for.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

fn list_problems(problems: &[(String, String)]) -> String {
    let lines: Vec<String> = problems.iter().map(|(host, what)| format!("host {host}: {what}")).collect();
    format!("nothing was started: {}", lines.join("\n  "))
}
