//! Runs a job on several hosts: one connection for each, one poll loop, the same watch as on one host. By ssh a connection is an ssh
//! client; by other runners ([`crate::hosts::crossing`]) agents call back.
//!
//! ```text
//!   connect to all -> all say hello -> first host gives a port -> all start -> watch over -> close
//!         \___________________\______________ a problem: nothing runs anywhere, one error ____/
//! ```
//!
//! - HOSTS-1: no rank starts before every host has answered with the same version.
//! - HOSTS-2: when this function returns, every connection is closed, so that nothing is left on any host that can still be reached; and
//!   an agent whose launcher cannot be reached ends everything by itself.

pub(crate) mod callers;
pub(crate) mod connection;
pub(crate) mod crossing;
pub(crate) mod everywhere;
pub(crate) mod listen;
pub(crate) mod meeting;

use crate::console::Console;
use crate::error::LaunchError;
use crate::hosts::connection::{Connection, Received};
use crate::hosts::crossing::Crossing;
use crate::job::attempts::JobEnd;
use crate::job::inbox::Inbox;
use crate::oversight::merge::Stream;
use crate::oversight::report::RankFacts;
use crate::oversight::tail::Tail;
use crate::oversight::watch::Event;
use crate::oversight::{Oversight, Wording};
use crate::plan::hosts_plan::HostsPlan;
use crate::ranks::evidence::Evidence;
use crate::ranks::signals::{self, Ending};
use crate::reach::runner::Runner;
use crate::secret;
use crate::wire::message::{Hello, Incoming, Order, Report, Start};
use rustix::event::{PollFd, PollFlags, Timespec};
use signal_hook::consts::signal::{SIGCHLD, SIGWINCH};
use std::time::{Duration, Instant};

/// How long all hosts together may take to answer.
const ANSWER: Duration = Duration::from_secs(60);

/// How often a host is told that the launcher is there.
const BEAT: Duration = Duration::from_secs(2);

/// A host that says nothing for so long while its ranks start or run is lost. Its agent says something every second.
const SILENCE: Duration = Duration::from_secs(6);

/// How long the hosts may take to end what is left there: the agent's time from SIGTERM to SIGKILL, and its sweep.
const CLOSE: Duration = Duration::from_secs(4);

const WORDING: Wording =
    Wording { ranks: "the ranks of every host", none_left: "no rank is left on any host" };

/// Where a host stands.
#[derive(Debug)]
enum State {
    Connecting,
    Ready,
    /// It has been told to start its ranks, and says from then on that it lives.
    Starting,
    Running,
    /// It is of no use, for this reason.
    Gone(String),
}

struct Host {
    connection: Connection,
    state: State,
    hello: Hello,
    heard: Duration,
}

/// What is known of one rank.
#[derive(Debug, Default)]
struct Rank {
    pid: i32,
    tail: Tail,
    evidence: Option<Evidence>,
    log: Option<std::path::PathBuf>,
    step: Option<u64>,
}

struct Job<'a> {
    plan: HostsPlan,
    console: &'a Console,
    /// pdsh, mpirun or srun, and who calls back; none by ssh.
    crossing: Option<Crossing>,
    oversight: Oversight<'a>,
    hosts: Vec<Host>,
    ranks: Vec<Rank>,
    port: Option<Result<u16, String>>,
    beat: Duration,
}

/// Runs the plan to its end.
///
/// # Errors
/// A host could not be reached or could not start its ranks; then none is left running.
pub(crate) fn run(plan: HostsPlan, inbox: &mut Inbox, console: &Console) -> Result<JobEnd, LaunchError> {
    let crossing = if plan.runner == Runner::Ssh { None } else { Some(Crossing::open(&plan)?) };
    let hosts = (0..plan.parts.len())
        .map(|at| {
            let connection = match crossing {
                None => Connection::open(&plan.connections[at])?,
                Some(_) => Connection::awaited(),
            };
            Ok(Host { connection, state: State::Connecting, hello: Hello::default(), heard: Duration::ZERO })
        })
        .collect::<Result<Vec<Host>, LaunchError>>()?;
    let world = plan.world();
    let mut job = Job {
        plan,
        console,
        crossing,
        oversight: Oversight::new(console, WORDING, 0, world),
        hosts,
        ranks: (0..world).map(|_| Rank::default()).collect(),
        port: None,
        beat: Duration::ZERO,
    };
    let started = job.start(inbox).and_then(|()| job.watch_over(inbox));
    let success = started.is_ok() && job.oversight.is_success();
    job.close(success);
    started.map(|()| job.conclude())
}

