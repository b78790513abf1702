//! The facts that a plan depends on, read once from this machine: GPUs, cores, environment, files.
//!
//! Counting GPUs opens no CUDA context and loads no library.

use crate::arguments::args::LaunchArgs;
use crate::error::LaunchError;
use crate::reach::runner;
use fs_err as fs;
use std::collections::BTreeMap;
use std::env;
use std::io;
use std::path::{Path, PathBuf};

/// Everything outside the command line that decides what is launched.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Surroundings {
    /// This machine's name.
    pub hostname: String,
    /// NVIDIA GPUs, whatever `CUDA_VISIBLE_DEVICES` says.
    pub gpus: usize,
    /// Cores that this process may keep busy: its affinity mask, cut to the cgroup's quota.
    pub cores: usize,
    /// Numbers of the cores in the affinity mask, ascending.
    pub core_ids: Vec<usize>,
    /// Of those, the first thread of each physical core; read only where cores are to be bound.
    pub physical_core_ids: Vec<usize>,
    /// The hostfile's path and text, if it exists.
    pub hostfile: Option<(PathBuf, String)>,
    /// The environment files found, in the order in which they apply.
    pub env_files: Vec<(PathBuf, String)>,
    /// The python to run scripts with.
    pub python: Option<PathBuf>,
    /// `CUDA_VISIBLE_DEVICES`.
    pub visible_devices: Option<String>,
    /// `DS_ACCELERATOR`.
    pub accelerator: Option<String>,
    /// `OMP_NUM_THREADS`.
    pub omp_num_threads: Option<String>,
    /// `KMP_AFFINITY`.
    pub kmp_affinity: Option<String>,
    /// `VIRTUAL_ENV`.
    pub virtual_env: Option<String>,
    /// Programs on `PATH` that start others on other hosts: ssh, pdsh, mpirun, srun and their like.
    pub tools: Vec<String>,
    /// The current folder.
    pub folder: PathBuf,
    /// This command itself.
    pub program: PathBuf,
    /// The environment, as far as it is text.
    pub environment: BTreeMap<String, String>,
    /// Names of variables whose values are not text.
    pub not_text: Vec<String>,
}

impl Surroundings {
    /// Reads the facts of this machine, of this process's environment, and of the files that `args` name.
    ///
    /// # Errors
    /// A file that exists and cannot be read; an affinity mask that cannot be read.
    pub fn read(args: &LaunchArgs) -> Result<Self, LaunchError> {
        let (mut environment, mut not_text) = (BTreeMap::new(), Vec::new());
        for (name, value) in env::vars_os() {
            let name = name.to_string_lossy().into_owned();
            match value.into_string() {
                Ok(value) => drop(environment.insert(name, value)),
                Err(_) => not_text.push(name),
            }
        }
        Ok(Self {
            hostfile: read_if_there("the hostfile cannot be read", &args.hostfile)?
                .map(|text| (args.hostfile.clone(), text)),
            env_files: read_env_files()?,
            tools: runner::TOOLS
                .iter()
                .filter(|tool| find_on_path(tool).is_some())
                .map(|tool| (*tool).to_owned())
                .collect(),
            folder: env::current_dir().unwrap_or_default(),
            program: env::current_exe().unwrap_or_else(|_| "deepspeed".into()),
            environment,
            not_text,
            ..Self::of_host(args.bind_cores_to_rank)?
        })
    }

    /// Reads the facts of this machine and of this process's environment that decide how a host runs its ranks.
    ///
    /// # Errors
    /// An affinity mask that cannot be read.
    pub(crate) fn of_host(bind_cores: bool) -> Result<Self, LaunchError> {
        let core_ids = allowed_cores()?;
        let physical_core_ids = if bind_cores {
            physical_cores(&core_ids, Path::new("/sys/devices/system/cpu"))
        } else {
            core_ids.clone()
        };
        let variable = |name: &str| env::var_os(name).map(|value| value.to_string_lossy().into_owned());
        let virtual_env = variable("VIRTUAL_ENV").filter(|value| !value.is_empty());
        Ok(Self {
            hostname: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            gpus: count_gpus(Path::new("/")),
            cores: std::thread::available_parallelism().map_or(core_ids.len(), usize::from),
            core_ids,
            physical_core_ids,
            python: find_python(virtual_env.as_deref()),
            visible_devices: variable("CUDA_VISIBLE_DEVICES"),
            accelerator: variable("DS_ACCELERATOR").filter(|value| !value.is_empty()),
            omp_num_threads: variable("OMP_NUM_THREADS").filter(|value| !value.is_empty()),
            kmp_affinity: variable("KMP_AFFINITY").filter(|value| !value.is_empty()),
            virtual_env,
            ..Self::default()
        })
    }
}

/// The text of a file; `None` where there is none. Bytes that are not UTF-8 become replacement characters, so that the
/// parser can point at them.
fn read_if_there(what: &'static str, path: &Path) -> Result<Option<String>, LaunchError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(None)
        }
        Err(source) => Err(LaunchError::File { what, source }),
    }
}

