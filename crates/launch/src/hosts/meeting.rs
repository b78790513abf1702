//! The address at which rank 0 awaits the others: that of the first host, as the others can reach it.

use crate::wire::message::Hello;
use std::net::IpAddr;

/// The address, from how the hosts present themselves; `first` is the first one's name in the hostfile.
///
/// The launcher has reached the first host at an address that very likely holds for the others, too. Where that is a loopback address
/// but the others' are not, the launcher runs on the first host, and the others see it at the address that the connection to them
/// comes from.
pub(crate) fn address(first: &str, hosts: &[Hello]) -> String {
    let is_loopback = |address: &String| {
        address.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
    };
    let Some((head, others)) = hosts.split_first() else { return first.to_owned() };
    match &head.reached_at {
        Some(address) if !is_loopback(address) => address.clone(),
        Some(address) => {
            let seen = others.iter().filter_map(|other| other.reached_from.as_ref());
            seen.into_iter().find(|seen| !is_loopback(seen)).unwrap_or(address).clone()
        }
        None => first.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(at: &str, from: &str) -> Hello {
        let text = |word: &str| (!word.is_empty()).then(|| word.to_owned());
        Hello { reached_at: text(at), reached_from: text(from), ..Hello::default() }
    }

    #[test]
    fn the_address_that_the_others_can_reach() {
        let of = |hosts: &[Hello]| address("worker-1", hosts);
        assert_eq!(of(&[host("10.0.0.2", "10.0.0.1"), host("10.0.0.3", "10.0.0.1")]), "10.0.0.2");
        assert_eq!(of(&[host("127.0.0.1", "127.0.0.1"), host("10.0.0.3", "10.0.0.1")]), "10.0.0.1");
        assert_eq!(of(&[host("127.0.0.2", "127.0.0.1"), host("127.0.0.3", "127.0.0.1")]), "127.0.0.2");
        assert_eq!(of(&[host("", ""), host("10.0.0.3", "10.0.0.1")]), "worker-1");
        assert_eq!(of(&[host("::1", "::1"), host("fe80::3", "fe80::1")]), "fe80::1");
    }
}
