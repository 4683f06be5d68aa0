//! What Prometheus itself says of a page of figures.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::error::files;
use crate::{Error, packages};

/// The program, of Debian's package prometheus.
///
/// # Errors
/// Where it can't be fetched.
pub fn program() -> Result<PathBuf, Error> {
    Ok(packages::unpacked("prometheus")?.join("usr/bin/promtool"))
}

/// Has `promtool check metrics` look at a page.
///
/// # Errors
/// Where it has a remark, or there is no promtool to be had.
pub fn check_metrics(page: &str) -> Result<(), Error> {
    let program = program()?;
    let check = || {
        let mut promtool = Command::new(&program)
            .args(["check", "metrics"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        drop(promtool.stdin.take().map(|mut input| input.write_all(page.as_bytes())));
        promtool.wait_with_output()
    };
    let output = check().map_err(files(program.display()))?;
    let remarks = String::from_utf8_lossy(&output.stderr);
    match output.status.success() && remarks.is_empty() {
        true => Ok(()),
        false => Err(Error::Failed(format!("promtool: {}: {remarks}", output.status))),
    }
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
