use std::panic::{AssertUnwindSafe, catch_unwind};

use super::*;

#[tokio::test]
async fn a_panic_in_a_request_ends_the_daemon_and_leaves_no_vm_without_a_driver() {
    let mut requests = JoinSet::<Done>::new();
    requests.spawn(async { panic!("as a bug in a driver") });
    let done = requests.join_next().await.unwrap();
    assert!(catch_unwind(AssertUnwindSafe(|| finished(done))).is_err());
}
