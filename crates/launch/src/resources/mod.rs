//! Which slots of this host the job gets: hostfile, filters, counts, `CUDA_VISIBLE_DEVICES`, or all that the machine has.

pub(crate) mod filters;
pub(crate) mod hostfile;

use crate::arguments::args::{DEFAULT_HOSTFILE, LaunchArgs};
use crate::error::LaunchError;
use crate::plan::Note;
use crate::plan::surroundings::Surroundings;
use crate::reach::runner::{self, Runner};
use crate::resources::filters::{Direction, HostSlots, Slot, list_slots};
use deepspeed_discovery::nodelist;
use serde::Serialize;
use std::path::Path;

/// The name of this machine where no hostfile names it.
const LOCAL: &str = "localhost";

/// What a slot stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    /// A GPU that the rank finds through `CUDA_VISIBLE_DEVICES` and its local rank.
    Gpu,
    /// A share of the CPU's cores.
    Cpu,
}

/// Where the ranks go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Resources {
    /// To this machine, which is `hosts[at]`; the other hosts, if any, are started by hand.
    Here { hosts: Vec<HostSlots>, at: usize, device: Device },
    /// To hosts that agents start them on.
    Hosts(Vec<HostSlots>),
}

/// Applies every setting that chooses hosts and slots.
pub(crate) fn resolve(
    args: &LaunchArgs,
    surroundings: &Surroundings,
    notes: &mut Vec<Note>,
) -> Result<Resources, LaunchError> {
    check_contradictions(args)?;
    let mut local_notes = Vec::new();
    // Where the ranks run on other hosts it does not matter what this one has.
    let local = device(surroundings, &mut local_notes);
    let has_gpus = matches!(local, Ok(Device::Gpu));
    let by_slurm = runner::parse(args.launcher.as_deref())? == Some(Runner::Slurm);
    let job = if surroundings.hostfile.is_none() { slurm_job(surroundings)? } else { None };
    let (place, hosts) = match (&surroundings.hostfile, job) {
        (None, Some(hosts)) if by_slurm => ("the Slurm job (SLURM_JOB_NODELIST)".to_owned(), hosts),
        (Some((path, text)), _) => {
            let hosts = hostfile::parse(text, path)?
                .into_iter()
                .map(|entry| HostSlots { host: entry.host, slots: indices(entry.slots as usize) })
                .collect();
            (format!("hostfile {}", path.display()), hosts)
        }
        (None, job) => {
            if let Some(hosts) = job.filter(|hosts| hosts.len() > 1) {
                notes.push(Note::info(format!(
                    "this Slurm job has {} hosts: using this machine only; --launcher slurm uses all of them",
                    hosts.len()
                )));
            }
            if args.hostfile != Path::new(DEFAULT_HOSTFILE) {
                let path = args.hostfile.display();
                notes.push(Note::warning(format!("hostfile {path} does not exist: using this machine only")));
            }
            notes.append(&mut local_notes);
            // That no GPU is found where one is demanded is said below.
            let device = if has_gpus { Device::Gpu } else { Device::Cpu };
            let slots = local_slots(args, surroundings, device, notes);
            let hosts = vec![HostSlots { host: LOCAL.to_owned(), slots }];
            ("the local resources (no hostfile is in use)".to_owned(), hosts)
        }
    };
    let hosts = filter(args, &hosts, &place)?;
    let is_listed = surroundings.hostfile.is_some() || by_slurm && place.starts_with("the Slurm job");
    let hosts = count(args, surroundings, hosts, (has_gpus, is_listed), &place)?;
    let elsewhere = !is_here(&hosts[0].host, surroundings);
    // A Slurm job may have been asked for on a machine that is not part of it.
    let by_job = is_listed && surroundings.hostfile.is_none();
    let several = hosts.len() > 1 || ((args.force_multi || by_job) && elsewhere);
    if several && !args.no_ssh {
        return Ok(Resources::Hosts(hosts));
    }
    let device = local?;
    notes.append(&mut local_notes);
    if surroundings.hostfile.is_some() && device == Device::Gpu && surroundings.visible_devices.is_some() {
        notes.push(Note::info("CUDA_VISIBLE_DEVICES is set aside: the hostfile says which GPUs to use"));
    }
    let at = if hosts.len() == 1 {
        check_single_host(args, surroundings, &hosts[0].host, notes);
        0
    } else {
        by_hand(args, hosts.len(), notes)?
    };
    let ranks = hosts[at].slots.len();
    if device == Device::Cpu && ranks > surroundings.cores {
        let cores = surroundings.cores;
        notes.push(Note::info(format!(
            "{ranks} ranks share {cores} CPU core{}",
            if cores == 1 { "" } else { "s" }
        )));
    }
    Ok(Resources::Here { hosts, at, device })
}

