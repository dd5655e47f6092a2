//! What running stages share out among them: places, threads and cards.

use contract::Needs;

use crate::graph::Subgraph;

/// Where a worker runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    /// `cpu` or `cuda:N`, of the cards that are visible here.
    pub(crate) device: String,
    /// Threads it may use.
    pub(crate) threads: usize,
}

/// What is free.
pub(crate) struct Slots {
    /// How many more workers may run.
    places: usize,
    threads: usize,
    /// Cards, in order of preference. One that stands here twice serves two workers at once.
    free: Vec<String>,
    /// Whether there are any: without, every stage runs on the CPU.
    has_cards: bool,
}

impl Slots {
    /// `devices` as [`crate::run::Settings`] has them; threads are shared evenly among `jobs` workers.
    pub(crate) fn new(devices: &[String], threads: usize, jobs: usize) -> Self {
        let free: Vec<String> = devices.iter().filter(|device| *device != "cpu").cloned().collect();
        let places = jobs.max(1);
        Slots { places, threads: (threads / places).max(1), has_cards: !free.is_empty(), free }
    }

    /// Threads of each worker.
    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    /// A slot for a stage, if what it needs is free now. Only what needs a card gets one, and nobody else has it meanwhile.
    pub(crate) fn take(&mut self, needs: Needs) -> Option<Slot> {
        if self.places == 0 {
            return None;
        }
        let device = match needs.gpu && self.has_cards {
            true if self.free.is_empty() => return None,
            true => self.free.remove(0),
            false => "cpu".into(),
        };
        self.places -= 1;
        Some(Slot { device, threads: self.threads })
    }

    /// Gives a slot back.
    pub(crate) fn give_back(&mut self, slot: Slot) {
        self.places += 1;
        if slot.device != "cpu" {
            self.free.push(slot.device);
        }
    }
}

/// What a subgraph needs: for a loop, all that any of its stages does.
pub(crate) fn needs(subgraph: &Subgraph, registry: &contract::Registry) -> Needs {
    let of = |kind: &str| registry.get(kind).map(contract::Kind::needs).unwrap_or_default();
    subgraph.operators().into_iter().map(|operator| of(&operator.kind)).fold(Needs::default(), Needs::and)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CPU: Needs = Needs { gpu: false };
    const GPU: Needs = Needs { gpu: true };

    fn device(slots: &mut Slots, needs: Needs) -> Option<String> {
        slots.take(needs).map(|slot| slot.device)
    }

    #[test]
    fn only_what_needs_a_card_gets_one_and_nobody_shares_it() {
        let cards = ["cuda:0".to_owned(), "cuda:1".to_owned()];
        let mut slots = Slots::new(&cards, 8, 4);
        assert_eq!(device(&mut slots, CPU).unwrap(), "cpu");
        let first = slots.take(GPU).unwrap();
        assert_eq!((first.device.as_str(), first.threads), ("cuda:0", 2));
        assert_eq!(device(&mut slots, GPU).unwrap(), "cuda:1");
        assert_eq!(slots.take(GPU), None, "a place is free, a card is not");
        slots.give_back(first);
        assert_eq!(device(&mut slots, GPU).unwrap(), "cuda:0");
        assert_eq!(device(&mut slots, CPU).unwrap(), "cpu");
        assert_eq!(slots.take(CPU), None, "all places are taken");
    }

    #[test]
    fn a_card_is_shared_by_those_who_ask_for_it_and_without_cards_all_run_on_the_cpu() {
        let twice = ["cuda:0".to_owned(), "cuda:0".to_owned()];
        let mut slots = Slots::new(&twice, 2, 3);
        assert_eq!((device(&mut slots, GPU), device(&mut slots, GPU)), (Some("cuda:0".into()), Some("cuda:0".into())));
        assert_eq!(slots.take(GPU), None);
        let mut slots = Slots::new(&["cpu".to_owned()], 1, 2);
        assert_eq!(slots.take(GPU).unwrap(), Slot { device: "cpu".into(), threads: 1 });
    }
}
