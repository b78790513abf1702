//! The agent where pdsh, mpirun or srun has started it: a process in front of the agent proper, which calls the launcher back and makes
//! the connection the agent's input and output.
//!
//! ```text
//!   pdsh, mpirun, srun ---- front ------------------ TCP ---- launcher
//!                             \---- agent (input and output are the TCP connection)
//!                                      \---- ranks
//! ```
//!
//! - FRONT-1: when this process dies, whoever kills it, or when the runner's daemon dies that has started it, the agent is told and has
//!   its time to end the ranks and all that they have left behind: the daemon knows of this process only.
//! - FRONT-2: when the agent dies, this process ends what the agent can no longer see to.

use crate::error::LaunchError;
use crate::plan::hosts_plan::AGENT_COMMAND;
use crate::ranks;
use crate::ranks::spawn;
use crate::secret;
use crate::wire::handshake;
use clap::Parser;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

/// How long an address may take to answer.
const CONNECT: Duration = Duration::from_secs(8);

/// How long the launcher may take to recognise this agent: its word through the runner's output may be slow.
const RECOGNISE: Duration = Duration::from_secs(60);

/// How long an agent may take that was told to end: from SIGTERM to SIGKILL of its ranks, and its sweep.
const END: Timespec = Timespec { tv_sec: 4, tv_nsec: 0 };

/// What the runner's daemon puts into the environment of its processes to say which they are. The ranks are others: a library that
/// believes these would take each of them for the same process.
const DAEMONS_OWN: [&str; 13] = [
    "OMPI_",
    "PMIX_",
    "PMI_",
    "PMI2_",
    "PRTE_",
    "ORTE_",
    "HYDI_",
    "MPI_LOCAL",
    "PALS_",
    "MV2_COMM_WORLD_",
    "SLURM_STEP",
    "SLURM_SRUN_COMM_",
    "SLURM_CPU_BIND",
];

/// And by their whole names.
const DAEMONS_OWN_NAMES: [&str; 14] = [
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_GTIDS",
    "SLURM_TASK_PID",
    "SLURM_NTASKS",
    "SLURM_NPROCS",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_DISTRIBUTION",
    "SLURM_LAUNCH_NODE_IPADDR",
    "SLURM_UMASK",
    "SLURM_PRIO_PROCESS",
    "MPIR_CVAR_CH3_INTERFACE_HOSTNAME",
    "GFORTRAN_UNBUFFERED_PRECONNECTED",
];

/// The words after the hidden command.
#[derive(Debug, Parser)]
#[command(name = "deepspeed __agent", disable_help_flag = true, disable_version_flag = true)]
struct FrontArgs {
    /// Where the launcher listens: ADDRESS:PORT, several with commas between them, in the order in which they are tried.
    #[arg(long, value_delimiter = ',', required = true)]
    connect: Vec<SocketAddr>,

    /// The fingerprint of the launcher's key.
    #[arg(long)]
    fingerprint: String,

    /// Which of the hosts this is.
    #[arg(long, conflicts_with = "place_from")]
    place: Option<String>,

    /// The variable that says which of the hosts this is.
    #[arg(long, required_unless_present = "place")]
    place_from: Option<String>,
}

