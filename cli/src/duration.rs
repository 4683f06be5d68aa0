//! Spans of time as people write them.

use std::time::Duration;

/// Reads `1s`, `500ms`, `2m` or a plain number of seconds.
///
/// # Errors
/// A sentence for the user.
pub fn parse(text: &str) -> Result<Duration, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let milliseconds = match unit {
        "ms" => Some(1),
        "" | "s" => Some(1000),
        "m" => Some(60_000),
        "h" => Some(3_600_000),
        _ => None,
    };
    let number: Option<u64> = number.parse().ok();
    number
        .zip(milliseconds)
        .and_then(|(number, unit)| number.checked_mul(unit))
        .map(Duration::from_millis)
        .ok_or_else(|| "write a whole number and a unit, such as 500ms, 1s or 2m".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_read_with_their_unit() {
        for (text, milliseconds) in [("500ms", 500), ("1s", 1000), ("3", 3000), ("2m", 120_000), ("0", 0)] {
            assert_eq!(parse(text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
        for text in ["", "s", "-1s", "1.5s", "1 s", "1d", "99999999999999999999h", "999999999999999h"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
