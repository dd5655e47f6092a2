//! The clock of a loop. Schedules count optimiser updates; a stage that makes several in a round multiplies.

use serde::{Deserialize, Serialize};

/// Where a loop stands while one of its stages runs. Outside loops: [`Step::once`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// This round, from 0.
    pub round: u64,
    /// How many rounds the loop has.
    pub rounds: u64,
    /// Epoch of the window that fixes the rounds, from 0.
    pub epoch: u64,
    /// Rounds in one epoch.
    pub rounds_per_epoch: u64,
}

impl Step {
    /// The clock of a stage that is not in a loop: one round of one.
    pub const fn once() -> Self {
        Step { round: 0, rounds: 1, epoch: 0, rounds_per_epoch: 1 }
    }

    /// True in the last round of an epoch.
    pub fn ends_epoch(&self) -> bool {
        (self.round + 1).is_multiple_of(self.rounds_per_epoch)
    }

    /// True in the last round of the loop.
    pub fn is_last(&self) -> bool {
        self.round + 1 == self.rounds
    }
}
