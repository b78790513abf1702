//! Names inside a checkpoint directory: tags, and the temporary names derived from them.

use crate::{CheckpointError, Result};

/// Longest tag, bytes: leaves room for the prefix and suffix of temporary names within 255.
const MAX_TAG: usize = 200;

/// The file in the checkpoint directory that names the tag to resume from.
pub(crate) const LATEST: &str = "latest";

/// Checks that `tag` can name a folder directly below the checkpoint directory.
///
/// # Errors
/// [`CheckpointError::Tag`] for an empty or too long tag, path separators, a leading dot (reserved for temporary
/// names), control characters, and `latest`, which is the name of a file.
pub fn validate_tag(tag: &str) -> Result<()> {
    let reason = if tag.is_empty() {
        "it is empty".to_owned()
    } else if tag.len() > MAX_TAG {
        format!("it has {} bytes and may have {MAX_TAG}", tag.len())
    } else if tag.contains(['/', '\\']) {
        "it contains a path separator, and a tag is the name of one folder".to_owned()
    } else if tag.starts_with('.') {
        "it starts with a dot, which is kept for temporary names".to_owned()
    } else if tag == LATEST {
        "that is the name of the file that names the newest checkpoint".to_owned()
    } else if tag.chars().any(char::is_control) {
        "it contains a control character".to_owned()
    } else if tag.trim() != tag {
        "it starts or ends with white space".to_owned()
    } else {
        return Ok(());
    };
    Err(CheckpointError::Tag { tag: tag.to_owned(), reason })
}

/// The folder in which a checkpoint is written before it gets its name.
pub(crate) fn draft_name(tag: &str, nonce: u64) -> String {
    format!(".tmp-{tag}-{nonce:016x}")
}

/// Where a checkpoint that is being replaced waits on file systems that cannot exchange two names.
pub(crate) fn replaced_name(tag: &str, nonce: u64) -> String {
    format!(".old-{tag}-{nonce:016x}")
}

/// Where a checkpoint goes that is being removed.
pub(crate) fn removed_name(tag: &str, nonce: u64) -> String {
    format!(".del-{tag}-{nonce:016x}")
}

/// The tag in a name made by [`draft_name`].
pub(crate) fn tag_of_draft(name: &str) -> Option<&str> {
    tag_of(name, ".tmp-")
}

/// The tag in a name made by [`replaced_name`].
pub(crate) fn tag_of_replaced(name: &str) -> Option<&str> {
    tag_of(name, ".old-")
}

/// The tag in a name made by [`removed_name`].
pub(crate) fn tag_of_removed(name: &str) -> Option<&str> {
    tag_of(name, ".del-")
}

fn tag_of<'a>(name: &'a str, prefix: &str) -> Option<&'a str> {
    let (tag, nonce) = name.strip_prefix(prefix)?.rsplit_once('-')?;
    let hex = nonce.len() == 16 && nonce.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    (hex && validate_tag(tag).is_ok()).then_some(tag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_tags_pass() {
        for tag in ["global_step10", "2.345678", "-1.5e-07", "best model", "pytorch_model", "épreuve"] {
            assert!(validate_tag(tag).is_ok(), "{tag}");
        }
    }

    #[test]
    fn tags_that_leave_the_folder_are_refused() {
        let long = "x".repeat(201);
        for tag in
            ["", ".", "..", "a/b", "/etc", "../x", "a\\b", ".tmp-x", "latest", "a\nb", "a\0b", " a", &long]
        {
            let error = validate_tag(tag).unwrap_err().to_string();
            assert!(error.contains("cannot be a checkpoint tag"), "{error}");
        }
    }

    #[test]
    fn temporary_names_give_the_tag_back() {
        assert_eq!(tag_of_draft(&draft_name("a-b", 255)), Some("a-b"));
        assert_eq!(tag_of_replaced(&replaced_name("2.5", u64::MAX)), Some("2.5"));
        assert_eq!(tag_of_removed(&removed_name("2.5", 0)), Some("2.5"));
        for name in ["a", ".tmp-a", ".tmp-a-12", ".tmp--00000000000000ff", ".old-a-00000000000000ff"] {
            assert_eq!(tag_of_draft(name), None, "{name}");
        }
    }
}
