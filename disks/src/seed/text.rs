//! What cloud-init takes, looked at before the guest gets it: there it would only be a line in a log.

/// The longest user-data.
pub const MOST_USER_DATA: usize = 1 << 20;

/// Why a seed can't be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SeedError {
    /// Neither a cloud-config nor a script.
    #[error(
        "user-data begins with `{0}`: cloud-init takes it where its first line is `#cloud-config`, or `#!` with the \
         program that a script is for"
    )]
    Kind(String),
    /// No YAML.
    #[error("user-data is no YAML: {0}")]
    Yaml(String),
    /// YAML, and no table.
    #[error(
        "user-data is {0}, and cloud-init wants names with values, such as `packages: [nginx]`, below its first line"
    )]
    NoMapping(&'static str),
    /// Too long.
    #[error("user-data has {0} bytes, and may have {MOST_USER_DATA}")]
    Long(usize),
    /// Nobody can be called so.
    #[error("`{0}` is no user's name: use up to 32 of a-z, 0-9, `_` and `-`, a letter or `_` first")]
    User(String),
    /// There is a root in each guest.
    #[error(
        "`root` is there in each guest, and cloud-init does not let it log in: choose another name, that user may \
         become root by sudo"
    )]
    Root,
    /// No host can be called so.
    #[error(
        "`{0}` is no host's name: use a-z, A-Z, 0-9 and `-`, with dots between parts of up to 63 of them, and 64 in \
         all"
    )]
    HostName(String),
    /// A secret.
    #[error(
        "it is a private key, which must not leave your host: give the public one, whose name ends in .pub"
    )]
    PrivateKey,
    /// Not a line of authorized_keys.
    #[error("line {0} is no public key for SSH, such as `ssh-ed25519 AAAA... name`")]
    Key(usize),
    /// Nothing.
    #[error("there is no key in it")]
    NoKey,
}

/// Looks whether cloud-init takes `text`.
pub fn check_user_data(text: &str) -> Result<(), SeedError> {
    if text.len() > MOST_USER_DATA {
        return Err(SeedError::Long(text.len()));
    }
    let first = text.lines().next().unwrap_or_default().trim_end();
    if first.starts_with("#!") && first.len() > 2 {
        return Ok(());
    }
    if first != "#cloud-config" {
        return Err(SeedError::Kind(first.chars().take(40).collect()));
    }
    let read: Result<serde_json::Value, _> = serde_saphyr::from_str(text);
    match read.map_err(|error| SeedError::Yaml(first_line(&error.to_string())))? {
        serde_json::Value::Object(_) => Ok(()),
        serde_json::Value::Null => Err(SeedError::NoMapping("empty")),
        serde_json::Value::Array(_) => Err(SeedError::NoMapping("a list")),
        _ => Err(SeedError::NoMapping("a word")),
    }
}

/// The sentence of an error that also draws where it is.
fn first_line(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    line.strip_prefix("error: ").unwrap_or(line).to_owned()
}

/// Looks whether a host can be called so (RFC 1123, section 2.1; Linux takes 64 bytes).
pub fn check_host_name(name: &str) -> Result<(), SeedError> {
    let is_part = |part: &str| {
        (1..=63).contains(&part.len())
            && !part.starts_with('-')
            && !part.ends_with('-')
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    if name.len() <= 64 && name.split('.').all(is_part) {
        Ok(())
    } else {
        Err(SeedError::HostName(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_data_that_cloud_init_would_not_take_is_told_with_its_line() {
        for good in [
            "#cloud-config\npackages: [nginx]\n",
            "#cloud-config\r\nx: 1\r\n",
            "#!/bin/sh\n:",
            "#cloud-config\n{}",
        ] {
            assert_eq!(check_user_data(good), Ok(()), "{good}");
        }
        for kind in
            ["", "packages: []", "# cloud-config\nx: 1", "\u{feff}#cloud-config\nx: 1", "#!", " #!/bin/sh"]
        {
            assert!(matches!(check_user_data(kind), Err(SeedError::Kind(_))), "{kind}");
        }
        let error = check_user_data("#cloud-config\nusers:\n  - name: me\n shell: x\n").expect_err("no YAML");
        let said = error.to_string();
        assert!(said.contains("line 4") || said.contains("line 3"), "{said}");
        assert!(!said.contains('\n'), "{said}");
        let twice = check_user_data("#cloud-config\nx: 1\nx: 2\n").expect_err("twice").to_string();
        assert!(twice.contains("line 3"), "{twice}");
        for (text, what) in [("", "empty"), ("- a\n", "a list"), ("hello\n", "a word")] {
            let told = check_user_data(&format!("#cloud-config\n{text}"));
            assert_eq!(told, Err(SeedError::NoMapping(what)));
        }
        let long = format!("#!/bin/sh\n{}", "x".repeat(MOST_USER_DATA));
        assert!(matches!(check_user_data(&long), Err(SeedError::Long(_))));
    }

    /// A few lines that mean more than memory holds.
    #[test]
    fn a_bomb_does_not_go_off() {
        let mut bomb = "#cloud-config\na0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for n in 1..12 {
            let alias = format!("*a{},", n - 1).repeat(10);
            bomb.push_str(&format!("a{n}: &a{n} [{alias}]\n"));
        }
        assert!(check_user_data(&bomb).is_err());
        let deep = format!("#cloud-config\nx: {}", "[".repeat(100_000));
        assert!(check_user_data(&deep).is_err());
    }

    #[test]
    fn hosts_names_are_those_of_the_net() {
        for good in ["web", "web-1.example.org", "A", &"x".repeat(63)] {
            assert_eq!(check_host_name(good), Ok(()), "{good}");
        }
        for bad in ["", "-a", "a-", "a..b", "a_b", "a b", "a\nb", &"x".repeat(64), &"x.".repeat(33)] {
            assert!(check_host_name(bad).is_err(), "{bad}");
        }
    }
}
