//! The agent: the launcher's hands on another host. It starts the host's ranks, hands their output and their ends to the launcher through
//! the connection it was started by, and sends them the signals that the launcher asks for. It decides one thing only: when the connection
//! closes, everything on this host ends.

pub(crate) mod front;
pub(crate) mod outgoing;

use crate::agent::outgoing::Outgoing;
use crate::doctor::Examiner;
use crate::error::LaunchError;
use crate::job::inbox::Inbox;
use crate::job::preflight;
use crate::oversight::merge::Stream;
use crate::plan::surroundings::Surroundings;
use crate::plan::{self, LaunchPlan};
use crate::port;
use crate::ranks::signals;
use crate::ranks::spawn::Streams;
use crate::ranks::{self, Change, Chunk, Ranks};
use crate::resources::filters::Slot;
use crate::resources::{self, Device};
use crate::wire::frame::{self, Decoder};
use crate::wire::message::{self, Hello, Order, Report, Start};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::Signal;
use signal_hook::consts::signal::{SIGCHLD, SIGWINCH};
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// How often the agent looks whether the launcher is still heard.
const LOOK: Duration = Duration::from_secs(5);

/// A launcher that says nothing for so long is taken for gone, and the network with it.
const SILENCE: Duration = Duration::from_secs(30);

/// The same as long as no rank runs: other hosts may take their time to answer, and `deepspeed doctor` its time to ask.
const SILENCE_BEFORE: Duration = Duration::from_secs(120);

/// From SIGTERM to SIGKILL when the connection has closed.
const TERMINATE: Duration = Duration::from_millis(1100);

/// More than this waits to be sent: the ranks' output is left in their pipes until it is less.
const BACKLOG: usize = 4 * 1024 * 1024;

/// Why the agent ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Over {
    /// The launcher says that all went well.
    Finished,
    /// The connection is closed, or what came through it makes no sense.
    Closed,
    /// This process was told to end, by this signal.
    Told(i32),
}

struct Agent {
    began: Instant,
    decoder: Decoder,
    outgoing: Outgoing,
    ranks: Ranks,
    plan: Option<LaunchPlan>,
    examiner: Examiner,
    heard: Duration,
}

/// Runs until the launcher is done or gone. Input and output are the connection.
///
/// # Errors
/// This process cannot catch signals or become the parent of orphans; a system call fails.
pub(crate) fn run() -> Result<(), LaunchError> {
    let error = |what| move |e: rustix::io::Errno| LaunchError::System { what, source: e.into() };
    rustix::io::ioctl_fionbio(io::stdin(), true).map_err(error("reading the connection"))?;
    rustix::io::ioctl_fionbio(io::stdout(), true).map_err(error("writing the connection"))?;
    let mut inbox = Inbox::open()?;
    let mut agent = Agent {
        began: Instant::now(),
        decoder: Decoder::default(),
        outgoing: Outgoing::default(),
        ranks: Ranks::new()?,
        plan: None,
        examiner: Examiner::default(),
        heard: Duration::ZERO,
    };
    agent.outgoing.queue(&frame::greeting());
    let ends = socket_ends().or_else(|| ssh_ends(std::env::var("SSH_CONNECTION").ok()?.as_str()));
    agent.tell(&Report::Hello(hello(ends)));
    let over = agent.serve(&mut inbox);
    if let Ok(Over::Told(signal)) = over {
        let signal = signals::name(signal).unwrap_or("a signal");
        agent.tell(&Report::Leaving(format!("its agent was told to end by {signal}")));
        // If the launcher cannot be told, it is not there.
        let _ = agent.outgoing.send();
    }
    if !matches!(over, Ok(Over::Finished)) {
        agent.end_all();
    }
    agent.ranks.dismiss_guard();
    over.map(|_| ())
}

/// The two ends of a connection as addresses: the launcher's, and this host's.
type Ends = (String, String);

/// Those of the socket that is this process's input; `None` where it is none.
fn socket_ends() -> Option<Ends> {
    let address = |end: rustix::net::SocketAddrAny| {
        Some(SocketAddr::try_from(end).ok()?.ip().to_canonical().to_string())
    };
    Some((
        address(rustix::net::getpeername(io::stdin()).ok()??)?,
        address(rustix::net::getsockname(io::stdin()).ok()?)?,
    ))
}

/// Those of sshd's `SSH_CONNECTION`: the client's address and port, the server's address and port.
fn ssh_ends(connection: &str) -> Option<Ends> {
    let words: Vec<&str> = connection.split_whitespace().collect();
    Some(((*words.first()?).to_owned(), (*words.get(2)?).to_owned()))
}

