//! The end of the ranks' children when the launcher itself is killed by SIGKILL.
//!
//! The kernel ends the ranks then (the parent-death signal), but not what they have started. A small shell waits at the end of a pipe that
//! only the launcher holds, knows the process groups of the living ranks, and kills them when the pipe closes.

use rustix::process::Pid;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{ChildStdin, Command, Stdio};

/// Reads `start GROUP` and `end GROUP` until the launcher is gone.
const SCRIPT: &str = r#"
living=
while read -r word group; do
    case $word in
    start) living="$living -$group" ;;
    end)
        rest=
        for one in $living; do [ "$one" = "-$group" ] || rest="$rest $one"; done
        living=$rest
        ;;
    esac
done
[ -z "$living" ] || kill -s KILL -- $living
"#;

/// The line to the guard; the guard ends when this value does.
#[derive(Debug)]
pub(crate) struct Guard {
    line: Option<ChildStdin>,
}

impl Guard {
    /// Starts the guard. Without a shell there is none, and the ranks themselves still die with the launcher.
    pub(crate) fn start() -> Self {
        let started = Command::new("/bin/sh")
            .args(["-c", SCRIPT, "deepspeed-guard"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn();
        Self { line: started.ok().and_then(|mut child| child.stdin.take()) }
    }

    /// A rank's group lives.
    pub(crate) fn started(&mut self, group: Pid) {
        self.tell("start", group);
    }

    /// A rank is over; its number may be used for another group from now on.
    pub(crate) fn ended(&mut self, group: Pid) {
        self.tell("end", group);
    }

    fn tell(&mut self, word: &str, group: Pid) {
        if let Some(line) = &mut self.line
            && writeln!(line, "{word} {group}").is_err()
        {
            self.line = None;
        }
    }
}
