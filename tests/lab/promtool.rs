//! What Prometheus itself says of a page of figures.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::packages;

/// The program, of Debian's package prometheus.
///
/// # Errors
/// Where it can't be fetched.
pub fn program() -> Result<PathBuf> {
    Ok(packages::unpacked("prometheus")?.join("usr/bin/promtool"))
}

/// Has `promtool check metrics` look at a page.
///
/// # Errors
/// Where it has a remark, or there is no promtool to be had.
pub fn check_metrics(page: &str) -> Result<()> {
    let program = program()?;
    let mut promtool = Command::new(&program)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("{} can't be run", program.display()))?;
    promtool.stdin.take().context("promtool has an input")?.write_all(page.as_bytes())?;
    let output = promtool.wait_with_output()?;
    let remarks = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && remarks.is_empty(), "promtool: {}: {remarks}", output.status);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::check_metrics;

    #[test]
    fn a_page_that_lacks_something_gets_a_remark() {
        check_metrics("# HELP a_total A.\n# TYPE a_total counter\na_total 1\n").unwrap();
        assert!(check_metrics("# TYPE a_total counter\na_total 1\n").is_err());
        assert!(check_metrics("a b c\n").is_err());
    }
}
