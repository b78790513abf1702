//! TensorBoard's event files, written without TensorFlow: records of small protocol buffers.
//!
//! A record is its length (u64), the masked CRC-32C of that, the message, and the masked CRC-32C of it, all little-endian.
//! The messages are those of tensorflow/core/util/event.proto and framework/summary.proto:
//!
//! ```text
//! Event   { 1: double wall_time, 2: int64 step, 3: string file_version | 5: Summary summary }
//! Summary { 1: repeated Value { 1: string tag, 2: float simple_value } }
//! ```

use std::{
    io::{self, Write},
    path::Path,
};

use fs_err as fs;

use super::{Metric, Sink, crc32c};

/// A file that TensorBoard shows.
#[derive(Debug)]
pub struct TensorBoardFile {
    file: fs::File,
}

impl TensorBoardFile {
    /// [`TensorBoardFile::create`] for this host and process.
    ///
    /// # Errors
    /// As there.
    pub fn of_this_process(folder: &Path, now: f64) -> io::Result<Self> {
        let host = rustix::system::uname();
        Self::create(folder, now, &host.nodename().to_string_lossy(), std::process::id())
    }

    /// Makes an event file in `folder`; `now` is in seconds since 1970, `host` and `process` tell files of one moment
    /// apart.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn create(folder: &Path, now: f64, host: &str, process: u32) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        // Two monitors of one process may start in the same second.
        for number in 0.. {
            let name = format!("events.out.tfevents.{:010}.{host}.{process}.{number}", now as u64);
            match fs::OpenOptions::new().create_new(true).append(true).open(folder.join(name)) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                opened => {
                    let mut file = opened?;
                    let mut event = wall_time(now);
                    bytes(&mut event, 3, b"brain.Event:2");
                    file.write_all(&record(&event))?;
                    return Ok(Self { file });
                }
            }
        }
        Err(io::Error::other("no free name"))
    }
}

impl Sink for TensorBoardFile {
    fn write(&mut self, metrics: &[Metric], now: f64) -> io::Result<()> {
        let mut all = Vec::new();
        for metric in metrics {
            all.extend(record(&event(metric, now)));
        }
        self.file.write_all(&all)
    }
}

fn event(metric: &Metric, now: f64) -> Vec<u8> {
    let mut value = Vec::new();
    bytes(&mut value, 1, metric.tag.as_bytes());
    key(&mut value, 2, 5);
    value.extend((metric.value as f32).to_le_bytes());
    let mut summary = Vec::new();
    bytes(&mut summary, 1, &value);
    let mut event = wall_time(now);
    key(&mut event, 2, 0);
    varint(&mut event, metric.samples);
    bytes(&mut event, 5, &summary);
    event
}

fn record(message: &[u8]) -> Vec<u8> {
    let length = (message.len() as u64).to_le_bytes();
    let mut out = Vec::with_capacity(message.len() + 16);
    out.extend(length);
    out.extend(crc32c::masked(&length).to_le_bytes());
    out.extend(message);
    out.extend(crc32c::masked(message).to_le_bytes());
    out
}

fn wall_time(now: f64) -> Vec<u8> {
    let mut event = Vec::new();
    key(&mut event, 1, 1);
    event.extend(now.to_le_bytes());
    event
}

/// The key of a field: its number and how it is encoded (0 varint, 1 eight bytes, 2 length and bytes, 5 four bytes).
fn key(out: &mut Vec<u8>, field: u64, encoding: u64) {
    varint(out, field << 3 | encoding);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn bytes(out: &mut Vec<u8>, field: u64, content: &[u8]) {
    key(out, field, 2);
    varint(out, content.len() as u64);
    out.extend(content);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_has_the_bytes_of_the_format() {
        let metric = Metric { tag: "lr".to_owned(), value: 0.5, samples: 300 };
        let expected: Vec<u8> = [
            &[0x09][..],
            &2.0_f64.to_le_bytes(),
            &[0x10, 0xac, 0x02, 0x2a, 0x0b, 0x0a, 0x09, 0x0a, 0x02, b'l', b'r', 0x15],
            &0.5_f32.to_le_bytes(),
        ]
        .concat();
        assert_eq!(event(&metric, 2.0), expected);
    }

    #[test]
    fn files_of_one_moment_have_different_names() {
        let folder = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            TensorBoardFile::create(folder.path(), 1.5e9, "here", 7).unwrap();
        }
        let mut names: Vec<_> = fs::read_dir(folder.path())
            .unwrap()
            .map(|it| it.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        let stem = "events.out.tfevents.1500000000.here.7";
        assert_eq!(names, [format!("{stem}.0"), format!("{stem}.1")]);
    }
}
