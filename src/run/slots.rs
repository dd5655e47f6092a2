//! What running stages share out among them: places, threads, memory and cards.

use contract::Needs;

use crate::graph::{Operator, Subgraph};

/// Where a worker runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    /// `cpu` or `cuda:N`, of the cards that are visible here.
    pub(crate) device: String,
    /// Threads it may use.
    pub(crate) threads: usize,
    /// Bytes of this machine's memory that are set aside for it.
    pub(crate) memory: u64,
}

/// What is free.
pub(crate) struct Slots {
    /// How many more workers may run.
    places: usize,
    threads: usize,
    /// Bytes of this machine's memory that nobody has set aside.
    memory: u64,
    /// Workers there are.
    taken: usize,
    /// Cards, in order of preference. One that stands here twice serves two workers at once.
    free: Vec<String>,
    /// Whether there are any: without, every stage runs on the CPU.
    has_cards: bool,
}

impl Slots {
    /// `devices` as [`crate::run::Settings`] has them; threads are shared evenly among `jobs` workers. `memory`: bytes that
    /// this machine has, where that is known.
    pub(crate) fn new(devices: &[String], threads: usize, jobs: usize, memory: Option<u64>) -> Self {
        let free: Vec<String> = devices.iter().filter(|device| *device != "cpu").cloned().collect();
        let places = jobs.max(1);
        let (threads, memory) = ((threads / places).max(1), memory.unwrap_or(u64::MAX));
        Slots { places, threads, memory, taken: 0, has_cards: !free.is_empty(), free }
    }

    /// Threads of each worker.
    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    /// Whether one more worker may run.
    pub(crate) fn has_place(&self) -> bool {
        self.places > 0
    }

    /// A slot for a stage, if what it needs is free now. Only what needs a card gets one, and nobody else has it meanwhile.
    /// On the CPU stages run beside one another as far as the memory goes that they are known to need, in bytes; one that
    /// needs more than there is runs alone.
    pub(crate) fn take(&mut self, needs: Needs, memory: u64) -> Option<Slot> {
        if self.places == 0 {
            return None;
        }
        // The memory of a card is its own.
        let memory = if needs.gpu && self.has_cards { 0 } else { memory };
        if memory > self.memory && self.taken > 0 {
            return None;
        }
        let memory = memory.min(self.memory);
        let device = match needs.gpu && self.has_cards {
            true if self.free.is_empty() => return None,
            true => self.free.remove(0),
            false => "cpu".into(),
        };
        self.places -= 1;
        self.taken += 1;
        self.memory -= memory;
        Some(Slot { device, threads: self.threads, memory })
    }

    /// Gives a slot back.
    pub(crate) fn give_back(&mut self, slot: Slot) {
        self.places += 1;
        self.taken -= 1;
        self.memory += slot.memory;
        if slot.device != "cpu" {
            self.free.push(slot.device);
        }
    }
}

/// What a subgraph needs: for a loop, all that any of its stages does.
pub(crate) fn needs(subgraph: &Subgraph, registry: &contract::Registry) -> Needs {
    let of =
        |operator: &Operator| registry.get(&operator.kind).map(|kind| kind.needs(&operator.config)).unwrap_or_default();
    subgraph.operators().into_iter().map(of).fold(Needs::default(), Needs::and)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CPU: Needs = Needs { gpu: false };
    const GPU: Needs = Needs { gpu: true };

    fn device(slots: &mut Slots, needs: Needs) -> Option<String> {
        slots.take(needs, 0).map(|slot| slot.device)
    }

    #[test]
    fn only_what_needs_a_card_gets_one_and_nobody_shares_it() {
        let cards = ["cuda:0".to_owned(), "cuda:1".to_owned()];
        let mut slots = Slots::new(&cards, 8, 4, None);
        assert_eq!(device(&mut slots, CPU).unwrap(), "cpu");
        let first = slots.take(GPU, 0).unwrap();
        assert_eq!((first.device.as_str(), first.threads), ("cuda:0", 2));
        assert_eq!(device(&mut slots, GPU).unwrap(), "cuda:1");
        assert_eq!(slots.take(GPU, 0), None, "a place is free, a card is not");
        slots.give_back(first);
        assert_eq!(device(&mut slots, GPU).unwrap(), "cuda:0");
        assert_eq!(device(&mut slots, CPU).unwrap(), "cpu");
        assert_eq!(slots.take(CPU, 0), None, "all places are taken");
    }

    #[test]
    fn a_card_is_shared_by_those_who_ask_for_it_and_without_cards_all_run_on_the_cpu() {
        let twice = ["cuda:0".to_owned(), "cuda:0".to_owned()];
        let mut slots = Slots::new(&twice, 2, 3, None);
        assert_eq!((device(&mut slots, GPU), device(&mut slots, GPU)), (Some("cuda:0".into()), Some("cuda:0".into())));
        assert_eq!(slots.take(GPU, 0), None);
        let mut slots = Slots::new(&["cpu".to_owned()], 1, 2, None);
        assert_eq!(slots.take(GPU, 0).unwrap(), Slot { device: "cpu".into(), threads: 1, memory: 0 });
    }
    #[test]
    fn stages_run_beside_one_another_as_far_as_the_memory_goes() {
        let mut slots = Slots::new(&["cuda:0".to_owned()], 4, 4, Some(10));
        let six = slots.take(CPU, 6).unwrap();
        assert_eq!(slots.take(CPU, 6), None);
        let four = slots.take(CPU, 4).unwrap();
        let card = slots.take(GPU, 100).expect("the memory of a card is its own");
        for slot in [six, four, card] {
            slots.give_back(slot);
        }
        let large = slots.take(CPU, 11).expect("there is nobody to wait for");
        assert_eq!(slots.take(CPU, 1), None);
        slots.give_back(large);
        assert!(slots.take(CPU, 10).is_some());
    }
}
