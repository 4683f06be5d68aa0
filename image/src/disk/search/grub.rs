//! The kernel's command line as a distribution states it: GRUB's defaults, and `/etc/kernel/cmdline`.
//!
//! GRUB's files are scripts of a shell. Here they are data: assignments of quoted text are read, and nothing is run.

use std::collections::BTreeMap;

use super::super::SearchError;
use super::super::files::{Files, text};

/// The words for every start. Others (`GRUB_CMDLINE_LINUX_DEFAULT`) are about what is seen on a screen.
const WORDS: &str = "GRUB_CMDLINE_LINUX";

/// Files in `/etc/default/grub.d` that are read at most.
const MOST: usize = 64;
/// Bytes of a value at most: a kernel takes no longer line.
const LONGEST: usize = 2048;

/// The command line that this root file system states, without the file system's own name; `None` where it states none.
///
/// # Errors
/// As [`Files::read`].
pub fn command_line(files: &dyn Files) -> Result<Option<String>, SearchError> {
    let mut paths = vec!["/etc/default/grub".to_owned()];
    let mut more = files.names("/etc/default/grub.d")?;
    more.retain(|name| name.ends_with(".cfg"));
    more.sort();
    paths.extend(more.iter().take(MOST).map(|name| format!("/etc/default/grub.d/{name}")));
    let mut variables = BTreeMap::new();
    for path in paths {
        if let Some(text) = text(files, &path)? {
            assign(&text, &mut variables);
        }
    }
    let line = match variables.remove(WORDS) {
        Some(line) => Some(line),
        None => text(files, "/etc/kernel/cmdline")?,
    };
    Ok(line.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")))
}

/// Takes the assignments of a script. What is computed, and what is done under a condition, is left out.
fn assign(text: &str, variables: &mut BTreeMap<String, String>) {
    let joined = text.replace("\\\n", "");
    for line in joined.lines() {
        // What is indented may stand in a function or under a condition.
        let line = line.strip_prefix("export ").unwrap_or(line);
        let Some((name, value)) = line.split_once('=') else { continue };
        let is_name = name.starts_with("GRUB_")
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        if !is_name {
            continue;
        }
        if let Some(value) = value_of(value, variables).filter(|value| value.len() <= LONGEST) {
            variables.insert(name.to_owned(), value);
        }
    }
}

/// A shell's word: quoted in pieces, with variables of the same files; `None` for what is computed.
fn value_of(text: &str, variables: &BTreeMap<String, String>) -> Option<String> {
    let mut value = String::new();
    let mut quote = None;
    let mut left = text.chars().peekable();
    while let Some(next) = left.next() {
        match (next, quote) {
            ('\'', None) | ('"', None) => quote = Some(next),
            ('\'', Some('\'')) | ('"', Some('"')) => quote = None,
            (_, Some('\'')) => value.push(next),
            ('`', _) => return None,
            ('\\', None) => value.extend(left.next()),
            ('\\', _) => match left.next() {
                Some(escaped @ ('"' | '\\' | '$' | '`')) => value.push(escaped),
                other => {
                    value.push('\\');
                    value.extend(other);
                }
            },
            ('$', _) => {
                let is_braced = left.next_if_eq(&'{').is_some();
                let mut name = String::new();
                while let Some(next) = left.next_if(|next| next.is_ascii_alphanumeric() || *next == '_') {
                    name.push(next);
                }
                if name.is_empty() || is_braced && left.next_if_eq(&'}').is_none() {
                    return None;
                }
                value.push_str(variables.get(&name).map_or("", String::as_str));
            }
            (' ' | '\t' | ';' | '#', None) => break,
            ('&' | '|' | '(' | ')' | '<' | '>', None) => return None,
            _ => value.push(next),
        }
        if value.len() > LONGEST {
            return None;
        }
    }
    quote.is_none().then_some(value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(text: &str) -> Option<String> {
        let mut variables = BTreeMap::new();
        assign(text, &mut variables);
        variables.remove(WORDS)
    }

    #[test]
    fn assignments_are_read_as_a_shell_does() {
        for (text, value) in [
            (
                "GRUB_CMDLINE_LINUX=\"console=tty0 console=ttyS0,115200\"",
                Some("console=tty0 console=ttyS0,115200"),
            ),
            ("GRUB_CMDLINE_LINUX=''", Some("")),
            ("GRUB_CMDLINE_LINUX=quiet # no more", Some("quiet")),
            ("GRUB_CMDLINE_LINUX=a\nGRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX b\"", Some("a b")),
            ("GRUB_CMDLINE_LINUX=a\nGRUB_CMDLINE_LINUX=\"${GRUB_CMDLINE_LINUX} b\"", Some("a b")),
            ("GRUB_CMDLINE_LINUX='$x \"y\"'\" \\\"z\\\"\"", Some("$x \"y\" \"z\"")),
            ("GRUB_CMDLINE_LINUX=\"one \\\ntwo\"", Some("one two")),
            ("#GRUB_CMDLINE_LINUX=a", None),
            ("GRUB_CMDLINE_LINUX=\"$(reboot)\"", None),
            ("GRUB_CMDLINE_LINUX=`reboot`", None),
            ("GRUB_CMDLINE_LINUX=\"open", None),
            ("GRUB_CMDLINE_LINUX_DEFAULT=quiet", None),
            ("if x; then\n  GRUB_CMDLINE_LINUX=a\nfi", None),
        ] {
            assert_eq!(read(text).as_deref(), value, "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_script_grows_without_end(lines in proptest::collection::vec("[$\"'a{}\\\\ ]{0,20}", 0..40)) {
            let mut text = String::from("GRUB_CMDLINE_LINUX=aaaaaaaa\n");
            for line in lines {
                text.push_str(&format!("GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX$GRUB_CMDLINE_LINUX{line}\"\n"));
            }
            prop_assert!(read(&text).is_none_or(|value| value.len() <= LONGEST));
        }
    }
}
