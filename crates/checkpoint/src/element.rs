//! What an element of a stored tensor is. Wider than the engine's dtypes: buffers may be of any type.

use std::{fmt, str::FromStr};

use deepspeed_core::DType;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};

/// The type of the elements of a stored tensor, by the names of the safetensors format: `F32`, `BF16`, `I64`, `BOOL`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Dtype", into = "Dtype")]
pub struct ElementType(Dtype);

/// A type name that cannot be stored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("elements of type `{0}` cannot be stored in a safetensors file")]
pub struct UnknownElementType(pub String);

/// The names PyTorch gives to the types; where there are two, its own favourite first.
const TORCH_NAMES: [(&str, Dtype); 20] = [
    ("float64", Dtype::F64),
    ("double", Dtype::F64),
    ("float32", Dtype::F32),
    ("float", Dtype::F32),
    ("float16", Dtype::F16),
    ("half", Dtype::F16),
    ("bfloat16", Dtype::BF16),
    ("int64", Dtype::I64),
    ("int32", Dtype::I32),
    ("int16", Dtype::I16),
    ("int8", Dtype::I8),
    ("uint64", Dtype::U64),
    ("uint32", Dtype::U32),
    ("uint16", Dtype::U16),
    ("uint8", Dtype::U8),
    ("bool", Dtype::BOOL),
    ("complex64", Dtype::C64),
    ("float8_e4m3fn", Dtype::F8_E4M3),
    ("float8_e5m2", Dtype::F8_E5M2),
    ("float8_e8m0fnu", Dtype::F8_E8M0),
];

impl ElementType {
    /// Single bytes.
    pub(crate) const U8: Self = Self(Dtype::U8);

    /// Bytes per element.
    pub fn size(self) -> usize {
        self.0.bitsize() / 8
    }

    /// The engine's dtype, if it is one the engine trains in.
    pub fn dtype(self) -> Option<DType> {
        match self.0 {
            Dtype::F32 => Some(DType::F32),
            Dtype::F16 => Some(DType::F16),
            Dtype::BF16 => Some(DType::BF16),
            _ => None,
        }
    }

    /// PyTorch's name without `torch.`, for a type that PyTorch has: `int64`.
    pub fn torch_name(self) -> Option<&'static str> {
        TORCH_NAMES.iter().find(|(_, dtype)| *dtype == self.0).map(|(name, _)| *name)
    }

    pub(crate) fn safetensors(self) -> Dtype {
        self.0
    }
}

impl From<DType> for ElementType {
    fn from(dtype: DType) -> Self {
        Self(match dtype {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
        })
    }
}

impl TryFrom<Dtype> for ElementType {
    type Error = UnknownElementType;

    /// Refuses types smaller than a byte: a slice of them need not start at a byte.
    fn try_from(dtype: Dtype) -> Result<Self, UnknownElementType> {
        if dtype.bitsize().is_multiple_of(8) {
            Ok(Self(dtype))
        } else {
            Err(UnknownElementType(dtype.to_string()))
        }
    }
}

impl From<ElementType> for Dtype {
    fn from(element: ElementType) -> Self {
        element.0
    }
}

impl fmt::Display for ElementType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for ElementType {
    type Err = UnknownElementType;

    /// Reads PyTorch's names, with or without `torch.`, and those of the safetensors format.
    fn from_str(text: &str) -> Result<Self, UnknownElementType> {
        let name = text.strip_prefix("torch.").unwrap_or(text);
        if let Some((_, dtype)) = TORCH_NAMES.iter().find(|(torch, _)| *torch == name) {
            return Ok(Self(*dtype));
        }
        let quoted = serde_json::Value::String(name.to_owned());
        let dtype: Dtype = serde_json::from_value(quoted).map_err(|_| UnknownElementType(text.to_owned()))?;
        Self::try_from(dtype)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_both_worlds_are_read() {
        for (text, name, size) in [
            ("torch.int64", "I64", 8),
            ("bool", "BOOL", 1),
            ("BF16", "BF16", 2),
            ("torch.float8_e4m3fn", "F8_E4M3", 1),
        ] {
            let element: ElementType = text.parse().unwrap();
            assert_eq!((element.to_string().as_str(), element.size()), (name, size));
        }
        assert_eq!("torch.int64".parse::<ElementType>().unwrap().torch_name(), Some("int64"));
        assert_eq!("double".parse::<ElementType>().unwrap().torch_name(), Some("float64"));
    }

    #[test]
    fn other_names_are_refused() {
        for text in ["complex128", "", "F4", "f32\""] {
            assert!(text.parse::<ElementType>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_engines_dtypes_round_trip() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            assert_eq!(ElementType::from(dtype).dtype(), Some(dtype));
        }
        assert_eq!(ElementType::U8.dtype(), None);
    }
}
