//! Why a host could not be reached, or was lost, in words: from what ssh and the host's shell say.

/// What ssh says, and what it means for the user. The first that is found counts.
const KNOWN: [(&str, &str); 10] = [
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its host key is not the known one: the host was set up anew, or another one answers; check, \
     then remove the old key with ssh-keygen -R",
    ),
    (
        "Host key verification failed",
        "its host key is not known here; log in once by hand and check it, or give \
     --launcher_args \"-o StrictHostKeyChecking=accept-new\"",
    ),
    (
        "Permission denied",
        "it does not let us in without a password; put your public key into its ~/.ssh/authorized_keys",
    ),
    ("Could not resolve hostname", "its name is not known; check the hostfile, or name it in ~/.ssh/config"),
    ("Connection refused", "nothing listens at ssh's port; start sshd there, or give --ssh_port"),
    ("Connection timed out", "it does not answer; is it up, and reachable from here?"),
    ("Operation timed out", "it does not answer; is it up, and reachable from here?"),
    ("No route to host", "there is no way to it from here"),
    ("Network is unreachable", "there is no way to it from here"),
    ("not responding", "it stopped answering"),
];

/// One sentence on what ssh says, where it is known what it means.
pub(crate) fn known(said: &str) -> Option<String> {
    KNOWN.iter().find_map(|(sign, meaning)| {
        let line = said.lines().rfind(|line| line.contains(sign))?;
        Some(format!("{meaning} (`{}`)", line.trim()))
    })
}

/// Whether ssh says there that it could not reach a host.
pub(crate) fn is_known(said: &str) -> bool {
    KNOWN.iter().any(|(sign, _)| said.contains(sign))
}

/// One sentence on a connection that has closed.
///
/// - `greeted`: whether the agent had answered before.
/// - `code`: the ssh client's exit code, if it has ended; ssh's own failures are 255, others are those of the host's shell.
/// - `said`: what came on stderr.
/// - `noise`: what came on stdout instead of the agent's greeting.
pub(crate) fn explain(greeted: bool, code: Option<i32>, said: &str, noise: &str) -> String {
    let last = said.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or_default();
    let quoted = |text: &str| if text.is_empty() { String::new() } else { format!(" (`{text}`)") };
    let ended = match code {
        None => "ssh has not ended".to_owned(),
        Some(code @ 129..=159) => format!("ssh was killed by signal {}", code - 128),
        Some(code) => format!("ssh exited with code {code}"),
    };
    match (known(said), code) {
        (Some(sentence), _) => sentence,
        (None, Some(127)) if !greeted => format!(
            "deepspeed is not installed where it is here, and not on its PATH; install it there, or give \
             --venv_script{}",
            quoted(last)
        ),
        (None, Some(126)) if !greeted => format!("its deepspeed cannot be executed{}", quoted(last)),
        (None, _) if greeted => format!("the connection to its agent has closed: {ended}{}", quoted(last)),
        (None, _) => {
            let first = noise.lines().next().unwrap_or_default();
            format!("no agent has answered: {ended}{}", quoted(if last.is_empty() { first } else { last }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ssh_says_is_explained() {
        insta::assert_snapshot!([
            explain(false, Some(255), "Host key verification failed.\r\n", ""),
            explain(false, Some(255), "u@h: Permission denied (publickey).\r\n", ""),
            explain(false, Some(127), "/bin/sh: 1: exec: deepspeed: not found\n", ""),
            explain(false, Some(0), "", "This account is not available.\n"),
            explain(true, Some(255), "Connection to h closed by remote host.\r\n", ""),
            explain(true, Some(137), "", ""),
            explain(true, Some(255), "Timeout, server 10.0.0.3 not responding.\r\n", ""),
            explain(true, None, "", ""),
        ].join("\n"), @r#"
            its host key is not known here; log in once by hand and check it, or give --launcher_args "-o StrictHostKeyChecking=accept-new" (`Host key verification failed.`)
            it does not let us in without a password; put your public key into its ~/.ssh/authorized_keys (`u@h: Permission denied (publickey).`)
            deepspeed is not installed where it is here, and not on its PATH; install it there, or give --venv_script (`/bin/sh: 1: exec: deepspeed: not found`)
            no agent has answered: ssh exited with code 0 (`This account is not available.`)
            the connection to its agent has closed: ssh exited with code 255 (`Connection to h closed by remote host.`)
            the connection to its agent has closed: ssh was killed by signal 9
            it stopped answering (`Timeout, server 10.0.0.3 not responding.`)
            the connection to its agent has closed: ssh has not ended
            "#);
    }
}