/// Runs until the agent is over. `words` are those after the hidden command.
///
/// # Errors
/// The launcher cannot be reached, or is another; the agent cannot be started.
pub(crate) fn run(words: impl IntoIterator<Item = OsString>) -> Result<(), LaunchError> {
    let called = std::iter::once(OsString::from("deepspeed")).chain(words);
    let args = FrontArgs::try_parse_from(called)
        .map_err(|error| LaunchError::Agent { what: format!("its command line makes no sense: {error}") })?;
    let place = match (&args.place, &args.place_from) {
        (Some(place), _) => place.clone(),
        (None, Some(name)) => std::env::var(name).ok().filter(|place| is_word(place)).ok_or_else(|| {
            LaunchError::Agent { what: format!("{name} does not say which of the hosts this is") }
        })?,
        (None, None) => String::new(),
    };
    let key = secret::new()?;
    let announcement = handshake::announcement(&place, &key);
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(announcement.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(|source| LaunchError::System { what: "writing to standard output", source })?;
    drop(stdout);
    let stream = connect(&args.connect)?;
    shake_hands(&stream, &place, &key, &args.fingerprint).map_err(|what| LaunchError::Agent { what })?;
    serve(stream)
}

fn is_word(text: &str) -> bool {
    !text.is_empty() && text.len() < 256 && !text.contains(char::is_whitespace)
}

/// The first address that answers.
fn connect(addresses: &[SocketAddr]) -> Result<TcpStream, LaunchError> {
    let mut failures = Vec::new();
    for address in addresses {
        match TcpStream::connect_timeout(address, CONNECT) {
            Ok(stream) => return Ok(stream),
            Err(error) => failures.push(format!("{address}: {error}")),
        }
    }
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    Err(LaunchError::Agent {
        what: format!(
            "{host} cannot reach the launcher ({}); give its address as this host sees it with --launcher_addr",
            failures.join("; ")
        ),
    })
}

/// Shows the launcher who this is, and makes sure that it is the launcher.
fn shake_hands(mut stream: &TcpStream, place: &str, key: &str, print: &str) -> Result<(), String> {
    let said = |error: io::Error| format!("the connection to the launcher has failed: {error}");
    stream.set_nodelay(true).map_err(said)?;
    stream.set_read_timeout(Some(RECOGNISE)).map_err(said)?;
    stream.write_all(handshake::join(place, key).as_bytes()).map_err(said)?;
    let mut line = Vec::new();
    // Byte by byte: what follows the line is for the agent.
    while line.last() != Some(&b'\n') && line.len() < handshake::MAX_LINE {
        let mut byte = [0];
        match stream.read(&mut byte).map_err(said)? {
            0 => {
                return Err(
                    "the launcher has closed the connection: this agent is not one that it waits for"
                        .to_owned(),
                );
            }
            _ => line.push(byte[0]),
        }
    }
    if !handshake::is_launcher(&String::from_utf8_lossy(&line), print) {
        return Err("something else than the launcher listens at its address".to_owned());
    }
    stream.set_read_timeout(None).map_err(said)
}

/// Starts the agent with the connection as its input and output, and waits for its end.
fn serve(stream: TcpStream) -> Result<(), LaunchError> {
    let error = |what| move |source: io::Error| LaunchError::System { what, source };
    // What outlives its agent becomes a child of this process.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(|e| LaunchError::System { what: "becoming the parent of orphans", source: e.into() })?;
    let program = std::env::current_exe().map_err(error("finding this program"))?;
    let input = OwnedFd::from(stream);
    let output = input.try_clone().map_err(error("handing on the connection"))?;
    let mut command = Command::new(program);
    command.arg(AGENT_COMMAND).stdin(Stdio::from(input)).stdout(Stdio::from(output)).process_group(0);
    for name in
        std::env::vars_os().map(|(name, _)| name).filter(|name| is_daemons_own(&name.to_string_lossy()))
    {
        command.env_remove(name);
    }
    spawn::tie(&mut command, rustix::process::getpid(), Signal::TERM, None);
    let mut agent = command.spawn().map_err(error("starting the agent"))?;
    // It holds the connection, which must close when the agent dies.
    drop(command);
    let watched = |pid| rustix::process::pidfd_open(pid, PidfdFlags::empty());
    let over = watched(Pid::from_child(&agent)).map_err(|e| error("watching the agent")(e.into()))?;
    let wait = |fds: &mut [PollFd<'_>], patience: Option<&Timespec>| loop {
        match rustix::event::poll(fds, patience) {
            Err(rustix::io::Errno::INTR) => {}
            done => return done,
        }
    };
    // None where this process has no parent that it could see.
    if let Some(daemon) = rustix::process::getppid().and_then(|daemon| watched(daemon).ok()) {
        let mut fds = [PollFd::new(&over, PollFlags::IN), PollFd::new(&daemon, PollFlags::IN)];
        let waited = wait(&mut fds, None);
        waited.map_err(|e| error("waiting for the agent")(e.into()))?;
        if fds[0].revents().is_empty() {
            // It may end by itself at this moment.
            let _ = rustix::process::kill_process(Pid::from_child(&agent), Signal::TERM);
            let mut fds = [PollFd::new(&over, PollFlags::IN)];
            let waited = wait(&mut fds, Some(&END));
            waited.map_err(|e| error("waiting for the agent")(e.into()))?;
            if fds[0].revents().is_empty() {
                let _ = agent.kill();
            }
        }
    }
    let ending = agent.wait().map_err(error("waiting for the agent"))?;
    if !ending.success() {
        ranks::sweep();
    }
    Ok(())
}

fn is_daemons_own(name: &str) -> bool {
    DAEMONS_OWN.iter().any(|prefix| name.starts_with(prefix)) || DAEMONS_OWN_NAMES.contains(&name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn ranks_do_not_take_themselves_for_their_daemon() {
        for name in [
            "OMPI_COMM_WORLD_RANK",
            "PMI_FD",
            "PMIX_RANK",
            "SLURM_PROCID",
            "SLURM_STEP_ID",
            "MPI_LOCALRANKID",
        ] {
            assert!(is_daemons_own(name), "{name}");
        }
        for name in [
            "SLURM_JOB_ID",
            "SLURM_JOB_NODELIST",
            "CUDA_VISIBLE_DEVICES",
            "I_MPI_FABRICS",
            "PATH",
            "MV2_SMP_USE_CMA",
        ] {
            assert!(!is_daemons_own(name), "{name}");
        }
    }

    /// A listener that reads a line and says something back.
    fn listener(reply: &'static str) -> (SocketAddr, std::thread::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut said = [0; handshake::MAX_LINE];
            let length = stream.read(&mut said).unwrap();
            stream.write_all(reply.as_bytes()).unwrap();
            String::from_utf8_lossy(&said[..length]).into_owned()
        });
        (address, thread)
    }

    #[test]
    fn a_stranger_at_the_launchers_address_is_no_launcher() {
        for (reply, what) in [
            ("", "has closed the connection"),
            ("HTTP/1.1 400 Bad Request\r\n\r\n", "something else than the launcher"),
            (
                "deepspeed-launcher 0000000000000000000000000000000000000000000000000000000000000000\n",
                "something else",
            ),
        ] {
            let (address, thread) = listener(reply);
            let stream = connect(&[address]).unwrap();
            let key = "a".repeat(64);
            let error = shake_hands(&stream, "0", &key, &handshake::fingerprint(&key)).unwrap_err();
            assert!(error.contains(what), "{error}");
            assert!(handshake::parse_join(&thread.join().unwrap()).is_ok());
        }
    }

    #[test]
    fn an_address_where_nobody_listens_is_named() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let error = connect(&[address]).unwrap_err().to_string();
        assert!(error.contains(&address.to_string()) && error.contains("--launcher_addr"), "{error}");
    }
}
