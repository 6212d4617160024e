//! Inference requests and answers as JSON, with or without binary tensors behind it.
//!
//! A request's JSON is read twice: first without its tensors, which says what each of them must be, and then
//! its tensors, straight into the memory that the model reads. So a tensor is never held in a second form, the
//! order of keys does not matter, and nothing is allocated for elements that the text is too short to hold.

use std::{borrow::Cow, fmt};

use bytes::Bytes;
use serde::{
    Deserialize,
    de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use tract_onnx::prelude::{Datum, Tensor, f16};

use super::{
    VERSION,
    datatype::{Datatype, with_element},
    failure::{Failure, Kind, clip},
    plan::Plan,
    tensor::{self, Claim},
};

/// A request without its tensors.
#[derive(Debug, Deserialize)]
struct Head<'a> {
    #[serde(borrow, default)]
    id: Option<Cow<'a, str>>,
    #[serde(default)]
    parameters: Option<Parameters>,
    #[serde(borrow)]
    inputs: Vec<Input<'a>>,
    #[serde(borrow, default)]
    outputs: Option<Vec<Output<'a>>>,
}

#[derive(Debug, Deserialize)]
struct Input<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(borrow)]
    datatype: Cow<'a, str>,
    shape: Vec<i64>,
    #[serde(default)]
    parameters: Option<Parameters>,
    #[serde(default)]
    data: Option<IgnoredAny>,
}

#[derive(Debug, Deserialize)]
struct Output<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(default)]
    parameters: Option<Parameters>,
}

/// The parameters that mean something here; others are for other servers.
#[derive(Debug, Default, Deserialize)]
struct Parameters {
    binary_data_size: Option<usize>,
    binary_data: Option<bool>,
    binary_data_output: Option<bool>,
}

/// A request, ready to run.
#[derive(Debug)]
pub(super) struct Call {
    id: Option<String>,
    /// The inputs, in the engine's order.
    pub(super) inputs: Vec<Tensor>,
    /// The places of the outputs that are wanted.
    pub(super) wanted: Vec<usize>,
    /// Which of them are wanted as binary data.
    binary: Vec<bool>,
}

/// An answer: JSON, and behind it the binary tensors.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) body: Vec<u8>,
    /// The length of the JSON, when there is something behind it.
    pub(super) header: Option<usize>,
}

/// Reads the request in `body` for `plan`. The first `header` bytes are its JSON; `None` means all of them. No
/// tensor has more than `limit` elements.
///
/// # Errors
/// When it is not what the protocol or the model asks for.
pub(super) fn read(plan: &Plan, body: &Bytes, header: Option<usize>, limit: usize) -> Result<Call, Failure> {
    let (json, mut raw) = body.split_at_checked(header.unwrap_or(body.len())).ok_or_else(|| {
        let came = body.len();
        Failure::invalid(format!("inference-header-content-length is more than the {came} bytes of the body"))
    })?;
    let head: Head<'_> = serde_json::from_slice(json).map_err(|error| malformed(&error))?;
    let claims: Vec<_> = head
        .inputs
        .iter()
        .map(|input| Claim { name: &input.name, datatype: &input.datatype, shape: &input.shape })
        .collect();
    let bound = tensor::bind(plan, &claims, limit)?;
    let mut slots: Vec<Slot<'_>> = Vec::with_capacity(bound.len());
    // An element takes a character and a comma, but for the last of each input.
    let mut room = json.len() / 2 + bound.len();
    for (input, (index, shape)) in head.inputs.iter().zip(bound) {
        let port = &plan.inputs[index];
        let size = input.parameters.as_ref().and_then(|parameters| parameters.binary_data_size);
        let name = &port.name;
        let slot = match (size, input.data.is_some()) {
            (Some(_), true) => {
                return Err(Failure::invalid(format!("input {name:?} has both data and binary_data_size; send one")));
            }
            (None, false) => {
                return Err(Failure::invalid(format!(
                    "input {name:?} has neither data nor binary_data_size; send one"
                )));
            }
            (Some(size), false) => {
                let (own, rest) = raw.split_at_checked(size).ok_or_else(|| {
                    let left = raw.len();
                    Failure::invalid(format!(
                        "input {name:?} has binary_data_size {size}, but {left} bytes are left behind the JSON; \
                         inference-header-content-length says where the JSON ends"
                    ))
                })?;
                raw = rest;
                Slot { name, index, tensor: tensor::from_raw(port, &shape, own)?, fill: None }
            }
            (None, true) => {
                let count: usize = shape.iter().product();
                room = room.checked_sub(count).ok_or_else(|| {
                    Failure::invalid(format!(
                        "input {name:?} came with fewer values than the {count} that its shape {shape:?} takes"
                    ))
                })?;
                Slot { name, index, tensor: tensor::blank(port.datatype, &shape)?, fill: Some(port.datatype) }
            }
        };
        slots.push(slot);
    }
    if !raw.is_empty() {
        return Err(Failure::invalid(format!("{} bytes at the end of the body belong to no input", raw.len())));
    }
    if slots.iter().any(|slot| slot.fill.is_some()) {
        let mut reader = serde_json::Deserializer::from_slice(json);
        Walk::Request(&mut slots).deserialize(&mut reader).map_err(|error| {
            // The text is well-formed, or the first reading would have failed: what is wrong is a value.
            Failure::invalid(clip(&error.to_string(), 300))
        })?;
    }
    slots.sort_by_key(|slot| slot.index);
    let asked = head.outputs.as_deref().unwrap_or_default();
    let wanted = tensor::outputs(plan, asked.iter().map(|output| &*output.name))?;
    let all = head.parameters.and_then(|parameters| parameters.binary_data_output).unwrap_or(false);
    let own = |place: usize| asked.get(place)?.parameters.as_ref()?.binary_data;
    let binary = (0..wanted.len()).map(|place| own(place).unwrap_or(all)).collect();
    let inputs = slots.into_iter().map(|slot| slot.tensor).collect();
    Ok(Call { id: head.id.map(Cow::into_owned), inputs, wanted, binary })
}

