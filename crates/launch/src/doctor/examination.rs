//! What an examination finds out, and the order in which it asks.

use super::examiner::now;
use super::party::{Party, Reply};
use super::question::{Answer, Question, Target};
use super::{DoctorArgs, Examiner, judge};
use crate::error::LaunchError;
use crate::facts::HostFacts;
use crate::hosts::meeting;
use crate::plan::hosts_plan::HostsPlan;
use crate::plan::surroundings::Surroundings;
use crate::plan::{self, LaunchPlan, Plan};
use crate::port;
use crate::resources::filters::Slot;
use crate::secret;
use crate::wire::message::{Hello, Order};
use serde::Serialize;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// How often each host is asked for its time; the fastest answer counts.
const CLOCK_ROUNDS: usize = 3;

/// Whether a host connects to another one: in so many seconds, or why not; `None` where it was not tried.
pub type Connected = Option<Result<f64, String>>;

/// Everything that is known when the hosts have been asked.
#[derive(Debug, Clone, Serialize)]
pub struct Examination {
    /// The host on which the command runs.
    pub here: HostFacts,
    /// The hostfile, where one is in use.
    pub hostfile: Option<PathBuf>,
    /// The folder in which the job would run.
    pub folder: PathBuf,
    /// The hosts of the job.
    pub hosts: Vec<HostExamination>,
    /// Where rank 0 would await the others.
    pub meeting: Option<Meeting>,
    /// Row by row: whether a host connects to each other one.
    pub connections: Vec<Vec<Connected>>,
    /// The shared folder, where one was named.
    pub shared_folder: Option<SharedFolder>,
}

/// One host.
#[derive(Debug, Clone, Serialize)]
pub struct HostExamination {
    /// Its name in the hostfile.
    pub host: String,
    /// The slots that the job would use.
    pub slots: Vec<Slot>,
    /// Why it is of no use.
    pub problem: Option<String>,
    /// Seconds until it had presented itself.
    pub answered_in: Option<f64>,
    /// The version of its deepspeed.
    pub version: Option<String>,
    /// Its clock.
    pub clock: Option<Clock>,
    /// What it has.
    pub facts: Option<HostFacts>,
    /// What is wrong with the job's folder there.
    pub folder_problem: Option<String>,
}

/// A host's clock against that of this host.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Clock {
    /// Seconds that it is ahead; negative: behind.
    pub ahead: f64,
    /// By so much the number may be wrong: half the time of question and answer.
    pub uncertainty: f64,
}

/// Where rank 0 would await the others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Meeting {
    /// The first host.
    pub host: String,
    /// The address by which the others would look for it.
    pub address: String,
    /// A port that is free there, or why the wanted one is not.
    pub port: Result<u16, String>,
    /// Whether the port was asked for.
    pub port_given: bool,
}

/// A folder that all hosts are said to share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SharedFolder {
    /// The folder.
    pub path: PathBuf,
    /// For each host: why it cannot write there.
    pub write_problems: Vec<Option<String>>,
    /// Row by row: why a host does not see what each host has written.
    pub read_problems: Vec<Vec<Option<String>>>,
}

/// Examines the hosts. `progress` is told what is being done.
///
/// # Errors
/// Arguments, hostfile or filters that a launch would refuse; ssh cannot be started. What is wrong with hosts is no error but a finding.
pub fn examine(args: &DoctorArgs, progress: &mut dyn FnMut(&str)) -> Result<Examination, LaunchError> {
    let mut flags: Vec<OsString> = Vec::new();
    for (name, value) in [
        ("--venv_script=", args.venv_script.clone().map(OsString::from)),
        ("--master_addr=", args.master_addr.clone().map(OsString::from)),
        ("--master_port=", args.master_port.map(|port| port.to_string().into())),
    ] {
        if let Some(value) = value {
            let mut flag = OsString::from(name);
            flag.push(value);
            flags.push(flag);
        }
    }
    let folder = args.shared_folder.as_ref().map(std::path::absolute).transpose();
    let folder =
        folder.map_err(|source| LaunchError::System { what: "finding the current folder", source })?;
    let args = &DoctorArgs { shared_folder: folder, ..args.clone() };
    let launch = args.hosts.as_launch(&flags)?;
    let surroundings = Surroundings::read(&launch)?;
    let mut examination = Examination {
        here: HostFacts::read(),
        hostfile: surroundings.hostfile.as_ref().map(|(path, _)| path.clone()),
        folder: surroundings.folder.clone(),
        hosts: Vec::new(),
        meeting: None,
        connections: Vec::new(),
        shared_folder: None,
    };
    match plan::resolve(&launch, &surroundings)? {
        Plan::Here(plan) => here(&plan, args, &mut examination)?,
        Plan::Hosts(plan) => hosts(plan, args, &mut examination, progress)?,
    }
    Ok(examination)
}

impl Examination {
    /// What is wrong, the gravest first.
    pub fn findings(&self) -> Vec<judge::Finding> {
        judge::judge(self)
    }

    /// The whole as text.
    pub fn render(&self) -> String {
        super::render::render(self, &self.findings())
    }
}

