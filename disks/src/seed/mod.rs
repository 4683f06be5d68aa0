//! What cloud-init in a guest is told at its first boot: a NoCloud seed, which is a small FAT disk labelled `CIDATA`
//! with the files `meta-data`, `user-data` and `network-config`.

mod fat;
mod text;
mod user;

use std::fmt::Write;
use std::fs::File;
use std::io;

use serde::{Deserialize, Serialize};
use serde_json::json;

pub use self::text::SeedError;
pub use self::user::{SshKeys, UserName};

/// DHCP on each Ethernet: the names are those of the images' own configuration, with which this is merged. None is
/// `optional`: where all are, Debian 12's systemd-networkd-wait-online waits for two minutes and fails.
const NETWORK: &str = "\
version: 2
ethernets:
  all-en:
    match: {name: 'en*'}
    dhcp4: true
    dhcp6: true
  all-eth:
    match: {name: 'eth*'}
    dhcp4: true
    dhcp6: true
";

/// sshd for the host: systemd does the same by itself from version 256 on (systemd-ssh-generator(8)).
const SSH_SOCKET: &str = "\
[Unit]
Description=OpenSSH server for this machine's host
ConditionPathExists=!/usr/lib/systemd/system-generators/systemd-ssh-generator

[Socket]
ListenStream=vsock::22
Accept=yes

[Install]
WantedBy=sockets.target
";

const SSH_SERVICE: &str = "\
[Unit]
Description=OpenSSH server for a connection of this machine's host
After=ssh.service

[Service]
ExecStart=-/usr/sbin/sshd -i
StandardInput=socket
RuntimeDirectory=sshd
RuntimeDirectoryPreserve=yes
";

/// The files of a seed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seed {
    /// Which instance this is, and its host name.
    pub meta_data: String,
    /// What the user asks for.
    pub user_data: String,
    /// How the network is set up.
    pub network_config: String,
}

impl Seed {
    /// A seed with `user_data`, which must be a `#cloud-config` or a script. cloud-init takes a guest for a new one,
    /// and sets it up anew, where the instance is another than at its last boot: the instance is known by `name`,
    /// the VM's where it has one of its own, and by what the seed says.
    ///
    /// # Errors
    /// [`SeedError`]: the user-data, or the host name.
    pub fn new(user_data: &str, host_name: Option<&str>, name: Option<&str>) -> Result<Self, SeedError> {
        text::check_user_data(user_data)?;
        host_name.map_or(Ok(()), text::check_host_name)?;
        let mut hasher = blake3::Hasher::new();
        for part in [name.unwrap_or_default(), host_name.unwrap_or_default(), user_data, NETWORK] {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
        }
        let hash = hasher.finalize().to_hex();
        let mut meta_data = format!("instance-id: iid-{}\n", hash.get(..16).unwrap_or_default());
        if let Some(host_name) = host_name {
            let _ = writeln!(meta_data, "local-hostname: {host_name}");
        }
        Ok(Self { meta_data, user_data: user_data.to_owned(), network_config: NETWORK.to_owned() })
    }

    /// User-data for a guest that has one user more, who may become root and logs in with one of `keys`. `by_vsock` has
    /// sshd listen for the host as well. The guest wakes by its power button.
    pub fn user_data_of(user: &UserName, keys: &SshKeys, by_vsock: bool) -> String {
        let user = json!({
            "name": user.as_str(),
            "shell": "/bin/bash",
            "sudo": "ALL=(ALL) NOPASSWD:ALL",
            "lock_passwd": true,
            "ssh_authorized_keys": keys.lines(),
        });
        let mut files = vec![json!({ "path": crate::WAKE_RULE_PATH, "content": crate::WAKE_RULE })];
        let mut commands = vec![
            json!(["udevadm", "control", "--reload"]),
            json!(["udevadm", "trigger", "--sysname-match=ttyS0"]),
        ];
        if by_vsock {
            let unit = |name: &str, content: &str| json!({ "path": format!("/etc/systemd/system/{name}"), "content": content });
            files.extend([unit("ssh-vsock.socket", SSH_SOCKET), unit("ssh-vsock@.service", SSH_SERVICE)]);
            commands.push(json!(["systemctl", "daemon-reload"]));
            commands.push(json!(["systemctl", "enable", "--now", "ssh-vsock.socket"]));
        }
        let config = json!({ "users": [user], "write_files": files, "runcmd": commands });
        // What is JSON is YAML as well.
        format!("#cloud-config\n{config:#}\n")
    }