fn malformed(error: &serde_json::Error) -> Failure {
    let problem = clip(&error.to_string(), 200);
    Failure::invalid(format!("the body is not an inference request in JSON: {problem}"))
}

/// Writes the answer to `call`.
///
/// # Errors
/// When an output can't be told.
pub(super) fn write(plan: &Plan, call: &Call, outputs: Vec<Tensor>) -> Result<Answer, Failure> {
    let mut json = Vec::with_capacity(256);
    let mut raw: Vec<Bytes> = Vec::new();
    json.extend_from_slice(b"{\"model_name\":");
    value(&mut json, &plan.name)?;
    json.extend_from_slice(b",\"model_version\":");
    value(&mut json, VERSION)?;
    if let Some(id) = &call.id {
        json.extend_from_slice(b",\"id\":");
        value(&mut json, id)?;
    }
    json.extend_from_slice(b",\"outputs\":[");
    for (place, tensor) in outputs.into_iter().enumerate() {
        let port = &plan.outputs[call.wanted[place]];
        if place > 0 {
            json.push(b',');
        }
        json.extend_from_slice(b"{\"name\":");
        value(&mut json, &port.name)?;
        json.extend_from_slice(b",\"datatype\":");
        value(&mut json, port.datatype.name())?;
        json.extend_from_slice(b",\"shape\":");
        value(&mut json, tensor.shape())?;
        if call.binary[place] {
            let bytes = tensor::into_raw(tensor)?;
            json.extend_from_slice(b",\"parameters\":{\"binary_data_size\":");
            value(&mut json, &bytes.len())?;
            json.push(b'}');
            raw.push(bytes);
        } else {
            json.extend_from_slice(b",\"data\":");
            tensor::write_json(&mut json, port.datatype, &tensor)?;
        }
        json.push(b'}');
    }
    json.extend_from_slice(b"]}");
    let header = (!raw.is_empty()).then_some(json.len());
    json.reserve_exact(raw.iter().map(Bytes::len).sum());
    for bytes in raw {
        json.extend_from_slice(&bytes);
    }
    Ok(Answer { body: json, header })
}

fn value<T: serde::Serialize + ?Sized>(out: &mut Vec<u8>, value: &T) -> Result<(), Failure> {
    serde_json::to_writer(out, value).map_err(|error| Failure::new(Kind::Internal, error.to_string()))
}

/// One input: where it goes, and whether its values are still to come from the JSON.
struct Slot<'a> {
    name: &'a str,
    index: usize,
    tensor: Tensor,
    fill: Option<Datatype>,
}

/// The second reading: down to each input's `data`, past everything else.
enum Walk<'a, 'b> {
    Request(&'a mut [Slot<'b>]),
    Inputs(&'a mut [Slot<'b>]),
    Input(&'a mut Slot<'b>),
    Data(&'a mut Slot<'b>),
}

impl<'de> DeserializeSeed<'de> for Walk<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        match self {
            Self::Request(_) | Self::Input(_) => deserializer.deserialize_map(self),
            Self::Inputs(_) => deserializer.deserialize_seq(self),
            Self::Data(Slot { name, tensor, fill, .. }) => match fill {
                Some(datatype) => {
                    with_element!(*datatype, T => fill_tensor::<T, D>(name, tensor, *datatype, deserializer))
                }
                None => IgnoredAny::deserialize(deserializer).map(drop),
            },
        }
    }
}

impl<'de> Visitor<'de> for Walk<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an inference request")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<Cow<'de, str>>()? {
            match (&mut self, &*key) {
                (Self::Request(slots), "inputs") => map.next_value_seed(Walk::Inputs(slots))?,
                (Self::Input(slot), "data") => map.next_value_seed(Walk::Data(slot))?,
                _ => {
                    let IgnoredAny = map.next_value()?;
                }
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        if let Self::Inputs(slots) = self {
            for slot in slots {
                seq.next_element_seed(Walk::Input(slot))?;
            }
        }
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }
}