/// A job on this machine only: no connections, no clocks.
fn here(plan: &LaunchPlan, args: &DoctorArgs, examination: &mut Examination) -> Result<(), LaunchError> {
    examination.hosts.push(HostExamination {
        host: plan.host.clone(),
        slots: plan.slots.clone(),
        problem: None,
        answered_in: None,
        version: Some(examination.here.version.clone()),
        clock: None,
        facts: Some(examination.here.clone()),
        folder_problem: None,
    });
    let port = match args.master_port {
        Some(port) => port::check_free(port).map(|()| port),
        None => port::choose_free(),
    };
    examination.meeting = Some(Meeting {
        host: plan.host.clone(),
        address: plan.master_addr.clone(),
        port: port.map_err(|error| error.to_string()),
        port_given: args.master_port.is_some(),
    });
    if let Some(folder) = &args.shared_folder {
        let (name, text) = file_name(&secret::new()?, 0);
        let mut host = Examiner::default();
        let write = Question::Write { folder: folder.clone(), name: name.clone(), text: text.clone() };
        let write = match host.answer(write) {
            Answer::Write(written) => written.err(),
            _ => None,
        };
        let read = match host.answer(Question::Read { folder: folder.clone(), files: vec![(name, text)] }) {
            Answer::Read(seen) if write.is_none() => seen.into_iter().map(Result::err).collect(),
            _ => vec![None],
        };
        examination.shared_folder = Some(SharedFolder {
            path: folder.clone(),
            write_problems: vec![write],
            read_problems: vec![read],
        });
    }
    Ok(())
}

fn file_name(word: &str, at: usize) -> (String, String) {
    let short = &word[..word.len().min(12)];
    (format!(".deepspeed-doctor-{short}-{at}"), format!("written by host {at} of {short}\n"))
}

fn hosts(
    plan: HostsPlan,
    args: &DoctorArgs,
    examination: &mut Examination,
    progress: &mut dyn FnMut(&str),
) -> Result<(), LaunchError> {
    let count = plan.parts.len();
    let ours = env!("CARGO_PKG_VERSION");
    progress(&format!("connecting to {count} hosts"));
    let mut party = Party::open(&plan.connections)?;
    party.await_hellos()?;
    for member in &mut party.members {
        if let Some((hello, _)) = &member.hello
            && hello.version != ours
            && member.lost.is_none()
        {
            member.lost = Some(format!(
                "its deepspeed ({}) has version {}, this one {ours}; install the same one on every host",
                hello.program.display(),
                hello.version
            ));
        }
    }
    progress("comparing clocks");
    let mut clocks: Vec<Option<Clock>> = vec![None; count];
    for _ in 0..CLOCK_ROUNDS {
        let sent = now();
        let answers = party.question(|_| Some(Question::Clock))?;
        for (clock, answer) in clocks.iter_mut().zip(answers) {
            if let Some((Answer::Clock(theirs), took)) = answer {
                let seen = read_clock(sent, theirs, took);
                if clock.is_none_or(|best| seen.uncertainty < best.uncertainty) {
                    *clock = Some(seen);
                }
            }
        }
    }
    progress("reading versions, memory and devices");
    let facts = party.question(|_| Some(Question::Facts { folder: plan.folder.clone() }))?;
    progress("connecting every host to every other");
    examination.connections = connections(&plan, &mut party)?;
    examination.meeting = meeting(&plan, args, &mut party)?;
    if let Some(folder) = &args.shared_folder {
        progress("writing to and reading from the shared folder");
        examination.shared_folder = Some(shared_folder(folder, count, &mut party)?);
    }
    for (((part, member), clock), facts) in plan.parts.into_iter().zip(&party.members).zip(clocks).zip(facts)
    {
        let (facts, folder_problem) = match facts {
            Some((Answer::Facts { facts, folder }, _)) => (Some(*facts), folder),
            _ => (None, None),
        };
        examination.hosts.push(HostExamination {
            host: part.host,
            slots: part.slots,
            problem: member.lost.clone(),
            answered_in: member.hello.as_ref().map(|(_, took)| took.as_secs_f64()),
            version: member.hello.as_ref().map(|(hello, _)| hello.version.clone()),
            clock,
            facts,
            folder_problem,
        });
    }
    Ok(())
}

/// A host's clock, by its answer to a question that was sent at `sent` by our clock and answered `took` later: if both ways take the
/// same time it has looked at its clock in the middle.
fn read_clock(sent: Duration, theirs: Duration, took: Duration) -> Clock {
    let uncertainty = took.as_secs_f64() / 2.0;
    Clock { ahead: theirs.as_secs_f64() - sent.as_secs_f64() - uncertainty, uncertainty }
}

