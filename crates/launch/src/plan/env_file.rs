//! `.deepspeed_env`: lines of `NAME=VALUE` that are set for every rank.
//!
//! The original reads it only when it launches on several hosts and fails on a blank line. Here it holds on one host too,
//! blank lines, comments and a leading `export` are fine, and a line that cannot be read is reported and left out.

/// What one file says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct EnvFile {
    /// Names and values in order; a later line for the same name wins.
    pub(crate) variables: Vec<(String, String)>,
    /// Lines (from 1) that could not be read, and why.
    pub(crate) problems: Vec<(usize, String)>,
}

/// Parses the text of an environment file. Never fails: what cannot be read is a problem of its line.
pub(crate) fn parse(text: &str) -> EnvFile {
    let mut file = EnvFile::default();
    for (index, raw) in text.lines().enumerate() {
        let line = raw.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let line = line.strip_prefix("export ").map_or(line, str::trim_start);
        match line.split_once('=') {
            None => file.problems.push((index + 1, format!("`{line}` has no `=`"))),
            Some((name, _)) if name.trim().is_empty() || name.trim().contains(char::is_whitespace) => {
                file.problems.push((index + 1, format!("`{name}` is not a variable's name")));
            }
            Some((_, value)) if value.contains('\0') => {
                file.problems.push((index + 1, "the value holds a zero byte".to_owned()));
            }
            Some((name, _)) if name.contains('\0') => {
                file.problems.push((index + 1, "the name holds a zero byte".to_owned()));
            }
            Some((name, value)) => file.variables.push((name.trim().to_owned(), value.to_owned())),
        }
    }
    file
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lenient() {
        let file = parse("NCCL_IB_DISABLE=1\n\n# eth\nexport A=b=c d\nwhat\n=x\nTWO WORDS=1\r\n");
        assert_eq!(
            file.variables,
            [("NCCL_IB_DISABLE".to_owned(), "1".to_owned()), ("A".to_owned(), "b=c d".to_owned())]
        );
        assert_eq!(file.problems.iter().map(|(line, _)| *line).collect::<Vec<_>>(), [5, 6, 7]);
    }

    proptest! {
        #[test]
        fn names_and_values_can_be_set(text in "(?s).{0,80}") {
            for (name, value) in parse(&text).variables {
                prop_assert!(!name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0'));
            }
        }
    }
}
