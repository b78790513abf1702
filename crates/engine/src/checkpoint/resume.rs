//! Which checkpoint is loaded, and what happens when it turns out to be damaged.

use std::path::Path;

use deepspeed_checkpoint::{Chosen, Source, choose, open_any, open_universal};
use deepspeed_core::SpanMut;
use deepspeed_optim::Hyper;

use super::LoadOptions;
use crate::{Engine, EngineError};

impl Engine {
    /// Opens the checkpoint `tag` of `dir`, whatever its format, and checks its files; with `universal`, only one of the
    /// original's universal format. Collective.
    ///
    /// Without a tag, the one that [`choose`] chooses, and if a checksum of it is wrong, the next. [`Engine::chosen`] says
    /// why. `None` if there is none.
    ///
    /// # Errors
    /// [`EngineError::Checkpoint`] and [`EngineError::DamagedCheckpoint`] on every rank if anything failed on any;
    /// [`EngineError::Usage`] if ranks would load different ones.
    pub fn open_checkpoint(
        &mut self,
        dir: &Path,
        tag: Option<&str>,
        universal: bool,
    ) -> Result<Option<Box<dyn Source>>, EngineError> {
        self.finish_save()?;
        self.chosen = None;
        if universal {
            return self.agree_on_opened(dir, open_universal(dir, tag));
        }
        if self.settings.saving.node_local {
            return self.open_on_all_hosts(dir, tag);
        }
        if tag.is_some() {
            return self.agree_on_opened(dir, open_any(dir, tag));
        }
        let mut damaged: Vec<(String, String)> = Vec::new();
        loop {
            let opened = choose(dir, &damaged).and_then(|chosen| {
                self.chosen = chosen;
                // Without a choice there may still be a `latest_universal`.
                open_any(dir, self.chosen.as_ref().map(|it| it.tag.as_str()))
            });
            let opened = self.agree_on_opened(dir, opened);
            match (opened, self.chosen.take()) {
                (Err(EngineError::DamagedCheckpoint { rank, problem }), Some(chosen)) => {
                    damaged.push((chosen.tag, format!("rank {rank}: {problem}")));
                }
                (opened, chosen) => {
                    self.chosen = chosen;
                    return opened;
                }
            }
        }
    }

    /// [`Engine::open_checkpoint`] and [`Engine::load_from`] in one. Collective.
    ///
    /// # Errors
    /// As these.
    pub fn load_checkpoint(
        &mut self,
        dir: &Path,
        tag: Option<&str>,
        options: LoadOptions,
        hypers: &[Hyper],
        weights: &mut [SpanMut<'_>],
        frozen: &mut [(String, SpanMut<'_>)],
    ) -> Result<Option<Box<dyn Source>>, EngineError> {
        let checkpoint = self.open_checkpoint(dir, tag, false)?;
        if let Some(checkpoint) = &checkpoint {
            self.load_from(&**checkpoint, options, hypers, weights, frozen)?;
        }
        Ok(checkpoint)
    }

    /// As [`Engine::open_checkpoint`], where each host has a folder of its own.
    fn open_on_all_hosts(
        &mut self,
        dir: &Path,
        tag: Option<&str>,
    ) -> Result<Option<Box<dyn Source>>, EngineError> {
        let mut damaged: Vec<(String, String)> = Vec::new();
        loop {
            let Some(chosen) = self.choose_on_all_hosts(dir, tag, &damaged)? else { return Ok(None) };
            self.bring_files(dir, &chosen.tag)?;
            match self.agree_on_opened(dir, open_any(dir, Some(&chosen.tag))) {
                Err(EngineError::DamagedCheckpoint { rank, problem }) if tag.is_none() => {
                    damaged.push((chosen.tag, format!("rank {rank}: {problem}")));
                }
                opened => {
                    self.chosen = tag.is_none().then_some(chosen);
                    return opened;
                }
            }
        }
    }

    /// The checkpoint that was loaded without being asked for by name, and why it was that one.
    pub fn chosen(&self) -> Option<&Chosen> {
        self.chosen.as_ref()
    }
}