/// Every host connects to every other one.
fn connections(plan: &HostsPlan, party: &mut Party) -> Result<Vec<Vec<Connected>>, LaunchError> {
    let count = plan.parts.len();
    let word = secret::new()?;
    let ports = party.question(|_| Some(Question::Listen { word: word.clone() }))?;
    let hellos: Vec<Option<Hello>> =
        party.members.iter().map(|member| member.hello.as_ref().map(|(hello, _)| hello.clone())).collect();
    // Where a host listens, as the others would look for it; or why it does not.
    let targets: Vec<Option<Result<Target, String>>> = ports
        .into_iter()
        .enumerate()
        .map(|(at, answer)| match answer {
            Some((Answer::Listen(Ok(port)), _)) => {
                Some(Ok(Target { address: address_of(at, &plan.parts[at].host, &hellos), port }))
            }
            Some((Answer::Listen(Err(error)), _)) => Some(Err(format!("it cannot listen: {error}"))),
            _ => None,
        })
        .collect();
    let others = |from: usize| -> Vec<usize> {
        (0..count).filter(|to| *to != from && matches!(targets[*to], Some(Ok(_)))).collect()
    };
    let answers = party.question(|from| {
        let targets = others(from).into_iter().filter_map(|to| targets[to].clone()?.ok()).collect();
        Some(Question::Reach { word: word.clone(), targets })
    })?;
    let mut table: Vec<Vec<Connected>> = vec![vec![None; count]; count];
    for (from, answer) in answers.into_iter().enumerate() {
        let Some((Answer::Reach(reached), _)) = answer else { continue };
        for (to, reached) in others(from).into_iter().zip(reached) {
            table[from][to] = Some(reached.map(|took| took.as_secs_f64()));
        }
        for to in (0..count).filter(|to| *to != from) {
            if let Some(Err(error)) = &targets[to] {
                table[from][to] = Some(Err(error.clone()));
            }
        }
    }
    Ok(table)
}

/// The address of a host for the others.
fn address_of(at: usize, name: &str, hellos: &[Option<Hello>]) -> String {
    let others = hellos.iter().enumerate().filter(|(other, _)| *other != at);
    let mut ordered: Vec<Hello> = hellos[at].iter().cloned().collect();
    ordered.extend(others.filter_map(|(_, hello)| hello.clone()));
    meeting::address(name, &ordered)
}

/// Where rank 0 would await the others, as a launch decides it.
fn meeting(plan: &HostsPlan, args: &DoctorArgs, party: &mut Party) -> Result<Option<Meeting>, LaunchError> {
    let first = &plan.parts[0];
    let hellos: Vec<Option<Hello>> =
        party.members.iter().map(|member| member.hello.as_ref().map(|(hello, _)| hello.clone())).collect();
    let address = if first.master_addr.is_empty() {
        address_of(0, &first.host, &hellos)
    } else {
        first.master_addr.clone()
    };
    let replies = party.ask(|at| (at == 0).then_some(Order::Port(args.master_port)))?;
    Ok(match replies.into_iter().next().flatten() {
        Some((Reply::Port(port), _)) => {
            Some(Meeting { host: first.host.clone(), address, port, port_given: args.master_port.is_some() })
        }
        _ => None,
    })
}

/// Every host writes a file, and every host looks for all of them.
fn shared_folder(
    folder: &std::path::Path,
    count: usize,
    party: &mut Party,
) -> Result<SharedFolder, LaunchError> {
    let word = secret::new()?;
    let files: Vec<(String, String)> = (0..count).map(|at| file_name(&word, at)).collect();
    let folder = folder.to_path_buf();
    let written = party.question(|at| {
        let (name, text) = files[at].clone();
        Some(Question::Write { folder: folder.clone(), name, text })
    })?;
    let is_written: Vec<bool> =
        written.iter().map(|answer| matches!(answer, Some((Answer::Write(Ok(())), _)))).collect();
    let to_see: Vec<usize> = (0..count).filter(|at| is_written[*at]).collect();
    let seen = party.question(|_| {
        let files = to_see.iter().map(|at| files[*at].clone()).collect();
        Some(Question::Read { folder: folder.clone(), files })
    })?;
    let cleared = party.question(|_| Some(Question::Clear))?;
    let mut read_problems = vec![vec![None; count]; count];
    for (reader, answer) in seen.into_iter().enumerate() {
        let Some((Answer::Read(seen), _)) = answer else { continue };
        for (writer, seen) in to_see.iter().zip(seen) {
            read_problems[reader][*writer] = seen.err();
        }
    }
    let write_problems = written
        .into_iter()
        .zip(cleared)
        .map(|answers| match answers {
            (Some((Answer::Write(Err(error)), _)), _) => Some(error),
            (_, Some((Answer::Clear(error), _))) => {
                error.map(|error| format!("it cannot remove a file: {error}"))
            }
            _ => None,
        })
        .collect();
    Ok(SharedFolder { path: folder, write_problems, read_problems })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_read_in_the_middle_of_question_and_answer() {
        let at = Duration::from_millis;
        let clock = read_clock(at(1000), at(1005), at(10));
        assert!(clock.ahead.abs() < 1e-9 && (clock.uncertainty - 0.005).abs() < 1e-9);
        assert!((read_clock(at(1000), at(500), at(0)).ahead + 0.5).abs() < 1e-9);
    }
}