/// How this host presents itself.
fn hello(ends: Option<Ends>) -> Hello {
    let (reached_from, reached_at) = ends.unzip();
    Hello {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        program: std::env::current_exe().unwrap_or_default(),
        hostname: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        reached_at,
        reached_from,
        slurm_job: std::env::var("SLURM_JOB_ID").ok(),
    }
}

impl Agent {
    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Queues a message.
    fn tell(&mut self, report: &Report) {
        match message::encode(report) {
            Ok(bytes) => self.outgoing.queue(&bytes),
            Err(error) => self.say(&format!("a message is too long to be sent: {error}")),
        }
    }

    /// The only other way to be heard: ssh passes stderr on.
    fn say(&self, text: &str) {
        let _ =
            io::Write::write_all(&mut io::stderr().lock(), format!("deepspeed agent: {text}\n").as_bytes());
    }

    fn serve(&mut self, inbox: &mut Inbox) -> Result<Over, LaunchError> {
        loop {
            self.wait(inbox)?;
            for signal in inbox.take() {
                match signal {
                    SIGCHLD => self.reap(),
                    SIGWINCH => {}
                    _ => return Ok(Over::Told(signal)),
                }
            }
            if let Some(over) = self.read_orders()? {
                return Ok(over);
            }
            let patience = if self.plan.is_some() { SILENCE } else { SILENCE_BEFORE };
            if self.now() > self.heard + patience {
                self.say(&format!("the launcher has said nothing for {} s", patience.as_secs()));
                return Ok(Over::Closed);
            }
            if !self.outgoing.send() {
                return Ok(Over::Closed);
            }
        }
    }

