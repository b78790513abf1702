//! Numbers as people write and read them: `7b` parameters, `64GiB`.

use std::fmt;

/// Bytes, shown in binary units: `26.08 GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        if self.0 < 1024 {
            return f.pad(&format!("{} B", self.0));
        }
        let mut value = self.0 as f64 / 1024.0;
        let mut unit = 0;
        // 1023.995 would be shown as 1024.00.
        while value >= 1023.995 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        f.pad(&format!("{value:.2} {}", UNITS[unit]))
    }
}

/// A number of elements, shown in decimal units: `7.00 B`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Count(pub u64);

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.0 as f64;
        match self.0 {
            0..1_000 => f.pad(&self.0.to_string()),
            1_000..1_000_000 => f.pad(&format!("{:.2} K", value / 1e3)),
            1_000_000..1_000_000_000 => f.pad(&format!("{:.2} M", value / 1e6)),
            1_000_000_000..1_000_000_000_000 => f.pad(&format!("{:.2} B", value / 1e9)),
            _ => f.pad(&format!("{:.2} T", value / 1e12)),
        }
    }
}

/// Text that is no quantity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not {expected}")]
pub struct QuantityError {
    text: String,
    expected: &'static str,
}

/// The greatest count that is taken: a million times what has ever been trained.
const GREATEST: f64 = 1e18;

/// A number of elements: `7000000000`, `7_000_000_000`, `7e9`, `7b`, `1.3B`, `350M`, `12k`, `1t`.
///
/// # Errors
/// Anything else, fractions of an element, and numbers above 1e18.
pub fn parse_count(text: &str) -> Result<u64, QuantityError> {
    const UNITS: &[(&str, f64)] = &[("", 1.0), ("k", 1e3), ("m", 1e6), ("b", 1e9), ("g", 1e9), ("t", 1e12)];
    parse(text, UNITS, "a number of parameters, such as 7e9, 7b or 350M")
}

/// A number of bytes: `68719476736`, `64GiB`, `64G` (binary), `64GB` (decimal), `1.5TiB`.
///
/// # Errors
/// Anything else, fractions of a byte, and numbers above 1e18.
pub fn parse_bytes(text: &str) -> Result<u64, QuantityError> {
    const UNITS: &[(&str, f64)] = &[
        ("", 1.0),
        ("b", 1.0),
        ("k", 1024.0),
        ("kib", 1024.0),
        ("kb", 1e3),
        ("m", 1_048_576.0),
        ("mib", 1_048_576.0),
        ("mb", 1e6),
        ("g", 1_073_741_824.0),
        ("gib", 1_073_741_824.0),
        ("gb", 1e9),
        ("t", 1_099_511_627_776.0),
        ("tib", 1_099_511_627_776.0),
        ("tb", 1e12),
    ];
    parse(text, UNITS, "a number of bytes, such as 64GiB, 64GB or 68719476736")
}

fn parse(text: &str, units: &[(&str, f64)], expected: &'static str) -> Result<u64, QuantityError> {
    let wrong = || QuantityError { text: text.to_owned(), expected };
    let plain: String = text.trim().chars().filter(|c| *c != '_').collect::<String>().to_ascii_lowercase();
    // The `e` of an exponent is part of the number; no unit begins with it.
    let digits = plain.find(|c: char| !(c.is_ascii_digit() || ".e+-".contains(c))).unwrap_or(plain.len());
    let (number, unit) = plain.split_at(digits);
    let (_, factor) = units.iter().find(|(name, _)| *name == unit.trim()).ok_or_else(wrong)?;
    if let (Ok(whole), true) = (number.parse::<u64>(), *factor == 1.0) {
        return if whole as f64 <= GREATEST { Ok(whole) } else { Err(wrong()) };
    }
    let value = number.trim().parse::<f64>().map_err(|_| wrong())? * factor;
    let rounded = value.round();
    // A decimal such as 1.3 times 1e9 need not be whole to the last bit.
    let whole = (value - rounded).abs() <= rounded.abs() * 1e-12;
    if !(0.0..=GREATEST).contains(&value) || !(whole || *factor > 1.0) {
        return Err(wrong());
    }
    Ok(rounded as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts() {
        for (text, expected) in [
            ("0", 0),
            ("7e9", 7_000_000_000),
            ("7E+9", 7_000_000_000),
            ("7b", 7_000_000_000),
            (" 7 B ", 7_000_000_000),
            ("1.3B", 1_300_000_000),
            ("350M", 350_000_000),
            ("12_345", 12_345),
            ("0.5k", 500),
            ("1t", 1_000_000_000_000),
            ("123456789012345678", 123_456_789_012_345_678),
        ] {
            assert_eq!(parse_count(text), Ok(expected), "{text}");
        }
        for text in
            ["", "b", "-1", "1.5", "seven", "7x", "nan", "inf", "1e30", "7e", "7 b b", "99999999999999999999"]
        {
            assert!(parse_count(text).is_err(), "{text}");
        }
        assert_eq!(
            parse_count("many").unwrap_err().to_string(),
            "`many` is not a number of parameters, such as 7e9, 7b or 350M"
        );
    }

    #[test]
    fn bytes() {
        for (text, expected) in
            [("1024", 1024), ("64GiB", 64 << 30), ("64g", 64 << 30), ("64GB", 64_000_000_000), ("1.5k", 1536)]
        {
            assert_eq!(parse_bytes(text), Ok(expected), "{text}");
        }
        assert!(parse_bytes("64 gigs").is_err());
    }

    #[test]
    fn shown() {
        for (bytes, expected) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1 << 20, "1.00 MiB"),
            ((1 << 30) - 1, "1.00 GiB"),
            (28 << 30, "28.00 GiB"),
            (u64::MAX, "16.00 EiB"),
        ] {
            assert_eq!(Bytes(bytes).to_string(), expected);
        }
        assert_eq!(format!("{:>10}|{:<8}|", Bytes(1024), Count(12)), "  1.00 KiB|12      |");
        assert_eq!(Count(7_000_000_000).to_string(), "7.00 B");
        assert_eq!(Count(350_000_000).to_string(), "350.00 M");
    }
}
