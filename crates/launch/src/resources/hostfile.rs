//! The hostfile: one line `<host> slots=<number>` for each host.
//!
//! Blank lines and lines that begin with `#` are skipped, and whatever follows the number after a space is ignored (Open MPI
//! writes `max_slots=...` there).

use crate::error::LaunchError;
use std::path::Path;

/// A host may have at most this many slots; more is taken for a slip of the finger.
pub(crate) const MAX_SLOTS: u32 = 4096;

/// One line of a hostfile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostEntry {
    /// The host's name or address.
    pub(crate) host: String,
    /// How many ranks it can run.
    pub(crate) slots: u32,
    /// The line it stands on, from 1.
    pub(crate) line: usize,
}

/// Parses the text of a hostfile; `path` is used in messages only.
///
/// # Errors
/// The first bad line, with line and column; a host listed twice; a file without entries.
pub(crate) fn parse(text: &str, path: &Path) -> Result<Vec<HostEntry>, LaunchError> {
    let mut entries: Vec<HostEntry> = Vec::new();
    for (index, raw) in text.lines().enumerate() {
        let line = raw.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let number = index + 1;
        let (host, slots) = parse_line(raw).map_err(|(byte, what)| LaunchError::HostfileBadEntry {
            path: path.to_path_buf(),
            line: number,
            column: raw[..byte].chars().count() + 1,
            text: line.to_owned(),
            what,
        })?;
        if let Some(first) = entries.iter().find(|entry| entry.host == host) {
            return Err(LaunchError::HostfileDuplicate {
                path: path.to_path_buf(),
                line: number,
                first_line: first.line,
                host: host.to_owned(),
            });
        }
        entries.push(HostEntry { host: host.to_owned(), slots, line: number });
    }
    if entries.is_empty() {
        return Err(LaunchError::HostfileEmpty { path: path.to_path_buf() });
    }
    Ok(entries)
}

/// Host and slots of one line that is not blank, or the byte at which it goes wrong and why.
fn parse_line(raw: &str) -> Result<(&str, u32), (usize, String)> {
    let start = raw.len() - raw.trim_start().len();
    let line = raw.trim_end();
    let host_end = line[start..].find(char::is_whitespace).map_or(line.len(), |at| start + at);
    let host = &line[start..host_end];
    if host.starts_with("slots=") {
        return Err((start, "the host's name is missing before `slots=`".to_owned()));
    }
    let rest = line[host_end..].trim_start();
    let rest_start = line.len() - rest.len();
    if rest.is_empty() {
        return Err((line.len(), format!("`slots=<number>` is missing after the host `{host}`")));
    }
    let Some(value) = rest.strip_prefix("slots=") else {
        let word = rest.split_whitespace().next().unwrap_or(rest);
        return Err((rest_start, format!("expected `slots=<number>`, found `{word}`")));
    };
    let value_start = line.len() - value.len();
    let word = value.split(|c: char| c.is_whitespace() || c == '#').next().unwrap_or(value);
    if word.is_empty() {
        return Err((value_start, "the number after `slots=` is missing".to_owned()));
    }
    if let Some(at) = word.find(|c: char| !c.is_ascii_digit()) {
        return Err((value_start + at, format!("`slots={word}` is not a whole number")));
    }
    match word.parse::<u32>() {
        Ok(slots) if slots <= MAX_SLOTS => Ok((host, slots)),
        _ => Err((value_start, format!("{word} slots are more than the {MAX_SLOTS} that a host may have"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parsed(text: &str) -> Result<Vec<(String, u32)>, String> {
        parse(text, Path::new("hosts"))
            .map(|entries| entries.into_iter().map(|e| (e.host, e.slots)).collect())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn lines_comments_and_trailing_words() {
        let text =
            "# a cluster\n\nworker-1 slots=4\n  worker-2\t slots=2 max_slots=8\n10.0.0.3 slots=1# spare\r\n";
        assert_eq!(
            parsed(text).unwrap(),
            [("worker-1".to_owned(), 4), ("worker-2".to_owned(), 2), ("10.0.0.3".to_owned(), 1)]
        );
    }

    #[test]
    fn bad_lines_say_where_and_what() {
        for (text, place, what) in [
            ("worker-1", "hosts:1:9:", "`slots=<number>` is missing"),
            ("a slots=1\nb slot=4", "hosts:2:3:", "expected `slots=<number>`, found `slot=4`"),
            ("a slots=", "hosts:1:9:", "the number after `slots=` is missing"),
            ("a slots=4x", "hosts:1:10:", "`slots=4x` is not a whole number"),
            ("a slots=-1", "hosts:1:9:", "`slots=-1` is not a whole number"),
            ("a slots=99999999999", "hosts:1:9:", "more than the 4096"),
            ("slots=4", "hosts:1:1:", "the host's name is missing"),
            ("  ü slot", "hosts:1:5:", "found `slot`"),
        ] {
            let error = parsed(text).unwrap_err();
            assert!(error.starts_with(place) && error.contains(what), "{text:?} gave {error}");
            assert!(error.contains("hostfile contains a bad entry"), "{error}");
        }
    }

    #[test]
    fn duplicates_and_empty_files() {
        let error = parsed("a slots=1\nb slots=1\na slots=2").unwrap_err();
        assert!(
            error.contains("hosts:3") && error.contains("multiple entries for a") && error.contains("line 1")
        );
        assert!(
            parsed("# nothing\n\n").unwrap_err().contains("hostfile is empty or not formatted correctly")
        );
    }

    proptest! {
        #[test]
        fn never_panics(text in "(?s).{0,200}") {
            let _ = parse(&text, Path::new("h"));
        }

        #[test]
        fn never_panics_near_the_grammar(text in "([ \t]*(a|b|#|é)?[ \t]*(slots=?)?[0-9x]{0,12}[ \r\n]){0,8}") {
            let _ = parse(&text, Path::new("h"));
        }

        #[test]
        fn what_is_written_is_read(hosts in prop::collection::btree_map("[a-z][a-z0-9.-]{0,12}", 0u32..64, 1..8)) {
            let text: String = hosts.iter().map(|(host, slots)| format!("{host} slots={slots}\n")).collect();
            let read = parsed(&text).unwrap();
            prop_assert_eq!(read, hosts.into_iter().collect::<Vec<_>>());
        }
    }
}
