//! The worked example of docs/balancing.md.

use super::*;

#[test]
fn the_worked_example_comes_out_as_it_is_told() {
    let limits = "4G,min=1G,max=8G";
    let mut world = World::new(
        Bytes::gib(10),
        vec![Guest::new(1, limits, Bytes::mib(3000)), Guest::new(2, limits, Bytes::mib(4000))],
    );
    for (guest, has) in world.guests.iter_mut().zip([3600, 4800]) {
        (guest.vm.observed.target, guest.vm.observed.actual) = (Bytes::mib(has), Bytes::mib(has));
    }
    world.run(10);
    assert_eq!((world.target(0), world.target(1)), (Bytes::mib(3600), Bytes::mib(4800)));
    assert_eq!(world.balance.free, Bytes::mib(1840));
    world.guests[1].wants = Bytes::mib(6000);
    world.tick();
    let whole = |bytes: Bytes| bytes.0 >> 20;
    let entitled = |world: &World| [0, 1].map(|index| whole(world.guests[index].vm.entitlement()));
    let targets = |world: &World| [0, 1].map(|index| whole(world.target(index)));
    assert_eq!(whole(world.guests[1].vm.demand()), 7728);
    assert_eq!((entitled(&world), targets(&world)), ([3128, 7110], [3150, 6638]));
    world.tick();
    assert_eq!((targets(&world), whole(world.balance.free)), ([3130, 7088], 452));
    world.run(20);
    assert_eq!(entitled(&world), [3600, 6332]);
    world.run(60);
    assert_eq!((targets(&world), whole(world.balance.free)), ([3130, 6802], 307));
    world.run(60);
    assert_eq!((targets(&world), whole(world.balance.free)), ([3600, 6334], 305));
    assert_eq!(world.guests[1].vm.used(), Some(Bytes::mib(6000)));
}
