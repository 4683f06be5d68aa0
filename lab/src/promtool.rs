//! What Prometheus itself says of a page of figures.

use std::io::Write;
use std::path::{Path, PathBuf};
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

/// Has `promtool check rules` look at files of rules.
///
/// # Errors
/// Where one does not parse, or there is no promtool to be had.
pub fn check_rules(files: &[&Path]) -> Result<(), Error> {
    on_files(&["check", "rules"], files)
}

/// Has `promtool test rules` play tests of rules.
///
/// # Errors
/// Where one does not come out as it says, or there is no promtool to be had.
pub fn test_rules(tests: &[&Path]) -> Result<(), Error> {
    on_files(&["test", "rules"], tests)
}

fn on_files(task: &[&str], paths: &[&Path]) -> Result<(), Error> {
    let program = program()?;
    let output = Command::new(&program).args(task).args(paths).output().map_err(files(program.display()))?;
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    Err(Error::Failed(format!("promtool {}: {}: {}", task.join(" "), output.status, said.concat())))
}

#[cfg(test)]
mod tests {
    use super::{check_metrics, check_rules, test_rules};

    #[test]
    fn a_page_that_lacks_something_gets_a_remark() {
        check_metrics("# HELP a_total A.\n# TYPE a_total counter\na_total 1\n").unwrap();
        assert!(check_metrics("# TYPE a_total counter\na_total 1\n").is_err());
        assert!(check_metrics("a b c\n").is_err());
    }

    #[test]
    fn rules_that_do_not_parse_or_say_something_else_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let [rules, wrong, tests] =
            ["rules.yml", "wrong.yml", "tests.yml"].map(|name| directory.path().join(name));
        std::fs::write(&rules, "groups: [{name: g, rules: [{record: a, expr: sum(b)}]}]").unwrap();
        std::fs::write(&wrong, "groups: [{name: g, rules: [{record: a, expr: sum(b}]}]").unwrap();
        check_rules(&[&rules]).unwrap();
        assert!(check_rules(&[&rules, &wrong]).is_err());
        for (value, good) in [(3, true), (4, false)] {
            let test = format!(
                "rule_files: [rules.yml]\ntests: [{{interval: 1m, input_series: [{{series: b, values: '3 3'}}], \
                 promql_expr_test: [{{expr: a, eval_time: 1m, exp_samples: [{{labels: a, value: {value}}}]}}]}}]"
            );
            std::fs::write(&tests, test).unwrap();
            assert_eq!(test_rules(&[&tests]).is_ok(), good);
        }
    }
}
