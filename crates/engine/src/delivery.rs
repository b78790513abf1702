//! Which parameters ever got a gradient: a parameter that never does is a defect worth a name.

use deepspeed_comm::{CommError, Group};
use deepspeed_core::{Layout, ParamId};

use crate::Gradients;

/// Remembers which parameters delivered a gradient on this rank: until the first boundary, and in the last pass.
#[derive(Debug)]
pub(crate) struct Delivery {
    delivered: Vec<bool>,
    checked: bool,
    /// In the current pass.
    this_pass: Vec<bool>,
    /// In the last pass; all, before the first.
    last_pass: Vec<bool>,
}

impl Delivery {
    pub(crate) fn new(params: usize) -> Self {
        Self {
            delivered: vec![false; params],
            checked: false,
            this_pass: vec![false; params],
            last_pass: vec![true; params],
        }
    }

    /// Of which parameters there is a gradient now.
    pub(crate) fn record(&mut self, gradients: Gradients<'_, '_>) {
        match gradients {
            Gradients::Spans(spans) => self.record_each(spans.iter().map(Option::is_some)),
            Gradients::OnDevice(present) => self.record_each(present.iter().copied()),
        }
    }

    fn record_each(&mut self, present: impl Iterator<Item = bool>) {
        for (delivered, now) in self.this_pass.iter_mut().zip(present) {
            *delivered |= now;
        }
    }

    /// The backward pass is over.
    pub(crate) fn end_pass(&mut self) {
        for (delivered, now) in self.delivered.iter_mut().zip(&self.this_pass) {
            *delivered |= now;
        }
        std::mem::swap(&mut self.last_pass, &mut self.this_pass);
        self.this_pass.fill(false);
    }

    /// Whether a gradient of `param` is worth waiting for: it had one in the last pass.
    pub(crate) fn expects(&self, param: ParamId) -> bool {
        self.last_pass[param.index()]
    }

    /// At the first boundary: the names of parameters that got a gradient on no rank. `None` at later ones.
    pub(crate) fn check(
        &mut self,
        layout: &Layout,
        group: &dyn Group,
    ) -> Result<Option<Vec<String>>, CommError> {
        if self.checked {
            return Ok(None);
        }
        self.checked = true;
        let mine: Vec<u8> = self.delivered.iter().map(|delivered| u8::from(*delivered)).collect();
        let all = group.all_gather_bytes("parameters with a gradient", &mine)?;
        let missing = layout.params.iter().enumerate().filter(|(index, spec)| {
            spec.numel() > 0
                && all.iter().all(|rank| rank.get(*index).is_none_or(|delivered| *delivered == 0))
        });
        Ok(Some(missing.map(|(_, spec)| spec.name.clone()).collect()))
    }
}
