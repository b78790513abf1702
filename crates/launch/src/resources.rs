//! Which slots of this host the job gets: hostfile, filters, counts, `CUDA_VISIBLE_DEVICES`, or all that the machine has.

use crate::args::{DEFAULT_HOSTFILE, LaunchArgs};
use crate::error::LaunchError;
use crate::filters::{self, Direction, HostSlots, Slot, list_slots};
use crate::hostfile;
use crate::nearest::nearest;
use crate::plan::Note;
use crate::surroundings::Surroundings;
use serde::Serialize;
use std::path::Path;

/// The name of this machine where no hostfile names it.
const LOCAL: &str = "localhost";

/// Programs that reach several hosts, by the names that `--launcher` takes.
const LAUNCHERS: [&str; 6] = ["pdsh", "openmpi", "mpich", "impi", "slurm", "mvapich"];

/// What a slot stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    /// A GPU that the rank finds through `CUDA_VISIBLE_DEVICES` and its local rank.
    Gpu,
    /// A share of the CPU's cores.
    Cpu,
}

/// The slots of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LocalSlots {
    pub(crate) host: String,
    pub(crate) device: Device,
    pub(crate) slots: Vec<Slot>,
}

/// Applies every setting that chooses hosts and slots.
pub(crate) fn resolve(
    args: &LaunchArgs,
    surroundings: &Surroundings,
    notes: &mut Vec<Note>,
) -> Result<LocalSlots, LaunchError> {
    check_contradictions(args)?;
    let device = device(surroundings, notes)?;
    let (place, hosts) = match &surroundings.hostfile {
        Some((path, text)) => {
            let hosts = hostfile::parse(text, path)?
                .into_iter()
                .map(|entry| HostSlots { host: entry.host, slots: indices(entry.slots as usize) })
                .collect();
            if device == Device::Gpu && surroundings.visible_devices.is_some() {
                notes.push(Note::info(
                    "CUDA_VISIBLE_DEVICES is set aside: the hostfile says which GPUs to use",
                ));
            }
            (format!("hostfile {}", path.display()), hosts)
        }
        None => {
            if args.hostfile != Path::new(DEFAULT_HOSTFILE) {
                let path = args.hostfile.display();
                notes.push(Note::warning(format!("hostfile {path} does not exist: using this machine only")));
            }
            let hosts = vec![HostSlots {
                host: LOCAL.to_owned(),
                slots: local_slots(args, surroundings, device, notes),
            }];
            ("the local resources (no hostfile is in use)".to_owned(), hosts)
        }
    };
    let hosts = filter(args, &hosts, &place)?;
    let hosts = count(args, surroundings, hosts, device, &place)?;
    let [host] = hosts.as_slice() else {
        let hosts = hosts.into_iter().map(|host| host.host).collect();
        return Err(LaunchError::MultiHost { setting: place, hosts });
    };
    check_single_host(args, surroundings, &host.host, notes)?;
    if device == Device::Cpu && host.slots.len() > surroundings.cores {
        let (ranks, cores) = (host.slots.len(), surroundings.cores);
        notes.push(Note::info(format!(
            "{ranks} ranks share {cores} CPU core{}",
            if cores == 1 { "" } else { "s" }
        )));
    }
    Ok(LocalSlots { host: host.host.clone(), device, slots: host.slots.clone() })
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
    if let Some(name) = &args.launcher
        && !LAUNCHERS.contains(&name.to_lowercase().as_str())
    {
        return Err(LaunchError::UnknownValue {
            flag: "--launcher",
            value: name.clone(),
            known: LAUNCHERS.join(", "),
            nearest: nearest(&name.to_lowercase(), LAUNCHERS)
                .map_or_else(String::new, |near| format!("; did you mean '{near}'?")),
        });
    }
    Ok(())
}

/// Whether slots are GPUs or cores here.
fn device(surroundings: &Surroundings, notes: &mut Vec<Note>) -> Result<Device, LaunchError> {
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
        .map(|word| word.parse().map_or_else(|_| Slot::Device(word.to_owned()), Slot::Index))
        .collect()
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
    device: Device,
    place: &str,
) -> Result<Vec<HostSlots>, LaunchError> {
    if let Ok(nodes) = usize::try_from(args.num_nodes) {
        if nodes > 1 && surroundings.hostfile.is_none() {
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
        } else if device == Device::Cpu {
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

/// Says which flags for several hosts have no effect on the single one, and refuses a host that is another machine where the user
/// insists on reaching it.
fn check_single_host(
    args: &LaunchArgs,
    surroundings: &Surroundings,
    host: &str,
    notes: &mut Vec<Note>,
) -> Result<(), LaunchError> {
    let short = |name: &str| name.split('.').next().unwrap_or(name).to_lowercase();
    let is_here = [LOCAL, "127.0.0.1", "::1"].contains(&host)
        || host == surroundings.hostname
        || short(host) == short(&surroundings.hostname);
    if !is_here {
        if args.force_multi {
            return Err(LaunchError::NotBuilt {
                setting: format!("--force_multi with the host '{host}', which is not this machine,"),
                hint: "; without --force_multi a single host's ranks start here",
            });
        }
        notes.push(Note::warning(format!(
            "the hostfile's host '{host}' is not this machine's name ('{}'); as it is the only one, its ranks start here",
            surroundings.hostname
        )));
    }
    let unused: Vec<&str> = [
        ("--launcher", args.launcher.is_some()),
        ("--launcher_args", !args.launcher_args.is_empty()),
        ("--node_rank", args.node_rank >= 0),
        ("--no_ssh", args.no_ssh),
        ("--no_ssh_check", args.no_ssh_check),
        ("--ssh_port", args.ssh_port.is_some()),
        ("--force_multi", args.force_multi),
        ("--venv_script", args.venv_script.is_some()),
    ]
    .into_iter()
    .filter_map(|(flag, given)| given.then_some(flag))
    .collect();
    if !unused.is_empty() {
        notes.push(Note::info(format!("without effect on one host: {}", unused.join(", "))));
    }
    Ok(())
}
