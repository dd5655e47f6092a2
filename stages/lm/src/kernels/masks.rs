//! Dropout masks from counters: whether an element is dropped depends on what it is, not on where it lies in a batch.

use contract::random::philox;

use crate::terms::dropout::Dropout;

/// Counters drawn side by side; each gives four words.
const SIDE: usize = 8;

/// Elements of one block: what `SIDE` counters give.
pub(crate) const BLOCK: usize = 4 * SIDE;

/// The factors of one row of a mask: 0 for dropped elements, `1 / (1 - rate)` for the others.
///
/// `line` is the row's place (a position, for attention that of the query), `row` the row id, `site` which mask of the
/// model. Each block of 32 elements takes the words of eight counters, all first words before all second words.
pub(crate) fn fill(out: &mut [f32], dropout: &Dropout, rate: f32, site: u32, row: u64, line: u32) {
    // An element is dropped when its 32 bits are below the rate's share of them.
    let threshold = (f64::from(rate) * 4_294_967_296.0) as u32;
    let kept = 1.0 / (1.0 - rate);
    let row = (row ^ row >> 32) as u32;
    let purpose = dropout.purpose.wrapping_add(site);
    for (block, out) in out.chunks_mut(BLOCK).enumerate() {
        // A line has room for 2^14 counters: 2^16 elements.
        let first = (line << 14).wrapping_add((block * SIDE) as u32);
        let words = draw(dropout.seed, first, row, dropout.update, purpose);
        for (out, word) in out.iter_mut().zip(words.as_flattened()) {
            *out = if *word < threshold { 0.0 } else { kept };
        }
    }
}

/// The words of `SIDE` counters in a row, `philox` written in lanes.
#[inline(always)]
fn draw(seed: u64, first: u32, row: u32, time: u32, purpose: u32) -> [[u32; SIDE]; 4] {
    const M0: u64 = 0xD251_1F53;
    const M1: u64 = 0xCD9E_8D57;
    let mut c0 = [0u32; SIDE];
    c0.iter_mut().enumerate().for_each(|(i, c)| *c = first.wrapping_add(i as u32));
    let (mut c1, mut c2, mut c3) = ([row; SIDE], [time; SIDE], [purpose; SIDE]);
    let (mut k0, mut k1) = (seed as u32, (seed >> 32) as u32);
    for _ in 0..10 {
        for i in 0..SIDE {
            let (p0, p1) = (M0 * u64::from(c0[i]), M1 * u64::from(c2[i]));
            (c0[i], c1[i], c2[i], c3[i]) =
                ((p1 >> 32) as u32 ^ c1[i] ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3[i] ^ k1, p0 as u32);
        }
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    debug_assert_eq!([c0[0], c1[0], c2[0], c3[0]], philox(seed, [first, row, time, purpose]));
    [c0, c1, c2, c3]
}

#[cfg(test)]
mod tests {
    use super::*;

    const DROPOUT: Dropout = Dropout { seed: 3, update: 5, purpose: 0x100 };

    #[test]
    fn lanes_draw_the_numbers_of_the_shared_generator() {
        let words = draw(0x1234_5678_9abc_def0, u32::MAX - 3, 7, 8, 9);
        for lane in 0..SIDE {
            let counter = [(u32::MAX - 3).wrapping_add(lane as u32), 7, 8, 9];
            assert_eq!(words.map(|word| word[lane]), philox(0x1234_5678_9abc_def0, counter));
        }
    }

    #[test]
    fn about_the_rate_is_dropped_and_the_mean_stays() {
        let mut mask = vec![0.0; 40_000];
        fill(&mut mask, &DROPOUT, 0.1, 0, 1, 0);
        let dropped = mask.iter().filter(|m| **m == 0.0).count() as f64 / 40_000.0;
        assert!((dropped - 0.1).abs() < 0.006, "{dropped}");
        assert!(mask.iter().all(|m| *m == 0.0 || *m == 1.0 / (1.0 - 0.1)));
    }

    #[test]
    fn a_longer_line_begins_like_a_shorter_one_and_each_key_matters() {
        let mask = |dropout: Dropout, site, row, line, length| {
            let mut mask = vec![0.0; length];
            fill(&mut mask, &dropout, 0.5, site, row, line);
            mask
        };
        let base = mask(DROPOUT, 0, 1, 2, 64);
        assert_eq!(base[..37], mask(DROPOUT, 0, 1, 2, 37));
        for other in [
            mask(Dropout { seed: 4, ..DROPOUT }, 0, 1, 2, 64),
            mask(Dropout { update: 6, ..DROPOUT }, 0, 1, 2, 64),
            mask(DROPOUT, 1, 1, 2, 64),
            mask(DROPOUT, 0, 9, 2, 64),
            mask(DROPOUT, 0, 1, 3, 64),
        ] {
            assert_ne!(base, other);
        }
    }
}
