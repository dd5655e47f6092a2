//! What time it is, and how a time is written.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Time since 1970.
pub(crate) fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// A time since 1970 as `20260131-235959.123`, in UTC (days to date as in Hinnant's "chrono-compatible low-level date
/// algorithms").
pub(crate) fn utc(time: Duration) -> String {
    let (days, seconds) = ((time.as_secs() / 86_400) as i64, time.as_secs() % 86_400);
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}{month:02}{day:02}-{hour:02}{minute:02}{second:02}.{:03}", time.subsec_millis())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_named_by_the_date() {
        let check = |seconds: u64, expected| assert_eq!(utc(Duration::from_millis(seconds * 1000 + 7)), expected);
        check(0, "19700101-000000.007");
        check(951_782_399, "20000228-235959.007");
        check(951_782_400, "20000229-000000.007");
        check(1_767_225_599, "20251231-235959.007");
    }
}
