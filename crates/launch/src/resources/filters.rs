//! `--include` and `--exclude`: `HOST[:SLOT[,SLOT...]][@HOST...]`, applied to the hosts and slots that there are.

use crate::error::LaunchError;
use crate::nearest::nearest;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// One place for a rank on a host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Slot {
    /// The number of a GPU or of a core-sized place.
    Index(u32),
    /// A GPU by its unique id, as `CUDA_VISIBLE_DEVICES` may name it.
    Device(String),
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Slot::Index(index) => index.fmt(f),
            Slot::Device(id) => id.fmt(f),
        }
    }
}

impl Serialize for Slot {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Slot {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Slot::named(&String::deserialize(deserializer)?))
    }
}

impl Slot {
    /// A slot as `CUDA_VISIBLE_DEVICES` names it: a number, or a unique id.
    pub(crate) fn named(word: &str) -> Self {
        word.parse().map_or_else(|_| Slot::Device(word.to_owned()), Slot::Index)
    }
}

/// A host and the slots on it that may be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostSlots {
    /// The host's name.
    pub host: String,
    /// Its slots, in the order in which local ranks take them.
    pub slots: Vec<Slot>,
}

/// One part of a filter. Where several name the same host, all of them count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFilter {
    /// The host's name.
    pub host: String,
    /// The slots named, ascending and without repetition; `None` means the whole host.
    pub slots: Option<Vec<u32>>,
}

/// Which way a filter works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Keep what is named.
    Include,
    /// Keep what is not named.
    Exclude,
}

impl Direction {
    /// The flag that gave the filter.
    pub fn flag(self) -> &'static str {
        match self {
            Direction::Include => "--include",
            Direction::Exclude => "--exclude",
        }
    }
}

/// Parses a filter's text.
///
/// # Errors
/// The first place at which it is not of the form, with its column.
pub(crate) fn parse(text: &str, direction: Direction) -> Result<Vec<HostFilter>, LaunchError> {
    let error = |byte: usize, what: String| LaunchError::FilterSyntax {
        flag: direction.flag(),
        text: text.to_owned(),
        column: text[..byte].chars().count() + 1,
        what,
    };
    let mut filters: Vec<HostFilter> = Vec::new();
    let mut at = 0;
    for part in text.split('@') {
        let start = at;
        at += part.len() + 1;
        let (host, slots) = match part.split_once(':') {
            Some((host, slots)) => (host, Some(slots)),
            None => (part, None),
        };
        let name = host.trim();
        if name.is_empty() {
            return Err(error(start, "a host's name is missing".to_owned()));
        }
        let slots = match slots {
            None => None,
            Some(list) => {
                let mut numbers = Vec::new();
                let mut slot_at = start + host.len() + 1;
                for slot in list.split(',') {
                    let word = slot.trim();
                    let number =
                        word.parse::<u32>().ok().filter(|_| word.bytes().all(|b| b.is_ascii_digit()));
                    let Some(number) = number else {
                        let what = if word.is_empty() {
                            "a slot's number is missing".to_owned()
                        } else {
                            format!("slot `{word}` is not a number")
                        };
                        return Err(error(slot_at, what));
                    };
                    numbers.push(number);
                    slot_at += slot.len() + 1;
                }
                numbers.sort_unstable();
                numbers.dedup();
                Some(numbers)
            }
        };
        filters.push(HostFilter { host: name.to_owned(), slots });
    }
    Ok(filters)
}

