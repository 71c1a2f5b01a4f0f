//! Log lines on standard error, one line an event; `POLYTROPO_LOG` says from which level on.

use std::io::Write;
use std::sync::OnceLock;

use log::{LevelFilter, Log, Metadata, Record};

struct Lines {
    who: &'static str,
}

/// Starts logging as `who` ("keeper", "worker"). An unknown level in POLYTROPO_LOG counts as `info`.
pub fn start(who: &'static str) {
    let level = std::env::var("POLYTROPO_LOG").ok().and_then(|name| name.parse().ok());
    log::set_max_level(level.unwrap_or(LevelFilter::Info));
    static LINES: OnceLock<Lines> = OnceLock::new();
    // The second of two starts in one process keeps the first one's name.
    let _ = log::set_logger(LINES.get_or_init(|| Lines { who }));
}

impl Log for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let text: String = record.args().to_string().chars().map(printable).collect();
        let line =
            format!("{} {} {}: {text}\n", timestamp(), self.who, record.level().as_str().to_lowercase());
        // There is nobody to tell that the log cannot be written.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }

    fn flush(&self) {}
}

fn printable(c: char) -> char {
    if c.is_control() { '?' } else { c }
}

/// The time in UTC as RFC 3339 writes it, to the millisecond.
fn timestamp() -> String {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    let (days, second) = (now.tv_sec.div_euclid(86_400), now.tv_sec.rem_euclid(86_400));
    let (year, month, day) = civil_date(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let milliseconds = now.tv_nsec / 1_000_000;
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{milliseconds:03}Z")
}

/// Year, month, day of a number of days since 1970-01-01 (Howard Hinnant's algorithm).
fn civil_date(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::civil_date;

    #[test]
    fn knows_the_calendar() {
        assert_eq!(civil_date(0), (1970, 1, 1));
        assert_eq!(civil_date(19_782), (2024, 2, 29));
        assert_eq!(civil_date(19_783), (2024, 3, 1));
        assert_eq!(civil_date(-1), (1969, 12, 31));
    }
}