/// The place of this host among several that are started by hand.
fn by_hand(args: &LaunchArgs, hosts: usize, notes: &mut Vec<Note>) -> Result<usize, LaunchError> {
    let at = usize::try_from(args.node_rank).ok().filter(|at| *at < hosts);
    let at = at.ok_or(LaunchError::NodeRank { given: args.node_rank, hosts })?;
    note_unused(
        &[
            ("--launcher", args.launcher.is_some()),
            ("--launcher_addr", !args.launcher_addr.is_empty()),
            ("--launcher_args", !args.launcher_args.is_empty()),
            ("--no_ssh_check", args.no_ssh_check),
            ("--ssh_port", args.ssh_port.is_some()),
            ("--force_multi", args.force_multi),
            ("--venv_script", args.venv_script.is_some()),
        ],
        "with --no_ssh",
        notes,
    );
    Ok(at)
}

fn indices(count: usize) -> Vec<Slot> {
    (0..count).map(|index| Slot::Index(u32::try_from(index).unwrap_or(u32::MAX))).collect()
}

/// Settings that exclude each other, whatever the machine.
fn check_contradictions(args: &LaunchArgs) -> Result<(), LaunchError> {
    for (flag, value) in [("--num_nodes", args.num_nodes), ("--num_gpus", args.num_gpus)] {
        if value < 1 && value != -1 {
            return Err(LaunchError::CountTooSmall { flag, value });
        }
        if value > i64::from(hostfile::MAX_SLOTS) {
            return Err(LaunchError::CountTooLarge { flag, value, most: hostfile::MAX_SLOTS });
        }
    }
    let filter = match (args.include.is_empty(), args.exclude.is_empty()) {
        (false, false) => return Err(LaunchError::IncludeAndExclude),
        (false, true) => "--include",
        (true, false) => "--exclude",
        (true, true) => "",
    };
    let count = match (args.num_nodes, args.num_gpus) {
        (-1, -1) => "",
        (-1, _) => "--num_gpus",
        _ => "--num_nodes",
    };
    if !filter.is_empty() && !count.is_empty() {
        return Err(LaunchError::CountWithFilter { count, filter });
    }
    runner::parse(args.launcher.as_deref())?;
    Ok(())
}

/// Whether slots are GPUs or cores here.
pub(crate) fn device(surroundings: &Surroundings, notes: &mut Vec<Note>) -> Result<Device, LaunchError> {
    match surroundings.accelerator.as_deref() {
        Some("cpu") => return Ok(Device::Cpu),
        Some("cuda") if surroundings.gpus == 0 => {
            return Err(LaunchError::NoGpu { accelerator: "cuda".to_owned() });
        }
        Some("cuda") | None => {}
        Some(other) => notes.push(Note::warning(format!(
            "DS_ACCELERATOR={other}: only NVIDIA GPUs are counted here; say how many ranks with --num_gpus"
        ))),
    }
    if surroundings.gpus == 0 {
        if surroundings.visible_devices.as_deref().is_some_and(|list| !visible(list).is_empty()) {
            notes.push(Note::warning(
                "CUDA_VISIBLE_DEVICES is set, but no NVIDIA GPU is found: using the CPU cores",
            ));
        }
        return Ok(Device::Cpu);
    }
    match surroundings.visible_devices.as_deref() {
        Some(list) if visible(list).is_empty() => {
            notes.push(Note::info(format!(
                "CUDA_VISIBLE_DEVICES={list} hides every GPU: using the CPU cores"
            )));
            Ok(Device::Cpu)
        }
        _ => Ok(Device::Gpu),
    }
}

