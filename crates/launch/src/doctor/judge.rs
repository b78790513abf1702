//! From what an examination has found out to what is wrong with it.

use super::examination::{Examination, HostExamination};
use crate::facts::HostFacts;
use crate::resources::filters::{Slot, list_slots};
use serde::Serialize;
use std::fmt;
use std::net::IpAddr;

/// A clock that is further off is worth a word: times in logs do not fit together.
const CLOCK_DOUBTFUL: f64 = 0.5;

/// A clock that is further off breaks things: dates of files, certificates, tickets.
const CLOCK_WRONG: f64 = 30.0;

/// `/dev/shm` below this is too small for the workers of data loaders and for NCCL; containers have 64 MiB unless told otherwise.
const SMALL_SHM: u64 = 1 << 30;

/// Memory for each rank below which hardly a program with torch runs.
const LITTLE_MEMORY: u64 = 512 << 20;

/// Files that each rank may need open at a time: sockets to the others, shards, libraries.
const FEW_FILES: u64 = 1024;

/// How grave a finding is. Ordered: the gravest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// A job would not start, or would fail.
    Failure,
    /// A job may be slow, or fail later.
    Warning,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Failure => "FAIL",
            Self::Warning => "warn",
        })
    }
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How grave.
    pub level: Level,
    /// What was looked at: `reach`, `versions`, `clock`, `connections`, `port`, `folder`, `shared folder`, `memory`, `shm`, `gpus`,
    /// `limits`, `name`.
    pub check: &'static str,
    /// The host that it is about; `None`: several.
    pub host: Option<String>,
    /// What is wrong, and what to do.
    pub text: String,
}

/// Collects findings.
struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, level: Level, check: &'static str, host: &str, text: impl Into<String>) {
        self.0.push(Finding { level, check, host: Some(host.to_owned()), text: text.into() });
    }

    fn fail(&mut self, check: &'static str, host: &str, text: impl Into<String>) {
        self.add(Level::Failure, check, host, text);
    }

    fn warn(&mut self, check: &'static str, host: &str, text: impl Into<String>) {
        self.add(Level::Warning, check, host, text);
    }
}

/// What is wrong, the gravest first, otherwise in the order of checks.
pub(super) fn judge(examination: &Examination) -> Vec<Finding> {
    let mut findings = Findings(Vec::new());
    for host in &examination.hosts {
        if let Some(problem) = &host.problem {
            findings.fail("reach", &host.host, problem.clone());
        }
        if let Some(problem) = &host.folder_problem {
            let folder = examination.folder.display();
            findings.fail("folder", &host.host, format!("the job would run in {folder}, but {problem}"));
        }
    }
    versions(examination, &mut findings);
    for host in &examination.hosts {
        clock(host, &mut findings);
        if let Some(facts) = &host.facts {
            devices(host, facts, &mut findings);
            resources(host, facts, &mut findings);
        }
    }
    connections(examination, &mut findings);
    meeting(examination, &mut findings);
    shared_folder(examination, &mut findings);
    findings.0.sort_by_key(|finding| finding.level);
    findings.0
}

/// A version of something among a host's facts, where it is there.
type Version<'a> = &'a dyn Fn(&HostFacts) -> Option<String>;

