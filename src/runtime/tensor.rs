//! Tensors in and out: checked against what the model takes before a byte is allocated, copied once.
//!
//! The protocol's bytes are little-endian, and so must the host be: they are taken as they come.

use bytes::{BufMut as _, Bytes};
use tract_onnx::prelude::{Datum, Tensor, TractError, f16, tract_ndarray::ArrayD};

use super::{
    datatype::Datatype,
    failure::{Failure, Kind, clip, explain},
    plan::{Dim, Plan, Port},
};

#[cfg(target_endian = "big")]
compile_error!("tensors are exchanged with clients as little-endian bytes without being turned around");

/// A shape that has been checked.
pub(crate) type Shape = Vec<usize>;

/// What a client says of one input, in either protocol.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Claim<'a> {
    pub(crate) name: &'a str,
    pub(crate) datatype: &'a str,
    pub(crate) shape: &'a [i64],
}

/// Matches a request's inputs with a model's. Returns for each input of the request its place in the model and
/// its shape. No tensor holds more than `limit` elements, counting an empty axis as one.
///
/// # Errors
/// When an input is missing, unknown, there twice, or not of the wanted type or shape.
pub(crate) fn bind(plan: &Plan, claims: &[Claim<'_>], limit: usize) -> Result<Vec<(usize, Shape)>, Failure> {
    let mut bound: Vec<(usize, Shape)> = Vec::with_capacity(claims.len());
    let mut lengths: Vec<(&str, usize, &str)> = Vec::new();
    for claim in claims {
        let shown = clip(claim.name, 64);
        let Some((index, port)) = Plan::find(&plan.inputs, claim.name) else {
            return Err(Failure::invalid(format!(
                "input {shown:?} is not an input of model {:?}, which takes {}",
                plan.name,
                names(&plan.inputs)
            )));
        };
        if bound.iter().any(|(other, _)| *other == index) {
            return Err(Failure::invalid(format!("input {shown:?} is there twice; send each input once")));
        }
        if Datatype::from_name(claim.datatype) != Some(port.datatype) {
            let came = clip(claim.datatype, 32);
            return Err(Failure::invalid(format!("input {shown:?} came as {came:?}, wanted {}", port.datatype)));
        }
        let shape = fit(port, claim.shape, limit)?;
        for (dim, length) in port.shape.iter().zip(&shape) {
            let Dim::Named(axis) = dim else { continue };
            match lengths.iter().find(|(name, ..)| name == axis) {
                Some((_, other, first)) if other != length => {
                    return Err(Failure::invalid(format!(
                        "input {shown:?} came with {length} along axis {axis:?}, where input {first:?} has {other}; \
                         they must be equal"
                    )));
                }
                Some(_) => {}
                None => lengths.push((axis, *length, &port.name)),
            }
        }
        bound.push((index, shape));
    }
    let missing = plan.inputs.iter().enumerate().find(|(index, _)| !bound.iter().any(|(other, _)| other == index));
    if let Some((_, port)) = missing {
        return Err(Failure::invalid(format!(
            "input {:?} is missing; model {:?} takes {}",
            port.name,
            plan.name,
            names(&plan.inputs)
        )));
    }
    Ok(bound)
}

/// The places of the outputs named `wanted`, or of all of them when none is named.
///
/// # Errors
/// When one is unknown or there twice.
pub(crate) fn outputs<'a>(plan: &Plan, wanted: impl ExactSizeIterator<Item = &'a str>) -> Result<Vec<usize>, Failure> {
    if wanted.len() == 0 {
        return Ok((0..plan.outputs.len()).collect());
    }
    let mut places = Vec::new();
    for name in wanted {
        let shown = clip(name, 64);
        let Some((index, _)) = Plan::find(&plan.outputs, name) else {
            return Err(Failure::invalid(format!(
                "output {shown:?} is not an output of model {:?}, which gives {}",
                plan.name,
                names(&plan.outputs)
            )));
        };
        if places.contains(&index) {
            return Err(Failure::invalid(format!("output {shown:?} is asked for twice; ask for each output once")));
        }
        places.push(index);
    }
    Ok(places)
}

