//! Which checkpoint is loaded, and what happens when it turns out to be damaged.

use std::path::Path;

use deepspeed_checkpoint::{Chosen, Source, choose};

use crate::{Engine, EngineError};

impl Engine {
    /// Opens the checkpoint `tag` of `dir`, whatever its format, and checks its files; with `universal`, the universal one.
    /// Collective.
    ///
    /// Without a tag it is the one that [`choose`] chooses, and if a checksum of it is wrong, the next; nothing has been
    /// loaded then. [`Engine::chosen`] says why. `None` if there is none.
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
        if tag.is_some() || universal {
            return self.open_tag(dir, Ok(tag.map(str::to_owned)), universal);
        }
        let mut damaged: Vec<(String, String)> = Vec::new();
        loop {
            let chosen = choose(dir, &damaged);
            let tag = chosen.map(|chosen| {
                self.chosen = chosen;
                self.chosen.as_ref().map(|it| it.tag.clone())
            });
            match (self.open_tag(dir, tag, false), self.chosen.take()) {
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

    /// The checkpoint that was loaded without being asked for by name, and why it was that one.
    pub fn chosen(&self) -> Option<&Chosen> {
        self.chosen.as_ref()
    }
}
