//! Which cores each rank is bound to: the list's syntax and its division among the ranks.

use crate::error::LaunchError;
use std::ops::RangeInclusive;

/// Core numbers from here on are refused: a set of cores is a mask of this many bits.
const MAX_CORES: usize = 1024;

/// Parses `0-7,16-23`: core numbers and ranges, ascending and disjoint.
///
/// # Errors
/// The first range that is not a number, runs backwards, overlaps or comes out of order.
pub(crate) fn parse_list(text: &str) -> Result<Vec<usize>, LaunchError> {
    let error = |what: String| LaunchError::CoreList { text: text.to_owned(), what };
    let mut cores: Vec<usize> = Vec::new();
    for part in text.split(',') {
        let range = parse_range(part.trim()).map_err(error)?;
        if let Some(last) = cores.last()
            && range.start() <= last
        {
            let how = if cores.contains(range.start()) {
                "overlaps what stands before it"
            } else {
                "is out of order"
            };
            return Err(error(format!("`{}` {how}", part.trim())));
        }
        cores.extend(range);
    }
    Ok(cores)
}

/// One number or `low-high`.
fn parse_range(part: &str) -> Result<RangeInclusive<usize>, String> {
    let number = |word: &str| -> Result<usize, String> {
        let digits = !word.is_empty() && word.bytes().all(|b| b.is_ascii_digit());
        match word.parse::<usize>() {
            Ok(core) if digits && core < MAX_CORES => Ok(core),
            Ok(_) if digits => {
                Err(format!("core {word} is above the highest possible one, {}", MAX_CORES - 1))
            }
            _ => Err(format!("`{word}` is not a core's number")),
        }
    };
    let (low, high) = match part.split_once('-') {
        Some((low, high)) => (number(low)?, number(high)?),
        None => (number(part)?, number(part)?),
    };
    if high < low {
        return Err(format!("`{part}` runs backwards"));
    }
    Ok(low..=high)
}

/// Cuts the cores into one run of equal length for each rank; a remainder stays unused, as in the original.
///
/// Returns `None` where there are fewer cores than ranks.
pub(crate) fn share_out(cores: &[usize], ranks: usize) -> Option<Vec<Vec<usize>>> {
    let each = cores.len().checked_div(ranks).filter(|each| *each > 0)?;
    Some(cores.chunks_exact(each).take(ranks).map(<[usize]>::to_vec).collect())
}

/// Cores in words, with runs shortened: `0-3,6`.
pub(crate) fn list_cores(cores: &[usize]) -> String {
    let mut words: Vec<String> = Vec::new();
    let mut at = 0;
    while at < cores.len() {
        let mut end = at;
        while end + 1 < cores.len() && cores[end + 1] == cores[end] + 1 {
            end += 1;
        }
        words.push(if end == at { cores[at].to_string() } else { format!("{}-{}", cores[at], cores[end]) });
        at = end + 1;
    }
    words.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lists() {
        assert_eq!(parse_list("0-3").unwrap(), [0, 1, 2, 3]);
        assert_eq!(parse_list("0, 2-3,7").unwrap(), [0, 2, 3, 7]);
        for (text, what) in [
            ("3-1", "`3-1` runs backwards"),
            ("0-3,2", "`2` overlaps"),
            ("4,1", "`1` is out of order"),
            ("", "`` is not a core's number"),
            ("0-", "`` is not a core's number"),
            ("a", "`a` is not a core's number"),
            ("0-1024", "core 1024 is above the highest possible one, 1023"),
        ] {
            let error = parse_list(text).unwrap_err().to_string();
            assert!(error.contains(what), "{text}: {error}");
        }
    }

    #[test]
    fn shares() {
        assert_eq!(share_out(&[0, 1, 2, 3, 4], 2).unwrap(), [vec![0, 1], vec![2, 3]]);
        assert_eq!(share_out(&[5], 1).unwrap(), [vec![5]]);
        assert_eq!(share_out(&[0], 2), None);
        assert_eq!(share_out(&[], 1), None);
        assert_eq!(share_out(&[1], 0), None);
        assert_eq!(list_cores(&[0, 1, 2, 5, 7, 8]), "0-2,5,7-8");
    }

    proptest! {
        #[test]
        fn never_panics(text in "(?s).{0,40}") {
            let _ = parse_list(&text);
        }

        #[test]
        fn what_is_listed_is_parsed(set in prop::collection::btree_set(0usize..1024, 1..40)) {
            let cores: Vec<usize> = set.into_iter().collect();
            prop_assert_eq!(parse_list(&list_cores(&cores)).unwrap(), cores);
        }
    }
}
