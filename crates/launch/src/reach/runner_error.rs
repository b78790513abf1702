//! Why pdsh, mpirun or srun could not start an agent on a host, or ended while it ran: in words, from what they say.

use crate::ranks::signals;
use crate::reach::runner::Runner;
use crate::reach::ssh_error;

/// What runners say, and what it means for the user. The first that is found counts.
const KNOWN: [(&str, &str); 8] = [
    (
        "has detected an attempt to run as root",
        "Open MPI refuses to run as root; give --launcher_args --allow-run-as-root if that is what you want",
    ),
    ("Requested node configuration is not available", "Slurm has no such nodes, or not as much on them"),
    ("Invalid node name specified", "Slurm does not know a node of that name"),
    ("Unable to contact slurm controller", "Slurm's controller does not answer"),
    ("Requested nodes are busy", "Slurm has given the nodes to other jobs"),
    ("unrecognized argument", "the mpirun on PATH is that of another MPI"),
    ("unrecognized option", "the program on PATH does not know an option; is it that of another MPI?"),
    ("does not support", "the program on PATH does not support what it was asked for"),
];

/// One sentence on a host whose agent is not there although the runner has ended.
///
/// - `started`: whether the agent has been heard of.
/// - `code`: the runner's exit code, or 128 and its signal.
/// - `said`: what the runner has said.
pub(crate) fn explain(runner: Runner, started: bool, code: i32, said: &str, host: &str) -> String {
    if let Some(line) = said.lines().rfind(|line| line.contains("cannot reach the launcher") && started) {
        return agents_words(line);
    }
    if let Some(why) = known(said) {
        return why;
    }
    let relevant = relevant(said, host);
    // 127 is that of the host's shell, which pdsh passes on.
    let by_ssh = ssh_error::explain(false, Some(code), &relevant, "");
    if by_ssh.starts_with("no agent has answered")
        || code > 128 && runner != Runner::Pdsh && !ssh_error::is_known(&relevant)
    {
        return format!("no agent has answered: {}{}", ended(runner, code), quoted(last(&relevant)));
    }
    by_ssh
}

/// One sentence on a host that cannot be reached while the runner goes on.
pub(crate) fn unreachable(said: &str, host: &str) -> String {
    let relevant = relevant(said, host);
    // pdsh names the exit code of each ssh.
    let code = relevant.lines().rev().find_map(|line| line.split_once(SSH_EXITED)?.1.trim().parse().ok());
    let by_ssh = ssh_error::explain(false, code, &relevant, "");
    if by_ssh.starts_with("no agent has answered") {
        return format!("no agent has answered{}", quoted(last(&relevant)));
    }
    by_ssh
}

/// How pdsh says that it has lost a host.
const SSH_EXITED: &str = "ssh exited with exit code";

/// Whether a runner says there that it could not reach a host.
pub(crate) fn is_alarming(said: &str) -> bool {
    ssh_error::is_known(said) || said.contains(SSH_EXITED)
}

/// Whether the words name the host.
pub(crate) fn names(said: &str, host: &str) -> bool {
    !of_host(said, host).is_empty()
}

/// The lines that tell of the host: those that name it, unless only the others hold words that ssh is known for. Without ornaments.
fn relevant(said: &str, host: &str) -> String {
    let of_host = of_host(said, host);
    let whole = of_host.is_empty() || !is_alarming(&of_host) && is_alarming(said);
    let telling = |line: &&str| line.chars().any(char::is_alphanumeric);
    let text = if whole { said } else { &of_host };
    text.lines().filter(telling).map(|line| format!("{line}\n")).collect()
}

/// One sentence on the end of a runner whose agents were at work.
pub(crate) fn lost(runner: Runner, code: i32, said: &str) -> String {
    format!("{}, through which every host is reached{}", ended(runner, code), quoted(last(said)))
}

/// What may have kept an agent from answering, where there is a sign of it.
pub(crate) fn late(started: bool, said: &str, host: &str) -> Option<String> {
    if started {
        let line = said.lines().rfind(|line| line.contains("cannot reach the launcher"));
        return Some(line.map_or_else(
            || "its agent runs but has not called back; give this machine's address as the host sees it with --launcher_addr".to_owned(),
            agents_words,
        ));
    }
    let of_host = of_host(said, host);
    let words = last(if of_host.is_empty() { said } else { &of_host });
    (!words.is_empty()).then(|| format!("no agent has answered{}", quoted(words)))
}

fn known(said: &str) -> Option<String> {
    KNOWN.iter().find_map(|(sign, meaning)| {
        said.lines().rfind(|line| line.contains(sign)).map(|line| format!("{meaning}{}", quoted(line.trim())))
    })
}

/// The agent's own sentence, without the labels before it.
fn agents_words(line: &str) -> String {
    line.split_once("the agent: ").map_or(line, |(_, words)| words).trim().to_owned()
}

/// The lines that name the host.
fn of_host(said: &str, host: &str) -> String {
    let name = host.rsplit_once('@').map_or(host, |(_, name)| name);
    let names = |line: &&str| {
        line.split(|c: char| !(c.is_alphanumeric() || ".-_".contains(c)))
            .any(|word| word.trim_end_matches('.') == name)
    };
    said.lines().filter(names).map(|line| format!("{line}\n")).collect()
}

fn last(said: &str) -> &str {
    let is_telling = |line: &&str| line.chars().any(char::is_alphanumeric);
    said.lines().map(str::trim).rfind(is_telling).unwrap_or_default()
}