fn names(ports: &[Port]) -> String {
    const SHOWN: usize = 16;
    let mut list = ports.iter().take(SHOWN).map(|port| format!("{:?}", port.name)).collect::<Vec<_>>().join(", ");
    if ports.len() > SHOWN {
        list.push_str(", ...");
    }
    if list.is_empty() { "none".to_owned() } else { list }
}

fn fit(port: &Port, shape: &[i64], limit: usize) -> Result<Shape, Failure> {
    let refuse = || {
        let shown: Vec<_> = shape.iter().take(16).collect();
        Failure::invalid(format!(
            "input {:?} came with shape {shown:?}, wanted {:?} (-1 is any length)",
            port.name,
            port.wire_shape()
        ))
    };
    if shape.len() != port.shape.len() {
        return Err(refuse());
    }
    let mut fitted = Shape::with_capacity(shape.len());
    let mut reach = 1_usize;
    for (came, wanted) in shape.iter().zip(&port.shape) {
        let length = usize::try_from(*came).map_err(|_| refuse())?;
        if matches!(wanted, Dim::Fixed(wanted) if *wanted != length) {
            return Err(refuse());
        }
        reach = reach.checked_mul(length.max(1)).filter(|reach| *reach <= limit).ok_or_else(|| {
            let shown: Vec<_> = shape.iter().take(16).collect();
            Failure::invalid(format!(
                "input {:?} came with shape {shown:?}, which holds more elements than a request can carry",
                port.name
            ))
        })?;
        fitted.push(length);
    }
    Ok(fitted)
}

/// A tensor of `shape`, zeros or empty strings, to be filled through [`slice`].
pub(crate) fn blank(datatype: Datatype, shape: &[usize]) -> Result<Tensor, Failure> {
    let tensor = match datatype {
        Datatype::Bytes => Ok(ArrayD::<String>::default(shape).into()),
        _ => Tensor::zero_dt(datatype.datum(), shape),
    };
    tensor.map_err(|error| engine(&error))
}

/// The elements of a tensor that [`blank`] made.
pub(crate) fn slice<T: Datum>(tensor: &mut Tensor) -> Result<&mut [T], Failure> {
    let view = tensor.to_plain_array_view_mut::<T>().map_err(|error| engine(&error))?;
    view.into_slice().ok_or_else(|| Failure::new(Kind::Internal, "a tensor is not contiguous"))
}

/// The tensor that `raw` holds for `port`.
///
/// # Errors
/// When there are too few or too many bytes, or they don't hold what they should.
pub(crate) fn from_raw(port: &Port, shape: &[usize], raw: &[u8]) -> Result<Tensor, Failure> {
    let count: usize = shape.iter().product();
    let Some(width) = port.datatype.width() else {
        return from_raw_strings(port, shape, count, raw);
    };
    let wanted = count.saturating_mul(width);
    if raw.len() != wanted {
        return Err(Failure::invalid(format!(
            "input {:?} came with {} bytes, wanted {wanted} for {} of shape {shape:?}",
            port.name,
            raw.len(),
            port.datatype
        )));
    }
    let mut tensor = blank(port.datatype, shape)?;
    if port.datatype == Datatype::Bool {
        // Only 0 and 1 are booleans to the engine.
        for (to, from) in slice::<bool>(&mut tensor)?.iter_mut().zip(raw) {
            *to = *from != 0;
        }
    } else if wanted > 0 {
        tensor.as_bytes_mut().copy_from_slice(raw);
    }
    Ok(tensor)
}

