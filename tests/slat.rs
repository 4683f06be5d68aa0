//! What `ballast slat` says of a real guest is what KVM and the guest say themselves.

use std::time::Duration;

use guests::Host;
use guests::checks::slat::{addresses_are_followed, the_module_is_reloaded_and_put_back};
use lab::Kernel;

#[test]
fn an_address_of_a_guest_is_followed_to_where_the_guest_says_it_is() {
    Host::new().guest(Kernel::V6_1).usually(Duration::from_secs(45)).run(|| {
        addresses_are_followed();
    });
}

// Only in the lab: on a real host this would touch the host.
#[test]
fn the_module_is_reloaded_and_put_back_on_amd() {
    Host::new()
        .guest(Kernel::V6_1)
        .usually(Duration::from_secs(45))
        .run(|| the_module_is_reloaded_and_put_back("kvm_amd", "npt"));
}
