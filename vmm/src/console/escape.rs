//! Ctrl-A on standard input, which starts a command to ballast instead of the guest.

const CTRL_A: u8 = 0x01;

/// Where standard input stands between a guest and ballast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Escape {
    /// What comes is the guest's.
    Plain,
    /// The next byte is a command.
    AfterCtrlA,
}

impl Escape {
    /// Hands what of `input` is the guest's to `through`, and returns whether the user quits: by Ctrl-A x. Ctrl-A
    /// Ctrl-A is one Ctrl-A, anything else after Ctrl-A is dropped with it.
    pub fn filter(&mut self, input: &[u8], through: &mut Vec<u8>) -> bool {
        let mut quits = false;
        for &byte in input {
            *self = match (*self, byte) {
                (Self::Plain, CTRL_A) => Self::AfterCtrlA,
                (Self::Plain, byte) => {
                    through.push(byte);
                    Self::Plain
                }
                (Self::AfterCtrlA, b'x' | b'X') => {
                    quits = true;
                    Self::Plain
                }
                (Self::AfterCtrlA, CTRL_A) => {
                    through.push(CTRL_A);
                    Self::Plain
                }
                (Self::AfterCtrlA, _) => Self::Plain,
            };
        }
        quits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_is_for_ballast() {
        let mut escape = Escape::Plain;
        let mut through = Vec::new();
        assert!(!escape.filter(b"a\x01\x01b\x01c", &mut through));
        assert!(!escape.filter(b"d\x01", &mut through));
        assert_eq!(through, b"a\x01bd");
        assert!(escape.filter(b"x", &mut through));
        assert_eq!(through, b"a\x01bd");
    }
}
