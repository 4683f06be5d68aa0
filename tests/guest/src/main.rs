//! Init.
fn main() {}
