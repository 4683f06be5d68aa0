//! Who may log in.

use std::str::FromStr;

use super::SeedError;

/// The name of a user in a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserName(String);

impl UserName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for UserName {
    type Err = SeedError;

    /// By the rule of Debian's adduser.
    fn from_str(text: &str) -> Result<Self, SeedError> {
        let is_first = |byte: u8| byte.is_ascii_lowercase() || byte == b'_';
        let is_other = |byte: u8| is_first(byte) || byte.is_ascii_digit() || byte == b'-';
        if text == "root" {
            return Err(SeedError::Root);
        }
        if text.len() > 32 || !text.bytes().next().is_some_and(is_first) || !text.bytes().all(is_other) {
            return Err(SeedError::User(text.to_owned()));
        }
        Ok(Self(text.to_owned()))
    }
}

/// What a public key's line begins with.
const KINDS: [&str; 7] = [
    "ssh-ed25519",
    "ssh-rsa",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
];

/// Public keys, as they stand in a `.pub` file or in `authorized_keys`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SshKeys(Vec<String>);

impl SshKeys {
    /// One key a line.
    pub fn lines(&self) -> &[String] {
        &self.0
    }

    /// These and others.
    pub fn extend(&mut self, others: Self) {
        self.0.extend(others.0);
    }
}

impl FromStr for SshKeys {
    type Err = SeedError;

    fn from_str(text: &str) -> Result<Self, SeedError> {
        if text.contains("PRIVATE KEY-----") {
            return Err(SeedError::PrivateKey);
        }
        let mut keys = Vec::new();
        for (number, line) in (1..).zip(text.lines().map(str::trim)) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let mut words = line.split_ascii_whitespace();
            let is_kind = words.next().is_some_and(|kind| KINDS.contains(&kind));
            let is_base64 = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'=');
            // Each key begins with the length of its kind, of which the first three bytes are zero.
            let is_key =
                words.next().is_some_and(|key| key.starts_with("AAAA") && key.bytes().all(is_base64));
            if !(is_kind && is_key && !line.contains(char::is_control)) {
                return Err(SeedError::Key(number));
            }
            keys.push(line.to_owned());
        }
        if keys.is_empty() { Err(SeedError::NoKey) } else { Ok(Self(keys)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_names_are_debians() {
        for good in ["me", "_x", "a-b_9", &"x".repeat(32)] {
            assert!(good.parse::<UserName>().is_ok(), "{good}");
        }
        for bad in ["", "Me", "9a", "-a", "a b", "a:b", "é", &"x".repeat(33)] {
            assert_eq!(bad.parse::<UserName>(), Err(SeedError::User(bad.to_owned())));
        }
        assert_eq!("root".parse::<UserName>(), Err(SeedError::Root));
    }

    #[test]
    fn only_public_keys_are_taken() {
        let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBZk me@here";
        let keys: SshKeys = format!("# mine\n\n{key}\r\nssh-rsa AAAAB3NzaC1yc2E=\n").parse().expect("two");
        assert_eq!(keys.lines(), [key, "ssh-rsa AAAAB3NzaC1yc2E="]);
        let private = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3Bl\n-----END OPENSSH PRIVATE KEY-----\n";
        assert_eq!(private.parse::<SshKeys>(), Err(SeedError::PrivateKey));
        assert_eq!("\n# nothing\n".parse::<SshKeys>(), Err(SeedError::NoKey));
        for bad in ["hello", "ssh-ed25519", "ssh-ed25519 me", "ssh-dss AAAA", "ssh-rsa AAAA\u{7}x"] {
            assert_eq!(format!("\n{bad}").parse::<SshKeys>(), Err(SeedError::Key(2)), "{bad}");
        }
    }
}