fn quoted(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(" (`{text}`)") }
}

fn ended(runner: Runner, code: i32) -> String {
    let tool = match runner {
        Runner::Ssh => "ssh",
        Runner::Pdsh => "pdsh",
        Runner::Slurm => "srun",
        Runner::OpenMpi | Runner::Mpich | Runner::Impi | Runner::Mvapich => "mpirun",
    };
    match (code, signals::name(code - 128)) {
        (129..=159, Some(name)) => format!("{tool} was killed by signal {} ({name})", code - 128),
        _ => format!("{tool} exited with code {code}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runners_say_is_explained() {
        let root = "-----\nmpirun.openmpi has detected an attempt to run as root.\n\nRunning as root is *strongly* discouraged\n-----\n";
        let pdsh = "worker-1: ssh: Could not resolve hostname worker-1: Name or service not known\n\
                    pdsh@login: worker-1: ssh exited with exit code 255\n\
                    worker-10: Permission denied (publickey).\n";
        let away = "worker-2: deepspeed: error: the agent: n2 cannot reach the launcher (10.0.0.1:5: Connection refused); \
                    give its address as this host sees it with --launcher_addr\n";
        let shell = "worker-1: deepspeed: 1: exec: deepspeed: not found\npdsh@l: worker-1: ssh exited with exit code 127\n";
        let open_mpi = "root@10.0.0.3: Permission denied (publickey).\n-----\nORTE was unable to launch.\n  target node:  worker-1\n-----\n";
        insta::assert_snapshot!([
            explain(Runner::OpenMpi, false, 1, root, "worker-1"),
            explain(Runner::Pdsh, false, 0, pdsh, "worker-1"),
            explain(Runner::Pdsh, false, 0, pdsh, "root@worker-10"),
            explain(Runner::Pdsh, false, 127, shell, "worker-1"),
            explain(Runner::Slurm, true, 1, away, "worker-2"),
            explain(Runner::Slurm, false, 1, "srun: error: Unable to allocate resources: Requested node configuration is not available\n", "n1"),
            explain(Runner::Mpich, false, 255, "[mpiexec@vm] match_arg: unrecognized argument bind-to\n", "n1"),
            explain(Runner::Mpich, false, 137, "", "n1"),
            explain(Runner::Slurm, false, 0, "", "n1"),
            explain(Runner::OpenMpi, false, 255, open_mpi, "worker-1"),
            unreachable("ssh: connect to host 10.0.0.3 port 22: Connection refused\n", "worker-2"),
            unreachable(pdsh, "worker-1"),
            unreachable(shell, "worker-1"),
            unreachable("pdsh@l: worker-1: ssh exited with exit code 3\n", "worker-1"),
            lost(Runner::OpenMpi, 137, ""),
            lost(Runner::Pdsh, 255, "pdsh@login: worker-1: ssh exited with exit code 255\n"),
            late(true, "", "worker-2").unwrap(),
            late(true, away, "worker-2").unwrap(),
            late(false, "srun: job 7 queued and waiting for resources\n", "n1").unwrap(),
        ].join("\n"), @r#"
        Open MPI refuses to run as root; give --launcher_args --allow-run-as-root if that is what you want (`mpirun.openmpi has detected an attempt to run as root.`)
        its name is not known; check the hostfile, or name it in ~/.ssh/config (`worker-1: ssh: Could not resolve hostname worker-1: Name or service not known`)
        it does not let us in without a password; put your public key into its ~/.ssh/authorized_keys (`worker-10: Permission denied (publickey).`)
        deepspeed is not installed where it is here, and not on its PATH; install it there, or give --venv_script (`pdsh@l: worker-1: ssh exited with exit code 127`)
        n2 cannot reach the launcher (10.0.0.1:5: Connection refused); give its address as this host sees it with --launcher_addr
        Slurm has no such nodes, or not as much on them (`srun: error: Unable to allocate resources: Requested node configuration is not available`)
        the mpirun on PATH is that of another MPI (`[mpiexec@vm] match_arg: unrecognized argument bind-to`)
        no agent has answered: mpirun was killed by signal 9 (SIGKILL)
        no agent has answered: srun exited with code 0
        it does not let us in without a password; put your public key into its ~/.ssh/authorized_keys (`root@10.0.0.3: Permission denied (publickey).`)
        nothing listens at ssh's port; start sshd there, or give --ssh_port (`ssh: connect to host 10.0.0.3 port 22: Connection refused`)
        its name is not known; check the hostfile, or name it in ~/.ssh/config (`worker-1: ssh: Could not resolve hostname worker-1: Name or service not known`)
        deepspeed is not installed where it is here, and not on its PATH; install it there, or give --venv_script (`pdsh@l: worker-1: ssh exited with exit code 127`)
        no agent has answered (`pdsh@l: worker-1: ssh exited with exit code 3`)
        mpirun was killed by signal 9 (SIGKILL), through which every host is reached
        pdsh exited with code 255, through which every host is reached (`pdsh@login: worker-1: ssh exited with exit code 255`)
        its agent runs but has not called back; give this machine's address as the host sees it with --launcher_addr
        n2 cannot reach the launcher (10.0.0.1:5: Connection refused); give its address as this host sees it with --launcher_addr
        no agent has answered (`srun: job 7 queued and waiting for resources`)
        "#);
        assert_eq!(late(false, "", "n1"), None);
    }
}
