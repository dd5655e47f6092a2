//! From numbers to places in a picture, and round numbers to write at an axis.

/// A number as a person reads it: four significant digits.
pub fn number(value: f64) -> String {
    let size = value.abs();
    if !value.is_finite() {
        return value.to_string();
    }
    if size != 0.0 && !(1e-4..1e6).contains(&size) {
        return trimmed(&format!("{value:.3e}"));
    }
    let whole = if size >= 1.0 { size.log10().floor() as usize + 1 } else { 1 };
    let digits =
        if size < 1.0 && size > 0.0 { (3.0 - size.log10().floor()) as usize } else { 4usize.saturating_sub(whole) };
    trimmed(&format!("{value:.digits$}"))
}

/// Without zeros that say nothing: `1.50e-5` is `1.5e-5`, `-0.0` is `0`.
fn trimmed(text: &str) -> String {
    let (mantissa, exponent) = text.split_once('e').map_or((text, None), |(m, e)| (m, Some(e)));
    let mantissa = if mantissa.contains('.') { mantissa.trim_end_matches('0').trim_end_matches('.') } else { mantissa };
    let mantissa = if mantissa == "-0" { "0" } else { mantissa };
    exponent.map_or_else(|| mantissa.to_owned(), |exponent| format!("{mantissa}e{exponent}"))
}

/// Numbers from `low` to `high` spread over pixels from `from` to `to`.
#[derive(Clone, Debug)]
pub(crate) struct Scale {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    is_log: bool,
}

impl Scale {
    /// Over all finite numbers, with a little room at both ends; logarithmic where asked for and all are above 0.
    pub(crate) fn over(numbers: impl IntoIterator<Item = f64>, is_log: bool, from: f64, to: f64) -> Self {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for number in numbers.into_iter().filter(|number| number.is_finite()) {
            (low, high) = (low.min(number), high.max(number));
        }
        if low > high {
            (low, high) = (0.0, 1.0);
        }
        let is_log = is_log && low > 0.0;
        if low == high {
            let room = if low == 0.0 { 1.0 } else { low.abs() * 0.1 };
            (low, high) = if is_log { (low / 1.5, high * 1.5) } else { (low - room, high + room) };
        }
        Scale { low, high, from, to, is_log }.with_room()
    }

    fn with_room(self) -> Self {
        let pixels = (self.to - self.from).abs().max(1.0);
        let share = 4.0 / pixels;
        let (low, high) = (self.low, self.high);
        let (low, high) = if self.is_log {
            let room = (high / low).powf(share);
            (low / room, high * room)
        } else {
            let room = (high - low) * share;
            (low - room, high + room)
        };
        Scale { low, high, ..self }
    }

    /// Where a number is.
    pub(crate) fn at(&self, number: f64) -> f64 {
        let share = if self.is_log {
            (number.max(f64::MIN_POSITIVE) / self.low).ln() / (self.high / self.low).ln()
        } else {
            (number - self.low) / (self.high - self.low)
        };
        self.from + share * (self.to - self.from)
    }

    /// As a program reads it that goes from pixels back to numbers: `from to low high`, and `log`.
    pub(crate) fn in_words(&self) -> String {
        let Scale { low, high, from, to, is_log } = self;
        format!("{from:.1} {to:.1} {low} {high}{}", if *is_log { " log" } else { "" })
    }

    /// About so many round numbers, each with its text.
    pub(crate) fn ticks(&self, about: usize) -> Vec<(f64, String)> {
        let decades = if self.is_log { (self.high / self.low).log10() } else { 0.0 };
        if decades >= 1.0 { self.decades(about, decades) } else { self.steps(about) }
    }

    fn steps(&self, about: usize) -> Vec<(f64, String)> {
        let rough = (self.high - self.low) / about.max(1) as f64;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0]
            .iter()
            .map(|by| by * power)
            .find(|step| *step >= rough * 0.75)
            .unwrap_or(power * 10.0);
        let digits = (-step.log10().floor()).max(0.0) as usize;
        let (first, last) = ((self.low / step).ceil() as i64, (self.high / step).floor() as i64);
        // A hundred at most, whatever comes in.
        let inside = (first..=last.min(first + 100)).map(|index| index as f64 * step);
        let text = |value: f64| {
            if digits > 4 || value.abs() >= 1e6 { number(value) } else { trimmed_zero(&format!("{value:.digits$}")) }
        };
        inside.map(|value| (value, text(value))).collect()
    }

    fn decades(&self, about: usize, decades: f64) -> Vec<(f64, String)> {
        let (first, last) = (self.low.log10().floor() as i32, self.high.log10().ceil() as i32);
        let every = (decades / about.max(1) as f64).ceil().max(1.0) as i32;
        let within: &[f64] = if decades < about as f64 / 2.0 { &[1.0, 2.0, 5.0] } else { &[1.0] };
        let powers = (first..=last).filter(|power| power.rem_euclid(every) == 0);
        let all = powers.flat_map(|power| within.iter().map(move |by| by * 10f64.powi(power)));
        all.filter(|value| (self.low..=self.high).contains(value)).map(|value| (value, number(value))).collect()
    }
}

fn trimmed_zero(text: &str) -> String {
    if text.trim_start_matches('-').chars().all(|c| c == '0' || c == '.') {
        text.trim_start_matches('-').to_owned()
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_four_digits() {
        let cases = [
            (0.0, "0"),
            (-0.0, "0"),
            (81.64, "81.64"),
            (0.012345, "0.01235"),
            (1500.0, "1500"),
            (1.5e-5, "1.5e-5"),
            (123_456.7, "123457"),
            (2.5e6, "2.5e6"),
            (-3.25, "-3.25"),
            (f64::NAN, "NaN"),
        ];
        for (value, expected) in cases {
            assert_eq!(number(value), expected);
        }
    }

    #[test]
    fn ticks_are_round_and_inside() {
        let texts = |scale: &Scale| scale.ticks(5).into_iter().map(|(_, text)| text).collect::<Vec<_>>();
        assert_eq!(texts(&Scale::over([0.0, 1.0], false, 0.0, 200.0)), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(texts(&Scale::over([69.4, 85.8], false, 0.0, 200.0)), ["70", "75", "80", "85"]);
        assert_eq!(texts(&Scale::over([1e-4, 1e-1], true, 0.0, 200.0)), ["0.0001", "0.001", "0.01", "0.1"]);
        assert_eq!(texts(&Scale::over([-1.0, 1.0], false, 0.0, 200.0)), ["-1.0", "-0.5", "0.0", "0.5", "1.0"]);
        // What is no range at all still has one.
        for numbers in [vec![], vec![3.0], vec![0.0], vec![f64::NAN, f64::INFINITY], vec![-1e300, 1e300]] {
            for is_log in [false, true] {
                let scale = Scale::over(numbers.iter().copied(), is_log, 200.0, 0.0);
                assert!(scale.ticks(5).len() <= 101, "{numbers:?}");
                assert!(
                    numbers.iter().filter(|x| x.is_finite()).all(|x| (0.0..=200.0).contains(&scale.at(*x))),
                    "{numbers:?} {scale:?}"
                );
            }
        }
    }
}
