//! Metrics as CSV: a folder with one file for each tag.

use std::{
    collections::HashMap,
    io::{self, Write},
    path::{Path, PathBuf},
};

use fs_err as fs;

use super::{Metric, Sink};

/// A folder of files `Train_Samples_lr.csv`, each with a head line and lines of samples and value. A file that is there
/// is continued.
#[derive(Debug)]
pub struct CsvFolder {
    folder: PathBuf,
    files: HashMap<String, fs::File>,
}

impl CsvFolder {
    /// Makes the folder.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn create(folder: &Path) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        Ok(Self { folder: folder.to_owned(), files: HashMap::new() })
    }

    fn open(&self, tag: &str) -> io::Result<fs::File> {
        let safe = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' };
        let name: String = tag.chars().map(safe).collect();
        let path = self.folder.join(name).with_added_extension("csv");
        let mut file = fs::OpenOptions::new().create(true).append(true).open(path)?;
        if file.metadata()?.len() == 0 {
            writeln!(file, "step,{}", quoted(tag))?;
        }
        Ok(file)
    }
}

impl Sink for CsvFolder {
    fn write(&mut self, metrics: &[Metric], _now: f64) -> io::Result<()> {
        for Metric { tag, value, samples } in metrics {
            if !self.files.contains_key(tag) {
                self.files.insert(tag.clone(), self.open(tag)?);
            }
            if let Some(file) = self.files.get_mut(tag) {
                // One write for a line, so that a program that reads along sees whole lines.
                file.write_all(format!("{samples},{value}\n").as_bytes())?;
            }
        }
        Ok(())
    }
}

/// A field of a CSV file (RFC 4180).
fn quoted(field: &str) -> String {
    if field.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", field.replace('"', "\"\""))
    } else {
        field.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_for_each_tag_and_it_is_continued() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("logs/job");
        let metric = |tag: &str, value, samples| Metric { tag: tag.to_owned(), value, samples };
        for samples in [8, 16] {
            let mut csv = CsvFolder::create(&folder).unwrap();
            csv.write(&[metric("Train/Samples/lr", 0.5, samples), metric("a,b", 1e-9, samples)], 0.0)
                .unwrap();
        }
        let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
        assert_eq!(read("Train_Samples_lr.csv"), "step,Train/Samples/lr\n8,0.5\n16,0.5\n");
        assert_eq!(read("a_b.csv"), "step,\"a,b\"\n8,0.000000001\n16,0.000000001\n");
    }
}
