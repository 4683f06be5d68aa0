//! C6: how many memory references a TLB miss costs.

use super::{Found, Material, Outcome};
use crate::lab::Pair;
use crate::lab::walks::Miss;
use crate::walk::{PageSize, Walk};

/// The model, and what the lab counted.
pub(super) fn walks(material: Material<'_>) -> Found {
    let walk = Walk::USUAL;
    let model = format!(
        "By the model {} at most: {}. {} counts only the walks for the guest's tables, {} leaves out the guest's own \
         entries.",
        walk.references(),
        walk.formula(),
        walk.for_tables_only(),
        walk.host_references()
    );
    match material.of_lab(|lab| counted(lab.walks.as_ref()?)) {
        Some((outcome, text)) => (outcome, format!("{text} {model}")),
        None => (Outcome::Model, model),
    }
}

/// What was read in each miss, by page sizes.
pub(super) fn counted(pair: &Pair) -> Option<Found> {
    let usual = |miss: &&Miss| (miss.guest_page, miss.host_page) == (PageSize::Size4K, PageSize::Size4K);
    let references = |misses: &[Miss]| misses.iter().find(usual).map(Miss::references);
    let on = references(&pair.on.misses)?;
    let list = |misses: &[Miss]| {
        let one = |miss: &Miss| format!("{} over {} {}", miss.guest_page, miss.host_page, miss.references());
        misses.iter().map(one).collect::<Vec<_>>().join(", ")
    };
    let modelled = pair.on.misses.iter().all(Miss::is_as_modelled);
    let mut text = format!(
        "References of a miss, with no cache of paging structures, by the guest's page over the host's (exact): {}; {}.",
        list(&pair.on.misses),
        if modelled { "the model's, in its order" } else { "not all the model's" }
    );
    let off = references(&pair.off.misses);
    if off.is_some() {
        text += &format!(" With SLAT off: {}.", list(&pair.off.misses));
    }
    let outcome = match (on, off) {
        (16 | 20, Some(4)) => Outcome::Holds,
        (on, Some(off)) if on > off => Outcome::Partly,
        (_, Some(_)) => Outcome::Fails,
        (..) => Outcome::Partly,
    };
    Some((outcome, text))
}
