//! How Pacemaker 2.1 places resources by utilization (`placement-strategy=balanced`), of one attribute.
//!
//! After "Allocation Details" of Pacemaker Explained, as far as VMs need it: no priorities, colocations or failures,
//! one positive stickiness, and a negative score on hosts under pressure that is smaller. `tests/pacemaker.rs` compares
//! it with Pacemaker's own `crm_simulate`.

use std::cmp::Reverse;
use std::collections::BTreeSet;

/// A host as the cluster knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// What all that is placed there may count.
    pub capacity: u64,
    /// Whether it may run anything.
    pub is_online: bool,
    /// Whether it is kept from VMs that are not there.
    pub refuses: bool,
}

/// A VM as the cluster knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vm {
    /// What it counts.
    pub weight: u64,
    /// Where it runs.
    pub host: Option<usize>,
}

/// Where each VM is to run next, in the VMs' order; `None` for one that no host may take. Hosts are in the order of
/// their names.
///
/// VMs that run come first: those of hosts that refuse nobody, of these those of the host with the largest capacity, of
/// these in their own order. Each stays where it runs if what is left of that host holds it, and goes else to the host
/// with the most left, of these to the one with the fewest VMs, of these to the first. So a VM that has to leave may
/// take room on a smaller host before those have it that run there.
#[must_use]
pub fn place(hosts: &[Host], vms: &[Vm]) -> Vec<Option<usize>> {
    let mut room: Vec<Room> = hosts.iter().map(|host| Room { left: host.capacity, vms: 0 }).collect();
    let mut open: BTreeSet<_> = hosts
        .iter()
        .enumerate()
        .filter(|(_, host)| host.is_online && !host.refuses)
        .map(|(index, host)| (Reverse(host.capacity), 0, index))
        .collect();
    let mut placed = vec![None; vms.len()];
    let runs = |vm: &Vm| vm.host.is_some_and(|host| hosts.get(host).is_some_and(|host| host.is_online));
    let mut running: Vec<usize> = (0..vms.len()).filter(|index| vms.get(*index).is_some_and(runs)).collect();
    running.sort_by_key(|index| {
        let host = vms.get(*index).and_then(|vm| vm.host).unwrap_or_default();
        let there = hosts.get(host).copied();
        (there.map(|host| (host.refuses, Reverse(host.capacity))), host, *index)
    });
    let waiting = (0..vms.len()).filter(|index| vms.get(*index).is_some_and(|vm| !runs(vm)));
    for index in running.into_iter().chain(waiting) {
        let Some(vm) = vms.get(index) else { continue };
        let own =
            vm.host.filter(|_| runs(vm)).filter(|host| room.get(*host).is_some_and(|r| r.left >= vm.weight));
        let roomiest = open.first().filter(|(Reverse(left), ..)| *left >= vm.weight).map(|(.., host)| *host);
        let Some(host) = own.or(roomiest) else { continue };
        let Some(there) = room.get_mut(host) else { continue };
        let was_open = open.remove(&(Reverse(there.left), there.vms, host));
        there.left -= vm.weight;
        there.vms += 1;
        if was_open {
            open.insert((Reverse(there.left), there.vms, host));
        }
        if let Some(place) = placed.get_mut(index) {
            *place = Some(host);
        }
    }
    placed
}

/// What is left of a host while VMs are placed.
#[derive(Clone, Copy, Debug)]
struct Room {
    left: u64,
    vms: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn host(capacity: u64) -> Host {
        Host { capacity, is_online: true, refuses: false }
    }

    const fn vm(weight: u64, host: Option<usize>) -> Vm {
        Vm { weight, host }
    }

    #[test]
    fn newcomers_go_where_most_is_left_and_those_that_run_stay() {
        let hosts = [host(1000), host(1000), host(900)];
        assert_eq!(place(&hosts, &[vm(300, None); 4]), [Some(0), Some(1), Some(2), Some(0)]);
        assert_eq!(
            place(&hosts, &[vm(300, Some(2)), vm(300, Some(2)), vm(10, None)]),
            [Some(2), Some(2), Some(0)]
        );
        assert_eq!(place(&hosts, &[vm(1001, None)]), [None]);
    }

    #[test]
    fn a_host_that_refuses_keeps_what_it_has_and_one_that_is_gone_nothing() {
        let pressed = Host { refuses: true, ..host(1000) };
        let gone = Host { is_online: false, ..host(1000) };
        assert_eq!(
            place(&[pressed, host(100)], &[vm(50, Some(0)), vm(50, None), vm(60, None)]),
            [Some(0), Some(1), None]
        );
        assert_eq!(place(&[gone, host(100)], &[vm(50, Some(0)), vm(60, Some(0))]), [Some(1), None]);
    }

    #[test]
    fn what_no_longer_fits_leaves_and_may_take_room_on_a_smaller_host_before_those_that_run_there() {
        let leaves = [vm(50, Some(0)), vm(40, Some(0)), vm(80, Some(1))];
        assert_eq!(place(&[host(50), host(100)], &leaves), [Some(0), None, Some(1)]);
        let leaves = [vm(50, Some(0)), vm(60, Some(0)), vm(80, Some(1))];
        assert_eq!(place(&[host(100), host(90)], &leaves), [Some(0), Some(1), None]);
    }
}
