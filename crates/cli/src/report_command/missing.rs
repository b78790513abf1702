//! What a job could miss here, and what to do about it.

use deepspeed_launch::facts::HostFacts;

/// `/dev/shm` below this is too small for the workers of data loaders and for NCCL.
const SMALL_SHM: u64 = 1 << 30;

/// Below this a rank with many peers, shards and libraries runs out of files.
const FEW_FILES: u64 = 1024;

/// One sentence each.
pub(super) fn missing(facts: &HostFacts) -> Vec<String> {
    let mut missing = Vec::new();
    let mut say = |text: String| missing.push(text);
    match &facts.python {
        None => say(format!("python: {}", facts.python_problem.clone().unwrap_or_default())),
        Some(python) => {
            match &python.torch {
                None => say(format!("torch: {} has none; `pip install torch`", python.path.display())),
                Some(torch) if facts.gpus.count > 0 && torch.cuda.is_none() => say(format!(
                    "CUDA in torch: this host has {} GPUs, and torch {} is built for CPUs; install one with CUDA",
                    facts.gpus.count, torch.version
                )),
                Some(_) => {}
            }
            match &python.deepspeed {
                None => say(format!(
                    "the Python package deepspeed: {} has none; `pip install deepspeed`",
                    python.path.display()
                )),
                Some(package) if package.version != facts.version => say(format!(
                    "one version of deepspeed: this command has {}, the Python package in {} {}",
                    facts.version,
                    package.path.display(),
                    package.version
                )),
                Some(_) => {}
            }
        }
    }
    if let Some(problem) = &facts.cpu.kernel_problem {
        say(problem.clone());
    }
    if let Some(why) = &facts.io_uring_refused {
        say(format!(
            "io_uring, for offload to NVMe: {why}; a pool of threads takes its place, which is slower"
        ));
    }
    match &facts.shm {
        None => say("/dev/shm: there is none; workers of data loaders and NCCL need it".to_owned()),
        Some(shm) if shm.free < SMALL_SHM => {
            let free = deepspeed_monitor::memory::Bytes(shm.free);
            say(format!(
                "room in /dev/shm: {free} are free; workers of data loaders and NCCL need more (docker run --shm-size=8g)"
            ));
        }
        Some(_) => {}
    }
    if let Some(files) = facts.limits.open_files.filter(|files| *files < FEW_FILES) {
        say(format!("open files: only {files} at a time; raise `ulimit -n`"));
    }
    if facts.program_path("ssh").is_none() {
        say("ssh, to reach other hosts: install OpenSSH's client; one host needs none".to_owned());
    }
    if facts.gpus.count == 0 && facts.gpus.driver.is_some() {
        say("GPUs: the driver is loaded, but there is no /dev/nvidia0; was the container started without them?".to_owned());
    }
    missing
}
