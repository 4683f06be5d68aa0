//! A guest with a cushion. Its balloon follows each change of the target: it gives and takes at once, and needs
//! nothing of the guest but free pages. What is plugged follows in two ways:
//!
//! - It is never less than the target and the cushion.
//! - What is plugged beyond that stays in the balloon, until it is [`PIECE`] or more and the guest has been left alone
//!   for [`REST`], or so much that moving it and the cushion by the balloon would be more work than unplugging. What
//!   is more than the guest may have goes at once.
//!
//! Pages of the balloon lie all over the blocks that are to go, and Linux moves each of them by asking the balloon for
//! another, some 5 MiB/s. So the balloon lets go of all that it holds before the guest unplugs, and fills again
//! afterwards. That is work too, which is why it is done seldom: a target that moves to and fro within a piece
//! plugs and unplugs nothing.

use std::time::Duration;

use api::status::UNPLUG_PATIENCE;
use api::units::Bytes;

use super::{AHEAD, Phase, Standing, Steps};

/// The least that is unplugged at a time. Linux gives page structures back by so much.
pub const PIECE: Bytes = Bytes::mib(128);

/// How long a guest is left alone before it is asked to unplug what the balloon holds as well.
pub const REST: Duration = Duration::from_secs(10);

/// How long a balloon may take to let go of all that it holds.
pub const EMPTY_PATIENCE: Duration = Duration::from_secs(30);

/// How long a balloon that fills again may take without the guest counting as having kept what it let go.
pub const REFILL_PATIENCE: Duration = Duration::from_secs(10);

pub fn steps(standing: Standing, target: Bytes, cushion: Bytes) -> Steps {
    let whole = standing.blocks_for(target.saturating_add(cushion));
    let needed = standing.has().saturating_sub(target);
    let surplus = standing.plugged.saturating_sub(whole);
    let Standing { driver, waited, held, balloon, .. } = standing;
    // Linux is slow to unplug while its balloon lets go, and that is no sign that it can't.
    let is_empty = balloon == Bytes::ZERO;
    let patience = if is_empty { UNPLUG_PATIENCE } else { EMPTY_PATIENCE };
    let unplug = |let_go: Bytes, waited| Steps {
        requested: if is_empty { whole } else { standing.plugged },
        held: Bytes::ZERO,
        // The guest counts as having its target at least.
        phase: Phase::Unplugging { let_go: let_go.min(needed) },
        look_again: Some(patience.saturating_sub(waited)),
    };
    let stuck = match standing.phase {
        Phase::Unplugging { let_go } if surplus > Bytes::ZERO && driver => {
            if waited < patience {
                return unplug(let_go, waited);
            }
            surplus
        }
        Phase::Unplugging { .. } => Bytes::ZERO,
        Phase::Held { stuck } | Phase::Refilling { stuck, .. } => stuck.min(surplus),
    };
    // One that has taken from its cushion, or can't fill it, has nothing to unplug.
    let is_full = balloon.saturating_add(AHEAD) >= held;
    let is_piece = driver && is_full && surplus >= stuck.saturating_add(PIECE);
    // Here `held` is what the balloon was asked for before the target fell.
    let is_due = is_piece && (waited >= REST || surplus >= held.saturating_add(cushion));
    let is_too_much = driver && surplus > stuck && standing.plugged > standing.blocks_for(standing.max);
    if is_due || is_too_much {
        return unplug(held.max(standing.phase.let_go()), Duration::ZERO);
    }
    // A guest that has taken from its cushion does not get the rest of it in other pages.
    let allowed =
        standing.blocks_for(target.saturating_add(balloon).saturating_add(AHEAD.max(standing.block)));
    let requested = standing.plugged.max(whole.min(allowed));
    let let_go = standing.phase.let_go().min(needed);
    let fills = let_go > Bytes::ZERO && balloon < needed && waited < REFILL_PATIENCE;
    let phase = if fills { Phase::Refilling { let_go, stuck } } else { Phase::Held { stuck } };
    let look_again = match () {
        () if fills => Some(REFILL_PATIENCE.saturating_sub(waited)),
        () => is_piece.then(|| REST.saturating_sub(waited)),
    };
    Steps { requested, held: needed, phase, look_again }
}
