//! Counters and loss scale, as checkpoints hold them.

use deepspeed_monitor::Counters;
use deepspeed_optim::LossScaler;
use serde_json::{Value, json};

use crate::{Engine, EngineError};

impl Engine {
    /// Counters and loss scale, as checkpoints hold them.
    pub fn state(&self) -> Value {
        json!({
            "counters": self.counters,
            "loss_scaler": self.scaler,
            "train_batch_size": self.settings.train_batch_size,
            "accumulation_steps": self.settings.accumulation_steps,
            "gradient_clipping": self.settings.gradient_clipping,
        })
    }

    /// Takes back what [`Engine::state`] gave.
    ///
    /// # Errors
    /// [`EngineError::Usage`] for anything else.
    pub fn load_state(&mut self, state: &Value) -> Result<(), EngineError> {
        let damaged = |what: &str, error: serde_json::Error| {
            EngineError::Usage(format!("the saved {what} cannot be read: {error}"))
        };
        self.counters = serde_json::from_value::<Counters>(state["counters"].clone())
            .map_err(|error| damaged("counters", error))?;
        let scaler = serde_json::from_value::<LossScaler>(state["loss_scaler"].clone())
            .map_err(|error| damaged("loss scale", error))?;
        // A run that goes on in another precision keeps the scaler its config asks for.
        if scaler.is_dynamic() == self.scaler.is_dynamic() {
            self.scaler = scaler;
        }
        // A boundary stays a boundary, also where the accumulation steps have changed.
        let saved = state["accumulation_steps"].as_u64();
        if saved.is_some_and(|saved| saved != self.accumulation.steps()) {
            self.counters.micro_steps = self.counters.global_steps * self.accumulation.steps();
        }
        self.accumulation.set_micro_steps(self.counters.micro_steps);
        self.restart_window();
        self.tell_progress();
        Ok(())
    }
}
