//! The port on which rank 0 awaits the others: a free one, or the given one if nobody has it.

use crate::error::LaunchError;
use fs_err as fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
use std::path::Path;

/// A port that is free now. Between this and rank 0's listening another program may take it; the system hands out ports in
/// a scattered order, so that is unlikely.
pub(crate) fn choose_free() -> Result<u16, LaunchError> {
    TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))
        .and_then(|listener| listener.local_addr())
        .map(|address| address.port())
        .map_err(LaunchError::NoFreePort)
}

/// Checks that rank 0 will be able to listen on `port`.
pub(crate) fn check_free(port: u16) -> Result<(), LaunchError> {
    let in_use = |error: &io::Error| error.kind() == io::ErrorKind::AddrInUse;
    match TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)) {
        Ok(_) => {}
        Err(error) if in_use(&error) => {
            return Err(LaunchError::PortInUse { port, who: describe_listener(port) });
        }
        Err(source) => return Err(LaunchError::PortUnusable { port, source }),
    }
    // A listener on IPv6 only; a machine without IPv6 gives another error, which does not matter.
    match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)) {
        Err(error) if in_use(&error) => Err(LaunchError::PortInUse { port, who: describe_listener(port) }),
        _ => Ok(()),
    }
}

/// ` by process 12 (python3 train.py)` where the listener can be found in `/proc`, else empty.
fn describe_listener(port: u16) -> String {
    let Some(inode) = ["/proc/net/tcp", "/proc/net/tcp6"]
        .into_iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .find_map(|table| listening_inode(&table, port))
    else {
        return String::new();
    };
    let socket = format!("socket:[{inode}]");
    let Ok(processes) = fs::read_dir("/proc") else { return String::new() };
    for process in processes.flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().filter(|name| name.bytes().all(|b| b.is_ascii_digit())) else {
            continue;
        };
        let Ok(files) = fs::read_dir(process.path().join("fd")) else { continue };
        let holds = files
            .flatten()
            .any(|file| fs::read_link(file.path()).is_ok_and(|target| target.as_os_str() == socket.as_str()));
        if holds {
            return format!(" by process {pid} ({})", command_line(&process.path()));
        }
    }
    String::new()
}

/// The socket's inode of the listener on `port` in a table of `/proc/net`.
fn listening_inode(table: &str, port: u16) -> Option<u64> {
    const LISTENING: &str = "0A";
    table.lines().skip(1).find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (_, local_port) = words.get(1)?.rsplit_once(':')?;
        let listens = u16::from_str_radix(local_port, 16) == Ok(port) && *words.get(3)? == LISTENING;
        if listens { words.get(9)?.parse().ok() } else { None }
    })
}

/// A process's command line, shortened.
fn command_line(process: &Path) -> String {
    let bytes = fs::read(process.join("cmdline")).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes).replace('\0', " ");
    let text = text.trim();
    match text.char_indices().nth(80) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}...", &text[..end]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_free_port_is_free_and_a_taken_one_is_named() {
        check_free(choose_free().unwrap()).unwrap();
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else { continue };
            let port = listener.local_addr().unwrap().port();
            let error = check_free(port).unwrap_err().to_string();
            assert!(error.contains(&format!("--master_port={port}")), "{error}");
            assert!(error.contains(&format!("by process {}", std::process::id())), "{error}");
        }
    }

    #[test]
    fn the_listener_is_found_in_the_table() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
                     0: 0100007F:1F90 00000000:0000 01 00000000:00000000 00:00000000 00000000  1000 0 11 1 0\n   \
                     1: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000 0 22 1 0\n";
        assert_eq!(listening_inode(table, 8080), Some(22));
        assert_eq!(listening_inode(table, 8081), None);
        assert_eq!(listening_inode("garbage\n1 2\n\n", 1), None);
    }
}
