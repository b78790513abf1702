//! A command on every host of a hostfile: `deepspeed ssh`. Needs nothing on the hosts but sshd and a POSIX shell.

use crate::arguments::host_args::HostArgs;
use crate::error::LaunchError;
use crate::plan::surroundings::Surroundings;
use crate::plan::{self, Plan};
use crate::ranks::spawn;
use crate::reach::ssh_error;
use crate::reach::words;
use std::ffi::{OsStr, OsString};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::thread;

/// Runs the command in a group of its own, and ends that group when the connection closes: a command that is waited for no more would
/// otherwise stay. `$0` is the command line. One line, for login shells that take no line's end in quotes.
const TIED: &str = concat!(
    "exec 3<&0 </dev/null; tool=; command -v setsid >/dev/null 2>&1 && tool=setsid; ",
    "$tool /bin/sh -c \"$0\" 3<&- & command=$!; ",
    "( while read -r line; do :; done; ",
    "if [ -n \"$tool\" ]; then kill -s TERM -- -$command; else kill -s TERM $command; fi ",
    ") <&3 >/dev/null 2>&1 & watch=$!; ",
    "exec 3<&-; wait $command; code=$?; kill $watch 2>/dev/null; exit $code",
);

/// So much of what a host says is kept for an explanation.
const KEPT: usize = 4096;

/// The exit code where a host cannot be reached, as ssh has it.
const UNREACHABLE: u8 = 255;

/// Runs a command on every host at once. What it prints comes line by line, behind the host's name.
///
/// One word is a command line for each host's shell; several words are a command and its arguments, and reach it as they are.
/// Returns the greatest exit code of all hosts; 255 where one cannot be reached.
///
/// # Errors
/// Arguments that do not name hosts, no ssh, no threads.
pub fn on_every_host(args: &HostArgs, command: &[OsString]) -> Result<u8, LaunchError> {
    let line = match command {
        [line] => line.to_string_lossy().into_owned(),
        words => words::join(words),
    };
    let script =
        format!("exec /bin/sh -c {} {}", words::quote(OsStr::new(TIED)), words::quote(OsStr::new(&line)));
    let args = args.as_launch(&[])?;
    let plan = plan::resolve(&args, &Surroundings::read(&args)?)?;
    let lines: Vec<(String, Vec<OsString>)> = match plan {
        // A single host that is this machine.
        Plan::Here(plan) => vec![(plan.host, vec!["/bin/sh".into(), "-c".into(), script.into()])],
        Plan::Hosts(plan) => {
            plan.parts.iter().map(|part| (part.host.clone(), plan.reach.ssh(&part.host, &script))).collect()
        }
    };
    let error = |source: io::Error| LaunchError::System { what: "starting ssh", source };
    let started =
        lines.iter().map(|(_, line)| start(line)).collect::<io::Result<Vec<Child>>>().map_err(error)?;
    let codes: Vec<u8> = thread::scope(|scope| {
        let running: Vec<_> = lines
            .iter()
            .zip(started)
            .map(|((host, line), child)| scope.spawn(move || attend(host, line[0] == "ssh", child)))
            .collect();
        running.into_iter().map(|thread| thread.join().unwrap_or(UNREACHABLE)).collect()
    });
    Ok(codes.into_iter().max().unwrap_or(0))
}

fn start(line: &[OsString]) -> io::Result<Child> {
    let mut command = Command::new(&line[0]);
    command.args(&line[1..]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    spawn::tie_to_launcher(&mut command, rustix::process::getpid(), None);
    command.spawn()
}

/// Passes on what a host's command prints until it has ended; its exit code.
fn attend(host: &str, by_ssh: bool, mut child: Child) -> u8 {
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    // Its input stays open for as long as we are there: when it closes, the host ends the command.
    let stdin = child.stdin.take();
    let said = thread::scope(|scope| {
        let errors = scope.spawn(move || pass_on(host, stderr, &mut io::stderr()));
        pass_on(host, stdout, &mut io::stdout());
        errors.join().unwrap_or_default()
    });
    let status = child.wait();
    drop(stdin);
    let code = match status {
        Ok(status) => status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
        Err(_) => i32::from(UNREACHABLE),
    };
    let mut stderr = io::stderr().lock();
    // Nobody can be told that stderr is gone.
    let _ = match ssh_error::known(&said).filter(|_| by_ssh && code == i32::from(UNREACHABLE)) {
        Some(why) => writeln!(stderr, "{host}: not reached: {why}"),
        None if code != 0 => writeln!(stderr, "{host}: exited with code {code}"),
        None => Ok(()),
    };
    u8::try_from(code).unwrap_or(UNREACHABLE)
}

/// Copies lines behind the host's name; returns the last lines.
fn pass_on(host: &str, source: Option<impl Read>, target: &mut impl Write) -> String {
    let Some(source) = source else { return String::new() };
    let mut reader = BufReader::new(source);
    let (mut line, mut last) = (Vec::new(), String::new());
    let mut is_open = true;
    while reader.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
        if line.last() != Some(&b'\n') {
            line.push(b'\n');
        }
        last += &String::from_utf8_lossy(&line);
        if last.len() > 2 * KEPT {
            last = String::from_utf8_lossy(&last.as_bytes()[last.len() - KEPT..]).into_owned();
        }
        // One write for each line, so that the lines of hosts do not mix. Where the reader has gone (`| head`), the rest is read and
        // dropped, so that the command can end.
        let text = [format!("{host}: ").as_bytes(), &line].concat();
        is_open = is_open && target.write_all(&text).and_then(|()| target.flush()).is_ok();
        line.clear();
    }
    last
}
