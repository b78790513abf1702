//! Slurm's way to write lists: hosts as `gpu[03-07,12],login1`, and numbers that repeat as `4(x2),1`.
//!
//! ```text
//!   hosts = item ["," item]...
//!   item  = piece...                    text, and any number of brackets
//!   piece = text | "[" range ["," range]... "]"
//!   range = digits ["-" digits]         as many digits as the first number has, at least
//! ```

use crate::DiscoveryError;

/// No cluster has more hosts, and no list that names more is expanded.
const MAX_HOSTS: usize = 1 << 20;

/// The host names of a list, in its order.
///
/// # Errors
/// A bracket that does not close, a range that is none, or more than a million hosts.
pub fn hosts(list: &str) -> Result<Vec<String>, DiscoveryError> {
    let mut names = Vec::new();
    for item in items(list).map_err(|what| bad(list, what))? {
        let room = MAX_HOSTS - names.len();
        names.extend(expand(item, room).map_err(|what| bad(list, what))?);
    }
    Ok(names)
}

/// The numbers of a list such as `4(x2),1`, in its order: the tasks of each host.
///
/// # Errors
/// Something else than numbers and `(xN)`, or more than a million of them.
pub fn counts(list: &str) -> Result<Vec<u32>, DiscoveryError> {
    let mut counts = Vec::new();
    for item in list.split(',') {
        let (number, times) = match item.split_once("(x") {
            None => (item, 1),
            Some((number, times)) => {
                let times = times.strip_suffix(')').and_then(|times| times.parse().ok());
                (number, times.ok_or_else(|| bad(list, format!("`{item}` is not NUMBER(xTIMES)")))?)
            }
        };
        let number =
            number.trim().parse::<u32>().map_err(|_| bad(list, format!("`{number}` is no number")))?;
        if times > MAX_HOSTS - counts.len() {
            return Err(bad(list, format!("more than {MAX_HOSTS} numbers")));
        }
        counts.extend(std::iter::repeat_n(number, times));
    }
    Ok(counts)
}

fn bad(list: &str, what: String) -> DiscoveryError {
    DiscoveryError::List { list: list.chars().take(200).collect(), what }
}

