//! The report as text.

use std::fmt::Write as _;

use deepspeed_launch::facts::HostFacts;
use deepspeed_monitor::memory::Bytes;

use super::ops;

const RULE: &str = "--------------------------------------------------";

/// Width of names in the lines and in the table that look like the original's.
const NAME: usize = 34;
const OPERATION: usize = 24;

/// What a job would use, and why: (what, which).
pub(super) fn used(facts: &HostFacts) -> Vec<(&'static str, String)> {
    let python = facts.python.as_ref();
    let torch = python.and_then(|python| python.torch.as_ref());
    let none = || "none found".to_owned();
    let cpu_wanted = facts.environment.get("DS_ACCELERATOR").is_some_and(|name| name == "cpu");
    let gpus = facts.gpus.count;
    let ranks = match (gpus, cpu_wanted) {
        (0, _) => format!("{}, one for each CPU core, as no NVIDIA GPU is found", facts.cpu.cores),
        (_, true) => format!("{}, one for each CPU core, as DS_ACCELERATOR=cpu", facts.cpu.cores),
        (gpus, false) => match facts.environment.get("CUDA_VISIBLE_DEVICES") {
            Some(visible) => {
                format!("one for each GPU of CUDA_VISIBLE_DEVICES={visible}, of {gpus} there are")
            }
            None => format!("{gpus}, one for each GPU"),
        },
    };
    let kernels = facts.cpu.kernels.join(", ");
    let kernel = match facts.environment.get("DS_ISA") {
        Some(limit) => format!("{}, by DS_ISA={limit} (this CPU can: {kernels})", facts.cpu.kernel_in_use),
        None => format!("{}, the widest that this CPU can (of {kernels})", facts.cpu.kernel_in_use),
    };
    let collectives = if gpus > 0 && !cpu_wanted {
        match torch.map(|torch| &torch.nccl) {
            Some(Some(nccl)) => format!("NCCL {nccl}, which comes with torch"),
            _ => "NCCL, as torch carries it".to_owned(),
        }
    } else {
        "shared memory between the ranks of this host (2 MiB for each, none of it in /dev/shm); gloo between hosts"
            .to_owned()
    };
    let io = match &facts.io_uring_refused {
        None => "io_uring, which this kernel allows".to_owned(),
        Some(why) => format!("a pool of threads, as io_uring is refused: {why}"),
    };
    let hosts = match facts.program_path("ssh") {
        Some(path) => format!("ssh ({})", path.display()),
        None => none(),
    };
    vec![
        (
            "python",
            python.map_or_else(none, |python| format!("{} ({})", python.version, python.path.display())),
        ),
        ("torch", torch.map_or_else(none, |torch| format!("{} ({})", torch.version, torch.path.display()))),
        ("ranks", ranks),
        ("kernels", kernel),
        ("collectives", collectives),
        ("NVMe offload", io),
        ("other hosts", hosts),
    ]
}

/// All but what is missing and the tables.
pub(super) fn facts(facts: &HostFacts) -> String {
    let mut text =
        format!("deepspeed {} ({})\n\nA job here would use\n", facts.version, facts.program.display());
    for (what, which) in used(facts) {
        line(&mut text, what, &which);
    }
    text += "\nThis host\n";
    line(&mut text, "name", &facts.hostname);
    line(&mut text, "system", &facts.system);
    let (cores, allowed) = (facts.cpu.cores, facts.cpu.cores_allowed);
    let quota = if cores < allowed {
        format!(" (a quota, of {allowed} in the affinity mask)")
    } else {
        String::new()
    };
    line(&mut text, "processor", &facts.cpu.model);
    line(&mut text, "cores", &format!("{cores}{quota}"));
    line(&mut text, "extensions", &facts.cpu.extensions.join(" "));
    let (free, total) = (Bytes(facts.memory.free), Bytes(facts.memory.total));
    line(&mut text, "memory", &format!("{free} free of {total} ({})", facts.memory.limited_by));
    let shm = facts.shm.as_ref();
    let shm = shm.map(|shm| format!("{} free of {}", Bytes(shm.free), Bytes(shm.size)));
    line(&mut text, "/dev/shm", &shm.unwrap_or_else(|| "none".to_owned()));
    let limit = |limit: Option<u64>| limit.map_or_else(|| "unlimited".to_owned(), |limit| limit.to_string());
    let locked =
        facts.limits.locked_memory.map_or_else(|| "unlimited".to_owned(), |limit| Bytes(limit).to_string());
    line(
        &mut text,
        "limits",
        &format!(
            "locked memory {locked}, open files {}, processes {}",
            limit(facts.limits.open_files),
            limit(facts.limits.processes)
        ),
    );
    line(&mut text, "GPUs", &gpus(facts));
    let programs: Vec<String> = facts
        .programs
        .iter()
        .map(|(name, path)| match path {
            Some(path) => format!("{name} ({})", path.display()),
            None => format!("no {name}"),
        })
        .collect();
    line(&mut text, "programs", &programs.join(", "));
    if let Some(python) = &facts.python {
        let packages: Vec<String> =
            python.packages.iter().map(|package| format!("{} {}", package.name, package.version)).collect();
        let packages =
            if packages.is_empty() { "none of those that matter".to_owned() } else { packages.join(", ") };
        line(&mut text, "packages", &packages);
    }
    text += "\nVariables that a job would see\n";
    for (name, value) in &facts.environment {
        let _ = writeln!(text, "  {name}={value}");
    }
    for (path, names) in &facts.env_files {
        let _ = writeln!(text, "  {} sets {}", path.display(), names.join(", "));
    }
    if facts.environment.is_empty() && facts.env_files.is_empty() {
        text += "  none is set\n";
    }
    text
}