fn fill_tensor<'de, T: Element, D: Deserializer<'de>>(
    name: &str,
    tensor: &mut Tensor,
    datatype: Datatype,
    deserializer: D,
) -> Result<(), D::Error> {
    let refuse = |problem: &dyn fmt::Display| de::Error::custom(format!("input {name:?}: {problem}"));
    let shape = tensor.shape().to_vec();
    let slice = tensor::slice::<T>(tensor).map_err(|failure| refuse(&failure))?;
    let wanted = slice.len();
    let mut to = slice.iter_mut();
    Fill { datatype, to: &mut to }.deserialize(deserializer).map_err(|error| refuse(&error))?;
    match to.len() {
        0 => Ok(()),
        left => {
            let came = wanted - left;
            Err(refuse(&format!("data holds {came} values, its shape {shape:?} takes {wanted}")))
        }
    }
}

/// Takes values, flat or nested, in row-major order.
struct Fill<'a, 'b, T> {
    datatype: Datatype,
    to: &'a mut std::slice::IterMut<'b, T>,
}

impl<T: Element> Fill<'_, '_, T> {
    /// Takes `value`, or says that what `came` is none.
    fn put<E: de::Error>(self, value: Option<T>, came: impl fmt::Display) -> Result<(), E> {
        let datatype = self.datatype;
        let value = value.ok_or_else(|| {
            E::custom({
                let came = clip(&came.to_string(), 32);
                format!("the value {came} is not of type {datatype}")
            })
        })?;
        let to = self.to.next().ok_or_else(|| E::custom("data holds more values than its shape takes"))?;
        *to = value;
        Ok(())
    }
}

impl<'de, T: Element> DeserializeSeed<'de> for Fill<'_, '_, T> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, T: Element> Visitor<'de> for Fill<'_, '_, T> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "values of type {}, or arrays of them", self.datatype)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(Fill { datatype: self.datatype, to: &mut *self.to })?.is_some() {}
        Ok(())
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<(), E> {
        self.put(T::from_bool(value), value)
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<(), E> {
        self.put(T::from_integer(value.into()), value)
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<(), E> {
        self.put(T::from_integer(value.into()), value)
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<(), E> {
        self.put(T::from_float(value), value)
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<(), E> {
        self.put(T::from_text(value), format_args!("{value:?}"))
    }

    fn visit_unit<E: de::Error>(self) -> Result<(), E> {
        self.put(T::nothing(), "null")
    }
}

/// An element, from each thing that JSON can say; `None` where that would not be the same thing.
trait Element: Datum {
    fn from_bool(_: bool) -> Option<Self> {
        None
    }
    fn from_integer(_: i128) -> Option<Self> {
        None
    }
    fn from_float(_: f64) -> Option<Self> {
        None
    }
    fn from_text(_: &str) -> Option<Self> {
        None
    }
    fn nothing() -> Option<Self> {
        None
    }
}

impl Element for bool {
    fn from_bool(value: bool) -> Option<Self> {
        Some(value)
    }

    fn from_integer(value: i128) -> Option<Self> {
        match value {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }
}

impl Element for String {
    fn from_text(value: &str) -> Option<Self> {
        Some(value.to_owned())
    }
}

macro_rules! integers {
    ($($T:ty)*) => {$(
        impl Element for $T {
            fn from_integer(value: i128) -> Option<Self> {
                value.try_into().ok()
            }

            // Some clients write 1 as 1.0.
            #[expect(clippy::cast_possible_truncation, reason = "whole and small: exact")]
            fn from_float(value: f64) -> Option<Self> {
                const EXACT: f64 = 9_007_199_254_740_992.0;
                (value.fract() == 0.0 && value.abs() <= EXACT).then_some(value as i128)?.try_into().ok()
            }
        }
    )*};
}
integers!(i8 i16 i32 i64 u8 u16 u32 u64);

macro_rules! floats {
    ($($T:ty: $integer:expr, $float:expr;)*) => {$(
        impl Element for $T {
            #[expect(clippy::cast_precision_loss, reason = "a float holds the nearest number, as everywhere")]
            fn from_integer(value: i128) -> Option<Self> {
                let number: $T = $integer(value);
                number.is_finite().then_some(number)
            }

            fn from_float(value: f64) -> Option<Self> {
                let number: $T = $float(value);
                number.is_finite().then_some(number)
            }

            // As answers write it.
            fn nothing() -> Option<Self> {
                Some(<$T>::NAN)
            }
        }
    )*};
}
#[expect(clippy::cast_possible_truncation, reason = "a float holds the nearest number, as everywhere")]
fn single(value: f64) -> f32 {
    value as f32
}
floats! {
    f16: |value| f16::from_f64(value as f64), f16::from_f64;
    f32: |value| value as f32, single;
    f64: |value| value as f64, |value| value;
}
