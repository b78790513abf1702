//! How a process ended, in words.

use serde::{Deserialize, Serialize};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Ending {
    /// It exited with this code.
    Code(i32),
    /// A signal of this number killed it.
    Signal(i32),
    /// A signal of this number stopped it, and nobody let it go on.
    Stopped(i32),
    /// The connection to its host is gone.
    HostLost,
}

/// The exit code for a lost host, as ssh has it.
const LOST: u8 = 255;

impl Ending {
    /// Whether the process did what it should.
    pub(crate) fn is_success(self) -> bool {
        self == Ending::Code(0)
    }

    /// The exit code by which a shell reports such an ending: the code itself, or 128 and the signal's number.
    pub(crate) fn shell_code(self) -> u8 {
        match self {
            Ending::Code(code) => u8::try_from(code & 0xff).unwrap_or(1),
            Ending::Signal(signal) | Ending::Stopped(signal) => {
                u8::try_from((128 + signal) & 0xff).unwrap_or(1)
            }
            Ending::HostLost => LOST,
        }
    }

    /// Whether the kernel ends a process like this when memory is short.
    pub(crate) fn may_be_out_of_memory(self) -> bool {
        matches!(self, Ending::Signal(9) | Ending::Code(137))
    }

    /// The ending in words: `killed by signal 9 (SIGKILL)`, `exited with code 3`.
    pub(crate) fn words(self) -> String {
        match self {
            Ending::Signal(signal) => match name(signal) {
                Some(name) => format!("killed by signal {signal} ({name})"),
                None => format!("killed by signal {signal}"),
            },
            Ending::Stopped(signal) => match name(signal) {
                Some(name) => format!("stopped by signal {signal} ({name}), and not continued"),
                None => format!("stopped by signal {signal}, and not continued"),
            },
            Ending::HostLost => "lost with its host".to_owned(),
            Ending::Code(code) => match name(code - 128) {
                // 129 to 159 is how a shell passes on the death of its child; 137 is the usual one.
                Some(name) if code > 128 => {
                    format!(
                        "exited with code {code} (a shell's way to say: killed by signal {}, {name})",
                        code - 128
                    )
                }
                _ => format!("exited with code {code}"),
            },
        }
    }

    /// What usually lies behind such an ending, where that is not obvious.
    pub(crate) fn meaning(self) -> Option<&'static str> {
        let signal = match self {
            Ending::Signal(signal) => signal,
            Ending::Code(code) => code - 128,
            Ending::Stopped(_) => return Some("the other ranks would wait for it for ever"),
            Ending::HostLost => return None,
        };
        Some(match signal {
            4 => "an illegal instruction: the program was built for another kind of CPU",
            6 => "the program gave up on itself (abort); its last lines say why",
            7 => "memory that could not be had behind an address: often /dev/shm or a disk is full",
            8 => "an arithmetic error such as an integer division by zero, in native code",
            11 => "access to memory that is not its own: an error in native code",
            24 => "its limit of CPU time (ulimit -t) is used up",
            25 => "a file reached the size limit (ulimit -f)",
            31 => "a system call that this container forbids",
            _ => return None,
        })
    }
}

/// The name of a signal.
pub(crate) fn name(signal: i32) -> Option<&'static str> {
    Some(match signal {
        1 => "SIGHUP",
        2 => "SIGINT",
        3 => "SIGQUIT",
        4 => "SIGILL",
        5 => "SIGTRAP",
        6 => "SIGABRT",
        7 => "SIGBUS",
        8 => "SIGFPE",
        9 => "SIGKILL",
        10 => "SIGUSR1",
        11 => "SIGSEGV",
        12 => "SIGUSR2",
        13 => "SIGPIPE",
        14 => "SIGALRM",
        15 => "SIGTERM",
        19 => "SIGSTOP",
        20 => "SIGTSTP",
        21 => "SIGTTIN",
        22 => "SIGTTOU",
        24 => "SIGXCPU",
        25 => "SIGXFSZ",
        31 => "SIGSYS",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_codes() {
        for (ending, words, code) in [
            (Ending::Code(3), "exited with code 3", 3),
            (Ending::Signal(9), "killed by signal 9 (SIGKILL)", 137),
            (Ending::Signal(40), "killed by signal 40", 168),
            (
                Ending::Code(139),
                "exited with code 139 (a shell's way to say: killed by signal 11, SIGSEGV)",
                139,
            ),
            (Ending::Code(255), "exited with code 255", 255),
        ] {
            assert_eq!(ending.words(), words);
            assert_eq!(ending.shell_code(), code);
        }
        assert!(Ending::Signal(11).meaning().is_some() && Ending::Code(1).meaning().is_none());
    }
}
