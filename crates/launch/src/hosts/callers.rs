//! Agents that call back: who they are is checked before anything that they say counts.
//!
//! A caller is an agent when the key it shows fits the fingerprint that has come through the runner's output for its place, be it before
//! or after the call. Others are hung up on: they learn nothing, and hold a place for ten seconds at most.

use crate::error::LaunchError;
use crate::secret;
use crate::wire::handshake;
use rustix::event::{PollFd, PollFlags};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// How long a caller may take to say who it is.
const INTRODUCTION: Duration = Duration::from_secs(10);

/// How long the runner's output may take to confirm it.
const CONFIRMATION: Duration = Duration::from_secs(60);

/// More callers than hosts, strangers among them, wait in the system's queue.
const STRANGERS: usize = 64;

/// Callers and what is known of the agents that may call.
#[derive(Debug)]
pub(crate) struct Callers {
    listeners: Vec<TcpListener>,
    key: String,
    /// By host: the fingerprint that the runner's output has brought, and whether its agent is connected.
    places: Vec<(Option<String>, bool)>,
    waiting: Vec<Caller>,
    /// How many were hung up on.
    pub(crate) refused: usize,
}

#[derive(Debug)]
struct Caller {
    stream: TcpStream,
    line: Vec<u8>,
    /// The host it says it is, and its key.
    claim: Option<(usize, String)>,
    since: Instant,
}

/// What has become of a caller.
enum Verdict {
    Waits,
    Agent(usize),
    Stranger,
}

impl Callers {
    /// Nobody has called yet.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub(crate) fn new(listeners: Vec<TcpListener>, hosts: usize) -> Result<Self, LaunchError> {
        let places = vec![(None, false); hosts];
        Ok(Self { listeners, key: secret::new()?, places, waiting: Vec::new(), refused: 0 })
    }

    /// The fingerprint of the launcher's key.
    pub(crate) fn fingerprint(&self) -> String {
        handshake::fingerprint(&self.key)
    }

    /// What to wait for.
    pub(crate) fn poll_fds(&self) -> impl Iterator<Item = PollFd<'_>> {
        let calls = if self.all_are_here() { 0 } else { self.listeners.len() };
        let listeners = self.listeners[..calls].iter().map(|one| PollFd::new(one, PollFlags::IN));
        let unnamed = self.waiting.iter().filter(|caller| caller.claim.is_none());
        listeners.chain(unnamed.map(|caller| PollFd::new(&caller.stream, PollFlags::IN)))
    }

    fn all_are_here(&self) -> bool {
        self.places.iter().all(|(_, here)| *here)
    }

    /// The runner's output brings the fingerprint of a host's agent. The first one counts.
    pub(crate) fn announce(&mut self, host: usize, print: String) {
        if let Some((known, _)) = self.places.get_mut(host) {
            known.get_or_insert(print);
        }
    }

    /// Whether the runner's output has brought a word from the host's agent.
    pub(crate) fn is_announced(&self, host: usize) -> bool {
        self.places.get(host).is_some_and(|(print, _)| print.is_some())
    }

    /// Takes calls, and returns the connections of agents, each with its host. `host` finds the host of a place.
    pub(crate) fn tend(&mut self, host: impl Fn(&str) -> Option<usize>) -> Vec<(usize, TcpStream)> {
        self.accept();
        let mut agents = Vec::new();
        let mut waiting = Vec::new();
        for mut caller in std::mem::take(&mut self.waiting) {
            match caller.listen(&self.places, &host) {
                Verdict::Waits => waiting.push(caller),
                Verdict::Stranger => self.refused += 1,
                Verdict::Agent(at) => match caller.welcome(&self.key) {
                    Ok(()) => {
                        self.places[at].1 = true;
                        agents.push((at, caller.stream));
                    }
                    // It will call again or be missed.
                    Err(_) => self.refused += 1,
                },
            }
        }
        self.waiting = waiting;
        agents
    }

    fn accept(&mut self) {
        if self.all_are_here() {
            return;
        }
        for listener in &self.listeners {
            while self.waiting.len() < self.places.len() + STRANGERS {
                // Nobody is there, or who was has gone.
                let Ok((stream, _)) = listener.accept() else { break };
                if stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true)).is_ok() {
                    self.waiting.push(Caller {
                        stream,
                        line: Vec::new(),
                        claim: None,
                        since: Instant::now(),
                    });
                }
            }
        }
    }
}

