//! Words for a shell, and words out of a text that a shell would split.

use crate::error::LaunchError;
use std::ffi::OsStr;

/// A word as a POSIX shell needs it: plain words as they are, others in single quotes.
pub(crate) fn quote(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let is_plain = |c: char| c.is_alphanumeric() || "_@%+=:,./-".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.into_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// A command line as a shell would need it.
pub(crate) fn join<T: AsRef<OsStr>>(words: &[T]) -> String {
    words.iter().map(|word| quote(word.as_ref())).collect::<Vec<_>>().join(" ")
}

/// The words of `--launcher_args`: split at blanks; quotes and backslashes as in a shell, nothing else has a meaning.
///
/// # Errors
/// A quote that does not end.
pub(crate) fn split(text: &str) -> Result<Vec<String>, LaunchError> {
    let mut words: Vec<String> = Vec::new();
    let mut word: Option<String> = None;
    let mut quoted: Option<(char, usize)> = None;
    let mut letters = text.chars().enumerate();
    while let Some((at, c)) = letters.next() {
        match (quoted, c) {
            (Some((quote, _)), c) if c == quote => quoted = None,
            (Some(('"', _)) | None, '\\') => match letters.next() {
                Some((_, next)) => word.get_or_insert_default().push(next),
                None => word.get_or_insert_default().push('\\'),
            },
            (Some(_), c) => word.get_or_insert_default().push(c),
            (None, '\'' | '"') => {
                quoted = Some((c, at + 1));
                word.get_or_insert_default();
            }
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            (None, c) => word.get_or_insert_default().push(c),
        }
    }
    if let Some((_, column)) = quoted {
        return Err(LaunchError::LauncherArgs { text: text.to_owned(), column });
    }
    words.extend(word);
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn words_are_split_as_a_shell_does() {
        assert_eq!(
            split(r#" -F  'a b' -o "x=\"y\"" '' c\ d"#).unwrap(),
            ["-F", "a b", "-o", "x=\"y\"", "", "c d"]
        );
        assert!(split("").unwrap().is_empty());
        assert!(matches!(split("a 'b"), Err(LaunchError::LauncherArgs { column: 3, .. })));
    }

    proptest! {
        /// What is quoted and joined comes apart again as it was.
        #[test]
        fn quoting_is_undone_by_splitting(words in prop::collection::vec(any::<String>(), 0..5)) {
            prop_assert_eq!(split(&join(&words)).unwrap(), words);
        }

        /// And a real shell agrees.
        #[test]
        fn a_shell_sees_the_same_word(word in "[ -~\n]{0,20}") {
            let output = std::process::Command::new("/bin/sh")
                .args(["-c", &format!("printf %s {}", quote(OsStr::new(&word)))])
                .output()
                .unwrap();
            prop_assert_eq!(String::from_utf8(output.stdout).unwrap(), word);
        }
    }
}
