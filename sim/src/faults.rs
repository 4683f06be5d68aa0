//! What goes wrong with VMs, or is other with them than a policy may think.

use std::time::Duration;

use api::limits::Limits;
use api::units::Bytes;
use serde::Serialize;

use super::words::words;

/// When a [`Fault::Silent`] guest stops reporting, and an [`Fault::Unresponsive`] VM stops answering.
pub const QUIET_FROM: Duration = Duration::from_secs(300);

/// How long an [`Fault::Intermittent`] balloon works, and then how long it does not.
pub const INTERMITTENT: Duration = Duration::from_secs(30);

/// How often a [`Fault::Dying`] VM dies,
pub const LIFE: Duration = Duration::from_secs(240);

/// and how long it is gone each time.
pub const DEAD: Duration = Duration::from_secs(20);

/// How a VM misbehaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// Takes memory, gives none up.
    Stuck,
    /// Gives memory up half of the time.
    Intermittent,
    /// Claims to use all it has.
    Lying,
    /// Stops reporting after a while, but follows its target.
    Silent,
    /// Has no balloon driver: it can touch all of its memory map.
    Driverless,
    /// Its API stops answering: no news from it, and no target reaches it.
    Unresponsive,
    /// Dies without a word and starts again a while later, again and again.
    Dying,
    /// Its kernel manages half of its memory map (`mem=`).
    Mem,
    /// Its kernel keeps an eighth of its memory map for another kernel (`crashkernel=`).
    Crashkernel,
    /// Memory that is plugged into it does not come on line.
    OffLine,
    /// Its control group allows it what lies in the middle between its startup memory and its max, and the
    /// kernel kills what touches more.
    Limited,
    /// Nobody knows what the host holds for it: its process lives in another PID namespace.
    Hidden,
}

impl Fault {
    /// Whether a balloon with this fault gives memory up at `now`.
    pub fn inflates(self, now: Duration) -> bool {
        match self {
            Self::Stuck | Self::Driverless => false,
            Self::Intermittent => (now.as_secs() / INTERMITTENT.as_secs()).is_multiple_of(2),
            _ => true,
        }
    }

    /// Whether it still reports at `now`.
    pub fn reports(self, now: Duration) -> bool {
        match self {
            Self::Driverless => false,
            Self::Silent => now < QUIET_FROM,
            _ => true,
        }
    }

    /// Whether its API answers at `now`.
    pub fn answers(self, now: Duration) -> bool {
        self != Self::Unresponsive || now < QUIET_FROM
    }

    /// What its kernel does not manage of what it was `given`.
    pub fn unmanaged(self, limits: &Limits, given: Bytes) -> Bytes {
        match self {
            Self::Mem => Bytes(limits.max().0 / 2).page_floor(),
            Self::Crashkernel => Bytes(limits.max().0 / 8).page_floor(),
            Self::OffLine => given.saturating_sub(limits.startup()),
            _ => Bytes::ZERO,
        }
    }

    /// The most that its guest can have.
    pub fn most(self, limits: &Limits) -> Bytes {
        match self {
            Self::OffLine => limits.startup(),
            _ => limits.max().saturating_sub(self.unmanaged(limits, limits.max())),
        }
    }

    /// What its control group allows it.
    pub fn allowed(self, limits: &Limits) -> Option<Bytes> {
        let between = limits.max().saturating_sub(limits.startup());
        (self == Self::Limited).then(|| limits.startup().saturating_add(Bytes(between.0 / 2)).page_floor())
    }

    /// The most that its guest could ever use, where that is less than its limits say.
    pub fn confines(self, limits: &Limits) -> Option<Bytes> {
        let most = self.most(limits).min(self.allowed(limits).unwrap_or(limits.max()));
        (most < limits.max()).then_some(most)
    }

    /// Whether it is dead at `now`.
    pub fn is_dead(self, now: Duration) -> bool {
        let into_a_life = now.as_secs() % LIFE.as_secs();
        self == Self::Dying && now >= LIFE && into_a_life < DEAD.as_secs()
    }
}

words! {
    Fault, UnknownFault: "`{}` is no fault: use one of {}",
    Stuck "stuck",
    Intermittent "intermittent",
    Lying "lying",
    Silent "silent",
    Driverless "driverless",
    Unresponsive "unresponsive",
    Dying "dying",
    Mem "mem",
    Crashkernel "crashkernel",
    OffLine "off-line",
    Limited "limited",
    Hidden "hidden",
}
