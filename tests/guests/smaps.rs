//! What a VM's process holds, as `/proc/PID/smaps` says: guest memory, and all else.

use api::units::Bytes;

/// A mapping of at least this size is guest memory, as is one of any size that a VM keeps out of core
/// dumps (`dd`, proc(5)): ballast's guest memory may be many mappings, and QEMU's is in core dumps.
const GUEST_MEMORY: Bytes = Bytes::mib(128);

/// What a sum is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Of {
    /// Guest memory.
    Guest,
    /// The rest.
    Rest,
    /// What no file backs of the rest.
    Anonymous,
}

/// The sum of `fields`.
pub fn sum(smaps: &str, of: Of, fields: &[&str]) -> Bytes {
    let (mut sum, mut own) = (Bytes::ZERO, Bytes::ZERO);
    let (mut guest, mut file) = (false, false);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let Some(field) = words.next().and_then(|word| word.strip_suffix(':')) else {
            // A mapping's head: range, rights, offset, device, inode, and a path where it has one.
            file = words.nth(4).is_some_and(|path| path.starts_with('/'));
            continue;
        };
        let amount = words.clone().next().and_then(|kib| kib.parse().ok()).map(Bytes::kib);
        match field {
            "Size" => guest = amount.is_some_and(|size| size >= GUEST_MEMORY),
            "VmFlags" => {
                let guest = guest || words.any(|flag| flag == "dd");
                let wanted = match of {
                    Of::Guest => guest,
                    Of::Rest => !guest,
                    Of::Anonymous => !guest && !file,
                };
                sum += if wanted { own } else { Bytes::ZERO };
                own = Bytes::ZERO;
            }
            field if fields.contains(&field) => own += amount.unwrap_or_default(),
            _ => {}
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_told_from_the_rest_and_files_from_what_none_backs() {
        let smaps = "\
7f00-7f10 rw-p 00000000 00:00 0 \nSize: 262144 kB\nRss: 1024 kB\nPrivate_Hugetlb: 2048 kB\nVmFlags: rd wr hg \n\
7f10-7f11 rw-p 00000000 00:00 0 \nSize: 2048 kB\nRss: 512 kB\nVmFlags: rd wr dd nh \n\
5500-5510 r-xp 00000000 00:02 17 /bin/ballast\nSize: 400 kB\nRss: 300 kB\nVmFlags: rd ex \n\
7f20-7f21 rw-p 00000000 00:00 0 [heap]\nSize: 132 kB\nRss: 64 kB\nVmFlags: rd wr mr \n";
        let fields = ["Rss", "Private_Hugetlb"];
        let sums = [Of::Guest, Of::Rest, Of::Anonymous].map(|of| sum(smaps, of, &fields));
        assert_eq!(sums, [Bytes::kib(3584), Bytes::kib(364), Bytes::kib(64)]);
    }
}
