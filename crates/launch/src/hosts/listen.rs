//! Where this machine awaits the agents that call back: at the addresses by which the hosts see it, and at no others.

use crate::error::LaunchError;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, ToSocketAddrs, UdpSocket};

/// So many hosts are looked up; further ones are taken to be in the same networks.
const LOOKED_UP: usize = 8;

/// An address for documentation: it chooses a route, and nothing is sent.
const ELSEWHERE: (Ipv4Addr, u16) = (Ipv4Addr::new(192, 0, 2, 1), 9);

/// Listeners at `given`, which the user has named, or else at the addresses from which this machine reaches `hosts`.
///
/// # Errors
/// An address that is not this machine's.
pub(crate) fn listeners(given: &str, hosts: &[&str]) -> Result<Vec<TcpListener>, LaunchError> {
    let addresses = if given.is_empty() { routes(hosts) } else { vec![resolve(given)?] };
    addresses
        .into_iter()
        .map(|address| {
            let listener = TcpListener::bind((address, 0)).and_then(|listener| {
                listener.set_nonblocking(true)?;
                Ok(listener)
            });
            listener.map_err(|source| LaunchError::Listen { address: address.to_string(), source })
        })
        .collect()
}

/// `ADDRESS:PORT` of each, with commas between them.
///
/// # Errors
/// The system does not say.
pub(crate) fn describe(listeners: &[TcpListener]) -> Result<String, LaunchError> {
    let addresses: Result<Vec<String>, std::io::Error> =
        listeners.iter().map(|listener| listener.local_addr().map(|address| address.to_string())).collect();
    addresses
        .map(|addresses| addresses.join(","))
        .map_err(|source| LaunchError::System { what: "finding the port that agents call", source })
}

fn resolve(given: &str) -> Result<IpAddr, LaunchError> {
    let found = (given, 0).to_socket_addrs().map(|mut found| found.next());
    match found {
        Ok(Some(address)) => Ok(address.ip()),
        Ok(None) => Err(LaunchError::Listen {
            address: given.to_owned(),
            source: std::io::Error::other("the name has no address"),
        }),
        Err(source) => Err(LaunchError::Listen { address: given.to_owned(), source }),
    }
}

/// This machine's addresses on the ways to the hosts, each once. Where a name is one that only ssh or Slurm knows, the address of this
/// machine on the way to anywhere is among them; where there is no such way, that of the machine itself.
fn routes(hosts: &[&str]) -> Vec<IpAddr> {
    let mut found: Vec<IpAddr> = Vec::new();
    let mut unknown = false;
    for host in hosts.iter().take(LOOKED_UP) {
        let name = host.rsplit_once('@').map_or(*host, |(_, name)| name);
        let way = (name, 9).to_socket_addrs().ok().and_then(|mut addresses| addresses.find_map(route_to));
        match way {
            Some(address) if !found.contains(&address) => found.push(address),
            Some(_) => {}
            None => unknown = true,
        }
    }
    if unknown {
        found.extend(route_to(ELSEWHERE.into()).filter(|address| !found.contains(address)));
    }
    if found.is_empty() {
        found.push(Ipv4Addr::LOCALHOST.into());
    }
    found
}

/// This machine's address on the way to another.
fn route_to(other: SocketAddr) -> Option<IpAddr> {
    let any: SocketAddr =
        if other.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { "[::]:0".parse().ok()? };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(other).ok()?;
    socket.local_addr().ok().map(|address| address.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_on_the_way_to_a_host() {
        assert_eq!(routes(&["127.0.0.1", "user@127.0.0.3"]), [IpAddr::from(Ipv4Addr::LOCALHOST)]);
        let unknown = routes(&["no-such-host.invalid"]);
        assert_eq!(unknown.len(), 1);
        assert!(!unknown[0].is_unspecified());
    }

    #[test]
    fn only_the_given_address_is_listened_at() {
        let listeners = listeners("127.0.0.2", &["a"]).unwrap();
        let text = describe(&listeners).unwrap();
        assert!(text.starts_with("127.0.0.2:") && !text.contains(','), "{text}");
        assert!(super::listeners("192.0.2.1", &["a"]).unwrap_err().to_string().contains("192.0.2.1"));
    }
}
