//! Which parameters ever got a gradient: a parameter that never does is a defect worth a name.

use deepspeed_comm::{CommError, Group};
use deepspeed_core::{Layout, Span};

/// Remembers, until the first boundary, which parameters delivered a gradient on this rank.
#[derive(Debug)]
pub(crate) struct Delivery {
    delivered: Vec<bool>,
    checked: bool,
}

impl Delivery {
    pub(crate) fn new(params: usize) -> Self {
        Self { delivered: vec![false; params], checked: false }
    }

    pub(crate) fn record(&mut self, gradients: &[Option<Span<'_>>]) {
        if !self.checked {
            for (delivered, gradient) in self.delivered.iter_mut().zip(gradients) {
                *delivered |= gradient.is_some();
            }
        }
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
