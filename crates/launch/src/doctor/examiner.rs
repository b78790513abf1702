//! A host's side of an examination: it answers questions about itself and about what it can reach.

use super::question::{Answer, Question, Target};
use crate::facts::HostFacts;
use fs_err as fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

/// How long another host may take to accept a connection, and to answer.
const REACH: Duration = Duration::from_secs(4);

/// How long a file that another host has written may take to appear: NFS clients remember for seconds what was not there.
const APPEAR: Duration = Duration::from_secs(4);

/// What a listener answers to who knows the word.
const WELCOME: &[u8] = b"welcome\n";

/// What a host has put up for its examination; it goes with this value, should the launcher's host be lost meanwhile.
#[derive(Debug, Default)]
pub(crate) struct Examiner {
    file: Option<PathBuf>,
}

impl Examiner {
    /// Answers; takes seconds at most.
    pub(crate) fn answer(&mut self, question: Question) -> Answer {
        match question {
            Question::Clock => Answer::Clock(now()),
            Question::Facts { folder } => Answer::Facts {
                facts: Box::new(HostFacts::read()),
                folder: match fs::metadata(&folder) {
                    Ok(metadata) if metadata.is_dir() => None,
                    Ok(_) => Some(format!("{} is no folder", folder.display())),
                    Err(error) => Some(error.to_string()),
                },
            },
            Question::Listen { word } => Answer::Listen(listen(word).map_err(|error| error.to_string())),
            Question::Reach { word, targets } => Answer::Reach(reach_all(&word, &targets)),
            Question::Write { folder, name, text } => {
                let path = folder.join(name);
                let written = fs::write(&path, text);
                if written.is_ok() {
                    self.file = Some(path);
                }
                Answer::Write(written.map_err(|error| error.to_string()))
            }
            Question::Read { folder, files } => {
                let deadline = Instant::now() + APPEAR;
                Answer::Read(files.iter().map(|(name, text)| see(&folder, name, text, deadline)).collect())
            }
            Question::Clear => {
                let removed = self.file.take().map_or(Ok(()), fs::remove_file);
                Answer::Clear(removed.err().map(|error| error.to_string()))
            }
        }
    }
}

impl Drop for Examiner {
    fn drop(&mut self) {
        if let Some(path) = &self.file {
            // Where it cannot be removed the folder has a small file more; whoever looks there sees its name.
            let _ = fs::remove_file(path);
        }
    }
}

/// Time since 1970, by this host's clock.
pub(super) fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// Listens at a free port for as long as this process lives, and answers to who knows the word.
fn listen(word: String) -> io::Result<u16> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0))
        .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)))?;
    let port = listener.local_addr()?.port();
    thread::Builder::new().name("doctor".to_owned()).spawn(move || {
        for stream in listener.incoming().flatten() {
            let word = word.clone();
            // One that says nothing must not hold up the others.
            let greet = move || drop(greet(stream, &word));
            if thread::Builder::new().spawn(greet).is_err() {
                return;
            }
        }
    })?;
    Ok(port)
}

fn greet(mut stream: TcpStream, word: &str) -> io::Result<()> {
    stream.set_read_timeout(Some(REACH))?;
    let mut said = vec![0; word.len()];
    stream.read_exact(&mut said)?;
    if said == word.as_bytes() {
        stream.write_all(WELCOME)?;
    }
    Ok(())
}

/// Connects to all targets at once.
fn reach_all(word: &str, targets: &[Target]) -> Vec<Result<Duration, String>> {
    thread::scope(|scope| {
        let tries: Vec<_> = targets.iter().map(|target| scope.spawn(move || reach(word, target))).collect();
        let lost = || Err("the try has ended by itself".to_owned());
        tries.into_iter().map(|try_| try_.join().unwrap_or_else(|_| lost())).collect()
    })
}

/// Connects to a target; the time that this took.
fn reach(word: &str, target: &Target) -> Result<Duration, String> {
    let at = format!("{} port {}", target.address, target.port);
    let addresses = (target.address.as_str(), target.port)
        .to_socket_addrs()
        .map_err(|error| format!("the name {} is not known there ({error})", target.address))?;
    let mut last = format!("the name {} stands for no address there", target.address);
    for address in addresses {
        let began = Instant::now();
        match TcpStream::connect_timeout(&address, REACH) {
            Ok(stream) => {
                let took = began.elapsed();
                return converse(stream, word)
                    .map(|()| took)
                    .map_err(|error| format!("something else than deepspeed answers at {at} ({error})"));
            }
            Err(error) => last = format!("{at}: {}", explain(&error)),
        }
    }
    Err(last)
}

fn converse(mut stream: TcpStream, word: &str) -> io::Result<()> {
    stream.set_read_timeout(Some(REACH))?;
    stream.write_all(word.as_bytes())?;
    let mut answer = [0; WELCOME.len()];
    stream.read_exact(&mut answer)?;
    if answer == WELCOME { Ok(()) } else { Err(io::Error::other("a wrong answer")) }
}

/// Why a connection has failed, and what that hints at.
fn explain(error: &io::Error) -> String {
    let hint = match error.kind() {
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
            "no answer: does a firewall drop packets between the hosts?"
        }
        io::ErrorKind::ConnectionRefused => {
            "refused: does a firewall reject the port, or does the address lead to another host or container?"
        }
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
            "there is no way to it from there"
        }
        _ => return error.to_string(),
    };
    format!("{hint} ({error})")
}

/// Whether a file is there with this text, by the deadline.
fn see(folder: &Path, name: &str, text: &str, deadline: Instant) -> Result<(), String> {
    loop {
        let problem = match fs::read_to_string(folder.join(name)) {
            Ok(found) if found == text => return Ok(()),
            Ok(_) => "it holds something else than was written".to_owned(),
            Err(error) => error.to_string(),
        };
        if Instant::now() >= deadline {
            return Err(problem);
        }
        thread::sleep(Duration::from_millis(100));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reach_one(word: &str, port: u16) -> Result<Duration, String> {
        let targets = vec![Target { address: "127.0.0.1".to_owned(), port }];
        let question = Question::Reach { word: word.to_owned(), targets };
        match Examiner::default().answer(question) {
            Answer::Reach(mut reached) => reached.remove(0),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn who_knows_the_word_is_welcome() {
        let mut host = Examiner::default();
        let Answer::Listen(Ok(port)) = host.answer(Question::Listen { word: "open".to_owned() }) else {
            panic!("no port");
        };
        // A stranger who says nothing does not hold up the others.
        let _silent = TcpStream::connect(("127.0.0.1", port)).unwrap();
        assert!(reach_one("open", port).is_ok());
        assert!(reach_one("shut", port).unwrap_err().contains("something else than deepspeed"));
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        assert!(reach_one("open", free).unwrap_err().contains("refused"));
    }

    #[test]
    fn files_are_seen_and_go() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().to_path_buf();
        let mut host = Examiner::default();
        let write = Question::Write { folder: at.clone(), name: "a".to_owned(), text: "1".to_owned() };
        assert_eq!(host.answer(write.clone()), Answer::Write(Ok(())));
        let files = vec![("a".to_owned(), "1".to_owned())];
        let read = Question::Read { folder: at.clone(), files };
        assert_eq!(host.answer(read), Answer::Read(vec![Ok(())]));
        drop(host);
        assert_eq!(fs::read_dir(&at).unwrap().count(), 0);
        let missing = Question::Write { folder: at.join("none"), name: "a".to_owned(), text: String::new() };
        assert!(matches!(Examiner::default().answer(missing), Answer::Write(Err(_))));
    }
}
