//! An examination as text.

use super::examination::{Connected, Examination, HostExamination};
use super::judge::{Finding, Level};
use crate::columns::Columns;
use deepspeed_monitor::memory::Bytes;

/// Hosts up to which the table of connections is shown in full.
const SMALL: usize = 16;

/// The table of hosts, the connections, and what is wrong.
pub(super) fn render(examination: &Examination, findings: &[Finding]) -> String {
    let hosts = &examination.hosts;
    let source = match &examination.hostfile {
        Some(path) => format!("of {}", path.display()),
        None => "(this machine; no hostfile is in use)".to_owned(),
    };
    let mut text = format!("{} {source}\n\n", plural(hosts.len(), "host"));
    text += &table(examination);
    text += &connections(examination);
    if let Some(meeting) = &examination.meeting {
        let port = match &meeting.port {
            Ok(port) if meeting.port_given => format!("port {port} is free"),
            Ok(port) => format!("a free port, such as {port}"),
            Err(_) => "the port cannot be had".to_owned(),
        };
        text +=
            &format!("\nrank 0 would await the others on {} at {}, {port}\n", meeting.host, meeting.address);
    }
    if let Some(shared) = &examination.shared_folder {
        let is_well =
            shared.write_problems.iter().chain(shared.read_problems.iter().flatten()).all(Option::is_none);
        let reached = hosts.iter().filter(|host| host.problem.is_none()).count();
        if is_well {
            let path = shared.path.display();
            text += &format!("what each of {} wrote to {path}, all of them saw\n", plural(reached, "host"));
        }
    }
    text.push('\n');
    for finding in findings {
        let host = finding.host.as_deref().map(|host| format!(" {host}:")).unwrap_or_default();
        text += &format!("{} {}:{host} {}\n", finding.level, finding.check, finding.text);
    }
    let count = |level| findings.iter().filter(|finding| finding.level == level).count();
    let (failures, warnings) = (count(Level::Failure), count(Level::Warning));
    text += &match (failures, warnings) {
        (0, 0) => "all is well\n".to_owned(),
        (0, warnings) => format!("{}, no failures: a job would start\n", plural(warnings, "warning")),
        (failures, warnings) => format!("{}, {}\n", plural(failures, "failure"), plural(warnings, "warning")),
    };
    text
}

fn plural(count: usize, word: &str) -> String {
    format!("{count} {word}{}", if count == 1 { "" } else { "s" })
}

fn table(examination: &Examination) -> String {
    let several = examination.hosts.iter().any(|host| host.answered_in.is_some() || host.problem.is_some());
    let mut headings = vec!["host"];
    if several {
        headings.extend([">answers", ">clock"]);
    }
    headings.extend([
        "deepspeed",
        "python",
        "torch",
        ">cores",
        ">free memory",
        ">/dev/shm",
        ">GPUs",
        ">slots",
    ]);
    let mut table = Columns::new(&headings);
    for host in &examination.hosts {
        let mut row = vec![host.host.clone()];
        if several {
            let answered = host.answered_in.filter(|_| host.problem.is_none());
            row.push(answered.map_or_else(|| "no".to_owned(), |seconds| format!("{:.0} ms", seconds * 1e3)));
            row.push(host.clock.map_or_else(dash, |clock| format!("{:+.3} s", clock.ahead)));
        }
        row.extend(cells(host));
        table.row(row);
    }
    table.render("  ")
}

fn dash() -> String {
    "-".to_owned()
}

/// What a host has, in cells.
fn cells(host: &HostExamination) -> Vec<String> {
    let facts = host.facts.as_ref();
    let python = facts.and_then(|facts| facts.python.as_ref());
    vec![
        host.version.clone().unwrap_or_else(dash),
        python.map_or_else(dash, |python| python.version.clone()),
        python.and_then(|python| python.torch.as_ref()).map_or_else(dash, |torch| torch.version.clone()),
        facts.map_or_else(dash, |facts| facts.cpu.cores.to_string()),
        facts.map_or_else(dash, |facts| Bytes(facts.memory.free).to_string()),
        facts.and_then(|facts| facts.shm.as_ref()).map_or_else(dash, |shm| Bytes(shm.free).to_string()),
        facts.map_or_else(dash, |facts| facts.gpus.count.to_string()),
        host.slots.len().to_string(),
    ]
}

fn connections(examination: &Examination) -> String {
    let (hosts, rows) = (&examination.hosts, &examination.connections);
    if rows.is_empty() {
        return String::new();
    }
    if hosts.len() > SMALL {
        let tried = rows.iter().flatten().flatten().count();
        let reached = rows.iter().flatten().flatten().filter(|cell| cell.is_ok()).count();
        return format!("\n{reached} of {tried} connections between the hosts succeed\n");
    }
    let mut headings = vec!["from \\ to".to_owned()];
    headings.extend(hosts.iter().map(|host| format!(">{}", host.host)));
    let mut table = Columns::new(&headings);
    for (host, row) in hosts.iter().zip(rows) {
        let cell = |cell: &Connected| match cell {
            None => dash(),
            Some(Ok(seconds)) => format!("{:.2} ms", seconds * 1e3),
            Some(Err(_)) => "FAIL".to_owned(),
        };
        table.row(std::iter::once(host.host.clone()).chain(row.iter().map(cell)));
    }
    format!("\n{}", table.render("  "))
}