    /// User-data for a guest of which nothing but its host name is asked.
    pub fn no_user_data() -> String {
        "#cloud-config\n{}\n".to_owned()
    }

    /// The disk, in a file in memory that nobody can change.
    ///
    /// # Errors
    /// The host has no memory or descriptor for it.
    pub fn disk(&self) -> io::Result<File> {
        fat::disk(&[
            ("meta-data", &self.meta_data),
            ("user-data", &self.user_data),
            ("network-config", &self.network_config),
        ])
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn read(mut disk: &File, name: &str) -> String {
        io::Seek::rewind(&mut disk).expect("a place");
        let fs = fatfs::FileSystem::new(Unwritable(disk), fatfs::FsOptions::new()).expect("a FAT");
        let mut text = String::new();
        fs.root_dir().open_file(name).expect("the file").read_to_string(&mut text).expect("read");
        text
    }

    /// The library wants to write where it only reads.
    struct Unwritable<'a>(&'a File);

    impl Read for Unwritable<'_> {
        fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
            self.0.read(bytes)
        }
    }

    impl io::Write for Unwritable<'_> {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::PermissionDenied.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl io::Seek for Unwritable<'_> {
        fn seek(&mut self, to: io::SeekFrom) -> io::Result<u64> {
            self.0.seek(to)
        }
    }

    #[test]
    fn a_seed_is_a_disk_with_three_files() {
        let seed = Seed::new("#!/bin/sh\necho hello\n", Some("web"), Some("web")).expect("a seed");
        let disk = seed.disk().expect("a disk");
        assert_eq!(disk.metadata().expect("there").len() % 512, 0);
        assert_eq!(read(&disk, "user-data"), seed.user_data);
        assert_eq!(read(&disk, "network-config"), NETWORK);
        let meta_data = read(&disk, "meta-data");
        assert!(meta_data.starts_with("instance-id: iid-") && meta_data.ends_with("local-hostname: web\n"));
        // Long lines, and many: more than a cluster each.
        let long = format!("#cloud-config\nx: {}\n", "y".repeat(300 << 10));
        let disk = Seed::new(&long, None, None).expect("a seed").disk().expect("a disk");
        assert_eq!(read(&disk, "user-data"), long);
    }

    #[test]
    fn the_instance_is_the_same_until_something_changes() {
        let script = "#!/bin/sh\n";
        let seed = |host, name| Seed::new(script, host, name).expect("a seed").meta_data;
        assert_eq!(seed(Some("a"), Some("web")), seed(Some("a"), Some("web")));
        assert_ne!(seed(Some("a"), Some("web")), seed(Some("a"), Some("db")));
        assert_ne!(seed(None, Some("a")), seed(Some("a"), None));
        let other = Seed::new("#!/bin/bash\n", None, None).expect("a seed").meta_data;
        assert_ne!(seed(None, None), other);
    }

    #[test]
    fn a_user_is_put_in_whatever_the_key_says() {
        let keys = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBZk me: \"here\" # {x}\n";
        let keys: SshKeys = keys.parse().expect("a key");
        let text = Seed::user_data_of(&"me".parse().expect("a name"), &keys, true);
        assert!(Seed::new(&text, None, None).is_ok(), "{text}");
        let read: serde_json::Value = serde_saphyr::from_str(&text).expect("YAML");
        let user = &read["users"][0];
        assert_eq!(user["name"], "me");
        assert_eq!(user["ssh_authorized_keys"][0].as_str(), keys.lines().first().map(String::as_str));
        assert_eq!(read["write_files"][0]["content"].as_str(), Some(crate::WAKE_RULE));
        assert_eq!(read["write_files"][1]["content"].as_str(), Some(SSH_SOCKET));
        let without = Seed::user_data_of(&"me".parse().expect("a name"), &keys, false);
        assert!(!without.contains("vsock"), "{without}");
    }
}
