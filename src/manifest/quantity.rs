//! Kubernetes quantities of memory.

use crate::domain::memory::Bytes;

/// The bytes that `text` means: `100Ki`, `1.5Gi`, `1.5G`, `1e9`, `334000000`.
///
/// Seldon refuses values that need decimal arithmetic, such as `1.5Gi`; here a value only has to be a whole
/// number of bytes in the end.
///
/// # Errors
/// One clause that says what is wrong: no number, an unknown suffix, a negative value, a part of a byte, or
/// more than can be counted.
pub fn from_quantity(text: &str) -> Result<Bytes, String> {
    let number_end = text
        .char_indices()
        .find(|(at, c)| !(c.is_ascii_digit() || *c == '.' || (*at == 0 && matches!(c, '+' | '-'))))
        .map_or(text.len(), |(at, _)| at);
    let (number, suffix) = text.split_at(number_end);
    if number.starts_with('-') {
        return Err(format!("{text} is negative; memory is not"));
    }
    let number = number.strip_prefix('+').unwrap_or(number);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return Err(format!("{text:?} is not a quantity; write bytes, or a number with Ki, Mi, Gi, Ti, k, M, G or T"));
    }
    let (multiplier, divisor) = scale(suffix).ok_or_else(|| {
        format!("{text:?} has the unknown suffix {suffix:?}; known are Ki, Mi, Gi, Ti, Pi, Ei, k, M, G, T, P, E")
    })?;
    let too_large = || format!("{text} is more than can be counted");
    let digits: u128 = format!("{whole}{fraction}").parse().map_err(|_| too_large())?;
    let below = u32::try_from(fraction.len()).ok().and_then(|n| 10_u128.checked_pow(n)).ok_or_else(too_large)?;
    let numerator = digits.checked_mul(multiplier).ok_or_else(too_large)?;
    let denominator = below.checked_mul(divisor).ok_or_else(too_large)?;
    if !numerator.is_multiple_of(denominator) {
        return Err(format!("{text} is not a whole number of bytes"));
    }
    u64::try_from(numerator / denominator).map(Bytes).map_err(|_| too_large())
}

/// What a suffix multiplies and divides by.
fn scale(suffix: &str) -> Option<(u128, u128)> {
    const DECIMAL: [&str; 7] = ["", "k", "M", "G", "T", "P", "E"];
    const BINARY: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    const SMALL: [&str; 4] = ["", "m", "u", "n"];
    let position =
        |table: &[&str]| table.iter().position(|known| *known == suffix).and_then(|at| u32::try_from(at).ok());
    if let Some(power) = position(&DECIMAL) {
        return Some((1000_u128.pow(power), 1));
    }
    if let Some(power) = position(&BINARY) {
        return Some((1024_u128.pow(power), 1));
    }
    if let Some(power) = position(&SMALL) {
        return Some((1, 1000_u128.pow(power)));
    }
    let exponent: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
    let power = 10_u128.checked_pow(exponent.unsigned_abs())?;
    Some(if exponent < 0 { (1, power) } else { (power, 1) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_exactly() {
        for (text, bytes) in [
            ("0", 0),
            ("334000000", 334_000_000),
            ("100Ki", 102_400),
            ("1.5Gi", 1_610_612_736),
            ("1.5G", 1_500_000_000),
            ("0.5Ki", 512),
            (".5k", 500),
            ("+1k", 1000),
            ("1e9", 1_000_000_000),
            ("1E3", 1000),
            ("1000m", 1),
            ("100Ti", 109_951_162_777_600),
            ("15.9999999999999999E", 15_999_999_999_999_999_900),
        ] {
            assert_eq!(from_quantity(text), Ok(Bytes(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_whole_number_of_bytes_is_refused() {
        for text in [
            "",
            "-1",
            "-1Gi",
            "100m",
            "0.5",
            "1.1Ki",
            "Gi",
            "1 Gi",
            "1gi",
            "1GiB",
            "1.2.3",
            "1e",
            "1e99",
            "99Ei",
            "e3",
            "0x10",
            "1,5Gi",
            "99999999999999999999999999999999999999999999",
            "NaN",
            "1e-1",
            "-",
        ] {
            assert!(from_quantity(text).is_err(), "{text}");
        }
    }
}
