//! The connection to one host, with an agent at its other end: an ssh client of its own, or a socket once the agent has called back.

use crate::error::LaunchError;
use crate::ranks::spawn;
use crate::reach::ssh_error;
use crate::wire::frame::{self, Decoder};
use crate::wire::message::{self, Incoming, Order};
use rustix::event::{PollFd, PollFlags};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::{Duration, Instant};

/// So much of what ssh says is kept.
const KEPT: usize = 16 * 1024;

/// How long an ssh client whose connection is closed may take to end.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// A connection. When it is dropped, it closes, and with it ends all that runs on the host.
#[derive(Debug)]
pub(crate) struct Connection {
    /// The ssh client; `None` where the agent calls back.
    child: Option<Child>,
    /// Where orders go; `None` once closed, or before a call.
    input: Option<File>,
    /// Where reports come from; the same.
    output: Option<File>,
    stderr: Option<ChildStderr>,
    called: bool,
    decoder: Decoder,
    greeted: bool,
    outgoing: Vec<u8>,
    said: Vec<u8>,
}

/// What one look at a connection has brought.
#[derive(Debug)]
pub(crate) struct Received {
    /// Whole messages.
    pub(crate) incoming: Vec<Incoming>,
    /// Whether any byte has come, be it only a part of a message.
    pub(crate) any: bool,
    /// Why nothing more will come, where that is so.
    pub(crate) problem: Option<String>,
}

