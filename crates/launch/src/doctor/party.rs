//! The hosts of an examination, each behind its connection: questions go out to all, and the answers are awaited together.

use super::question::{Answer, Question};
use crate::error::LaunchError;
use crate::hosts::connection::{Connection, Received};
use crate::wire::message::{Hello, Incoming, Order, Report};
use rustix::event::{PollFd, Timespec};
use std::ffi::OsString;
use std::time::{Duration, Instant};

/// How long ssh, the login shell and the agent may take together.
const HELLO: Duration = Duration::from_secs(60);

/// How long a host may think about a question. Longer than any patience of its own.
const ANSWER: Duration = Duration::from_secs(30);

/// One host.
pub(super) struct Member {
    connection: Connection,
    /// How it has presented itself, and how long that took.
    pub(super) hello: Option<(Hello, Duration)>,
    /// Why it is of no use, once it is not.
    pub(super) lost: Option<String>,
    answer: Option<(Reply, Duration)>,
}

/// An answer, of either kind.
#[derive(Debug)]
pub(super) enum Reply {
    /// To a question of an examination.
    Answer(Answer),
    /// To the order that every launch begins with.
    Port(Result<u16, String>),
}

/// All hosts.
pub(super) struct Party {
    pub(super) members: Vec<Member>,
    began: Instant,
}

impl Party {
    /// Starts to connect to every host.
    ///
    /// # Errors
    /// ssh cannot be started.
    pub(super) fn open(lines: &[Vec<OsString>]) -> Result<Self, LaunchError> {
        let members = lines
            .iter()
            .map(|line| {
                Ok(Member { connection: Connection::open(line)?, hello: None, lost: None, answer: None })
            })
            .collect::<Result<Vec<Member>, LaunchError>>()?;
        Ok(Self { members, began: Instant::now() })
    }

    /// Waits until every host has said hello or is lost.
    ///
    /// # Errors
    /// Waiting itself fails.
    pub(super) fn await_hellos(&mut self) -> Result<(), LaunchError> {
        self.until(HELLO, |_, member| member.hello.is_some())
    }

    /// Gives each host its order and waits for what it says to it, with the time from sending to hearing. `None` for hosts without an
    /// order, and for those that are lost, be it meanwhile.
    ///
    /// # Errors
    /// Waiting itself fails.
    pub(super) fn ask(
        &mut self,
        order: impl Fn(usize) -> Option<Order>,
    ) -> Result<Vec<Option<(Reply, Duration)>>, LaunchError> {
        self.began = Instant::now();
        let mut asked = Vec::new();
        for (at, member) in self.members.iter_mut().enumerate() {
            member.answer = None;
            let order = order(at).filter(|_| member.lost.is_none());
            asked.push(order.is_some());
            if let Some(order) = order {
                member.connection.send(&order);
            }
        }
        self.until(ANSWER, |at, member| member.answer.is_some() || !asked[at])?;
        let answers = self.members.iter_mut().map(|member| member.answer.take());
        Ok(answers.zip(asked).map(|(answer, asked)| answer.filter(|_| asked)).collect())
    }

    /// [`ask`](Self::ask) for questions.
    ///
    /// # Errors
    /// Waiting itself fails.
    pub(super) fn question(
        &mut self,
        question: impl Fn(usize) -> Option<Question>,
    ) -> Result<Vec<Option<(Answer, Duration)>>, LaunchError> {
        let replies = self.ask(|at| question(at).map(Order::Examine))?;
        Ok(replies
            .into_iter()
            .map(|reply| match reply {
                Some((Reply::Answer(answer), took)) => Some((answer, took)),
                _ => None,
            })
            .collect())
    }

    /// Waits until every host that is not lost is ready; those that are late are lost.
    fn until(
        &mut self,
        patience: Duration,
        is_ready: impl Fn(usize, &Member) -> bool,
    ) -> Result<(), LaunchError> {
        let deadline = Instant::now() + patience;
        loop {
            let late: Vec<usize> = (0..self.members.len())
                .filter(|at| self.members[*at].lost.is_none() && !is_ready(*at, &self.members[*at]))
                .collect();
            if late.is_empty() {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                for at in late {
                    let text = format!("it has not answered within {} s", patience.as_secs());
                    self.members[at].lost = Some(text);
                }
                return Ok(());
            }
            self.wait(left)?;
            for member in self.members.iter_mut().filter(|member| member.lost.is_none()) {
                member.listen(self.began);
            }
        }
    }

    fn wait(&self, patience: Duration) -> Result<(), LaunchError> {
        let present = self.members.iter().filter(|member| member.lost.is_none());
        let mut fds: Vec<PollFd<'_>> = present.flat_map(|member| member.connection.poll_fds()).collect();
        let timeout = Timespec {
            tv_sec: patience.as_secs().cast_signed(),
            tv_nsec: i64::from(patience.subsec_nanos()),
        };
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(LaunchError::System { what: "waiting for the hosts", source: errno.into() }),
        }
    }
}

impl Member {
    /// Takes in what has come.
    fn listen(&mut self, began: Instant) {
        self.connection.flush();
        let Received { incoming, problem, .. } = self.connection.receive();
        for one in incoming {
            match one {
                Incoming::Report(Report::Hello(hello)) => self.hello = Some((hello, began.elapsed())),
                Incoming::Report(Report::Answer(answer)) => {
                    self.answer = Some((Reply::Answer(answer), began.elapsed()));
                }
                Incoming::Report(Report::Port(port)) => {
                    self.answer = Some((Reply::Port(port), began.elapsed()));
                }
                Incoming::Report(Report::Leaving(why)) => self.lost = Some(why),
                // Signs of life, remarks.
                _ => {}
            }
        }
        if self.lost.is_none() {
            self.lost = problem;
        }
    }
}
