//! The universal format: a folder per parameter, with a file for each kind of state.

use std::fs;

use super::{
    damage::Damage,
    index::{Index, Run},
    optimizer::{Entry, Facts},
    torch::TorchFile,
};
use crate::{CheckpointError, Result, kind};

/// The folder of the parameters.
const ZERO: &str = "zero";
/// Where the rest of the optimizer's state is.
const OPTIMIZER: &str = "zero/optimizer_state.pt";

/// Reads `zero/`, adding its files to `files`, which are numbered from `base_number` on.
///
/// # Errors
/// [`CheckpointError::Damaged`], [`CheckpointError::Io`].
pub(super) fn read_universal(
    index: &mut Index,
    facts: &mut Facts,
    files: &mut Vec<TorchFile>,
    base_number: usize,
    damage: &Damage,
) -> Result<()> {
    for param in 0..index.params.len() {
        let name = index.params[param].name.clone();
        // A name is made of what modules are called, and never leads out of the folder.
        if name.contains('/') || name == ".." || name == "." {
            return Err(damage.of(ZERO, format!("a parameter is called `{name}`")));
        }
        let folder = damage.folder().join(ZERO).join(&name);
        let listed = match fs::read_dir(&folder) {
            Ok(listed) => listed,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(CheckpointError::io("list", &folder)(error)),
        };
        let mut names = Vec::new();
        for entry in listed {
            let entry = entry.map_err(CheckpointError::io("list", &folder))?;
            names.extend(entry.file_name().into_string());
        }
        names.sort();
        for file_name in names {
            let Some(stem) = file_name.strip_suffix(".pt") else { continue };
            let file = TorchFile::open(damage, &format!("{ZERO}/{name}/{file_name}"))?;
            let root = file.root();
            let item = root.some("param").unwrap_or(root);
            if stem == "step" {
                let entry = Entry::scalar("step", item);
                facts.note(&file, &entry, &[&name])?;
                continue;
            }
            // What is written of frozen parameters too is no master.
            if stem == "fp32" && index.params[param].group.is_none() {
                continue;
            }
            let kind = if stem == "fp32" { kind::MASTER } else { stem };
            let tensor =
                item.tensor().ok_or_else(|| file.damaged(format!("it holds {}", item.describe())))?;
            let view = file.view(&tensor)?;
            let run = Run::new(base_number + files.len(), &view, 0..view.numel, 0);
            let run = run.filter(|run| run.len == index.numel(param));
            let Some(run) = run else {
                return Err(file.damaged(format!(
                    "it holds {:?} and parameter `{name}` is {:?}",
                    view.shape, index.params[param].shape
                )));
            };
            if kind != kind::MASTER {
                facts.kinds.insert(kind.to_owned());
            }
            index.add(param, kind, run);
            file.close();
            files.push(file);
        }
    }
    if !damage.folder().join(OPTIMIZER).exists() {
        return Ok(());
    }
    let file = TorchFile::open(damage, OPTIMIZER)?;
    let root = file.root();
    let nested = root.some("optimizer_state_dict");
    facts.note_groups(&file, root.some("param_groups"))?;
    facts.note_scaler(root, None);
    // From stage 3 there is no step per parameter: all have made as many.
    let first = nested.and_then(|nested| nested.get("state")?.at(0)).and_then(|entry| entry.get("step"));
    if let (Some(step), true) = (first, facts.scalars.is_empty()) {
        let trained = index.params.iter().filter(|param| param.group.is_some());
        let names: Vec<&str> = trained.map(|param| param.name.as_str()).collect();
        facts.note(&file, &Entry::scalar("step", step), &names)?;
    }
    Ok(())
}
