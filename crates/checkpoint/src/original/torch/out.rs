//! Writing a torch file: entries in order, elements as they come, nothing held back.

use std::ops::Range;

use crate::{
    ElementType,
    original::pickle::{Object, StoredTensor, write},
};

/// Storages start at multiples of this, as torch's own do.
const ALIGNMENT: u64 = 64;

/// The memory of one or more tensors, to be written as one entry.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Storage {
    pub(crate) dtype: ElementType,
    pub(crate) numel: usize,
}

impl Storage {
    /// The tensor that is the part `range` of storage number `index`.
    pub(crate) fn tensor(&self, index: usize, range: Range<usize>, shape: Vec<usize>) -> Option<Object> {
        let class = storage_class(self.dtype)?;
        let (storage_numel, offset) = (self.numel, range.start);
        Some(Object::Tensor(StoredTensor { storage: index, class, storage_numel, offset, shape }))
    }
}

/// torch's class of a storage of these elements.
pub(crate) fn storage_class(dtype: ElementType) -> Option<&'static str> {
    Some(match dtype.torch_name()? {
        "float64" => "DoubleStorage",
        "float32" => "FloatStorage",
        "float16" => "HalfStorage",
        "bfloat16" => "BFloat16Storage",
        "int64" => "LongStorage",
        "int32" => "IntStorage",
        "int16" => "ShortStorage",
        "int8" => "CharStorage",
        "uint8" => "ByteStorage",
        "bool" => "BoolStorage",
        "complex64" => "ComplexFloatStorage",
        _ => return None,
    })
}

/// What is written where; `E` is the error of whoever takes the bytes.
pub(crate) struct TorchWriter<W> {
    sink: W,
    name: String,
    at: u64,
    directory: Vec<u8>,
    count: u64,
    storages: usize,
    /// Of the entry that is being written: its header's offset, its name, its length, its checksum so far.
    current: Option<(u64, String, u64, crc32fast::Hasher)>,
}

impl<E, W: FnMut(&[u8]) -> Result<(), E>> TorchWriter<W> {
    /// Starts a file whose archive is called `name`, with its pickle. Storages follow in the order of their numbers.
    ///
    /// # Errors
    /// What `sink` says, here and in all methods.
    pub(crate) fn start(sink: W, name: &str, object: &Object) -> Result<Self, E> {
        let mut writer = Self {
            sink,
            name: name.to_owned(),
            at: 0,
            directory: Vec::new(),
            count: 0,
            storages: 0,
            current: None,
        };
        writer.entry("data.pkl", &write(object))?;
        writer.entry("byteorder", b"little")?;
        Ok(writer)
    }

    /// Begins the next storage.
    pub(crate) fn begin_storage(&mut self) -> Result<(), E> {
        let name = format!("data/{}", self.storages);
        self.storages += 1;
        self.begin(&name)
    }

    /// More bytes of the storage.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> Result<(), E> {
        if let Some((_, _, len, hasher)) = &mut self.current {
            *len += bytes.len() as u64;
            hasher.update(bytes);
        }
        self.raw(bytes)
    }

    /// Ends the storage.
    pub(crate) fn end_storage(&mut self) -> Result<(), E> {
        let Some((header_at, name, len, hasher)) = self.current.take() else { return Ok(()) };
        let crc = hasher.finalize();
        // Sizes and checksum follow the bytes, as the header could not know them.
        let mut descriptor = b"PK\x07\x08".to_vec();
        descriptor.extend(crc.to_le_bytes());
        descriptor.extend(len.to_le_bytes());
        descriptor.extend(len.to_le_bytes());
        self.raw(&descriptor)?;
        let record = &mut self.directory;
        record.extend(b"PK\x01\x02");
        for word in [VERSION, VERSION, FLAGS, 0, 0, DATE] {
            record.extend(word.to_le_bytes());
        }
        record.extend(crc.to_le_bytes());
        record.extend([0xff; 8]);
        record.extend((name.len() as u16).to_le_bytes());
        record.extend(28u16.to_le_bytes());
        record.extend([0; 10]);
        record.extend([0xff; 4]);
        record.extend(name.as_bytes());
        record.extend([1, 0, 24, 0]);
        for wide in [len, len, header_at] {
            record.extend(wide.to_le_bytes());
        }
        self.count += 1;
        Ok(())
    }

    /// Ends the file.
    pub(crate) fn finish(mut self) -> Result<(), E> {
        self.entry("version", b"3\n")?;
        let directory = std::mem::take(&mut self.directory);
        let start = self.at;
        self.raw(&directory)?;
        let end_at = self.at;
        let mut end = b"PK\x06\x06".to_vec();
        end.extend(44u64.to_le_bytes());
        end.extend([VERSION.to_le_bytes(), VERSION.to_le_bytes()].concat());
        end.extend([0; 8]);
        for wide in [self.count, self.count, directory.len() as u64, start] {
            end.extend(wide.to_le_bytes());
        }
        end.extend(b"PK\x06\x07\0\0\0\0");
        end.extend(end_at.to_le_bytes());
        end.extend(1u32.to_le_bytes());
        end.extend(b"PK\x05\x06\0\0\0\0");
        end.extend([0xff; 12]);
        end.extend([0, 0]);
        self.raw(&end)
    }

    fn entry(&mut self, name: &str, bytes: &[u8]) -> Result<(), E> {
        self.begin(name)?;
        self.bytes(bytes)?;
        self.end_storage()
    }

    fn begin(&mut self, name: &str) -> Result<(), E> {
        let name = format!("{}/{name}", self.name);
        let header_at = self.at;
        let mut header = b"PK\x03\x04".to_vec();
        for word in [VERSION, FLAGS, 0, 0, DATE] {
            header.extend(word.to_le_bytes());
        }
        // Checksum and both sizes: see the descriptor.
        header.extend([0; 12]);
        header.extend((name.len() as u16).to_le_bytes());
        // The padding is an extra field of its own, `FB` as torch calls it.
        let before = header_at + 30 + name.len() as u64 + 4;
        let padding = (ALIGNMENT - before % ALIGNMENT) % ALIGNMENT;
        header.extend((padding as u16 + 4).to_le_bytes());
        header.extend(name.as_bytes());
        header.extend(b"FB");
        header.extend((padding as u16).to_le_bytes());
        header.resize(header.len() + padding as usize, b'Z');
        self.raw(&header)?;
        self.current = Some((header_at, name, 0, crc32fast::Hasher::new()));
        Ok(())
    }

    fn raw(&mut self, bytes: &[u8]) -> Result<(), E> {
        self.at += bytes.len() as u64;
        (self.sink)(bytes)
    }
}

/// Needed to extract: version 4.5, which has 64-bit sizes.
const VERSION: u16 = 45;
/// Sizes follow the bytes; names are UTF-8.
const FLAGS: u16 = 1 << 3 | 1 << 11;
/// The first day of 1980.
const DATE: u16 = 1 << 5 | 1;