/// Applies a filter: hosts keep their order, slots theirs, hosts without slots are dropped.
///
/// `place` says where the hosts come from, for messages.
///
/// # Errors
/// A host or a slot that is not there; nothing left.
pub(crate) fn apply(
    hosts: &[HostSlots],
    filters: &[HostFilter],
    direction: Direction,
    place: &str,
) -> Result<Vec<HostSlots>, LaunchError> {
    for filter in filters {
        check(hosts, filter, direction, place)?;
    }
    let kept: Vec<HostSlots> = hosts
        .iter()
        .filter_map(|host| {
            let named = |slot: &Slot| {
                filters.iter().filter(|filter| filter.host == host.host).any(|filter| {
                    match (&filter.slots, slot) {
                        (None, _) => true,
                        (Some(list), Slot::Index(index)) => list.contains(index),
                        (Some(_), Slot::Device(_)) => false,
                    }
                })
            };
            let keep = direction == Direction::Include;
            let slots: Vec<Slot> = host.slots.iter().filter(|slot| named(slot) == keep).cloned().collect();
            (!slots.is_empty()).then(|| HostSlots { host: host.host.clone(), slots })
        })
        .collect();
    if kept.is_empty() {
        return Err(LaunchError::NothingLeft { flag: direction.flag().to_owned() });
    }
    Ok(kept)
}

/// Every host and slot that the filter names must be there.
fn check(
    hosts: &[HostSlots],
    filter: &HostFilter,
    direction: Direction,
    place: &str,
) -> Result<(), LaunchError> {
    let Some(host) = hosts.iter().find(|host| host.host == filter.host) else {
        let names: Vec<&str> = hosts.iter().map(|host| host.host.as_str()).collect();
        let hint = match nearest(&filter.host, names.iter().copied()) {
            Some(near) => format!("; did you mean '{near}'?"),
            None if names.len() <= 8 => format!("; known: {}", names.join(", ")),
            None => format!("; known: {}, ... ({} hosts)", names[..8].join(", "), names.len()),
        };
        return Err(LaunchError::UnknownHost {
            flag: direction.flag(),
            host: filter.host.clone(),
            place: place.to_owned(),
            hint,
        });
    };
    for slot in filter.slots.iter().flatten() {
        if !host.slots.contains(&Slot::Index(*slot)) {
            return Err(LaunchError::UnknownSlot {
                flag: direction.flag(),
                host: host.host.clone(),
                slot: slot.to_string(),
                available: list_slots(&host.slots),
            });
        }
    }
    Ok(())
}

