//! One outcome on all ranks.

use std::fmt::Display;

use deepspeed_comm::Group;
use deepspeed_core::Rank;

use crate::EngineError;

/// Tells all ranks how a step went on this one; an error on any is an error on all, with that rank's words.
pub(super) fn agree<T>(
    group: &dyn Group,
    what: &str,
    mine: Result<T, impl Display>,
    to_bytes: impl Fn(&T) -> Vec<u8>,
) -> Result<(T, Vec<Vec<u8>>), EngineError> {
    let message = match &mine {
        Ok(value) => [vec![1], to_bytes(value)].concat(),
        Err(error) => [vec![0], error.to_string().into_bytes()].concat(),
    };
    let all = group.all_gather_bytes(what, &message)?;
    let failed = all.iter().position(|message| message.first() != Some(&1));
    match (failed, mine) {
        (None, Ok(value)) => Ok((value, all.iter().map(|message| message[1..].to_vec()).collect())),
        (Some(rank), _) => {
            let problem = String::from_utf8_lossy(all[rank].get(1..).unwrap_or_default()).into_owned();
            Err(EngineError::Checkpoint { rank: Rank::from_index(rank), problem })
        }
        (None, Err(error)) => Err(EngineError::Checkpoint { rank: group.rank(), problem: error.to_string() }),
    }
}