/// python and torch: the same on all hosts, and the same here.
fn versions(examination: &Examination, findings: &mut Findings) {
    let known: Vec<(&str, &HostFacts)> = examination
        .hosts
        .iter()
        .filter_map(|host| Some((host.host.as_str(), host.facts.as_ref()?)))
        .collect();
    for (host, facts) in &known {
        if let Some(problem) = &facts.python_problem {
            findings.fail("versions", host, format!("there is no python for the ranks: {problem}"));
        } else if facts.python.as_ref().is_some_and(|python| python.torch.is_none()) {
            let python = facts.python.as_ref().map(|python| python.path.display().to_string());
            let python = python.unwrap_or_default();
            findings.fail("versions", host, format!("its python ({python}) has no torch; install it there"));
        }
        if let Some(problem) = &facts.cpu.kernel_problem {
            findings.fail("versions", host, problem.clone());
        }
    }
    let python = |facts: &HostFacts| facts.python.as_ref().map(|python| python.version.clone());
    let torch = |facts: &HostFacts| facts.python.as_ref()?.torch.as_ref().map(|torch| torch.version.clone());
    let package =
        |facts: &HostFacts| facts.python.as_ref()?.deepspeed.as_ref().map(|package| package.version.clone());
    let minor = |version: &str| version.rsplit_once('.').map_or(version, |(minor, _)| minor).to_owned();
    let kinds: [(&str, Version<'_>); 3] =
        [("python", &python), ("torch", &torch), ("the deepspeed package", &package)];
    for (what, of) in kinds {
        let Some((first, theirs)) = known.iter().find_map(|(host, facts)| Some((*host, of(facts)?))) else {
            continue;
        };
        let mut all_the_same = true;
        for (host, facts) in &known {
            match of(facts) {
                Some(version) if version == theirs => {}
                Some(version) => {
                    all_the_same = false;
                    let text = format!(
                        "{what} has version {version}, on {first} {theirs}; install the same one on every host"
                    );
                    if what == "python" && minor(&version) == minor(&theirs) {
                        findings.warn("versions", host, text);
                    } else {
                        findings.fail("versions", host, text);
                    }
                }
                None => {}
            }
        }
        if let Some(ours) = of(&examination.here).filter(|ours| all_the_same && *ours != theirs) {
            let host = examination.here.hostname.as_str();
            let text = format!("{what} has version {ours} on this host, {theirs} on those of the job");
            findings.warn("versions", host, text);
        }
    }
}

fn clock(host: &HostExamination, findings: &mut Findings) {
    let Some(clock) = host.clock else { return };
    let certain = clock.ahead.abs() - clock.uncertainty;
    let direction = if clock.ahead > 0.0 { "ahead of" } else { "behind" };
    let text = || {
        format!(
            "its clock is {:.1} s {direction} this host's: times in logs and of files will mislead; set it (chrony, ntpd)",
            clock.ahead.abs()
        )
    };
    if certain > CLOCK_WRONG {
        findings.fail("clock", &host.host, text());
    } else if certain > CLOCK_DOUBTFUL {
        findings.warn("clock", &host.host, text());
    }
}

/// Slots against GPUs and cores.
fn devices(host: &HostExamination, facts: &HostFacts, findings: &mut Findings) {
    let gpus = facts.gpus.count;
    let name = host.host.as_str();
    let accelerator = facts.environment.get("DS_ACCELERATOR").map(String::as_str);
    if gpus > 0 && accelerator != Some("cpu") {
        let is_missing = |slot: &&Slot| matches!(slot, Slot::Index(index) if *index as usize >= gpus);
        let missing: Vec<Slot> = host.slots.iter().filter(is_missing).cloned().collect();
        if !missing.is_empty() {
            let missing = list_slots(&missing);
            let text =
                format!("it has {gpus} GPUs, so there is none for slot {missing}; correct the hostfile");
            findings.fail("gpus", name, text);
        }
    } else if host.slots.len() > facts.cpu.cores {
        let (slots, cores) = (host.slots.len(), facts.cpu.cores);
        let text = format!("it has no GPUs, and {slots} ranks would share {cores} CPU cores");
        findings.warn("gpus", name, text);
    }
    let has_cuda = facts.python.as_ref().and_then(|python| python.torch.as_ref()?.cuda.as_ref()).is_some();
    if gpus > 0 && !has_cuda && facts.python.as_ref().is_some_and(|python| python.torch.is_some()) {
        let text = format!("it has {gpus} GPUs, but its torch is built for CPUs only; install one with CUDA");
        findings.fail("gpus", name, text);
    }
    if gpus == 0 && !facts.gpus.described.is_empty() {
        let text =
            "the driver knows GPUs, but there is no /dev/nvidia0: was the container started without them?";
        findings.warn("gpus", name, text);
    }
}

/// Memory, `/dev/shm` and limits.
fn resources(host: &HostExamination, facts: &HostFacts, findings: &mut Findings) {
    use deepspeed_monitor::memory::Bytes;
    let name = host.host.as_str();
    let ranks = host.slots.len().max(1) as u64;
    let each = facts.memory.free / ranks;
    if each < LITTLE_MEMORY {
        let text = format!(
            "{} of memory are free, {} for each rank ({})",
            Bytes(facts.memory.free),
            Bytes(each),
            facts.memory.limited_by
        );
        findings.warn("memory", name, text);
    }
    match &facts.shm {
        None => findings.warn("shm", name, "there is no /dev/shm: workers of data loaders and NCCL need it"),
        Some(shm) if shm.free < SMALL_SHM => {
            let text = format!(
                "/dev/shm has {} free: workers of data loaders and NCCL need more (docker run --shm-size=8g)",
                Bytes(shm.free)
            );
            findings.warn("shm", name, text);
        }
        Some(_) => {}
    }
    if let Some(files) = facts.limits.open_files.filter(|files| *files < FEW_FILES) {
        findings.warn("limits", name, format!("only {files} files may be open at a time; raise `ulimit -n`"));
    }
}

/// Connections between the hosts, one finding for each pair and reason.
fn connections(examination: &Examination, findings: &mut Findings) {
    for (from, row) in examination.connections.iter().enumerate() {
        let failed: Vec<(usize, &String)> = row
            .iter()
            .enumerate()
            .filter_map(|(to, cell)| Some((to, cell.as_ref()?.as_ref().err()?)))
            .collect();
        let name = |at: usize| examination.hosts[at].host.as_str();
        for (to, error) in &failed {
            findings.fail("connections", name(from), format!("it does not reach {}: {error}", name(*to)));
        }
    }
    // Gloo offers to the others the address that a host's own name stands for.
    let is_loopback =
        |text: &str| text.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback());
    let meets_beyond = examination.meeting.as_ref().is_some_and(|meeting| !is_loopback(&meeting.address));
    for host in examination.hosts.iter().filter(|_| examination.hosts.len() > 1 && meets_beyond) {
        let Some(facts) = &host.facts else { continue };
        let given = facts.environment.contains_key("GLOO_SOCKET_IFNAME");
        match &facts.own_address {
            Some(address) if is_loopback(address) && !given => findings.warn(
                "name",
                &host.host,
                format!(
                    "its own name ({}) stands for {address} there, which gloo would offer to the other hosts; set \
                     GLOO_SOCKET_IFNAME in .deepspeed_env, or correct its /etc/hosts",
                    facts.hostname
                ),
            ),
            _ => {}
        }
    }
}

fn meeting(examination: &Examination, findings: &mut Findings) {
    let Some(meeting) = &examination.meeting else { return };
    if let Err(error) = &meeting.port {
        findings.fail("port", &meeting.host, error.clone());
    }
}

fn shared_folder(examination: &Examination, findings: &mut Findings) {
    let Some(shared) = &examination.shared_folder else { return };
    let name = |at: usize| examination.hosts[at].host.as_str();
    let path = shared.path.display();
    for (at, problem) in shared.write_problems.iter().enumerate() {
        if let Some(problem) = problem {
            findings.fail("shared folder", name(at), format!("it cannot write to {path}: {problem}"));
        }
    }
    for (reader, row) in shared.read_problems.iter().enumerate() {
        let unseen: Vec<&str> = (0..row.len()).filter(|at| row[*at].is_some()).map(name).collect();
        if let Some(problem) = row.iter().flatten().next() {
            let text = format!(
                "in {path} it does not see what {} wrote ({problem}): is the same folder mounted there? else set \
                 checkpoint.use_node_local_storage",
                unseen.join(" and ")
            );
            findings.fail("shared folder", name(reader), text);
        }
    }
}