/// Slots in words, with runs shortened: `0-3,6`.
pub(crate) fn list_slots(slots: &[Slot]) -> String {
    let mut words: Vec<String> = Vec::new();
    let mut at = 0;
    while at < slots.len() {
        let mut end = at;
        while let (Slot::Index(here), Some(Slot::Index(next))) = (&slots[end], slots.get(end + 1)) {
            if *next != here.wrapping_add(1) {
                break;
            }
            end += 1;
        }
        words.push(match end - at {
            0 => slots[at].to_string(),
            1 => format!("{},{}", slots[at], slots[end]),
            _ => format!("{}-{}", slots[at], slots[end]),
        });
        at = end + 1;
    }
    if words.is_empty() { "none".to_owned() } else { words.join(",") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hosts(list: &[(&str, u32)]) -> Vec<HostSlots> {
        list.iter()
            .map(|(host, slots)| HostSlots {
                host: (*host).to_owned(),
                slots: (0..*slots).map(Slot::Index).collect(),
            })
            .collect()
    }

    fn run(direction: Direction, text: &str) -> Result<String, String> {
        let hosts = hosts(&[("worker-0", 4), ("worker-1", 4), ("worker-2", 2)]);
        let filters = parse(text, direction).map_err(|e| e.to_string())?;
        let kept = apply(&hosts, &filters, direction, "hostfile h").map_err(|e| e.to_string())?;
        Ok(kept.iter().map(|h| format!("{}:{}", h.host, list_slots(&h.slots))).collect::<Vec<_>>().join("@"))
    }

    #[test]
    fn table() {
        use Direction::{Exclude, Include};
        for (direction, text, expected) in [
            (Include, "worker-1", "worker-1:0-3"),
            (Include, "worker-1:0,1", "worker-1:0,1"),
            (Include, "worker-2@worker-0:3,1,1", "worker-0:1,3@worker-2:0,1"),
            (Include, "worker-0:1@worker-0:0", "worker-0:0,1"),
            (Include, "worker-0@worker-0:0", "worker-0:0-3"),
            (Include, " worker-0 : 0 , 1 ", "worker-0:0,1"),
            (Exclude, "worker-1", "worker-0:0-3@worker-2:0,1"),
            (Exclude, "worker-0:0@worker-1:0,1", "worker-0:1-3@worker-1:2,3@worker-2:0,1"),
            (Exclude, "worker-2:0,1", "worker-0:0-3@worker-1:0-3"),
        ] {
            assert_eq!(run(direction, text).as_deref(), Ok(expected), "{direction:?} {text}");
        }
    }

    #[test]
    fn errors_name_the_place_and_the_nearest() {
        use Direction::{Exclude, Include};
        for (direction, text, expected) in [
            (
                Include,
                "worker-l",
                "--include: hostname 'worker-l' not found in hostfile h; did you mean 'worker-",
            ),
            (
                Exclude,
                "zebra",
                "--exclude: hostname 'zebra' not found in hostfile h; known: worker-0, worker-1",
            ),
            (Include, "worker-2:2", "no slot '2' specified on host 'worker-2'; its slots are 0,1"),
            (Include, "worker-2@worker-2:2", "no slot '2' specified on host 'worker-2'"),
            (Include, "worker-0:", "a slot's number is missing at column 10"),
            (Include, "worker-0:0,x", "slot `x` is not a number at column 12"),
            (Include, "worker-0:0-2", "slot `0-2` is not a number at column 10"),
            (Include, "worker-0@@worker-1", "a host's name is missing at column 10"),
            (Include, "worker-0:99999999999", "is not a number"),
            (Exclude, "worker-0@worker-1@worker-2", "no slot is left after --exclude"),
        ] {
            let error = run(direction, text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    fn filter_text() -> impl Strategy<Value = String> {
        prop::collection::vec((0usize..3, prop::option::of(prop::collection::vec(0u32..2, 1..4))), 1..4)
            .prop_map(|parts| {
                parts
                    .into_iter()
                    .map(|(host, slots)| match slots {
                        None => format!("worker-{host}"),
                        Some(list) => {
                            let list: Vec<String> = list.iter().map(u32::to_string).collect();
                            format!("worker-{host}:{}", list.join(","))
                        }
                    })
                    .collect::<Vec<_>>()
                    .join("@")
            })
    }

    proptest! {
        #[test]
        fn never_panics(text in "(?s).{0,80}") {
            let _ = parse(&text, Direction::Include);
        }

        #[test]
        fn never_panics_near_the_grammar(text in "[a@:,0 é-]{0,30}") {
            if let Ok(filters) = parse(&text, Direction::Exclude) {
                let _ = apply(&hosts(&[("a", 2)]), &filters, Direction::Exclude, "h");
            }
        }

        /// What one filter includes and what it excludes are together everything, and nothing is in both.
        #[test]
        fn include_and_exclude_are_complements(text in filter_text()) {
            let all = hosts(&[("worker-0", 4), ("worker-1", 4), ("worker-2", 2)]);
            let filters = parse(&text, Direction::Include).unwrap();
            let flat = |list: Vec<HostSlots>| -> Vec<(String, Slot)> {
                list.into_iter().flat_map(|h| h.slots.into_iter().map(move |s| (h.host.clone(), s))).collect()
            };
            let kept = flat(apply(&all, &filters, Direction::Include, "h").unwrap());
            let rest = flat(apply(&all, &filters, Direction::Exclude, "h").unwrap_or_default());
            let mut both = [kept.clone(), rest.clone()].concat();
            both.sort();
            prop_assert_eq!(both, flat(all));
            prop_assert!(kept.iter().all(|slot| !rest.contains(slot)));
        }

        /// Including the same again changes nothing.
        #[test]
        fn include_is_idempotent(text in filter_text()) {
            let all = hosts(&[("worker-0", 4), ("worker-1", 4), ("worker-2", 2)]);
            let filters = parse(&text, Direction::Include).unwrap();
            let once = apply(&all, &filters, Direction::Include, "h").unwrap();
            let twice = apply(&once, &filters, Direction::Include, "h").unwrap();
            prop_assert_eq!(once, twice);
        }
    }
}
