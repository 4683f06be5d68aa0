//! Addresses of network cards.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The address of one network card.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac([u8; 6]);

/// Not an address of one card.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no MAC address of a network card: use six pairs of hexadecimal digits with colons, the second digit even, \
     such as 52:54:00:12:34:56"
)]
pub struct MacError(String);

impl Mac {
    /// An address that nobody has been given by its maker, of 40 bits that should differ from those of others.
    pub const fn local([a, b, c, d, e]: [u8; 5]) -> Self {
        // Bit 1 of the first byte says so (IEEE 802, locally administered); QEMU's are as well.
        Self([0x52, a, b, c, d, e])
    }

    /// The address in the order in which it is sent.
    pub const fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let wrong = || MacError(text.to_owned());
        let mut bytes = [0; 6];
        let mut pairs = text.split(':');
        for byte in &mut bytes {
            let pair = pairs.next().filter(|pair| pair.len() == 2 && !pair.starts_with('+'));
            *byte = pair.and_then(|pair| u8::from_str_radix(pair, 16).ok()).ok_or_else(wrong)?;
        }
        // Bit 0 is of groups of cards, and no card has zeros.
        let [first, ..] = bytes;
        if pairs.next().is_some() || first & 1 != 0 || bytes == [0; 6] {
            return Err(wrong());
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for Mac {
    type Error = MacError;
    fn try_from(text: String) -> Result<Self, MacError> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_cards_are_read_and_others_refused() {
        let mac: Mac = "52:54:00:aB:0c:ff".parse().unwrap();
        assert_eq!(mac.bytes(), [0x52, 0x54, 0, 0xab, 0x0c, 0xff]);
        assert_eq!(mac.to_string(), "52:54:00:ab:0c:ff");
        for bad in [
            "",
            "52:54:00:ab:0c",
            "52:54:00:ab:0c:ff:00",
            "52-54-00-ab-0c-ff",
            "+2:54:00:ab:0c:ff",
            "53:54:00:ab:0c:ff",
            "ff:ff:ff:ff:ff:ff",
            "00:00:00:00:00:00",
            "5:54:00:ab:0c:ff",
            "52:54:00:ab:0c:gg",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
        assert_eq!(Mac::local([1, 2, 3, 4, 5]).to_string(), "52:01:02:03:04:05");
    }
}
