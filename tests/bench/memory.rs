//! A process's private memory outside its guest's.

use api::units::Bytes;

/// A mapping of at least this size is guest memory, as is one of any size that a VM keeps out of
/// core dumps (`dd`, proc(5)): where the host gives out huge pages, guest memory may be many mappings.
const GUEST_MEMORY: Bytes = Bytes::mib(128);

/// Private pages beside guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Beside {
    /// All of them. Programs on an initramfs count their text, too.
    pub private: Bytes,
    /// Those that no file backs.
    pub anonymous: Bytes,
}

/// Adds up `/proc/PID/smaps`.
pub fn beside_guest(smaps: &str) -> Beside {
    let (mut beside, mut own) = (Beside::default(), Beside::default());
    let (mut guest, mut file) = (false, false);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        let Some(field) = first.strip_suffix(':') else {
            // A mapping's head: range, rights, offset, device, inode, and a path where it has one.
            file = words.nth(4).is_some_and(|path| path.starts_with('/'));
            continue;
        };
        let amount =
            words.clone().next().and_then(|kib| kib.parse().ok()).map(Bytes::kib).unwrap_or_default();
        match field {
            "Size" => guest = amount >= GUEST_MEMORY,
            "Private_Clean" | "Private_Dirty" if !guest => {
                own.private += amount;
                if !file {
                    own.anonymous += amount;
                }
            }
            "VmFlags" => {
                let own = std::mem::take(&mut own);
                if !words.any(|flag| flag == "dd") {
                    beside.private += own.private;
                    beside.anonymous += own.anonymous;
                }
            }
            _ => {}
        }
    }
    beside
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_left_out_and_files_are_told_apart() {
        let smaps = "\
7f00-7f10 rw-p 00000000 00:00 0 \nSize: 262144 kB\nPrivate_Dirty: 9000 kB\nVmFlags: rd \n\
7f10-7f11 rw-p 00000000 00:00 0 \nSize: 2048 kB\nPrivate_Dirty: 900 kB\nVmFlags: rd dd nh \n\
5500-5510 r-xp 00000000 00:02 17 /bin/ballast\nSize: 400 kB\nPrivate_Clean: 300 kB\nPrivate_Dirty: 0 kB\nVmFlags: rd ex \n\
7f20-7f21 rw-p 00000000 00:00 0 [heap]\nSize: 132 kB\nPrivate_Clean: 0 kB\nPrivate_Dirty: 64 kB\nVmFlags: rd wr \n";
        assert_eq!(beside_guest(smaps), Beside { private: Bytes::kib(364), anonymous: Bytes::kib(64) });
    }
}
