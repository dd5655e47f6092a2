//! Windows: how a dataset enters a loop, a slice a round.

use std::sync::Arc;

use anyhow::{anyhow, bail, ensure};
use contract::files::counted;
use contract::{AnyValue, Dataset, Result, random};

use crate::graph::{Last, Loop, Order, Window};

/// How many rounds a loop has, and how many of them make an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Clock {
    pub(super) rounds: u64,
    pub(super) rounds_per_epoch: u64,
}

/// A dataset with the way it is sliced. Which rows a round sees depends on the round alone, so it needs no inner state.
pub(super) struct Slicer {
    dataset: Arc<Dataset>,
    window: Window,
    rows: usize,
    /// The order last used and its epoch: a cache, since neighbouring rounds share it.
    order: Option<(u64, Vec<usize>)>,
}

impl Slicer {
    /// Errors when the value is no dataset or when no round would ever fit.
    pub(super) fn new(name: &str, window: &Window, value: AnyValue) -> Result<Self> {
        let found = value.port_type();
        let dataset = value
            .into_any()
            .downcast::<Dataset>()
            .map_err(|_| anyhow!("window `{name}` takes rows of a dataset, and its entry holds a {found}"))?;
        let all = dataset.rows.len();
        let rows = window.rows.map_or(all, |rows| all.min(usize::try_from(rows).unwrap_or(usize::MAX)));
        ensure!(window.take > 0, "window `{name}` takes 0 rows a round; set `take` to at least 1");
        ensure!(rows > 0, "window `{name}` has no rows");
        let slicer = Slicer { dataset, window: window.clone(), rows, order: None };
        ensure!(
            slicer.rounds_per_epoch() > 0,
            "window `{name}` has {}, fewer than the {} it takes a round; lower `take` or set `last: short`",
            counted(rows as u64, "row"),
            window.take
        );
        Ok(slicer)
    }

    pub(super) fn rounds_per_epoch(&self) -> u64 {
        let rows = self.rows as u64;
        match self.window.last {
            Last::Drop => rows / self.window.take,
            Last::Short => rows.div_ceil(self.window.take),
        }
    }

    /// The rows of a round, counted from 0 over all epochs. A window cycles through its own epochs without end.
    pub(super) fn slice(&mut self, round: u64) -> Dataset {
        let per_epoch = self.rounds_per_epoch();
        let (epoch, within) = (round / per_epoch, round % per_epoch);
        let start = usize::try_from(within * self.window.take).expect("rows fit in memory");
        let end = self.rows.min(start.saturating_add(usize::try_from(self.window.take).unwrap_or(usize::MAX)));
        if self.order.as_ref().is_none_or(|(of, _)| *of != epoch) {
            self.order = Some((epoch, self.order_of(epoch)));
        }
        let (_, order) = self.order.as_ref().expect("the order of this epoch was just made");
        self.dataset.select(&order[start..end])
    }

    fn order_of(&self, epoch: u64) -> Vec<usize> {
        match self.window.order {
            Order::Given => (0..self.rows).collect(),
            // The counter has 32 bits for the time; four thousand million epochs are enough.
            Order::Shuffle => random::permutation(self.rows, self.window.seed, random::purpose::SHUFFLE, epoch as u32),
        }
    }
}

/// The clock of a loop: the window with epochs fixes the rounds, `rounds` caps them or stands alone.
///
/// Without such a window an epoch is that of the only window there is; with several, or none, the loop is one epoch: which
/// of them came first in the file must not matter.
pub(super) fn clock(body: &Loop, slicers: &[Slicer]) -> Result<Clock> {
    let with_epochs = slicers.iter().find_map(|slicer| Some((slicer, slicer.window.epochs?)));
    let fixed = with_epochs.map(|(slicer, epochs)| epochs.saturating_mul(slicer.rounds_per_epoch()));
    let Some(rounds) = fixed.into_iter().chain(body.rounds).min() else {
        bail!("nothing says how many rounds the loop has; give one of its windows `epochs`, or the loop `rounds`");
    };
    ensure!(rounds > 0, "the loop has 0 rounds; `epochs` and `rounds` must be at least 1");
    let rounds_per_epoch = match (with_epochs, slicers) {
        (Some((slicer, _)), _) | (None, [slicer]) => slicer.rounds_per_epoch(),
        (None, _) => rounds,
    };
    Ok(Clock { rounds, rounds_per_epoch })
}

