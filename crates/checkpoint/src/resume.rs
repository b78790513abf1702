//! Which checkpoint a run goes on from when it asks for none by name.

use std::{
    fs,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use crate::{
    CheckpointError, CompleteTag, Result, complete_tags,
    latest::{self, read_latest},
    manifest::{MANIFEST, is_file_name},
    tag::LATEST,
    validate_tag,
};

/// A checkpoint to go on from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// Its tag.
    pub tag: String,
    /// Why it and no other, as the end of a sentence that begins with its name.
    pub why: String,
    /// Whether it is not what one would expect: reason for a warning.
    pub unexpected: bool,
}

/// Chooses the checkpoint of `dir` to go on from: the one that `latest` names, unless that cannot be used or a newer one
/// was completed by a save that died before it could write its name there; then the newest complete one. `except` are
/// tags that were chosen before and turned out to be damaged, with what is wrong with them.
///
/// A user who writes an older tag into `latest` gets that one: the file is then younger than the newer checkpoint.
///
/// `None` if there is no checkpoint and no trace of one.
///
/// # Errors
/// What is wrong with the one that `latest` names, or with `latest`, if there is no complete one to take instead;
/// [`CheckpointError::NoneComplete`] if there are checkpoints and none of them is complete; [`CheckpointError::Io`].
pub fn choose(dir: &Path, except: &[(String, String)]) -> Result<Option<Chosen>> {
    let complete: Vec<CompleteTag> =
        complete_tags(dir)?.into_iter().filter(|it| except.iter().all(|(tag, _)| *tag != it.tag)).collect();
    // Those that were saved to be gone on from come first.
    let newest = || complete.iter().find(|it| it.save_latest).or(complete.first());
    let instead = |problem: String| {
        newest().map(|it| {
            let why = format!("the newest complete checkpoint there ({problem})");
            Chosen { tag: it.tag.clone(), why, unexpected: true }
        })
    };
    if let Some((tag, problem)) = except.last() {
        let chosen = instead(format!("`{tag}` cannot be used: {problem}"));
        return chosen.map(Some).ok_or_else(|| CheckpointError::NoneComplete {
            dir: dir.to_owned(),
            problem: format!("`{tag}`: {problem}"),
        });
    }
    let named = match read_latest(dir) {
        Ok(Some(tag)) => tag,
        Ok(None) => {
            let chosen = instead("there is no file `latest`".to_owned());
            return match (chosen, traces(dir)) {
                (None, Some(folder)) => Err(CheckpointError::NoneComplete {
                    dir: dir.to_owned(),
                    problem: match latest::find(dir, &folder) {
                        Err(error) => error.to_string(),
                        Ok(_) => format!("`{folder}` was not complete a moment ago"),
                    },
                }),
                (chosen, _) => Ok(chosen),
            };
        }
        Err(error) => return instead(error.to_string()).map(Some).ok_or(error),
    };
    let Some(facts) = complete.iter().find(|it| it.tag == named) else {
        return match latest::find(dir, &named) {
            Err(error @ (CheckpointError::NotFound { .. } | CheckpointError::Damaged { .. })) => {
                instead(error.to_string()).map(Some).ok_or(error)
            }
            // One of another format or of a later version, or a disk that fails: whoever opens it says so.
            _ => Ok(Some(Chosen { tag: named, why: "`latest` names it".to_owned(), unexpected: false })),
        };
    };
    let newer = complete.iter().find(|it| it.save_latest && it.saved_at_ms > facts.saved_at_ms);
    Ok(Some(match newer {
        Some(newer) if written_at_ms(dir) < Some(newer.saved_at_ms) => Chosen {
            tag: newer.tag.clone(),
            why: format!(
                "the newest complete checkpoint there; `latest` still names `{named}`: the job that saved this one died \
                 before it could change that"
            ),
            unexpected: true,
        },
        Some(newer) => Chosen {
            why: format!(
                "`latest` names it; `{}` is newer and complete, and `latest` was written after it was saved",
                newer.tag
            ),
            tag: named,
            unexpected: true,
        },
        None => Chosen { tag: named, why: "`latest` names it".to_owned(), unexpected: false },
    }))
}

/// When `latest` was written, milliseconds since 1970 UTC.
fn written_at_ms(dir: &Path) -> Option<u64> {
    let modified: SystemTime = fs::metadata(dir.join(LATEST)).ok()?.modified().ok()?;
    u64::try_from(modified.duration_since(UNIX_EPOCH).ok()?.as_millis()).ok()
}

/// A folder that was a checkpoint of this format, or was to become one.
fn traces(dir: &Path) -> Option<String> {
    let names = fs::read_dir(dir).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let is_trace = |name: &String| {
        let files = fs::read_dir(dir.join(name)).into_iter().flatten();
        let mut files = files.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        validate_tag(name).is_ok() && files.any(|file| file == MANIFEST || is_file_name(&file))
    };
    names.filter(is_trace).min()
}
