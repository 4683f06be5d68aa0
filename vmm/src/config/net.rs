//! Network cards of a VM, as data.

use std::fmt;
use std::net::IpAddr;
use std::os::fd::RawFd;
use std::str::FromStr;

use api::units::Bytes;
use devices::bucket::{Rate, RateLimits};
use devices::virtio::net::MTUS;
use devices::virtio::net::mac::Mac;
use serde::{Deserialize, Serialize};

use super::device::rate;
use super::{ConfigError, DeviceId, Name};

text!(Forward);

/// A network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetOptions {
    /// Where its cable ends.
    pub backend: NetBackend,
    /// Its address; one by the names of the VM and the device where none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
    /// The largest packet, in bytes; what the backend carries where nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// How many packets may pass each way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packets: Option<Rate>,
    /// How many bytes of them may pass each way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<Rate>,
}

impl NetOptions {
    /// A card at this cable, with all else as usual.
    pub const fn new(backend: NetBackend) -> Self {
        Self { backend, mac: None, mtu: None, packets: None, bytes: None }
    }

    /// What may pass, each way.
    pub const fn limits(&self) -> RateLimits {
        RateLimits { operations: self.packets, bytes: self.bytes }
    }

    /// The address of the card `id` of the VM `name`: the same at each start, and hardly one that another VM has.
    pub fn mac(&self, name: &Name, id: &DeviceId) -> Mac {
        self.mac.unwrap_or_else(|| {
            let hash = blake3::hash(format!("{name}/{id}").as_bytes());
            let [a, b, c, d, e, ..] = *hash.as_bytes();
            Mac::local([a, b, c, d, e])
        })
    }
}

/// Where the cable of a network card ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetBackend {
    /// In passt, a process that makes the connections of the guest its own: no privileges are needed.
    User(UserNet),
    /// In a tap of the host, by its name.
    Tap(String),
    /// In a bridge of the host, by its name: a tap is made for that, and goes with the VM.
    Bridge(String),
    /// In a tap that is open as a descriptor.
    Fd(RawFd),
}

/// A network behind the user's own connections.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UserNet {
    /// Ports of the host that lead into the guest.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub forwards: Vec<Forward>,
    /// The gateway's address is the host's loopback to the guest.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub loopback: bool,
    /// The name server that the guest is told of; the host's where none is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dns: Option<IpAddr>,
}

/// Which protocol a port is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

/// A port of the host that leads into the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Forward {
    /// Of which protocol.
    pub protocol: Protocol,
    /// The address of the host where it listens; all of them where none is given.
    pub address: Option<IpAddr>,
    /// The host's port.
    pub host: u16,
    /// The guest's port.
    pub guest: u16,
}

/// `PROTOCOL:[ADDRESS:]PORT:PORT`; an IPv6 address stands in brackets.
impl FromStr for Forward {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let wrong = || ConfigError::Forward(text.to_owned());
        let (protocol, rest) = text.split_once(':').ok_or_else(wrong)?;
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return Err(wrong()),
        };
        let port = |text: &str| text.parse().ok().filter(|port| *port != 0).ok_or_else(wrong);
        let (rest, guest) = rest.rsplit_once(':').ok_or_else(wrong)?;
        let (address, host) = match rest.rsplit_once(':') {
            None => (None, rest),
            Some((address, host)) => (Some(address), host),
        };
        let address = match address {
            None => None,
            Some(text) => {
                let six = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
                let address: IpAddr = six.unwrap_or(text).parse().map_err(|_| wrong())?;
                Some(address)
                    .filter(|address| address.is_ipv6() == six.is_some())
                    .ok_or_else(wrong)
                    .map(Some)?
            }
        };
        Ok(Self { protocol, address, host: port(host)?, guest: port(guest)? })
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.protocol {
            Protocol::Tcp => "tcp:",
            Protocol::Udp => "udp:",
        })?;
        match self.address {
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
            Some(IpAddr::V4(address)) => write!(f, "{address}:")?,
            None => {}
        }
        write!(f, "{}:{}", self.host, self.guest)
    }
}