    /// Sleeps until something happens; takes in the ranks' output.
    fn wait(&mut self, inbox: &Inbox) -> Result<(), LaunchError> {
        let (stdin, stdout) = (io::stdin(), io::stdout());
        let mut fds = vec![PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN)];
        let out = if self.outgoing.len() == 0 { PollFlags::empty() } else { PollFlags::OUT };
        fds.push(PollFd::from_borrowed_fd(stdout.as_fd(), out));
        fds.extend(inbox.fds().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        let others = fds.len();
        let mut sources = Vec::new();
        if self.outgoing.len() < BACKLOG {
            for (index, stream, pipe) in self.ranks.pipes() {
                sources.push((index, stream));
                fds.push(PollFd::new(pipe, PollFlags::IN));
            }
        }
        let timeout = Timespec { tv_sec: LOOK.as_secs().cast_signed(), tv_nsec: 0 };
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(errno) => return Err(LaunchError::System { what: "waiting", source: errno.into() }),
        }
        let ready: Vec<bool> = fds[others..].iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        for ((index, stream), _) in sources.into_iter().zip(ready).filter(|(_, ready)| *ready) {
            self.read_output(index, stream);
        }
        Ok(())
    }

    /// Takes in what an output holds, up to one buffer; returns whether there may be more.
    fn read_output(&mut self, index: usize, stream: Stream) -> bool {
        let mut buffer = [0; 64 * 1024];
        let rank = self.rank(index);
        let bytes = match self.ranks.read(index, stream, &mut buffer) {
            Chunk::Bytes(length) => &buffer[..length],
            Chunk::Again => return true,
            Chunk::Nothing => return false,
            Chunk::Lost(error) => {
                self.warn(format!("output of rank {rank} is lost: {error}"));
                return false;
            }
        };
        if let Err(error) = self.ranks.log(index, bytes) {
            self.warn(format!("the log of rank {rank} ends here: {error}"));
        }
        match message::encode_output(rank, stream, bytes) {
            Ok(frame) => self.outgoing.queue(&frame),
            Err(error) => self.say(&format!("output of rank {rank} is lost: {error}")),
        }
        true
    }

    fn warn(&mut self, text: String) {
        self.tell(&Report::Note { warning: true, text });
    }

    /// The rank in the whole job.
    fn rank(&self, index: usize) -> usize {
        self.plan.as_ref().map_or(0, LaunchPlan::first_rank) + index
    }

    /// Tells what has become of ranks, with all that they have written.
    fn reap(&mut self) {
        while let Some((index, change)) = self.ranks.reap() {
            let rank = self.rank(index);
            match change {
                Change::Stopped(signal) => {
                    self.tell(&Report::Stopped { rank, signal, step: self.ranks.step(index) });
                }
                Change::Continued => self.tell(&Report::Continued { rank }),
                Change::Ended(ending) => {
                    for stream in [Stream::Stdout, Stream::Stderr] {
                        while self.read_output(index, stream) {}
                    }
                    let evidence = self.ranks.evidence(index, ending);
                    let (log, step) = (self.ranks.log_path(index), self.ranks.step(index));
                    self.tell(&Report::Ended { rank, ending, evidence, log, step });
                }
            }
        }
    }

    /// Reads and obeys what has come through the connection.
    fn read_orders(&mut self) -> Result<Option<Over>, LaunchError> {
        let mut buffer = [0; 64 * 1024];
        loop {
            match rustix::io::read(io::stdin(), &mut buffer) {
                Ok(0) => return Ok(Some(Over::Closed)),
                Ok(length) => self.decoder.push(&buffer[..length]),
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::AGAIN) => return Ok(None),
                Err(_) => return Ok(Some(Over::Closed)),
            }
            self.heard = self.now();
            loop {
                let order = match self.decoder.next() {
                    Ok(None) => break,
                    Ok(Some(frame)) => message::order(&frame),
                    Err(error) => Err(error.to_string()),
                };
                match order {
                    Ok(Order::Finish) => return Ok(Some(Over::Finished)),
                    Ok(order) => self.obey(order),
                    Err(what) => {
                        self.say(&format!("the connection brings {what}"));
                        return Ok(Some(Over::Closed));
                    }
                }
            }
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Port(wanted) => {
                let port = match wanted {
                    Some(port) => port::check_free(port).map(|()| port),
                    None => port::choose_free(),
                };
                self.tell(&Report::Port(port.map_err(|error| error.to_string())));
            }
            Order::Start(start) => {
                let report = match self.start(&start) {
                    Ok(()) => {
                        Report::Started((0..self.ranks.len()).map(|index| self.ranks.pid(index)).collect())
                    }
                    Err(error) => Report::Refused(error.to_string()),
                };
                self.tell(&report);
            }
            Order::Signal(number) => {
                if let Some(signal) = Signal::from_named_raw(number) {
                    self.ranks.signal(signal);
                }
            }
            Order::Examine(question) => {
                let answer = self.examiner.answer(question);
                self.tell(&Report::Answer(answer));
            }
            Order::Alive | Order::Finish => {}
        }
    }

    /// Starts the ranks of this host.
    fn start(&mut self, start: &Start) -> Result<(), LaunchError> {
        if self.plan.is_some() {
            return Ok(());
        }
        // Before there is anything to be ended: an agent that is stopped from here on is missed, by the guard, too.
        let error = |source| LaunchError::System { what: "starting a thread", source };
        self.outgoing.beat().and_then(|()| self.ranks.beat()).map_err(error)?;
        std::env::set_current_dir(&start.folder)
            .map_err(|source| LaunchError::Folder { folder: start.folder.clone(), source })?;
        let mut surroundings = Surroundings::of_host(start.part.bind_cores)?;
        if let Some(accelerator) = start.part.env.get("DS_ACCELERATOR") {
            surroundings.accelerator = Some(accelerator.clone());
        }
        let mut part = start.part.clone();
        // The hostfile says which GPUs to use; in a Slurm job, which of those that the job has been given.
        if let Some(given) = surroundings.visible_devices.take()
            && std::env::var_os("SLURM_JOB_ID").is_some()
        {
            part.slots = resources::among(&given, &part.slots)?;
        }
        let mut notes = Vec::new();
        let device = resources::device(&surroundings, &mut notes)?;
        if device == Device::Gpu {
            for slot in &part.slots {
                if let Slot::Index(index) = slot
                    && *index as usize >= surroundings.gpus
                {
                    return Err(LaunchError::SlotWithoutGpu { slot: *index, gpus: surroundings.gpus });
                }
            }
        }
        let plan = plan::on_host(&part, &surroundings, device, notes)?;
        preflight::check_script(&plan)?;
        for note in &plan.notes {
            self.tell(&Report::Note { warning: note.warning, text: note.text.clone() });
        }
        self.ranks.start(&plan, Some(&start.secret), |_| Streams {
            stdin: Stdio::null(),
            terminals: [None, None],
        })?;
        self.plan = Some(plan);
        Ok(())
    }

    /// Ends every rank, asking first, and whatever they have left behind.
    fn end_all(&mut self) {
        self.ranks.signal(Signal::TERM);
        let began = Instant::now();
        while self.ranks.any_alive() && began.elapsed() < TERMINATE {
            while self.ranks.reap().is_some() {}
            std::thread::sleep(Duration::from_millis(5));
        }
        self.ranks.signal(Signal::KILL);
        ranks::sweep();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_addresses_of_the_connection() {
        let hello = hello(ssh_ends("10.0.0.1 50000 10.0.0.2 22"));
        assert_eq!(hello.reached_at.as_deref(), Some("10.0.0.2"));
        assert_eq!(hello.reached_from.as_deref(), Some("10.0.0.1"));
        assert_eq!(super::hello(ssh_ends("")).reached_at, None);
    }
}
