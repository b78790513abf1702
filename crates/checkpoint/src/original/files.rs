//! The names of the files in a checkpoint of the original, and what they tell.

use std::{fs, io, path::Path};

use crate::{CheckpointError, Result};

/// What lies in a folder.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Listing {
    /// `mp_rank_00_model_states.pt`: stages 0 to 2.
    pub(super) model: Option<String>,
    /// `zero_pp_rank_R_mp_rank_00_model_states.pt`: stage 3. By rank.
    pub(super) sharded_models: Vec<(usize, String)>,
    /// `[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt`, by rank.
    pub(super) optimizers: Vec<(usize, String)>,
    /// Whether there is a folder `zero`: the universal format.
    pub(super) universal: bool,
    /// A file of a parallelism that is not read, and its name in words.
    pub(super) other: Option<(String, &'static str)>,
}

/// Whether `folder` holds a checkpoint of the original, by its names. A folder that cannot be listed does not.
pub(crate) fn is_original(folder: &Path) -> bool {
    list(folder).is_ok_and(|listing| {
        listing.model.is_some()
            || !listing.sharded_models.is_empty()
            || !listing.optimizers.is_empty()
            || listing.other.is_some()
            || listing.universal
    })
}

/// Lists `folder`.
///
/// # Errors
/// [`CheckpointError::Io`].
pub(super) fn list(folder: &Path) -> Result<Listing> {
    let names = fs::read_dir(folder).and_then(|entries| {
        let name = |entry: io::Result<fs::DirEntry>| Ok(entry?.file_name().into_string());
        entries.map(name).collect::<io::Result<Vec<_>>>()
    });
    let names = names.map_err(CheckpointError::io("list", folder))?;
    let mut names: Vec<String> = names.into_iter().flatten().collect();
    names.sort();
    let mut listing = Listing::default();
    for name in names {
        if name == "zero" && folder.join(&name).is_dir() {
            listing.universal = true;
        } else if name == "offloaded_tensors" {
            listing.other = Some((name, "optimizer state on NVMe"));
        } else {
            sort(&mut listing, name);
        }
    }
    listing.sharded_models.sort();
    listing.optimizers.sort();
    Ok(listing)
}

fn sort(listing: &mut Listing, name: String) {
    let Some(stem) = name.strip_suffix(".pt") else { return };
    let (stem, optimizer) = match (stem.strip_suffix("_model_states"), stem.strip_suffix("_optim_states")) {
        (Some(stem), _) => (stem, false),
        (_, Some(stem)) => (stem, true),
        _ => {
            if stem.starts_with("layer_") {
                listing.other = Some((name, "pipeline parallelism"));
            }
            return;
        }
    };
    if stem.starts_with("layer_") {
        let what = if stem.contains("_expert_") { "mixture of experts" } else { "pipeline parallelism" };
        listing.other = Some((name, what));
        return;
    }
    if stem.starts_with("expp_rank_") {
        listing.other = Some((name, "mixture of experts"));
        return;
    }
    let stem = stem.strip_prefix("bf16_").unwrap_or(stem);
    let (rank, model_rank) =
        match stem.strip_prefix("zero_pp_rank_").and_then(|rest| rest.split_once("_mp_rank_")) {
            Some((rank, model_rank)) => (rank.parse().ok(), model_rank),
            None => match stem.strip_prefix("mp_rank_") {
                Some(model_rank) => (None, model_rank),
                None => return,
            },
        };
    match (model_rank.parse::<usize>(), rank) {
        (Ok(0), Some(rank)) if optimizer => listing.optimizers.push((rank, name)),
        (Ok(0), Some(rank)) => listing.sharded_models.push((rank, name)),
        (Ok(0), None) if !optimizer => listing.model = Some(name),
        (Ok(1..), _) => listing.other = Some((name, "tensor parallelism")),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_sorted_by_what_they_hold() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "zero_pp_rank_10_mp_rank_00_model_states.pt",
            "zero_pp_rank_2_mp_rank_00_model_states.pt",
            "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
            "notes.txt",
            "zero_to_fp32.py",
        ] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let listing = list(dir.path()).unwrap();
        let ranks: Vec<usize> = listing.sharded_models.iter().map(|(rank, _)| *rank).collect();
        assert_eq!(ranks, [2, 10]);
        assert_eq!(listing.optimizers.len(), 1);
        assert!(listing.model.is_none() && listing.other.is_none() && !listing.universal);
        assert!(is_original(dir.path()));
        fs::create_dir(dir.path().join("offloaded_tensors")).unwrap();
        assert_eq!(list(dir.path()).unwrap().other.unwrap().1, "optimizer state on NVMe");
    }

    #[test]
    fn other_parallelisms_are_recognised() {
        for (name, what) in [
            ("mp_rank_01_model_states.pt", "tensor parallelism"),
            ("layer_01-model_00-model_states.pt", "pipeline parallelism"),
            ("layer_0_expert_3_mp_rank_00_model_states.pt", "mixture of experts"),
        ] {
            let mut listing = Listing::default();
            sort(&mut listing, name.to_owned());
            assert_eq!(listing.other, Some((name.to_owned(), what)));
        }
    }
}