/// Strings as the protocol packs them: the length in four bytes, then as many bytes.
fn from_raw_strings(port: &Port, shape: &[usize], count: usize, raw: &[u8]) -> Result<Tensor, Failure> {
    let broken = |problem: &str| Failure::invalid(format!("input {:?} {problem}", port.name));
    // Each string takes four bytes at least: check before allocating for them.
    if raw.len() / 4 < count {
        return Err(broken(&format!("came with {} bytes, too few for the {count} strings of {shape:?}", raw.len())));
    }
    let mut tensor = blank(Datatype::Bytes, shape)?;
    let mut rest = raw;
    for to in slice::<String>(&mut tensor)? {
        let (length, after) = rest.split_first_chunk::<4>().ok_or_else(|| broken("ends within a string's length"))?;
        let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
        let (text, after) = after.split_at_checked(length).ok_or_else(|| broken("ends within a string"))?;
        *to = utf8(port, text)?;
        rest = after;
    }
    if !rest.is_empty() {
        return Err(broken(&format!("has {} bytes after its last string", rest.len())));
    }
    Ok(tensor)
}

/// An element of BYTES, which is text to ONNX.
pub(crate) fn utf8(port: &Port, bytes: &[u8]) -> Result<String, Failure> {
    std::str::from_utf8(bytes)
        .map(str::to_owned)
        .map_err(|_| Failure::invalid(format!("input {:?} holds a string that is not UTF-8", port.name)))
}

/// The bytes of `tensor`, as the protocol packs them.
pub(crate) fn into_raw(tensor: Tensor) -> Result<Bytes, Failure> {
    struct Owner(Tensor);
    impl AsRef<[u8]> for Owner {
        fn as_ref(&self) -> &[u8] {
            self.0.as_bytes()
        }
    }
    if tensor.datum_type() != String::datum_type() {
        return Ok(if tensor.volume() == 0 { Bytes::new() } else { Bytes::from_owner(Owner(tensor)) });
    }
    let mut raw = Vec::new();
    for text in elements::<String>(&tensor)? {
        let length = u32::try_from(text.len())
            .map_err(|_| Failure::new(Kind::Internal, "the model gave a string of more than 4 GiB"))?;
        raw.put_u32_le(length);
        raw.put_slice(text.as_bytes());
    }
    Ok(raw.into())
}

/// The elements of an output.
pub(crate) fn elements<T: Datum>(tensor: &Tensor) -> Result<&[T], Failure> {
    let view = tensor.try_as_plain_ram().map_err(|error| engine(&error))?;
    view.as_slice::<T>().map_err(|error| engine(&error))
}

/// The elements of an output, each turned into `U`.
pub(crate) fn converted<T: Datum + Copy, U: From<T>>(tensor: &Tensor) -> Result<Vec<U>, Failure> {
    Ok(elements::<T>(tensor)?.iter().copied().map(U::from).collect())
}

/// Appends the elements of `tensor` to `out` as a JSON array. JSON has no word for NaN and infinity: they
/// become `null`, and only binary data tells them apart.
pub(crate) fn write_json(out: &mut Vec<u8>, datatype: Datatype, tensor: &Tensor) -> Result<(), Failure> {
    match datatype {
        Datatype::Bool => write(out, elements::<bool>(tensor)?),
        Datatype::Int8 => write(out, elements::<i8>(tensor)?),
        Datatype::Int16 => write(out, elements::<i16>(tensor)?),
        Datatype::Int32 => write(out, elements::<i32>(tensor)?),
        Datatype::Int64 => write(out, elements::<i64>(tensor)?),
        Datatype::Uint8 => write(out, elements::<u8>(tensor)?),
        Datatype::Uint16 => write(out, elements::<u16>(tensor)?),
        Datatype::Uint32 => write(out, elements::<u32>(tensor)?),
        Datatype::Uint64 => write(out, elements::<u64>(tensor)?),
        Datatype::Fp32 => write(out, elements::<f32>(tensor)?),
        Datatype::Fp64 => write(out, elements::<f64>(tensor)?),
        Datatype::Fp16 => write(out, &converted::<f16, f32>(tensor)?),
        Datatype::Bytes => write(out, elements::<String>(tensor)?),
    }
}

fn write<T: serde::Serialize + ?Sized>(out: &mut Vec<u8>, value: &T) -> Result<(), Failure> {
    serde_json::to_writer(out, value).map_err(|error| Failure::new(Kind::Internal, error.to_string()))
}

fn engine(error: &TractError) -> Failure {
    Failure::new(Kind::Internal, explain(error))
}
