//! How a launcher and an agent make sure of each other where no connection between them exists yet: pdsh, mpirun and srun start the
//! agent, which calls the launcher back.
//!
//! ```text
//!   launcher                                            agent
//!      |  command line: address, fingerprint of A  ->     |    A, B: random keys that are never on a command line
//!      |            <-  standard output: fingerprint of B |    through pdsh, mpirun or srun
//!      |            <-  TCP: place, B                     |    B fits its fingerprint: this is the agent
//!      |  TCP: A  ->                                      |    A fits its fingerprint: this is the launcher
//! ```
//!
//! A fingerprint is a SHA-256, which anyone may see: it tells a key that is shown from any other, and nothing about a key that is not.
//! So what the command line and the output carry, and any file that they may be kept in, is of no use to a stranger.

use sha2::{Digest, Sha256};
use std::fmt::Write as _;

/// The longest line of the handshake, its end included.
pub(crate) const MAX_LINE: usize = 512;

/// The version of these lines.
const VERSION: u32 = 1;

const ANNOUNCEMENT: &str = "deepspeed-agent-fingerprint";
const JOIN: &str = "deepspeed-agent-join";
const ANSWER: &str = "deepspeed-launcher";

/// The fingerprint of a key.
pub(crate) fn fingerprint(key: &str) -> String {
    Sha256::digest(key.as_bytes()).iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// What the agent prints. `place` is the word by which the runner tells hosts apart.
pub(crate) fn announcement(place: &str, key: &str) -> String {
    format!("{ANNOUNCEMENT} {place} {}\n", fingerprint(key))
}

/// The place and the fingerprint in a line of a runner's output, which may begin with the runner's own label.
pub(crate) fn find_announcement(line: &str) -> Option<(String, String)> {
    let (_, rest) = line.split_once(ANNOUNCEMENT)?;
    let mut words = rest.split_whitespace();
    let (place, print) = (words.next()?, words.next()?);
    is_hex(print).then(|| (place.to_owned(), print.to_owned()))
}

/// What the agent says first through the connection.
pub(crate) fn join(place: &str, key: &str) -> String {
    format!("{JOIN} {VERSION} {place} {key}\n")
}

/// The place and the key of who joins; an error says what else it is.
pub(crate) fn parse_join(line: &str) -> Result<(String, String), String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words.as_slice() {
        [JOIN, version, place, key] if *version == VERSION.to_string() && is_hex(key) => {
            Ok(((*place).to_owned(), (*key).to_owned()))
        }
        [JOIN, version, ..] if *version != VERSION.to_string() => {
            Err(format!("an agent of another version ({version}, this launcher {VERSION})"))
        }
        _ => Err("no agent".to_owned()),
    }
}

/// What the launcher says back.
pub(crate) fn answer(key: &str) -> String {
    format!("{ANSWER} {key}\n")
}

/// Whether an answer comes from the launcher with this fingerprint.
pub(crate) fn is_launcher(line: &str, print: &str) -> bool {
    let mut words = line.split_whitespace();
    words.next() == Some(ANSWER) && words.next().is_some_and(|key| is_hex(key) && fingerprint(key) == print)
}

/// 32 bytes in hexadecimal.
fn is_hex(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_fingerprint_is_sha_256() {
        assert_eq!(fingerprint("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    fn both_sides_know_each_other() {
        let (ours, theirs) = ("a".repeat(64), "b".repeat(64));
        let line = format!("worker-2: {}", announcement("1", &theirs));
        assert_eq!(find_announcement(&line), Some(("1".to_owned(), fingerprint(&theirs))));
        let (place, key) = parse_join(&join("1", &theirs)).unwrap();
        assert_eq!((place.as_str(), fingerprint(&key)), ("1", fingerprint(&theirs)));
        assert!(is_launcher(&answer(&ours), &fingerprint(&ours)));
        assert!(!is_launcher(&answer(&theirs), &fingerprint(&ours)));
        assert!(!is_launcher(&answer(""), &fingerprint("")));
        assert_eq!(parse_join("GET / HTTP/1.1"), Err("no agent".to_owned()));
        let old = parse_join(&format!("{JOIN} 0 1 {ours}"));
        assert_eq!(old, Err("an agent of another version (0, this launcher 1)".to_owned()));
    }

    proptest! {
        #[test]
        fn any_line_is_survived(line in "(deepspeed-agent-(join|fingerprint))?[ -~]{0,90}", print in "[0-9a-f]{0,70}") {
            let _ = find_announcement(&line);
            let _ = parse_join(&line);
            prop_assert!(!is_launcher(&line, &print));
        }
    }
}
