//! Directories of the host that a guest mounts, as data.

use std::path::PathBuf;
use std::str::FromStr;

use devices::virtio::fs::MOST_TAG;
use serde::{Deserialize, Serialize};

use super::{ConfigError, DeviceId};

/// A shared directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareOptions {
    /// The directory.
    pub path: PathBuf,
    /// What the guest mounts it by; the device's name where none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<Tag>,
    /// The guest may not write.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub readonly: bool,
}

impl ShareOptions {
    /// What the guest mounts it by, where its device is `id`.
    pub fn tag<'a>(&'a self, id: &'a DeviceId) -> &'a str {
        self.tag.as_ref().map_or(id.as_str(), |tag| &tag.0)
    }
}

text!(Tag);

/// What a guest mounts a directory by: 1 to 36 bytes without spaces and control characters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Tag(String);

impl std::fmt::Display for Tag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for Tag {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let is_one = (1..=MOST_TAG).contains(&text.len())
            && !text.contains(|letter: char| letter.is_control() || letter.is_whitespace() || letter == ',');
        if is_one { Ok(Self(text.to_owned())) } else { Err(ConfigError::Tag(text.to_owned())) }
    }
}

/// `DIR[,tag=TAG][,readonly]`: a comma of the path itself is written twice.
impl FromStr for ShareOptions {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let wrong = |what: String| ConfigError::Share { text: text.to_owned(), what };
        let marked = text.replace(",,", "\0");
        let mut parts = marked.split(',').map(|part| part.replace('\0', ","));
        let path = parts.next().filter(|path| !path.is_empty());
        let path = path.ok_or_else(|| wrong("it names no directory".to_owned()))?.into();
        let mut share = Self { path, tag: None, readonly: false };
        for part in parts {
            match part.split_once('=').unwrap_or((&part, "")) {
                ("readonly", "") => share.readonly = true,
                ("tag", tag) => share.tag = Some(tag.parse()?),
                _ => return Err(wrong(format!("`{part}` is not known"))),
            }
        }
        Ok(share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_read_and_others_refused() {
        let share: ShareOptions = "/srv/a,,b,tag=home,readonly".parse().unwrap();
        let id = "share0".parse().unwrap();
        assert_eq!((share.path.to_str(), share.tag(&id), share.readonly), (Some("/srv/a,b"), "home", true));
        let text = serde_json::to_string(&share).unwrap();
        assert_eq!(serde_json::from_str::<ShareOptions>(&text).unwrap(), share);
        let share: ShareOptions = ".".parse().unwrap();
        assert_eq!((share.tag(&id), share.readonly), ("share0", false));
        let long = format!("/srv,tag={}", "x".repeat(MOST_TAG + 1));
        for (bad, why) in [
            ("", "no directory"),
            ("/srv,tag=", "not a tag"),
            ("/srv,tag=a b", "`a b`"),
            (&long, "36 bytes"),
            ("/srv,readonly=1", "`readonly=1`"),
            ("/srv,ro", "`ro`"),
        ] {
            let said = bad.parse::<ShareOptions>().unwrap_err().to_string();
            assert!(said.contains(why), "{bad}: {said}");
        }
    }
}
