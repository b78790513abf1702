//! One log file for each rank: `<folder>/<YYYYmmddHHMMSS>_rank<N>.log`, the time in UTC.

use crate::error::LaunchError;
use fs_err as fs;
use fs_err::File;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Creates the folder and a file for each rank.
pub(crate) fn create(
    folder: &Path,
    ranks: impl Iterator<Item = usize>,
    now: SystemTime,
) -> Result<Vec<File>, LaunchError> {
    let error =
        |source| LaunchError::File { what: "--enable_each_rank_log: the logs cannot be written", source };
    fs::create_dir_all(folder).map_err(error)?;
    let time = stamp(now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()));
    ranks.map(|rank| File::create(path(folder, &time, rank)).map_err(error)).collect()
}

fn path(folder: &Path, time: &str, rank: usize) -> PathBuf {
    folder.join(format!("{time}_rank{rank}.log"))
}

/// `YYYYmmddHHMMSS` of a Unix time, in UTC.
fn stamp(unix: u64) -> String {
    let (days, rest) = (unix / 86_400, unix % 86_400);
    // Civil date from days since 1970-01-01, by counting eras of 400 years from 0000-03-01 (Howard Hinnant,
    // "chrono-compatible low-level date algorithms").
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}{month:02}{day:02}{:02}{:02}{:02}", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps() {
        assert_eq!(stamp(0), "19700101000000");
        assert_eq!(stamp(951_782_399), "20000228235959");
        assert_eq!(stamp(951_782_400), "20000229000000");
        assert_eq!(stamp(1_704_067_199), "20231231235959");
    }
}