/// The environment files in the home folder, then in the current one. `DS_ENV_FILE` gives another name or a whole path.
pub(crate) fn read_env_files() -> Result<Vec<(PathBuf, String)>, LaunchError> {
    let name =
        env::var_os("DS_ENV_FILE").filter(|name| !name.is_empty()).unwrap_or_else(|| ".deepspeed_env".into());
    let mut paths: Vec<PathBuf> = Vec::new();
    for folder in env::home_dir().into_iter().chain([PathBuf::from(".")]) {
        let path = folder.join(&name);
        if !paths.contains(&path) {
            paths.push(path);
        }
    }
    // The home folder may be the current one.
    if let [first, second] = paths.as_slice()
        && let (Ok(first), Ok(second)) = (fs::canonicalize(first), fs::canonicalize(second))
        && first == second
    {
        paths.remove(0);
    }
    let mut files = Vec::new();
    for path in paths {
        if let Some(text) = read_if_there("the environment file cannot be read", &path)? {
            files.push((path, text));
        }
    }
    Ok(files)
}

/// The cores of this process's affinity mask.
fn allowed_cores() -> Result<Vec<usize>, LaunchError> {
    let set = rustix::thread::sched_getaffinity(None)
        .map_err(|e| LaunchError::System { what: "reading the cores that may be used", source: e.into() })?;
    Ok((0..rustix::thread::CpuSet::MAX_CPU).filter(|core| set.is_set(*core)).collect())
}

/// Of `cores`, those that are the first allowed thread of their physical core; all of them where sysfs does not tell.
fn physical_cores(cores: &[usize], sysfs: &Path) -> Vec<usize> {
    let mut seen: Vec<String> = Vec::new();
    cores
        .iter()
        .copied()
        .filter(|core| {
            let path = sysfs.join(format!("cpu{core}/topology/thread_siblings_list"));
            match fs::read_to_string(path) {
                Ok(siblings) if seen.contains(&siblings) => false,
                Ok(siblings) => {
                    seen.push(siblings);
                    true
                }
                Err(_) => true,
            }
        })
        .collect()
}

/// Counts NVIDIA GPUs by the driver's folder and by the device files; where both tell, a container may show all of the
/// machine in one and its own in the other, so the smaller number holds.
fn count_gpus(root: &Path) -> usize {
    let entries = |folder: &str| -> Vec<String> {
        fs::read_dir(root.join(folder))
            .map(|list| {
                list.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
            })
            .unwrap_or_default()
    };
    let driver = entries("proc/driver/nvidia/gpus").len();
    let is_gpu = |name: &String| {
        name.strip_prefix("nvidia").is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    };
    let devices = if driver > 0 || root.join("dev/nvidiactl").exists() || root.join("dev/nvidia0").exists() {
        entries("dev").iter().filter(|name| is_gpu(name)).count()
    } else {
        0
    };
    if driver > 0 && devices > 0 { driver.min(devices) } else { driver.max(devices) }
}

/// The python beside this command (they share an environment), else of `VIRTUAL_ENV`, else on `PATH`.
fn find_python(virtual_env: Option<&str>) -> Option<PathBuf> {
    let beside = env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_path_buf));
    let in_folder = |folder: PathBuf| -> Option<PathBuf> {
        ["python", "python3"].iter().map(|name| folder.join(name)).find(|path| is_executable(path))
    };
    beside
        .and_then(in_folder)
        .or_else(|| virtual_env.and_then(|folder| in_folder(Path::new(folder).join("bin"))))
        .or_else(|| find_on_path("python3"))
        .or_else(|| find_on_path("python"))
}

/// The first executable file of that name in the folders of `PATH`.
pub(crate) fn find_on_path(name: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?)
        .filter(|folder| !folder.as_os_str().is_empty())
        .map(|folder| folder.join(name))
        .find(|path| is_executable(path))
}

/// Whether a path is a file that this process may execute.
pub(crate) fn is_executable(path: &Path) -> bool {
    path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_counted_without_a_driver_library() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(count_gpus(root.path()), 0);
        for gpu in ["0000:01:00.0", "0000:02:00.0"] {
            fs::create_dir_all(root.path().join("proc/driver/nvidia/gpus").join(gpu)).unwrap();
        }
        assert_eq!(count_gpus(root.path()), 2);
        fs::create_dir_all(root.path().join("dev")).unwrap();
        for file in ["nvidia1", "nvidiactl", "nvidia-uvm", "null"] {
            fs::write(root.path().join("dev").join(file), "").unwrap();
        }
        assert_eq!(count_gpus(root.path()), 1);
        fs::remove_dir_all(root.path().join("proc")).unwrap();
        assert_eq!(count_gpus(root.path()), 1);
    }

    #[test]
    fn one_thread_of_each_physical_core() {
        let sysfs = tempfile::tempdir().unwrap();
        for (core, siblings) in [(0, "0,2\n"), (1, "1,3\n"), (2, "0,2\n"), (3, "1,3\n")] {
            let folder = sysfs.path().join(format!("cpu{core}/topology"));
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("thread_siblings_list"), siblings).unwrap();
        }
        assert_eq!(physical_cores(&[0, 1, 2, 3], sysfs.path()), [0, 1]);
        assert_eq!(physical_cores(&[2, 3], sysfs.path()), [2, 3]);
        assert_eq!(physical_cores(&[7, 8], sysfs.path()), [7, 8]);
    }
}
