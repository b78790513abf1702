//! What the launcher's host asks the others when it examines them, and what they answer.

use crate::facts::HostFacts;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// A question to a host. Each has one answer of the same name.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Question {
    /// What time is it?
    Clock,
    /// What do you have; and is there this folder?
    Facts { folder: PathBuf },
    /// Listen for the other hosts, who prove themselves by this word.
    Listen { word: String },
    /// Can you reach these?
    Reach { word: String, targets: Vec<Target> },
    /// Write a file of this name into the folder; it goes when the examination ends.
    Write { folder: PathBuf, name: String, text: String },
    /// Do you see these files (name, text) in the folder?
    Read { folder: PathBuf, files: Vec<(String, String)> },
    /// Remove the file that you have written.
    Clear,
}

/// Where a host listens.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Target {
    /// Its address or name.
    pub(crate) address: String,
    /// Its port.
    pub(crate) port: u16,
}

/// A host's answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// Time since 1970.
    Clock(Duration),
    /// All that it has, and what is wrong with the folder.
    Facts { facts: Box<HostFacts>, folder: Option<String> },
    /// The port, or why none could be had.
    Listen(Result<u16, String>),
    /// For each target: the time to connect, or why it could not be reached.
    Reach(Vec<Result<Duration, String>>),
    /// Whether it is written.
    Write(Result<(), String>),
    /// For each file: whether it is there, or why not.
    Read(Vec<Result<(), String>>),
    /// Why it could not be removed.
    Clear(Option<String>),
}
