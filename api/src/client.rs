//! The client of ballast's APIs, and of others that are HTTP and JSON over a Unix socket.
//!
//! What comes back is not trusted: a guest may have taken over the process at the other end. So every
//! exchange has a time limit, every answer a bound, and text that ends up in a log or on a terminal is
//! cleaned first.

mod error;
mod events;
mod http;
mod peer;
mod vm;

use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::{problem, version};

pub use self::error::Error;
pub use self::events::EventSource;
pub use self::http::{Http, Upgraded};
pub use self::peer::{Acquaintance, PeerProcess, PeerStream};
pub use self::vm::Client;

/// How long one request may take where nobody says otherwise.
///
/// A VM answers from its own memory in well under a millisecond; a second is
/// the tick of the balancer, which must not wait longer for anyone.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(1);

/// The largest answer that is read. A full one of a VM is about 2 KiB.
pub const LARGEST_ANSWER: usize = 256 << 10;

/// What is expected at the other end.
#[derive(Debug)]
pub struct Peer {
    /// What its paths begin with. A server that knows none of them is asked without it: a VM that was started by the
    /// release before runs on through an upgrade.
    pub version: Option<&'static str>,
    /// The sentence in the body of a refusal, wherever it is put.
    pub sentence: fn(&[u8]) -> Option<String>,
    /// What to say where nobody listens.
    pub where_to_look: &'static str,
    /// What to ask where an answer makes no sense.
    pub should_be: &'static str,
}

/// A VM of ballast, or its balancer.
pub static BALLAST: Peer = Peer {
    version: Some(version::PREFIX),
    sentence: problem::detail,
    where_to_look: "; `ballast ps` lists those that run",
    should_be: "is it a ballast VM of this version?",
};

/// Takes as many descriptors as the hard limit allows: who speaks to many VMs needs one or two for each, and
/// 1024, the usual soft limit, is too few.
pub fn raise_descriptor_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    // Without it some VMs are not asked, which is said for each.
    if current != maximum {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    }
}