/// The devices of a `CUDA_VISIBLE_DEVICES`: numbers or unique ids; as CUDA does, it ends at a negative number.
fn visible(list: &str) -> Vec<Slot> {
    list.split(',')
        .map(str::trim)
        .take_while(|word| !word.is_empty() && !word.starts_with('-'))
        .map(Slot::named)
        .collect()
}

/// Slots counted among the devices that a scheduler has given this process, `given` being its `CUDA_VISIBLE_DEVICES`.
///
/// # Errors
/// A slot that is beyond them.
pub(crate) fn among(given: &str, slots: &[Slot]) -> Result<Vec<Slot>, LaunchError> {
    let devices = visible(given);
    if devices.is_empty() {
        return Ok(slots.to_vec());
    }
    slots
        .iter()
        .map(|slot| match slot {
            Slot::Index(index) => devices
                .get(*index as usize)
                .cloned()
                .ok_or(LaunchError::SlotWithoutGpu { slot: *index, gpus: devices.len() }),
            named => Ok(named.clone()),
        })
        .collect()
}

/// The hosts of the Slurm job that this process is part of; `None` outside of one.
///
/// Slots are the GPUs that the job has on a host, or else its tasks there.
///
/// # Errors
/// Slurm's lists cannot be read.
fn slurm_job(surroundings: &Surroundings) -> Result<Option<Vec<HostSlots>>, LaunchError> {
    let variable = |name: &str| surroundings.environment.get(name);
    let Some(list) = variable("SLURM_JOB_NODELIST") else { return Ok(None) };
    let error = |variable| move |source| LaunchError::SlurmList { variable, source };
    let hosts = nodelist::hosts(list).map_err(error("SLURM_JOB_NODELIST"))?;
    let tasks = match variable("SLURM_TASKS_PER_NODE") {
        Some(list) => nodelist::counts(list).map_err(error("SLURM_TASKS_PER_NODE"))?,
        None => Vec::new(),
    };
    let gpus: Option<u32> = variable("SLURM_GPUS_ON_NODE").and_then(|count| count.parse().ok());
    let slots = |at: usize| gpus.or(tasks.get(at).copied()).unwrap_or(1).min(hostfile::MAX_SLOTS);
    Ok(Some(
        hosts
            .iter()
            .enumerate()
            .map(|(at, host)| HostSlots { host: host.clone(), slots: indices(slots(at) as usize) })
            .collect(),
    ))
}

/// The slots of this machine where no hostfile tells.
fn local_slots(
    args: &LaunchArgs,
    surroundings: &Surroundings,
    device: Device,
    notes: &mut Vec<Note>,
) -> Vec<Slot> {
    let filtered = !args.include.is_empty() || !args.exclude.is_empty();
    match (device, surroundings.visible_devices.as_deref()) {
        (Device::Cpu, _) => indices(surroundings.cores.max(1)),
        (Device::Gpu, Some(list)) if filtered => {
            notes.push(Note::info(format!(
                "CUDA_VISIBLE_DEVICES={list} is set aside: --include and --exclude count all GPUs of the machine"
            )));
            indices(surroundings.gpus)
        }
        (Device::Gpu, Some(list)) => {
            let slots = visible(list);
            for slot in &slots {
                if let Slot::Index(index) = slot
                    && *index as usize >= surroundings.gpus
                {
                    let gpus = surroundings.gpus;
                    notes.push(Note::warning(format!(
                        "CUDA_VISIBLE_DEVICES={list} names GPU {index}, but only {gpus} are found"
                    )));
                }
            }
            slots
        }
        (Device::Gpu, None) => indices(surroundings.gpus),
    }
}