/// The items between commas that are not in brackets; empty ones are left out.
fn items(list: &str) -> Result<Vec<&str>, String> {
    let mut items = Vec::new();
    let (mut start, mut inside) = (0, false);
    for (at, c) in list.char_indices() {
        match (c, inside) {
            ('[', false) => inside = true,
            (']', true) => inside = false,
            ('[', true) => return Err("a bracket within a bracket".to_owned()),
            (']', false) => return Err("a bracket closes that was not open".to_owned()),
            (',', false) => {
                items.push(&list[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if inside {
        return Err("a bracket does not close".to_owned());
    }
    items.push(&list[start..]);
    Ok(items.into_iter().map(str::trim).filter(|item| !item.is_empty()).collect())
}

/// The names of one item; brackets from the left count slowest.
fn expand(item: &str, room: usize) -> Result<Vec<String>, String> {
    let too_many = || format!("more than {MAX_HOSTS} hosts");
    let mut names = vec![String::new()];
    let mut rest = item;
    while !rest.is_empty() {
        let (text, ranges, after) = match rest.split_once('[') {
            None => (rest, None, ""),
            Some((text, behind)) => {
                let (inner, after) = behind.split_once(']').ok_or("a bracket does not close")?;
                (text, Some(inner), after)
            }
        };
        for name in &mut names {
            name.push_str(text);
        }
        if let Some(ranges) = ranges {
            let numbers = numbers(ranges, room / names.len())?;
            if names.len().checked_mul(numbers.len()).is_none_or(|count| count > room) {
                return Err(too_many());
            }
            names = names
                .iter()
                .flat_map(|name| numbers.iter().map(move |number| format!("{name}{number}")))
                .collect();
        }
        rest = after;
    }
    if names.len() > room { Err(too_many()) } else { Ok(names) }
}

/// The numbers of the ranges in a bracket, with their leading zeros.
fn numbers(ranges: &str, room: usize) -> Result<Vec<String>, String> {
    let mut numbers = Vec::new();
    for range in ranges.split(',') {
        let wrong = || format!("`{range}` is no number or range of numbers");
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let number = |digits: &str| {
            let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
            digits.parse::<u64>().ok().filter(|_| is_number).ok_or_else(wrong)
        };
        let (from, to) = (number(first)?, number(last)?);
        if to < from {
            return Err(format!("`{range}` runs backwards"));
        }
        if to - from >= (room - numbers.len()) as u64 {
            return Err(format!("more than {MAX_HOSTS} hosts"));
        }
        let width = first.len();
        numbers.extend((from..=to).map(|number| format!("{number:0width$}")));
    }
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn host_lists() {
        let of =
            |list: &str| hosts(list).map(|names| names.join(" ")).unwrap_or_else(|error| error.to_string());
        assert_eq!(of("gpu[03-05,12],login1"), "gpu03 gpu04 gpu05 gpu12 login1");
        assert_eq!(of("worker-[1-2]"), "worker-1 worker-2");
        assert_eq!(of("a"), "a");
        assert_eq!(of("r[1-2]n[08-10]-ib"), "r1n08-ib r1n09-ib r1n10-ib r2n08-ib r2n09-ib r2n10-ib");
        assert_eq!(of("n[9-11]"), "n9 n10 n11");
        assert_eq!(of(""), "");
        for (list, what) in [
            ("n[1-2", "a bracket does not close"),
            ("n]", "a bracket closes that was not open"),
            ("n[[1]]", "a bracket within a bracket"),
            ("n[a]", "`a` is no number or range of numbers"),
            ("n[]", "`` is no number or range of numbers"),
            ("n[3-1]", "`3-1` runs backwards"),
            ("n[1--2]", "`1--2` is no number or range of numbers"),
            ("n[0-99999999999]", "more than 1048576 hosts"),
            ("n[0-99999][0-99999]", "more than 1048576 hosts"),
        ] {
            assert!(of(list).contains(what), "{list}: {}", of(list));
        }
    }

    #[test]
    fn repeated_numbers() {
        assert_eq!(counts("4(x2),1"), Ok(vec![4, 4, 1]));
        assert_eq!(counts("2"), Ok(vec![2]));
        for list in ["", "x", "4(x", "4(x2", "4(x-1)", "4(x99999999)"] {
            assert!(counts(list).is_err(), "{list}");
        }
    }

    /// Names as a plain reader writes them: prefixes with the numbers of one bracket.
    fn item() -> impl Strategy<Value = (String, Vec<String>)> {
        ("[a-z]{1,4}-?", prop::collection::vec((0u32..200, 0u32..4), 0..4), 1usize..4).prop_map(
            |(prefix, ranges, width)| {
                if ranges.is_empty() {
                    return (prefix.clone(), vec![prefix]);
                }
                let text: Vec<String> = ranges
                    .iter()
                    .map(|(from, more)| match more {
                        0 => format!("{from:0width$}"),
                        more => format!("{from:0width$}-{:0width$}", from + more),
                    })
                    .collect();
                let names = ranges.iter().flat_map(|(from, more)| {
                    // The first number's length is what the others are filled up to.
                    let width = format!("{from:0width$}").len();
                    let prefix = prefix.clone();
                    (*from..=from + more).map(move |number| format!("{prefix}{number:0width$}"))
                });
                (format!("{prefix}[{}]", text.join(",")), names.collect())
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(items in prop::collection::vec(item(), 1..4)) {
            let text: Vec<&str> = items.iter().map(|(text, _)| text.as_str()).collect();
            let names: Vec<String> = items.iter().flat_map(|(_, names)| names.clone()).collect();
            prop_assert_eq!(hosts(&text.join(",")), Ok(names));
        }

        #[test]
        fn any_text_is_survived(text in "[a-c0-9\\[\\],x()-]{0,30}") {
            let _ = hosts(&text);
            let _ = counts(&text);
        }
    }
}
