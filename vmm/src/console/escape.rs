//! Ctrl-A on standard input, which starts a command to ballast instead of the guest.

use crate::exit::Exit;
use crate::vcpu_set::VcpuSet;

const CTRL_A: u8 = 0x01;

/// Where standard input stands between the guest and ballast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Escape {
    Plain,
    AfterCtrlA,
}

impl Escape {
    /// Hands what of `input` is the guest's to `through`: Ctrl-A x ends the VM, Ctrl-A Ctrl-A is one Ctrl-A,
    /// anything else after Ctrl-A is dropped with it.
    pub(super) fn filter(&mut self, input: &[u8], vcpu_set: &VcpuSet, through: &mut Vec<u8>) {
        for &byte in input {
            *self = match (*self, byte) {
                (Self::Plain, CTRL_A) => Self::AfterCtrlA,
                (Self::Plain, byte) => {
                    through.push(byte);
                    Self::Plain
                }
                (Self::AfterCtrlA, b'x' | b'X') => {
                    vcpu_set.end(Exit::ConsoleQuit);
                    Self::Plain
                }
                (Self::AfterCtrlA, CTRL_A) => {
                    through.push(CTRL_A);
                    Self::Plain
                }
                (Self::AfterCtrlA, _) => Self::Plain,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_is_for_ballast() {
        let vcpu_set = VcpuSet::new(1).expect("a vcpu_set");
        let mut escape = Escape::Plain;
        let mut through = Vec::new();
        escape.filter(b"a\x01\x01b\x01c", &vcpu_set, &mut through);
        escape.filter(b"d\x01", &vcpu_set, &mut through);
        assert_eq!(through, b"a\x01bd");
        assert!(!vcpu_set.has_ended());
        escape.filter(b"x", &vcpu_set, &mut through);
        assert_eq!(through, b"a\x01bd");
        assert_eq!(vcpu_set.wait_for_end(), Exit::ConsoleQuit);
    }
}
