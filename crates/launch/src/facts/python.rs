//! The python that ranks run with, and the versions of packages that lie in its folders: from their metadata, without importing them.

use serde::{Deserialize, Serialize};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Asks an interpreter who it is and where it looks for packages.
const QUESTION: &str =
    "import json,sys;print(json.dumps(['.'.join(map(str,sys.version_info[:3])),[p for p in sys.path if p]]))";

/// Starting an interpreter takes 20 ms; longer than this is a network file system that hangs.
const PATIENCE: Duration = Duration::from_secs(10);

/// Packages whose versions are told, as their metadata calls them.
const PACKAGES: [&str; 8] =
    ["numpy", "transformers", "accelerate", "lightning", "safetensors", "mpi4py", "triton", "ninja"];

/// A python.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PythonFacts {
    /// Where it lies.
    pub path: PathBuf,
    /// Its version.
    pub version: String,
    /// torch, where it is installed.
    pub torch: Option<TorchFacts>,
    /// Our Python package, where it is installed.
    pub deepspeed: Option<Package>,
    /// Other packages that matter, of those that are installed.
    pub packages: Vec<Package>,
}

/// torch as its own files describe it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TorchFacts {
    /// Its folder.
    pub path: PathBuf,
    /// Its version.
    pub version: String,
    /// The CUDA that it was built for; `None`: for CPUs.
    pub cuda: Option<String>,
    /// The ROCm that it was built for.
    pub hip: Option<String>,
    /// The version of NCCL that lies beside it, where it is a package of its own.
    pub nccl: Option<String>,
}

/// A package.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Where it lies.
    pub path: PathBuf,
}

impl PythonFacts {
    /// The facts of the interpreter at `python`.
    ///
    /// # Errors
    /// It cannot be started, fails, or does not answer.
    pub(super) fn read(python: &Path) -> Result<Self, String> {
        let answer = output_of(Command::new(python).args(["-c", QUESTION]))
            .map_err(|what| format!("{} {what}", python.display()))?;
        let (version, folders): (String, Vec<PathBuf>) = serde_json::from_slice(&answer)
            .map_err(|error| format!("{} answers what makes no sense: {error}", python.display()))?;
        let installed: Vec<Package> = folders.iter().flat_map(|folder| packages_in(folder)).collect();
        let packages =
            PACKAGES.iter().filter_map(|name| installed.iter().find(|package| package.name == *name));
        let nccl = installed.iter().find(|package| package.name.starts_with("nvidia_nccl"));
        Ok(Self {
            path: python.to_path_buf(),
            version,
            torch: folders.iter().find_map(|folder| torch_in(folder, nccl)),
            deepspeed: folders.iter().find_map(|folder| ours_in(folder)),
            packages: packages.cloned().collect(),
        })
    }
}

/// What a program prints, or why there is no answer. Never waits longer than [`PATIENCE`].
fn output_of(command: &mut Command) -> Result<Vec<u8>, String> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("cannot be started: {error}"))?;
    let began = Instant::now();
    let status = loop {
        // The answer is shorter than a pipe's buffer, so that the program can end before it is read.
        match child.try_wait().map_err(|error| error.to_string())? {
            Some(status) => break status,
            None if began.elapsed() > PATIENCE => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("does not answer within {} s", PATIENCE.as_secs()));
            }
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    if !status.success() {
        return Err(format!("ends with {status} when it is asked for its version"));
    }
    let mut answer = Vec::new();
    if let Some(mut stdout) = child.stdout.take() {
        stdout.read_to_end(&mut answer).map_err(|error| error.to_string())?;
    }
    Ok(answer)
}

/// The packages whose metadata lie in a folder: `<name>-<version>.dist-info`.
fn packages_in(folder: &Path) -> Vec<Package> {
    let entries = fs_err::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            let (name, version) = name.strip_suffix(".dist-info")?.rsplit_once('-')?;
            Some(Package { name: name.to_lowercase(), version: version.to_owned(), path: entry.path() })
        })
        .collect()
}

/// torch, if it lies in this folder.
fn torch_in(folder: &Path, nccl: Option<&Package>) -> Option<TorchFacts> {
    let path = folder.join("torch");
    let text = fs_err::read_to_string(path.join("version.py")).ok()?;
    Some(TorchFacts {
        version: assigned(&text, "__version__")?,
        cuda: assigned(&text, "cuda"),
        hip: assigned(&text, "hip"),
        nccl: nccl.map(|package| package.version.clone()),
        path,
    })
}

/// Our package, if it lies in this folder.
fn ours_in(folder: &Path) -> Option<Package> {
    let path = folder.join("deepspeed");
    let text = fs_err::read_to_string(path.join("__init__.py")).ok()?;
    let version = assigned(&text, "__version__").unwrap_or_else(|| "unknown".to_owned());
    Some(Package { name: "deepspeed".to_owned(), version, path })
}

/// The text that a line `name = 'text'` or `name: type = 'text'` assigns.
fn assigned(python: &str, name: &str) -> Option<String> {
    python.lines().find_map(|line| {
        let rest = line.strip_prefix(name)?;
        let (before, value) = rest.split_once('=')?;
        if !(before.trim().is_empty() || before.trim_start().starts_with(':')) {
            return None;
        }
        let value = value.trim();
        let quote = value.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
        let (text, _) = value[1..].split_once(quote)?;
        Some(text.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use fs_err as fs;

    #[test]
    fn versions_are_read_and_not_imported() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        fs::create_dir_all(at.join("torch")).unwrap();
        let text = "from typing import Optional\n__version__ = '2.9.1+cu128'\ndebug = False\n\
                    cuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n";
        fs::write(at.join("torch/version.py"), text).unwrap();
        for name in ["nvidia_nccl_cu12-2.27.5.dist-info", "numpy-2.1.0.dist-info", "x.txt"] {
            fs::create_dir_all(at.join(name)).unwrap();
        }
        let installed = packages_in(at);
        assert_eq!(installed.len(), 2);
        let nccl = installed.iter().find(|package| package.name.starts_with("nvidia_nccl"));
        let torch = torch_in(at, nccl).unwrap();
        assert_eq!((torch.version.as_str(), torch.cuda.as_deref()), ("2.9.1+cu128", Some("12.8")));
        assert_eq!((torch.hip, torch.nccl.as_deref()), (None, Some("2.27.5")));
        assert_eq!(ours_in(at), None);
    }

    #[test]
    fn a_python_that_does_not_answer_is_an_error() {
        let error = PythonFacts::read(Path::new("/bin/false")).unwrap_err();
        assert!(error.contains("/bin/false ends with"), "{error}");
        let error = PythonFacts::read(Path::new("/bin/echo")).unwrap_err();
        assert!(error.contains("makes no sense"), "{error}");
        let error = PythonFacts::read(Path::new("/not/there")).unwrap_err();
        assert!(error.contains("cannot be started"), "{error}");
    }
}
