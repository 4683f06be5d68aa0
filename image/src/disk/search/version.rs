//! The order of versions (UAPI Group, Version Format Specification).

use std::cmp::Ordering;

/// A version as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version<'a>(pub &'a str);

impl Ord for Version<'_> {
    fn cmp(&self, other: &Self) -> Ordering {
        compare(self.0.as_bytes(), other.0.as_bytes())
    }
}

impl PartialOrd for Version<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Marks in the order in which they end a version: `1~rc` is older than `1`, `1-2` is newer.
const MARKS: [u8; 3] = [b'~', b'-', b'^'];

fn compare(mut one: &[u8], mut other: &[u8]) -> Ordering {
    loop {
        one = skip(one);
        other = skip(other);
        // A tilde is older than the end.
        match (one.first() == Some(&b'~'), other.first() == Some(&b'~')) {
            (true, false) => return Ordering::Less,
            (false, true) => return Ordering::Greater,
            _ => {}
        }
        if one.is_empty() || other.is_empty() {
            return one.len().cmp(&other.len());
        }
        // A mark is older than what is none.
        for mark in MARKS.iter().chain(b".") {
            match (one.first() == Some(mark), other.first() == Some(mark)) {
                (true, true) => {
                    one = one.get(1..).unwrap_or_default();
                    other = other.get(1..).unwrap_or_default();
                    break;
                }
                (true, false) => return Ordering::Less,
                (false, true) => return Ordering::Greater,
                (false, false) => {}
            }
        }
        let (ordering, one_rest, other_rest) = if starts_with_digit(one) || starts_with_digit(other) {
            let (one, one_rest) = split(one, u8::is_ascii_digit);
            let (other, other_rest) = split(other, u8::is_ascii_digit);
            let (one, other) = (without_zeros(one), without_zeros(other));
            (one.len().cmp(&other.len()).then(one.cmp(other)), one_rest, other_rest)
        } else {
            let (one, one_rest) = split(one, u8::is_ascii_alphabetic);
            let (other, other_rest) = split(other, u8::is_ascii_alphabetic);
            (one.cmp(other), one_rest, other_rest)
        };
        if ordering.is_ne() {
            return ordering;
        }
        (one, other) = (one_rest, other_rest);
    }
}

/// Goes past what tells nothing.
fn skip(text: &[u8]) -> &[u8] {
    let tells = |byte: &u8| byte.is_ascii_alphanumeric() || MARKS.contains(byte) || *byte == b'.';
    let start = text.iter().position(tells).unwrap_or(text.len());
    text.get(start..).unwrap_or_default()
}

fn starts_with_digit(text: &[u8]) -> bool {
    text.first().is_some_and(u8::is_ascii_digit)
}

fn split(text: &[u8], belongs: impl Fn(&u8) -> bool) -> (&[u8], &[u8]) {
    let end = text.iter().position(|byte| !belongs(byte)).unwrap_or(text.len());
    text.split_at_checked(end).unwrap_or_default()
}

fn without_zeros(digits: &[u8]) -> &[u8] {
    let start = digits.iter().position(|digit| *digit != b'0').unwrap_or(digits.len());
    digits.get(start..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn kernels_are_in_the_order_of_their_age() {
        for pair in [
            "5.10.0-30-amd64",
            "6.1.0-9-amd64",
            "6.1.0-10-amd64",
            "6.1.0-10-cloud-amd64",
            "6.1.0-56-amd64",
            "6.12.5-100.fc41.x86_64",
            "6.12.5-200.fc41.x86_64",
            "6.12.6~rc1",
            "6.12.6",
            "6.12.6-1",
            "6.12.6.1",
        ]
        .windows(2)
        {
            assert!(Version(pair[0]) < Version(pair[1]), "{pair:?}");
        }
        assert!(Version("0-rescue-0123456789abcdef") < Version("5.14.0-70.el9.x86_64"));
        assert_eq!(Version("6.01").cmp(&Version("6.1")), Ordering::Equal);
    }

    proptest! {
        #[test]
        fn it_is_an_order(texts in proptest::array::uniform3("[~^.a-c0-2-]{0,6}")) {
            let [one, two, three] = texts.each_ref().map(|text| Version(text));
            prop_assert_eq!(one.cmp(&two), two.cmp(&one).reverse());
            if one <= two && two <= three {
                prop_assert!(one <= three);
            }
        }
    }
}
