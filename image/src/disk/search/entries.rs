//! Entries of boot loaders (UAPI Group, Boot Loader Specification, type 1).

use std::cmp::Reverse;

use super::super::SearchError;
use super::super::files::{Files, text};
use super::version::Version;

/// Where they are, and where their paths begin where that is not `/`: on Fedora's root file systems they do in `/boot`.
const DIRECTORIES: [(&str, &str); 2] = [("/loader/entries", ""), ("/boot/loader/entries", "/boot")];

/// Entries that are read at most.
const MOST: usize = 256;

/// An entry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Its file.
    pub name: String,
    sort_key: Option<String>,
    version: String,
    /// The kernel.
    pub linux: String,
    /// The files of its initramfs.
    pub initrd: Vec<String>,
    /// The kernel's command line.
    pub options: String,
}

impl Entry {
    /// Reads an entry; `None` where it names no kernel for this machine.
    pub fn parse(name: &str, text: &str) -> Option<Self> {
        let mut entry = Self { name: name.to_owned(), ..Self::default() };
        for line in text.lines() {
            let (key, value) = line.trim().split_once(char::is_whitespace).unwrap_or((line.trim(), ""));
            let value = value.trim();
            match key {
                "linux" => entry.linux = value.to_owned(),
                // The specification has one a line, some distributions several.
                "initrd" => {
                    let files = value.split_whitespace().filter(|file| !file.starts_with('$'));
                    entry.initrd.extend(files.map(str::to_owned));
                }
                "options" => {
                    entry.options = [&entry.options, value].join(" ").trim().to_owned();
                }
                "version" => entry.version = value.to_owned(),
                "sort-key" => entry.sort_key = Some(value.to_owned()),
                "architecture" if !value.eq_ignore_ascii_case("x64") => return None,
                _ => {}
            }
        }
        (!entry.linux.is_empty()).then_some(entry)
    }
}

/// The entries of a file system, the one that is booted first, each with where its paths may begin.
///
/// # Errors
/// As [`Files::read`].
pub fn newest_first(files: &dyn Files) -> Result<Vec<(&'static str, Entry)>, SearchError> {
    let mut entries = Vec::new();
    for (directory, prefix) in DIRECTORIES {
        let mut names = files.names(directory)?;
        names.retain(|name| name.ends_with(".conf"));
        names.sort();
        for name in names.into_iter().take(MOST) {
            let path = format!("{directory}/{name}");
            let entry = text(files, &path)?.and_then(|text| Entry::parse(&path, &text));
            entries.extend(entry.map(|entry| (prefix, entry)));
        }
    }
    // Entries that say how they are to be sorted come first.
    entries.sort_by(|(_, one), (_, other)| {
        let key = |entry: &Entry| (entry.sort_key.is_none(), entry.sort_key.clone());
        key(one)
            .cmp(&key(other))
            .then(Reverse(Version(&one.version)).cmp(&Reverse(Version(&other.version))))
            .then(Reverse(Version(&one.name)).cmp(&Reverse(Version(&other.name))))
    });
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_read_as_loaders_do() {
        let text = "# Fedora\ntitle Fedora Linux (6.12)\nversion\t6.12.5-200.fc41.x86_64\nlinux /vmlinuz-6.12.5\n\
                    initrd /ucode.img /initramfs.img $tuned_initrd\noptions root=UUID=1 ro\noptions  rootflags=subvol=root\n";
        let entry = Entry::parse("a.conf", text).expect("it names a kernel");
        assert_eq!(entry.linux, "/vmlinuz-6.12.5");
        assert_eq!(entry.initrd, ["/ucode.img", "/initramfs.img"]);
        assert_eq!(entry.options, "root=UUID=1 ro rootflags=subvol=root");
        assert_eq!(entry.version, "6.12.5-200.fc41.x86_64");
        for other in ["title x\nefi /EFI/x.efi", "", "linux\n", "linux /k\narchitecture aa64"] {
            assert_eq!(Entry::parse("a.conf", other), None, "{other}");
        }
    }
}