/// Applies `--include` or `--exclude`; hosts without slots go in any case.
fn filter(args: &LaunchArgs, hosts: &[HostSlots], place: &str) -> Result<Vec<HostSlots>, LaunchError> {
    let (text, direction) = if !args.include.is_empty() {
        (&args.include, Direction::Include)
    } else if !args.exclude.is_empty() {
        (&args.exclude, Direction::Exclude)
    } else {
        let kept: Vec<HostSlots> = hosts.iter().filter(|host| !host.slots.is_empty()).cloned().collect();
        return if kept.is_empty() {
            Err(LaunchError::NothingLeft { flag: place.to_owned() })
        } else {
            Ok(kept)
        };
    };
    filters::apply(hosts, &filters::parse(text, direction)?, direction, place)
}

/// Applies `--num_nodes` and `--num_gpus`.
fn count(
    args: &LaunchArgs,
    surroundings: &Surroundings,
    mut hosts: Vec<HostSlots>,
    (has_gpus, is_listed): (bool, bool),
    place: &str,
) -> Result<Vec<HostSlots>, LaunchError> {
    if let Ok(nodes) = usize::try_from(args.num_nodes) {
        if nodes > 1 && !is_listed {
            return Err(LaunchError::NodesWithoutHostfile {
                nodes: args.num_nodes,
                looked_for: args.hostfile.clone(),
            });
        }
        if nodes > hosts.len() {
            return Err(LaunchError::TooFewNodes {
                asked: args.num_nodes,
                there: hosts.len(),
                place: place.to_owned(),
            });
        }
        hosts.truncate(nodes);
    }
    let Ok(gpus) = usize::try_from(args.num_gpus) else { return Ok(hosts) };
    for host in &mut hosts {
        if gpus <= host.slots.len() {
            host.slots.truncate(gpus);
        } else if !has_gpus {
            // A CPU slot is a share of the cores, so there can be any number of them.
            host.slots = indices(gpus);
        } else {
            return Err(LaunchError::TooFewGpus {
                asked: args.num_gpus,
                there: host.slots.len(),
                host: host.host.clone(),
                which: list_slots(&host.slots),
                hint: match (&surroundings.hostfile, &surroundings.visible_devices) {
                    (Some((path, _)), _) => format!(", says {}", path.display()),
                    (None, Some(list)) => format!(", for CUDA_VISIBLE_DEVICES={list}"),
                    (None, None) => String::new(),
                },
            });
        }
    }
    Ok(hosts)
}

/// Whether a host's name is this machine's.
fn is_here(host: &str, surroundings: &Surroundings) -> bool {
    let short = |name: &str| name.split('.').next().unwrap_or(name).to_lowercase();
    [LOCAL, "127.0.0.1", "::1"].contains(&host)
        || host == surroundings.hostname
        || short(host) == short(&surroundings.hostname)
}

/// Says which flags for several hosts have no effect on the single one.
fn check_single_host(args: &LaunchArgs, surroundings: &Surroundings, host: &str, notes: &mut Vec<Note>) {
    if !is_here(host, surroundings) {
        notes.push(Note::warning(format!(
            "the hostfile's host '{host}' is not this machine's name ('{}'); as it is the only one, its ranks start here \
             (--force_multi starts them there)",
            surroundings.hostname
        )));
    }
    note_unused(
        &[
            ("--launcher", args.launcher.is_some()),
            ("--launcher_addr", !args.launcher_addr.is_empty()),
            ("--launcher_args", !args.launcher_args.is_empty()),
            ("--node_rank", args.node_rank >= 0),
            ("--no_ssh", args.no_ssh),
            ("--no_ssh_check", args.no_ssh_check),
            ("--ssh_port", args.ssh_port.is_some()),
            ("--force_multi", args.force_multi),
            ("--venv_script", args.venv_script.is_some()),
        ],
        "on one host",
        notes,
    );
}

/// Names the flags that were given and change nothing.
pub(crate) fn note_unused(flags: &[(&str, bool)], when: &str, notes: &mut Vec<Note>) {
    let unused: Vec<&str> = flags.iter().filter_map(|(flag, given)| given.then_some(*flag)).collect();
    if !unused.is_empty() {
        notes.push(Note::info(format!("without effect {when}: {}", unused.join(", "))));
    }
}