impl Caller {
    /// Takes in what the caller says of itself, and judges it.
    fn listen(&mut self, places: &[(Option<String>, bool)], host: impl Fn(&str) -> Option<usize>) -> Verdict {
        if self.claim.is_none() {
            match self.read_line() {
                Ok(Some(line)) => match handshake::parse_join(&line) {
                    Ok((place, key)) => self.claim = host(&place).map(|at| (at, key)),
                    Err(_) => return Verdict::Stranger,
                },
                Ok(None) if self.since.elapsed() < INTRODUCTION => return Verdict::Waits,
                Ok(None) | Err(_) => return Verdict::Stranger,
            }
        }
        match &self.claim {
            None => Verdict::Stranger,
            Some((at, key)) => match places.get(*at) {
                Some((Some(print), false)) if *print == handshake::fingerprint(key) => Verdict::Agent(*at),
                Some((None, false)) if self.since.elapsed() < CONFIRMATION => Verdict::Waits,
                _ => Verdict::Stranger,
            },
        }
    }

    /// The caller's line, once it is whole. An agent says nothing more before it has an answer.
    fn read_line(&mut self) -> io::Result<Option<String>> {
        let mut buffer = [0; handshake::MAX_LINE];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(length) => self.line.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if self.line.last() == Some(&b'\n') {
                return Ok(Some(String::from_utf8_lossy(&self.line).into_owned()));
            }
            if self.line.len() > handshake::MAX_LINE {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
    }

    /// Shows the agent that this is the launcher. A fresh connection has room for one line.
    fn welcome(&mut self, key: &str) -> io::Result<()> {
        self.stream.write_all(handshake::answer(key).as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn callers() -> (Callers, std::net::SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        (Callers::new(vec![listener], 2).unwrap(), address)
    }

    /// Tends until `n` agents are there, or a while is over.
    fn tend(callers: &mut Callers, n: usize) -> Vec<(usize, TcpStream)> {
        let mut agents = Vec::new();
        let began = Instant::now();
        while agents.len() < n && began.elapsed() < Duration::from_secs(10) {
            agents.extend(callers.tend(|place| place.parse().ok()));
            std::thread::sleep(Duration::from_millis(1));
        }
        agents
    }

    fn call(address: std::net::SocketAddr, line: &str) -> TcpStream {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.write_all(line.as_bytes()).unwrap();
        stream
    }

    #[test]
    fn an_agent_is_known_by_its_key_and_the_launcher_by_its_own() {
        let (mut callers, address) = callers();
        let keys = ["a".repeat(64), "b".repeat(64)];
        // One is announced before its call, one after it.
        callers.announce(1, handshake::fingerprint(&keys[1]));
        let mut streams: Vec<TcpStream> = keys
            .iter()
            .enumerate()
            .map(|(at, key)| call(address, &handshake::join(&at.to_string(), key)))
            .collect();
        let mut agents = tend(&mut callers, 1);
        callers.announce(0, handshake::fingerprint(&keys[0]));
        agents.extend(tend(&mut callers, 1));
        assert_eq!(agents.iter().map(|(at, _)| *at).collect::<Vec<usize>>(), [1, 0]);
        for stream in &mut streams {
            let mut line = vec![0; handshake::answer(&keys[0]).len()];
            stream.read_exact(&mut line).unwrap();
            assert!(handshake::is_launcher(&String::from_utf8_lossy(&line), &callers.fingerprint()));
        }
    }

    #[test]
    fn strangers_are_hung_up_on() {
        let (mut callers, address) = callers();
        let key = "a".repeat(64);
        callers.announce(0, handshake::fingerprint(&key));
        let wrong = handshake::join("0", &"b".repeat(64));
        let nowhere = handshake::join("7", &key);
        let long = "x".repeat(2000);
        for line in ["GET / HTTP/1.1\r\n", wrong.as_str(), nowhere.as_str(), long.as_str()] {
            let refused = callers.refused;
            let mut stream = call(address, line);
            while callers.refused == refused {
                assert!(callers.tend(|place| place.parse().ok()).is_empty());
            }
            // Closed, without a word of the launcher's key.
            let mut said = Vec::new();
            let _ = stream.read_to_end(&mut said);
            assert!(said.is_empty());
        }
        let _agent = call(address, &handshake::join("0", &key));
        assert_eq!(tend(&mut callers, 1).len(), 1);
        // Nobody takes the place of an agent that is here.
        let mut second = call(address, &handshake::join("0", &key));
        let refused = callers.refused;
        while callers.refused == refused {
            assert!(callers.tend(|place| place.parse().ok()).is_empty());
        }
        assert_eq!(second.read(&mut [0]).unwrap_or(0), 0);
    }
}