/// `user`, `tap=NAME`, `bridge=NAME` or `fd=N`, then with commas `mac=`, `mtu=`, limits, and of `user` `forward=`, `dns=` and `loopback`.
impl FromStr for NetOptions {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let wrong = |what: String| ConfigError::Net { text: text.to_owned(), what };
        let mut parts = text.split(',').map(|part| part.split_once('=').unwrap_or((part, "")));
        let backend = match parts.next().unwrap_or_default() {
            ("user", "") => NetBackend::User(UserNet::default()),
            ("tap", name) if !name.is_empty() => NetBackend::Tap(name.to_owned()),
            ("bridge", name) if !name.is_empty() => NetBackend::Bridge(name.to_owned()),
            ("fd", number) => {
                NetBackend::Fd(number.parse().map_err(|_| wrong(format!("`{number}` is no descriptor")))?)
            }
            _ => return Err(wrong("it begins with no network".to_owned())),
        };
        let mut net = Self::new(backend);
        let (mut packets, mut bytes) = ((None, None), (None, None));
        let count = |text: &str| text.parse().ok().filter(|count| *count > 0);
        let size = |text: &str| text.parse().ok().map(|Bytes(size)| size).filter(|size| *size > 0);
        for (key, value) in parts {
            match (key, &mut net.backend) {
                ("mac", _) => net.mac = Some(value.parse().map_err(|error| wrong(format!("{error}")))?),
                ("mtu", _) => {
                    let mtu = value.parse().ok().filter(|mtu| MTUS.contains(mtu));
                    let (least, most) = (MTUS.start(), MTUS.end());
                    net.mtu = Some(mtu.ok_or_else(|| wrong(format!("an MTU is {least} to {most}")))?);
                }
                ("packets-per-second", _) if count(value).is_some() => packets.0 = count(value),
                ("packets-burst", _) if count(value).is_some() => packets.1 = count(value),
                ("bytes-per-second", _) if size(value).is_some() => bytes.0 = size(value),
                ("bytes-burst", _) if size(value).is_some() => bytes.1 = size(value),
                ("packets-per-second" | "packets-burst" | "bytes-per-second" | "bytes-burst", _) => {
                    return Err(wrong(format!("`{key}={value}` is no limit")));
                }
                ("forward", NetBackend::User(user)) => user.forwards.push(value.parse()?),
                ("loopback", NetBackend::User(user)) if value.is_empty() => user.loopback = true,
                ("dns", NetBackend::User(user)) => {
                    user.dns = Some(value.parse().map_err(|_| wrong(format!("`{value}` is no IP address")))?);
                }
                ("loopback", NetBackend::User(_)) => return Err(wrong("`loopback` has no value".to_owned())),
                ("forward" | "loopback" | "dns", _) => {
                    return Err(wrong(format!("`{key}` goes with `user` alone")));
                }
                _ => return Err(wrong(format!("`{key}` is not known"))),
            }
        }
        net.packets = rate(packets.0, packets.1).map_err(wrong)?;
        net.bytes = rate(bytes.0, bytes.1).map_err(wrong)?;
        Ok(net)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_are_read_as_they_are_written() {
        let net: NetOptions =
            "user,forward=tcp:8080:80,forward=udp:127.0.0.1:53:5353,forward=tcp:[::1]:1:2,mac=52:54:00:12:34:56,\
             mtu=1400,loopback,dns=9.9.9.9"
                .parse()
                .unwrap();
        let NetBackend::User(user) = &net.backend else { panic!("{net:?}") };
        let forwards: Vec<_> = user.forwards.iter().map(ToString::to_string).collect();
        assert_eq!(forwards, ["tcp:8080:80", "udp:127.0.0.1:53:5353", "tcp:[::1]:1:2"]);
        assert_eq!((net.mtu, user.loopback, user.dns), (Some(1400), true, "9.9.9.9".parse().ok()));
        let text = serde_json::to_string(&net).unwrap();
        assert_eq!(serde_json::from_str::<NetOptions>(&text).unwrap(), net);
        for (text, backend) in [
            ("tap=tap0", NetBackend::Tap("tap0".into())),
            ("bridge=br0", NetBackend::Bridge("br0".into())),
            ("fd=7", NetBackend::Fd(7)),
        ] {
            assert_eq!(text.parse(), Ok(NetOptions::new(backend)));
        }
        let net: NetOptions =
            "user,packets-per-second=1000,bytes-per-second=20M,bytes-burst=64K".parse().unwrap();
        let rate = |per_second, burst| Some(Rate { per_second, burst });
        assert_eq!(net.limits(), RateLimits { operations: rate(1000, 100), bytes: rate(20 << 20, 64 << 10) });
    }

    #[test]
    fn what_is_no_card_is_refused_with_a_reason() {
        for (bad, why) in [
            ("", "no network"),
            ("mac=52:54:00:12:34:56", "no network"),
            ("tap", "no network"),
            ("tap=", "no network"),
            ("fd=x", "`x`"),
            ("user,forward=8080:80", "8080:80"),
            ("user,forward=tcp:0:80", "tcp:0:80"),
            ("user,forward=tcp:1:2:3", "1:2:3"),
            ("user,forward=tcp:::1:1:2", "::1"),
            ("user,mac=1", "`1`"),
            ("user,mtu=10", "68 to"),
            ("user,mtu=65522", "65521"),
            ("tap=a,forward=tcp:1:2", "`user` alone"),
            ("user,packets-per-second=0", "no limit"),
            ("user,bytes-per-second=x", "no limit"),
            ("user,packets-burst=5", "burst"),
            ("user,x=1", "`x`"),
            ("user,loopback=1", "no value"),
            ("user,dns=a", "`a`"),
        ] {
            let said = bad.parse::<NetOptions>().unwrap_err().to_string();
            assert!(said.contains(why), "{bad}: {said}");
        }
    }

    #[test]
    fn an_address_stays_with_its_vm_and_card() {
        let net: NetOptions = "user".parse().unwrap();
        let mac = |name: &str, id: &str| net.mac(&name.parse().unwrap(), &id.parse().unwrap()).to_string();
        assert_eq!(mac("web", "net0"), mac("web", "net0"));
        assert!(mac("web", "net0").starts_with("52:"));
        assert_ne!(mac("web", "net0"), mac("web", "net1"));
        assert_ne!(mac("web", "net0"), mac("web-net0", "net0"));
    }
}
