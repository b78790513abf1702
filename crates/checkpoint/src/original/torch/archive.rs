//! The directory of a zip archive whose entries are stored without compression, with 64-bit sizes where needed.

use std::{collections::HashMap, fs::File, io, os::unix::fs::FileExt};

/// Sizes of the fixed parts of the records.
const END: usize = 22;
const LOCATOR: usize = 20;
const END64: usize = 56;
const CENTRAL: usize = 46;
const LOCAL: usize = 30;
/// A comment at the end has at most this many bytes.
const MAX_COMMENT: usize = 0xffff;
/// A larger directory is refused: it would name a thousand times as many tensors as the largest models have.
const MAX_DIRECTORY: u64 = 1 << 29;

/// Where an entry's bytes lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    /// First byte within the file.
    pub(crate) offset: u64,
    /// Number of bytes.
    pub(crate) len: u64,
    /// Their checksum; some writers leave it 0.
    pub(crate) crc: u32,
}

/// Why an archive cannot be read.
pub(crate) enum Problem {
    Io(io::Error),
    /// In words.
    Content(String),
}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            Self::Content("it has become shorter".to_owned())
        } else {
            Self::Io(error)
        }
    }
}

impl From<String> for Problem {
    fn from(problem: String) -> Self {
        Self::Content(problem)
    }
}

impl From<&str> for Problem {
    fn from(problem: &str) -> Self {
        Self::Content(problem.to_owned())
    }
}

/// The entries of the archive by name.
///
/// # Errors
/// If it is no archive, is damaged, or holds compressed or encrypted entries.
pub(crate) fn entries(file: &File) -> Result<HashMap<String, Entry>, Problem> {
    let file_len = file.metadata()?.len();
    let mut magic = [0; 4];
    if file_len < END as u64 {
        return Err(format!("a file of {file_len} bytes is no torch file").into());
    }
    file.read_exact_at(&mut magic, 0)?;
    if &magic != b"PK\x03\x04" {
        return Err("it is not a zip archive: torch before 1.6 wrote it, or it is damaged. A newer torch makes one that can \
                    be read of it: torch.save(torch.load(FILE), FILE)"
            .into());
    }
    let (directory_at, directory_len) = find_directory(file, file_len)?;
    if directory_len > MAX_DIRECTORY {
        return Err(format!("a directory of {directory_len} bytes").into());
    }
    let mut directory = vec![0; directory_len as usize];
    file.read_exact_at(&mut directory, directory_at)?;
    let mut found = HashMap::new();
    let mut rest = &directory[..];
    while rest.len() >= CENTRAL && rest.starts_with(b"PK\x01\x02") {
        let (name, entry, len) = central(rest)?;
        let entry = located(file, file_len, &name, entry)?;
        if found.insert(name.clone(), entry).is_some() {
            return Err(format!("two entries are called `{name}`").into());
        }
        rest = &rest[len..];
    }
    if rest.is_empty() { Ok(found) } else { Err("its directory is damaged".into()) }
}

/// Start and length of the directory.
fn find_directory(file: &File, file_len: u64) -> Result<(u64, u64), Problem> {
    let tail_len = file_len.min((END + MAX_COMMENT) as u64) as usize;
    let tail_at = file_len - tail_len as u64;
    let mut tail = vec![0; tail_len];
    file.read_exact_at(&mut tail, tail_at)?;
    let is_end = |at: &usize| {
        let end = &tail[*at..];
        end.starts_with(b"PK\x05\x06") && usize::from(u16_at(end, 20)) == end.len() - END
    };
    let Some(at) = (0..=tail_len - END).rev().find(is_end) else {
        return Err("it has no end: it was cut short".into());
    };
    let end = &tail[at..];
    let (mut len, mut start) = (u64::from(u32_at(end, 12)), u64::from(u32_at(end, 16)));
    let end_at = tail_at + at as u64;
    let small = u16_at(end, 10) != u16::MAX && len != u64::from(u32::MAX) && start != u64::from(u32::MAX);
    if !small && at >= LOCATOR && tail[at - LOCATOR..].starts_with(b"PK\x06\x07") {
        let mut wide = [0; END64];
        file.read_exact_at(&mut wide, u64_at(&tail[at - LOCATOR..], 8))?;
        if !wide.starts_with(b"PK\x06\x06") {
            return Err("its directory is damaged".into());
        }
        (len, start) = (u64_at(&wide, 40), u64_at(&wide, 48));
    }
    match start.checked_add(len) {
        Some(end) if end <= end_at => Ok((start, len)),
        _ => Err("its directory lies outside the file".into()),
    }
}

/// Name, entry (with the offset of its header) and length of a record of the directory.
fn central(record: &[u8]) -> Result<(String, Entry, usize), Problem> {
    let (name_len, extra_len, comment_len) =
        (usize::from(u16_at(record, 28)), usize::from(u16_at(record, 30)), usize::from(u16_at(record, 32)));
    let total = CENTRAL + name_len + extra_len + comment_len;
    if total > record.len() {
        return Err("its directory is damaged".into());
    }
    let name = std::str::from_utf8(&record[CENTRAL..CENTRAL + name_len]);
    let name = name.map_err(|_| "the name of an entry is not text")?.to_owned();
    if u16_at(record, 8) & 1 != 0 || u16_at(record, 10) != 0 {
        return Err(format!("`{name}` is compressed or encrypted, which torch.save never does").into());
    }
    let (mut stored, mut len) = (u64::from(u32_at(record, 20)), u64::from(u32_at(record, 24)));
    let mut offset = u64::from(u32_at(record, 42));
    let wide = wide_fields(&record[CENTRAL + name_len..CENTRAL + name_len + extra_len]);
    let mut wide = wide.chunks_exact(8).map(|bytes| u64_at(bytes, 0));
    for field in [&mut len, &mut stored, &mut offset] {
        if *field == u64::from(u32::MAX) {
            *field = wide.next().ok_or_else(|| format!("the size of `{name}` is missing"))?;
        }
    }
    if len != stored {
        return Err(format!("`{name}` has two sizes, {len} and {stored}").into());
    }
    Ok((name, Entry { offset, len, crc: u32_at(record, 16) }, total))
}

/// The 64-bit fields among the extra fields of a record.
fn wide_fields(mut extra: &[u8]) -> &[u8] {
    while extra.len() >= 4 {
        let (id, len) = (u16_at(extra, 0), usize::from(u16_at(extra, 2)));
        let Some(field) = extra.get(4..4 + len) else { break };
        if id == 1 {
            return field;
        }
        extra = &extra[4 + len..];
    }
    &[]
}

/// `entry` with the offset of its bytes instead of that of its header.
fn located(file: &File, file_len: u64, name: &str, entry: Entry) -> Result<Entry, Problem> {
    let outside = || Problem::Content(format!("`{name}` lies outside the file: it was cut short"));
    let end = entry.offset.checked_add(LOCAL as u64).filter(|end| *end <= file_len).ok_or_else(outside)?;
    let mut header = [0; LOCAL];
    file.read_exact_at(&mut header, entry.offset)?;
    if !header.starts_with(b"PK\x03\x04") {
        return Err(format!("`{name}` is not where the directory says").into());
    }
    let offset = end + u64::from(u16_at(&header, 26)) + u64::from(u16_at(&header, 28));
    match offset.checked_add(entry.len) {
        Some(end) if end <= file_len => Ok(Entry { offset, ..entry }),
        _ => Err(outside()),
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
