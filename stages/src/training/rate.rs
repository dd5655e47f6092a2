//! The learning rate of an update.

use contract::Step;
use lm::{Schedule, Warmup};

/// The learning rate at update `k` of `K`.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    /// Rate at the top of the schedule.
    pub peak: f64,
    /// How it goes on after the warm-up.
    pub schedule: Schedule,
    /// The first updates.
    pub warmup: Warmup,
}

impl Rate {
    /// The rate of the update that a round makes.
    pub fn at(&self, step: &Step) -> f64 {
        lm::learning_rate(self.peak, self.schedule, self.warmup, step.round, step.rounds)
    }
}