impl Job<'_> {
    fn now(&self) -> Duration {
        self.oversight.now()
    }

    /// Gets every host to run its ranks.
    fn start(&mut self, inbox: &mut Inbox) -> Result<(), LaunchError> {
        self.until(inbox, "it has not answered", |job| {
            job.hosts.iter().all(|host| !matches!(host.state, State::Connecting))
        })?;
        self.refuse_problems()?;
        self.agree_on_meeting(inbox)?;
        let secret = secret::new()?;
        for (host, part) in self.hosts.iter_mut().zip(&self.plan.parts) {
            let (part, folder) = (part.clone(), self.plan.folder.clone());
            host.connection.send(&Order::Start(Box::new(Start { part, folder, secret: secret.clone() })));
            host.state = State::Starting;
        }
        self.until(inbox, "it has not started its ranks", |job| {
            job.hosts.iter().all(|host| !matches!(host.state, State::Starting))
        })?;
        self.refuse_problems()
    }

    /// Fixes where rank 0 awaits the others: at a port of the first host, and at the address by which the hosts reach it.
    fn agree_on_meeting(&mut self, inbox: &mut Inbox) -> Result<(), LaunchError> {
        let wanted = self.plan.parts[0].master_port;
        // An address that is given may be that of another host; then its ports cannot be looked at.
        let port = if wanted.is_some() && !self.plan.parts[0].master_addr.is_empty() {
            wanted
        } else {
            self.hosts[0].connection.send(&Order::Port(wanted));
            self.until(inbox, "it has not chosen a port", |job| job.port.is_some())?;
            match self.port.take() {
                Some(Ok(port)) => Some(port),
                Some(Err(what)) => {
                    return Err(LaunchError::Hosts {
                        problems: vec![(self.plan.parts[0].host.clone(), what)],
                    });
                }
                None => None,
            }
        };
        let hellos: Vec<Hello> = self.hosts.iter().map(|host| host.hello.clone()).collect();
        let address = meeting::address(&self.plan.parts[0].host, &hellos);
        for part in &mut self.plan.parts {
            part.master_port = port;
            if part.master_addr.is_empty() {
                part.master_addr.clone_from(&address);
            }
        }
        self.console.debug(&format!("deepspeed: the ranks meet at {}\n", self.plan.parts[0].meeting()));
        Ok(())
    }

    /// An error that names every host that is of no use.
    fn refuse_problems(&self) -> Result<(), LaunchError> {
        let problems: Vec<(String, String)> = self
            .hosts
            .iter()
            .zip(&self.plan.parts)
            .filter_map(|(host, part)| match &host.state {
                State::Gone(what) => Some((part.host.clone(), what.clone())),
                _ => None,
            })
            .collect();
        if problems.is_empty() { Ok(()) } else { Err(LaunchError::Hosts { problems }) }
    }

    /// Waits for a condition, or for a host to be of no use.
    fn until(
        &mut self,
        inbox: &mut Inbox,
        late: &str,
        is_reached: impl Fn(&Self) -> bool,
    ) -> Result<(), LaunchError> {
        let patience = self.plan.answer().unwrap_or(ANSWER);
        let deadline = self.now() + patience;
        while !is_reached(self) {
            self.wait(inbox, Some(deadline))?;
            for signal in inbox.take() {
                if !matches!(signal, SIGCHLD | SIGWINCH) {
                    let code = Ending::Signal(signal).shell_code();
                    return Err(LaunchError::Interrupted {
                        signal: signals::name(signal).unwrap_or("a signal"),
                        code,
                    });
                }
            }
            // What others have to say is heard for as long as all of them need anyway.
            if self.hosts.iter().all(|host| !matches!(host.state, State::Connecting)) {
                self.refuse_problems()?;
            }
            if self.now() >= deadline {
                let text = format!("{late} within {} s", patience.as_secs());
                // Those that have answered only wait for the others.
                let some_are_missing = self.hosts.iter().any(|host| matches!(host.state, State::Connecting));
                for (at, host) in self.hosts.iter_mut().enumerate() {
                    let why = match (&host.state, &self.crossing) {
                        (State::Running | State::Gone(_), _) => continue,
                        (State::Ready | State::Starting, _) if some_are_missing => continue,
                        (State::Connecting, Some(crossing)) => crossing.why_late(at),
                        _ => None,
                    };
                    let why = why.map_or_else(String::new, |why| format!(": {why}"));
                    host.state = State::Gone(format!("{text}{why}"));
                }
                return self.refuse_problems();
            }
        }
        Ok(())
    }

    /// Waits and acts until every rank is over.
    fn watch_over(&mut self, inbox: &mut Inbox) -> Result<(), LaunchError> {
        while !self.oversight.is_over() {
            self.wait(inbox, self.oversight.deadline())?;
            for signal in inbox.take() {
                if !matches!(signal, SIGCHLD | SIGWINCH) {
                    self.oversight.on(Event::Interrupted(signal));
                }
            }
            self.oversight.tick();
            for signal in self.oversight.take_signals() {
                for host in self.hosts.iter_mut().filter(|host| matches!(host.state, State::Running)) {
                    host.connection.send(&Order::Signal(signal));
                }
            }
        }
        Ok(())
    }

    /// Sleeps until something happens, at most until the deadline, and takes in what has come from the hosts.
    fn wait(&mut self, inbox: &Inbox, deadline: Option<Duration>) -> Result<(), LaunchError> {
        let next = [deadline, Some(self.beat + BEAT)];
        let wait = next.into_iter().flatten().min().unwrap_or(BEAT).saturating_sub(self.now());
        let timeout =
            Timespec { tv_sec: wait.as_secs().cast_signed(), tv_nsec: i64::from(wait.subsec_nanos()) };
        let mut fds: Vec<PollFd<'_>> = Vec::new();
        for host in self.hosts.iter().filter(|host| !matches!(host.state, State::Gone(_))) {
            fds.extend(host.connection.poll_fds());
        }
        fds.extend(self.crossing.iter().flat_map(Crossing::poll_fds));
        fds.extend(inbox.fds().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => {
                return Err(LaunchError::System { what: "waiting for the hosts", source: errno.into() });
            }
        }
        drop(fds);
        for at in 0..self.hosts.len() {
            self.listen(at);
        }
        self.tend_crossing();
        if self.now() >= self.beat + BEAT {
            self.beat = self.now();
            for host in self
                .hosts
                .iter_mut()
                .filter(|host| matches!(host.state, State::Ready | State::Starting | State::Running))
            {
                host.connection.send(&Order::Alive);
            }
        }
        Ok(())
    }

    /// Takes in what has come from a host.
    fn listen(&mut self, at: usize) {
        let now = self.now();
        let host = &mut self.hosts[at];
        if matches!(host.state, State::Gone(_)) {
            return;
        }
        host.connection.flush();
        let Received { incoming, any, mut problem } = host.connection.receive();
        if any || !matches!(host.state, State::Starting | State::Running) {
            host.heard = now;
        } else if problem.is_none() && now > host.heard + SILENCE {
            problem = Some(format!("it has said nothing for {} s", SILENCE.as_secs()));
            host.connection.give_up();
        }
        for one in incoming {
            if let Err(what) = self.take(at, one) {
                problem = Some(format!("the agent's words make no sense: {what}"));
                break;
            }
        }
        if let Some(problem) = problem {
            self.lose(at, problem);
        }
    }

    /// Takes in agents that have called, and the runner's end.
    fn tend_crossing(&mut self) {
        let Some(crossing) = &mut self.crossing else { return };
        let tended = crossing.tend();
        for note in tended.notes {
            self.console.info(&note);
        }
        for (at, stream) in tended.agents {
            if let Err(error) = self.hosts[at].connection.adopt(stream) {
                self.lose(at, format!("its agent's call could not be taken: {error}"));
            }
        }
        for (at, why) in tended.failed {
            if matches!(self.hosts[at].state, State::Connecting) {
                self.hosts[at].state = State::Gone(why);
            }
        }
        let Some((missing, lost)) = tended.over else { return };
        let running = self.hosts.iter().any(|host| matches!(host.state, State::Running));
        for (host, why) in self.hosts.iter_mut().zip(missing) {
            match host.state {
                State::Connecting => host.state = State::Gone(why),
                State::Ready | State::Starting | State::Running => host.state = State::Gone(lost.clone()),
                State::Gone(_) => {}
            }
        }
        if running {
            for rank in &mut self.ranks {
                rank.evidence.get_or_insert_with(|| Evidence { out_of_memory: false, text: lost.clone() });
            }
            self.oversight.host_lost(0, self.ranks.len());
        }
    }

    /// Takes in one message of a host. An agent speaks for the ranks of its own host only.
    fn take(&mut self, at: usize, incoming: Incoming) -> Result<(), String> {
        let own = |rank: usize, plan: &HostsPlan| {
            if plan.host_of(rank) == Some(at) {
                Ok(rank)
            } else {
                Err(format!("rank {rank} is not one of its own"))
            }
        };
        match incoming {
            Incoming::Output { rank, stream, bytes } => {
                let rank = own(rank, &self.plan)?;
                if stream == Stream::Stderr {
                    self.ranks[rank].tail.push(&bytes);
                }
                self.oversight.output(rank, stream, &bytes);
            }
            Incoming::Report(report) => match report {
                Report::Hello(hello) => self.welcome(at, hello),
                Report::Port(port) => self.port = Some(port),
                Report::Started(pids) => {
                    let first = self.plan.parts[at].first_rank;
                    for (rank, pid) in
                        self.ranks[first..].iter_mut().zip(pids).take(self.plan.parts[at].slots.len())
                    {
                        rank.pid = pid;
                    }
                    self.hosts[at].state = State::Running;
                }
                Report::Refused(what) => self.hosts[at].state = State::Gone(what),
                Report::Note { warning, text } => {
                    let text = format!("host {}: {text}", self.plan.parts[at].host);
                    self.oversight.say(warning, &text);
                }
                Report::Ended { rank, ending, evidence, log, step } => {
                    let rank = own(rank, &self.plan)?;
                    let known = &mut self.ranks[rank];
                    (known.evidence, known.log, known.step) = (evidence, log, step);
                    self.oversight.ended(rank, ending, &known.tail.last_words());
                }
                Report::Stopped { rank, signal, step } => {
                    let rank = own(rank, &self.plan)?;
                    self.ranks[rank].step = step;
                    self.oversight.on(Event::Stopped { rank, signal });
                }
                Report::Continued { rank } => {
                    let rank = own(rank, &self.plan)?;
                    self.oversight.on(Event::Continued { rank });
                }
                Report::Answer(_) => return Err("an answer that nobody asked for".to_owned()),
                Report::Leaving(why) => self.lose(at, why),
                Report::Alive => {}
            },
        }
        Ok(())
    }

    /// A host has answered.
    fn welcome(&mut self, at: usize, hello: Hello) {
        let ours = env!("CARGO_PKG_VERSION");
        self.hosts[at].state = if hello.version == ours {
            State::Ready
        } else {
            State::Gone(format!(
                "its deepspeed ({}) has version {}, this one {ours}; install the same one on every host",
                hello.program.display(),
                hello.version
            ))
        };
        self.hosts[at].hello = hello;
    }

    /// A host is of no use any more; ranks that still ran there are lost.
    fn lose(&mut self, at: usize, what: String) {
        let (first, count) = (self.plan.parts[at].first_rank, self.plan.parts[at].slots.len());
        let was_running = matches!(self.hosts[at].state, State::Running);
        if was_running {
            for rank in &mut self.ranks[first..first + count] {
                let lost = || Evidence { out_of_memory: false, text: what.clone() };
                rank.evidence.get_or_insert_with(lost);
            }
        }
        self.hosts[at].state = State::Gone(what);
        self.hosts[at].connection.cut();
        if was_running {
            self.oversight.host_lost(first, count);
        }
    }

    /// Closes every connection and waits until the hosts have ended what was left there.
    fn close(&mut self, success: bool) {
        for host in &mut self.hosts {
            if success {
                host.connection.send(&Order::Finish);
            }
            host.connection.close();
        }
        let began = Instant::now();
        for (host, part) in self.hosts.iter_mut().zip(&self.plan.parts) {
            // An agent that has called can be heard to end even where it was given up.
            let is_gone = matches!(host.state, State::Connecting | State::Gone(_));
            if is_gone && self.crossing.is_none() {
                continue;
            }
            loop {
                host.connection.drain();
                if host.connection.await_end(Duration::from_millis(10)).is_some() {
                    break;
                }
                if began.elapsed() > CLOSE {
                    if !is_gone {
                        self.console
                            .warn(&format!("host {}: its agent has not said that it ended", part.host));
                    }
                    break;
                }
            }
        }
        if let Some(crossing) = &mut self.crossing {
            crossing.close(self.hosts.iter().find_map(|host| host.hello.slurm_job.as_deref()));
            if crossing.strangers() > 0 {
                self.console.debug(&format!(
                    "deepspeed: {} callers that are no agents of this job were refused\n",
                    crossing.strangers()
                ));
            }
        }
    }

    /// Says how it went.
    fn conclude(&mut self) -> JobEnd {
        let (ranks, plan) = (&self.ranks, &self.plan);
        self.oversight.end(|rank| {
            let known = &ranks[rank];
            RankFacts {
                host: plan.host_of(rank).map_or_else(String::new, |at| plan.parts[at].host.clone()),
                pid: known.pid,
                last_lines: known.tail.last_lines(),
                evidence: known.evidence.clone(),
                log: known.log.clone(),
                step: known.step,
            }
        })
    }
}
