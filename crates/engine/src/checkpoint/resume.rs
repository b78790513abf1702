//! Which checkpoint is loaded, and what happens when it turns out to be damaged.

use std::path::Path;

use deepspeed_checkpoint::{Checkpoint, Chosen, choose};
use deepspeed_core::SpanMut;
use deepspeed_optim::Hyper;

use super::LoadOptions;
use crate::{Engine, EngineError};

impl Engine {
    /// Loads what `options` ask for from the checkpoint `tag` of `dir` into the engine, into `weights` (by parameter id)
    /// and into `frozen` ones (by name). Collective.
    ///
    /// Without a tag, from the one that [`choose`] chooses, and if a checksum of it is wrong, from the next; none of its
    /// contents have been used then. [`Engine::chosen`] says why. `None` if there is none.
    ///
    /// # Errors
    /// [`EngineError::Checkpoint`] and [`EngineError::DamagedCheckpoint`] on every rank if anything failed on any.
    pub fn load_checkpoint(
        &mut self,
        dir: &Path,
        tag: Option<&str>,
        options: LoadOptions,
        hypers: &[Hyper],
        weights: &mut [SpanMut<'_>],
        frozen: &mut [(String, SpanMut<'_>)],
    ) -> Result<Option<Checkpoint>, EngineError> {
        self.finish_save()?;
        self.chosen = None;
        if self.settings.saving.node_local {
            return self.load_from_all_hosts(dir, tag, options, hypers, weights, frozen);
        }
        if let Some(tag) = tag {
            return self.load_tag(dir, Ok(Some(tag.to_owned())), options, hypers, weights, frozen);
        }
        let mut damaged: Vec<(String, String)> = Vec::new();
        loop {
            let chosen = choose(dir, &damaged);
            let tag = chosen.map(|chosen| {
                self.chosen = chosen;
                self.chosen.as_ref().map(|it| it.tag.clone())
            });
            let loaded = self.load_tag(dir, tag, options, hypers, weights, frozen);
            match (loaded, self.chosen.take()) {
                (Err(EngineError::DamagedCheckpoint { rank, problem }), Some(chosen)) => {
                    damaged.push((chosen.tag, format!("rank {rank}: {problem}")));
                }
                (loaded, chosen) => {
                    self.chosen = chosen;
                    return loaded;
                }
            }
        }
    }

    /// As [`Engine::load_checkpoint`], where each host has a folder of its own.
    fn load_from_all_hosts(
        &mut self,
        dir: &Path,
        tag: Option<&str>,
        options: LoadOptions,
        hypers: &[Hyper],
        weights: &mut [SpanMut<'_>],
        frozen: &mut [(String, SpanMut<'_>)],
    ) -> Result<Option<Checkpoint>, EngineError> {
        let mut damaged: Vec<(String, String)> = Vec::new();
        loop {
            let Some(chosen) = self.choose_on_all_hosts(dir, tag, &damaged)? else { return Ok(None) };
            self.bring_files(dir, &chosen.tag, options)?;
            let loaded = self.load_tag(dir, Ok(Some(chosen.tag.clone())), options, hypers, weights, frozen);
            match loaded {
                Err(EngineError::DamagedCheckpoint { rank, problem }) if tag.is_none() => {
                    damaged.push((chosen.tag, format!("rank {rank}: {problem}")));
                }
                loaded => {
                    self.chosen = tag.is_none().then_some(chosen);
                    return loaded;
                }
            }
        }
    }

    /// The checkpoint that was loaded without being asked for by name, and why it was that one.
    pub fn chosen(&self) -> Option<&Chosen> {
        self.chosen.as_ref()
    }
}
