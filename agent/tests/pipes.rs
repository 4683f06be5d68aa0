//! Whoever reads what the agent says may go, and the agent is not hurt by that.

use std::process::{Command, Stdio};

/// Runs the agent with `argument`, and nobody at the other end of its pipes; gives its exit code.
fn unheard(argument: &str) -> Option<i32> {
    let pipe = || {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        Stdio::from(writer)
    };
    let mut agent = Command::new(env!("CARGO_BIN_EXE_ballast-agent"));
    agent.arg(argument).stdout(pipe()).stderr(pipe()).status().unwrap().code()
}

#[test]
fn closed_pipes_end_nothing() {
    assert_eq!(unheard("--help"), Some(0));
    assert_eq!(unheard("--nonsense"), Some(2));
}
