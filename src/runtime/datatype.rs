//! The Open Inference Protocol's datatypes, and what the engine calls them.

use std::fmt;

use tract_onnx::prelude::DatumType;

/// A datatype of the Open Inference Protocol that an ONNX tensor can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Datatype {
    Bool,
    Int8,
    Int16,
    Int32,
    Int64,
    Uint8,
    Uint16,
    Uint32,
    Uint64,
    Fp16,
    Fp32,
    Fp64,
    Bytes,
}

impl Datatype {
    const ALL: [Self; 13] = [
        Self::Bool,
        Self::Int8,
        Self::Int16,
        Self::Int32,
        Self::Int64,
        Self::Uint8,
        Self::Uint16,
        Self::Uint32,
        Self::Uint64,
        Self::Fp16,
        Self::Fp32,
        Self::Fp64,
        Self::Bytes,
    ];

    /// The protocol's name for it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Bool => "BOOL",
            Self::Int8 => "INT8",
            Self::Int16 => "INT16",
            Self::Int32 => "INT32",
            Self::Int64 => "INT64",
            Self::Uint8 => "UINT8",
            Self::Uint16 => "UINT16",
            Self::Uint32 => "UINT32",
            Self::Uint64 => "UINT64",
            Self::Fp16 => "FP16",
            Self::Fp32 => "FP32",
            Self::Fp64 => "FP64",
            Self::Bytes => "BYTES",
        }
    }

    /// The datatype that the protocol names so.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|datatype| datatype.name() == name)
    }

    /// The datatype under which clients see the engine's `datum`. A dimension is a number to them.
    pub(crate) fn from_datum(datum: DatumType) -> Option<Self> {
        if datum == DatumType::TDim {
            return Some(Self::Int64);
        }
        let plain = datum.unquantized();
        Self::ALL.into_iter().find(|datatype| datatype.datum() == plain)
    }

    /// What the engine calls it.
    pub(crate) const fn datum(self) -> DatumType {
        match self {
            Self::Bool => DatumType::Bool,
            Self::Int8 => DatumType::I8,
            Self::Int16 => DatumType::I16,
            Self::Int32 => DatumType::I32,
            Self::Int64 => DatumType::I64,
            Self::Uint8 => DatumType::U8,
            Self::Uint16 => DatumType::U16,
            Self::Uint32 => DatumType::U32,
            Self::Uint64 => DatumType::U64,
            Self::Fp16 => DatumType::F16,
            Self::Fp32 => DatumType::F32,
            Self::Fp64 => DatumType::F64,
            Self::Bytes => DatumType::String,
        }
    }

    /// The bytes of one element, or `None` where elements have lengths of their own.
    pub(crate) const fn width(self) -> Option<usize> {
        match self {
            Self::Bool | Self::Int8 | Self::Uint8 => Some(1),
            Self::Int16 | Self::Uint16 | Self::Fp16 => Some(2),
            Self::Int32 | Self::Uint32 | Self::Fp32 => Some(4),
            Self::Int64 | Self::Uint64 | Self::Fp64 => Some(8),
            Self::Bytes => None,
        }
    }
}

impl fmt::Display for Datatype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Calls `$call` with `$T` as the Rust type of `$datatype`'s elements.
macro_rules! with_element {
    ($datatype:expr, $T:ident => $call:expr) => {{
        use $crate::runtime::datatype::Datatype;
        match $datatype {
            Datatype::Bool => {
                type $T = bool;
                $call
            }
            Datatype::Int8 => {
                type $T = i8;
                $call
            }
            Datatype::Int16 => {
                type $T = i16;
                $call
            }
            Datatype::Int32 => {
                type $T = i32;
                $call
            }
            Datatype::Int64 => {
                type $T = i64;
                $call
            }
            Datatype::Uint8 => {
                type $T = u8;
                $call
            }
            Datatype::Uint16 => {
                type $T = u16;
                $call
            }
            Datatype::Uint32 => {
                type $T = u32;
                $call
            }
            Datatype::Uint64 => {
                type $T = u64;
                $call
            }
            Datatype::Fp16 => {
                type $T = tract_onnx::prelude::f16;
                $call
            }
            Datatype::Fp32 => {
                type $T = f32;
                $call
            }
            Datatype::Fp64 => {
                type $T = f64;
                $call
            }
            Datatype::Bytes => {
                type $T = String;
                $call
            }
        }
    }};
}
pub(crate) use with_element;