fn line(text: &mut String, what: &str, which: &str) {
    // Writing to a string does not fail.
    let _ = writeln!(text, "  {what:<12}  {which}");
}

fn gpus(facts: &HostFacts) -> String {
    let driver = facts.gpus.driver.as_ref().map(|version| format!(", driver {version}")).unwrap_or_default();
    let mut models: Vec<(String, usize)> = Vec::new();
    for gpu in &facts.gpus.described {
        let model = gpu.model.clone().unwrap_or_else(|| "unknown model".to_owned());
        match models.iter_mut().find(|(known, _)| *known == model) {
            Some((_, count)) => *count += 1,
            None => models.push((model, 1)),
        }
    }
    let models: Vec<String> = models.into_iter().map(|(model, count)| format!("{count} x {model}")).collect();
    let models = if models.is_empty() { String::new() } else { format!(" ({})", models.join(", ")) };
    match facts.gpus.count {
        0 => format!("none{models}{driver}"),
        count => format!("{count}{models}{driver}"),
    }
}

/// What is missing.
pub(super) fn missing(missing: &[String]) -> String {
    if missing.is_empty() {
        return "\nNothing is missing\n".to_owned();
    }
    let mut text = "\nMissing\n".to_owned();
    for one in missing {
        let _ = writeln!(text, "  {one}");
    }
    text
}

/// The table of operations: lines that look like those of the original, and say what serves each.
pub(super) fn operations(facts: &HostFacts) -> String {
    let mut text = format!("\n{RULE}\n");
    let _ = writeln!(text, "{} installed .. compatible", dotted("op name", OPERATION));
    let _ = writeln!(text, "{RULE}");
    for operation in ops::table(facts) {
        let installed = if operation.installed { "[YES]" } else { "[NO]" };
        let compatible = if operation.compatible { "[OKAY]" } else { "[NO]" };
        let name = dotted(operation.name, OPERATION);
        let _ = writeln!(text, "{name} {} {compatible}   {}", dotted(installed, 12), operation.note);
    }
    let _ = writeln!(text, "{RULE}");
    text
}

/// The lines by which people say on what they run, named as in the original.
pub(super) fn general(facts: &HostFacts) -> String {
    let python = facts.python.as_ref();
    let torch = python.and_then(|python| python.torch.as_ref());
    let none = || "None".to_owned();
    let package = python.and_then(|python| python.deepspeed.as_ref());
    let mut text = "\nDeepSpeed general environment info:\n".to_owned();
    for (name, value) in [
        ("torch install path", torch.map_or_else(none, |torch| format!("['{}']", torch.path.display()))),
        ("torch version", torch.map_or_else(none, |torch| torch.version.clone())),
        (
            "deepspeed install path",
            package.map_or_else(none, |package| format!("['{}']", package.path.display())),
        ),
        ("deepspeed info", facts.version.clone()),
        ("torch cuda version", torch.and_then(|torch| torch.cuda.clone()).unwrap_or_else(none)),
        ("torch hip version", torch.and_then(|torch| torch.hip.clone()).unwrap_or_else(none)),
        (
            "shared memory (/dev/shm) size",
            facts.shm.as_ref().map_or_else(none, |shm| Bytes(shm.size).to_string()),
        ),
    ] {
        let _ = writeln!(text, "{} {value}", dotted(name, NAME));
    }
    text
}

/// `name ......`, `width` wide.
fn dotted(name: &str, width: usize) -> String {
    format!("{name} {}", ".".repeat(width.saturating_sub(name.len() + 1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dots() {
        assert_eq!(dotted("abc", 8), "abc ....");
        assert_eq!(dotted("abcdefgh", 4), "abcdefgh ");
    }
}
