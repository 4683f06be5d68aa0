//! Who may have how much: weighted sharing of what is there.
//!
//! Each VM keeps its floor. What is left is shared so that everyone gets the smaller of what it wants and
//! `floor + l x weight x range`, with the largest `l` for which the sum fits. `l` has no upper limit: a limit
//! would leave memory idle where weights are small. Sums are exact and in whole pages, so the order of the
//! VMs does not matter.

use api::units::Pages;

/// What one VM brings to the sharing, and what it gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Which VM; also breaks ties, so that the order of claims is irrelevant.
    pub id: u64,
    /// The caller's own index for it.
    pub index: usize,
    /// What it keeps in any case.
    pub floor: Pages,
    /// What it wants; less than the floor counts as the floor.
    pub want: Pages,
    /// Its weight times the pages between its min and its max; 0 gets its floor alone.
    pub share: u128,
    /// What it is given: set by [`divide`].
    pub given: Pages,
}

impl Claim {
    fn missing(&self) -> u128 {
        if self.share == 0 { 0 } else { u128::from(self.want.0.saturating_sub(self.floor.0)) }
    }
}

/// Divides `capacity` among `claims` and reorders them. True where everyone got what it wants.
///
/// The sum of what is given is at most `capacity`, or the sum of the floors
/// where that is more. Up to one page a claim is lost to rounding down.
pub fn divide(claims: &mut [Claim], capacity: Pages) -> bool {
    // A page count has 52 bits and a share 66: the products below fit 128.
    claims.sort_unstable_by(|a, b| {
        let (left, right) = (a.missing() * b.share.max(1), b.missing() * a.share.max(1));
        left.cmp(&right).then(a.id.cmp(&b.id))
    });
    let floors: u128 = claims.iter().map(|claim| u128::from(claim.floor.0)).sum();
    let mut left = u128::from(capacity.0).saturating_sub(floors);
    let mut shares: u128 = claims.iter().filter(|claim| claim.missing() > 0).map(|claim| claim.share).sum();
    let mut all = true;
    for claim in claims {
        let missing = claim.missing();
        if missing == 0 {
            claim.given = claim.floor;
            continue;
        }
        let fair = left * claim.share / shares;
        let more = missing.min(fair);
        all &= more == missing;
        claim.given = Pages(claim.floor.0.saturating_add(u64::try_from(more).unwrap_or(u64::MAX)));
        left -= more;
        shares -= claim.share;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn claim(id: u64, floor: u64, want: u64, share: u64) -> Claim {
        Claim {
            id,
            index: id as usize,
            floor: Pages(floor),
            want: Pages(want),
            share: u128::from(share),
            given: Pages(0),
        }
    }

    fn given(claims: &[Claim], id: u64) -> u64 {
        claims.iter().find(|claim| claim.id == id).unwrap().given.0
    }

    #[test]
    fn what_one_does_not_want_goes_to_the_others() {
        let mut claims = [claim(0, 10, 20, 1), claim(1, 10, 1000, 1), claim(2, 10, 1000, 3)];
        assert!(!divide(&mut claims, Pages(450)));
        // 420 above the floors: 10 to the first, the rest one to three.
        assert_eq!([given(&claims, 0), given(&claims, 1), given(&claims, 2)], [20, 113, 317]);
    }

    prop_compose! {
        fn any_claims()(raw in prop::collection::vec((0u64..1 << 20, 0u64..1 << 24, 1u64..10_000, 1u64..1 << 24), 1..20))
            -> Vec<Claim> {
            raw.iter().enumerate().map(|(id, (floor, more, weight, range))| Claim {
                share: u128::from(*weight) * u128::from(*range),
                ..claim(id as u64, *floor, floor + more.min(range), 0)
            }).collect()
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn the_sum_fits_and_nothing_is_left_idle(mut claims in any_claims(), capacity in 0u64..1 << 26) {
            let all = divide(&mut claims, Pages(capacity));
            let floors: u64 = claims.iter().map(|c| c.floor.0).sum();
            let sum: u64 = claims.iter().map(|c| c.given.0).sum();
            prop_assert!(sum <= capacity.max(floors));
            for c in &claims {
                prop_assert!(c.floor <= c.given && c.given <= c.want.max(c.floor));
            }
            prop_assert_eq!(all, claims.iter().all(|c| c.given >= c.want));
            if !all {
                prop_assert!(sum + claims.len() as u64 >= capacity, "{} of {} given while some want more", sum, capacity);
            }
        }

        #[test]
        fn the_order_of_vms_is_irrelevant(claims in any_claims(), capacity in 0u64..1 << 26, turn in 0usize..20) {
            let mut straight = claims.clone();
            let mut turned = claims.clone();
            turned.rotate_left(turn % claims.len());
            turned.reverse();
            divide(&mut straight, Pages(capacity));
            divide(&mut turned, Pages(capacity));
            for c in &claims {
                prop_assert_eq!(given(&straight, c.id), given(&turned, c.id));
            }
        }

        #[test]
        fn more_weight_or_more_demand_never_gives_less(
            claims in any_claims(), capacity in 0u64..1 << 26, heavier in 1u128..8, more in 0u64..1 << 20
        ) {
            let mut before = claims.clone();
            divide(&mut before, Pages(capacity));
            let mut after = claims.clone();
            after[0].share *= heavier;
            after[0].want.0 += more;
            divide(&mut after, Pages(capacity));
            // One page a claim may be lost to rounding.
            prop_assert!(given(&after, 0) + claims.len() as u64 >= given(&before, 0));
        }

        #[test]
        fn a_liar_cannot_push_another_below_its_entitlement(claims in any_claims(), capacity in 0u64..1 << 26) {
            let mut honest = claims.clone();
            divide(&mut honest, Pages(capacity));
            // Everyone else asks for all there is: what the first has then is its entitlement.
            let mut lied = claims.clone();
            for c in &mut lied[1..] {
                c.want = Pages(1 << 30);
            }
            divide(&mut lied, Pages(capacity));
            let mut all_lie = lied.clone();
            let first = all_lie.iter_mut().find(|c| c.id == 0).unwrap();
            first.want = Pages(1 << 30);
            divide(&mut all_lie, Pages(capacity));
            let entitlement = given(&all_lie, 0);
            let wanted = claims[0].want.0;
            prop_assert!(given(&lied, 0) + claims.len() as u64 >= wanted.min(entitlement));
            prop_assert!(given(&honest, 0) + claims.len() as u64 >= wanted.min(entitlement));
        }
    }
}