#[cfg(test)]
mod tests {
    use super::*;
    use contract::dataset::{End, Row};
    use contract::{Metrics, TokenizerFile};
    use indexmap::IndexMap;

    fn dataset(rows: u64) -> AnyValue {
        let row = |id| Row {
            id,
            prompt: vec![],
            response: vec![],
            end: End::Stop,
            log_probs: None,
            references: vec![],
            family: None,
        };
        let tokenizer = TokenizerFile::new("{}", 0, 1);
        Arc::new(Dataset { rows: (0..rows).map(row).collect(), tokenizer })
    }

    fn window(take: u64, epochs: Option<u64>) -> Window {
        Window { rows: None, take, epochs, order: Order::Given, seed: 3, last: Last::Drop, places: Default::default() }
    }

    fn slicer(rows: u64, window: &Window) -> Slicer {
        Slicer::new("batch", window, dataset(rows)).unwrap()
    }

    fn ids(slicer: &mut Slicer, round: u64) -> Vec<u64> {
        slicer.slice(round).rows.iter().map(|row| row.id).collect()
    }

    #[test]
    fn the_short_window_at_the_end_is_dropped_or_used() {
        let mut dropping = slicer(5, &window(2, Some(1)));
        assert_eq!(dropping.rounds_per_epoch(), 2);
        assert_eq!(ids(&mut dropping, 2), [0, 1]);
        let mut short = slicer(5, &Window { last: Last::Short, ..window(2, Some(1)) });
        assert_eq!(short.rounds_per_epoch(), 3);
        assert_eq!(ids(&mut short, 2), [4]);
        assert_eq!(ids(&mut short, 3), [0, 1]);
    }

    #[test]
    fn only_the_first_rows_enter() {
        let mut slicer = slicer(9, &Window { rows: Some(4), ..window(2, None) });
        assert_eq!((ids(&mut slicer, 1), ids(&mut slicer, 2)), (vec![2, 3], vec![0, 1]));
    }

    #[test]
    fn every_epoch_has_its_own_order_and_holds_every_row_once() {
        let mut slicer = slicer(8, &Window { order: Order::Shuffle, ..window(4, Some(2)) });
        let mut epoch = |first: u64| [ids(&mut slicer, first), ids(&mut slicer, first + 1)].concat();
        let (first, second) = (epoch(0), epoch(2));
        assert_ne!(first, second);
        assert_eq!(first, epoch(0), "the order depends on the round alone");
        let mut sorted = second.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..8).collect::<Vec<_>>());
    }

    #[test]
    fn a_window_that_never_fits_is_an_error_that_says_what_to_do() {
        let error = Slicer::new("batch", &window(6, None), dataset(5)).err().unwrap().to_string();
        assert_eq!(
            error,
            "window `batch` has 5 rows, fewer than the 6 it takes a round; lower `take` or set `last: short`"
        );
        let error = Slicer::new("batch", &window(6, None), Arc::new(Metrics::default())).err().unwrap().to_string();
        assert_eq!(error, "window `batch` takes rows of a dataset, and its entry holds a metrics");
    }

    #[test]
    fn epochs_fix_the_rounds_and_rounds_caps_them() {
        let check = |rounds: Option<u64>, windows: &[Window], expected: Option<(u64, u64)>| {
            let body = Loop {
                windows: IndexMap::new(),
                carry: IndexMap::new(),
                stages: IndexMap::new(),
                rounds,
                unroll: false,
                alone: false,
            };
            let slicers: Vec<_> = windows.iter().map(|window| slicer(10, window)).collect();
            let found = clock(&body, &slicers).ok().map(|clock| (clock.rounds, clock.rounds_per_epoch));
            assert_eq!(found, expected);
        };
        check(None, &[window(2, Some(3))], Some((15, 5)));
        check(Some(7), &[window(2, Some(3))], Some((7, 5)));
        check(Some(70), &[window(2, Some(3)), window(5, None)], Some((15, 5)));
        check(Some(70), &[window(2, None)], Some((70, 5)));
        check(Some(70), &[window(2, None), window(5, None)], Some((70, 70)));
        check(Some(70), &[], Some((70, 70)));
        check(None, &[window(2, None)], None);
        check(Some(0), &[], None);
    }
}