impl Connection {
    /// Starts the command line that reaches the host.
    ///
    /// # Errors
    /// It cannot be started.
    pub(crate) fn open(line: &[OsString]) -> Result<Self, LaunchError> {
        let error = |source: io::Error| LaunchError::System { what: "starting ssh", source };
        let mut command = Command::new(&line[0]);
        // In a group of its own, a Ctrl-C at the terminal does not reach it before the ranks have been told.
        command
            .args(&line[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        spawn::tie_to_launcher(&mut command, rustix::process::getpid(), None);
        let mut child = command.spawn().map_err(error)?;
        let input = child.stdin.take().map(OwnedFd::from).map(File::from);
        let output = child.stdout.take().map(OwnedFd::from).map(File::from);
        let stderr = child.stderr.take();
        unblock(input.as_ref())
            .and_then(|()| unblock(output.as_ref()))
            .and_then(|()| unblock(stderr.as_ref()))
            .map_err(error)?;
        let mut connection = Self::awaited();
        (connection.child, connection.input, connection.output) = (Some(child), input, output);
        connection.stderr = stderr;
        Ok(connection)
    }

    /// That of a host whose agent will call back.
    pub(crate) fn awaited() -> Self {
        Self {
            child: None,
            input: None,
            output: None,
            stderr: None,
            called: false,
            decoder: Decoder::default(),
            greeted: false,
            outgoing: Vec::new(),
            said: Vec::new(),
        }
    }

    /// The agent has called: `stream` does not block.
    ///
    /// # Errors
    /// The system has no further descriptor.
    pub(crate) fn adopt(&mut self, stream: TcpStream) -> io::Result<()> {
        let stream = OwnedFd::from(stream);
        self.input = Some(File::from(stream.try_clone()?));
        self.output = Some(File::from(stream));
        self.called = true;
        Ok(())
    }

    /// Whether the agent is yet to call.
    fn is_awaited(&self) -> bool {
        self.child.is_none() && !self.called
    }

    /// What to wait for.
    pub(crate) fn poll_fds(&self) -> Vec<PollFd<'_>> {
        let mut fds = Vec::with_capacity(3);
        if let Some(input) = self.input.as_ref().filter(|_| !self.outgoing.is_empty()) {
            fds.push(PollFd::new(input, PollFlags::OUT));
        }
        fds.extend(self.output.as_ref().map(|output| PollFd::new(output, PollFlags::IN)));
        fds.extend(self.stderr.as_ref().map(|stderr| PollFd::new(stderr, PollFlags::IN)));
        fds
    }

    /// Queues an order and sends what can be sent.
    pub(crate) fn send(&mut self, order: &Order) {
        match message::encode(order) {
            Ok(bytes) => self.outgoing.extend(bytes),
            // The plan's limits on words and slots keep every order shorter than a frame.
            Err(error) => self.said.extend(format!("an order cannot be sent: {error}\n").bytes()),
        }
        self.flush();
    }

    /// Sends what is queued, as far as the connection takes it. That it is closed shows in reading.
    pub(crate) fn flush(&mut self) {
        while let Some(input) = self.input.as_mut().filter(|_| !self.outgoing.is_empty()) {
            match input.write(&self.outgoing) {
                Ok(length) => drop(self.outgoing.drain(..length)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.input = None,
            }
        }
    }

    /// What has come, up to one buffer.
    pub(crate) fn receive(&mut self) -> Received {
        self.listen_to_ssh();
        let mut closed = self.output.is_none() && !self.is_awaited();
        let mut any = false;
        let mut buffer = [0; 64 * 1024];
        if let Some(output) = &mut self.output {
            match output.read(&mut buffer) {
                Ok(0) => closed = true,
                Ok(length) => {
                    any = true;
                    self.decoder.push(&buffer[..length]);
                }
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(_) => closed = true,
            }
        }
        let mut incoming = Vec::new();
        let mut problem = self.decode(&mut incoming).err();
        if closed && problem.is_none() {
            problem = Some(self.last_words());
        }
        if problem.is_some() {
            self.output = None;
        }
        Received { incoming, any, problem }
    }

    fn decode(&mut self, incoming: &mut Vec<Incoming>) -> Result<(), String> {
        let strange = |what: String| format!("the agent's words make no sense: {what}");
        if !self.greeted {
            match self.decoder.greeting().map_err(|error| strange(error.to_string()))? {
                None => return Ok(()),
                Some(frame::PROTOCOL) => self.greeted = true,
                Some(other) => {
                    return Err(format!(
                        "its deepspeed is of another version (its agent speaks version {other}, this launcher {}); \
                         install the same one on every host",
                        frame::PROTOCOL
                    ));
                }
            }
        }
        while let Some(frame) = self.decoder.next().map_err(|error| strange(error.to_string()))? {
            incoming.push(message::incoming(frame).map_err(strange)?);
        }
        Ok(())
    }

    /// Takes in what the ssh client says about itself, and the host's shell.
    fn listen_to_ssh(&mut self) {
        let mut buffer = [0; 4096];
        while let Some(stderr) = &mut self.stderr {
            match stderr.read(&mut buffer) {
                Ok(0) => self.stderr = None,
                Ok(length) => {
                    self.said.extend_from_slice(&buffer[..length]);
                    let surplus = self.said.len().saturating_sub(KEPT);
                    self.said.drain(..surplus);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.stderr = None,
            }
        }
    }

    /// Why a connection has closed.
    fn last_words(&mut self) -> String {
        if self.called {
            return "the connection to its agent has closed".to_owned();
        }
        let ended = self.await_end(LAST_WORDS);
        self.listen_to_ssh();
        let said = String::from_utf8_lossy(&self.said).into_owned();
        let noise = if self.greeted { String::new() } else { self.decoder.noise() };
        ssh_error::explain(self.greeted, ended, &said, &noise)
    }

    /// Waits for the ssh client to end; its exit code, or 128 and the signal's number. Without a client: waits for the agent to close the
    /// connection, which is the last that it does, and gives 0.
    pub(crate) fn await_end(&mut self, patience: Duration) -> Option<i32> {
        let began = Instant::now();
        loop {
            let Some(child) = &mut self.child else {
                self.drain();
                if self.output.is_none() {
                    return Some(0);
                }
                if began.elapsed() >= patience {
                    return None;
                }
                std::thread::sleep(Duration::from_millis(2));
                continue;
            };
            match child.try_wait() {
                Ok(Some(status)) => {
                    use std::os::unix::process::ExitStatusExt;
                    return status.code().or_else(|| status.signal().map(|signal| 128 + signal));
                }
                Ok(None) if began.elapsed() < patience => std::thread::sleep(Duration::from_millis(2)),
                _ => return None,
            }
        }
    }

    /// Closes the sending side: the agent ends all that runs on its host, and itself.
    pub(crate) fn close(&mut self) {
        self.flush();
        if let Some(input) = self.input.take()
            && self.called
        {
            // The other half stays open, for what the agent still says. One that is gone needs no such word.
            let _ = rustix::net::shutdown(&input, rustix::net::Shutdown::Write);
        }
    }

    /// Nothing more is expected from here: the host has gone silent, and its end is not waited for.
    pub(crate) fn give_up(&mut self) {
        self.output = None;
    }

    /// Ends the ssh client, even one that is stopped; whatever is left of the other end finds the connection gone. An agent that has
    /// called finds its input closed, and can still be heard to end.
    pub(crate) fn cut(&mut self) {
        self.outgoing.clear();
        self.close();
        if let Some(child) = &mut self.child {
            // What cannot be ended has ended.
            let _ = child.kill();
        }
    }

    /// Takes in and drops what still comes, so that the agent is not held up by it.
    pub(crate) fn drain(&mut self) {
        let mut buffer = [0; 64 * 1024];
        while let Some(output) = &mut self.output {
            match output.read(&mut buffer) {
                Ok(0) => self.output = None,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.output = None,
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.input = None;
        if let Some(child) = &mut self.child {
            // What cannot be ended any more has ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Makes reading and writing return at once.
pub(crate) fn unblock(fd: Option<&impl AsFd>) -> io::Result<()> {
    Ok(fd.map_or(Ok(()), |fd| rustix::io::ioctl_fionbio(fd, true))?)
}
