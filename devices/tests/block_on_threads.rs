//! The tests of the block device once more, where threads do all.

#[path = "block/main.rs"]
mod block;
