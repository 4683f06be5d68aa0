//! What an emulated host is told: a text, a word and its value in a line.
//!
//! ```text
//! console PATH             the program's input and output
//! results PATH             takes what is handed out
//! module PATH PARAMETERS   loaded in this order
//! env NAME=VALUE
//! argument TEXT            the program, then each of its arguments
//! bring PATH               handed out afterwards: a file, or a directory with all below it
//! terminal                 the program gets a terminal for a person, not a plain pipe of bytes
//! ```

use std::path::PathBuf;

/// Where the job lies.
pub const JOB: &str = "/lab/job";

/// What is to be done in an emulated host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Job {
    /// The device of the program's input and output.
    pub console: PathBuf,
    /// The device that takes what is handed out.
    pub results: PathBuf,
    /// Paths of modules, each with its parameters behind a space.
    pub modules: Vec<String>,
    /// Names and values.
    pub environment: Vec<(String, String)>,
    /// The program and its arguments.
    pub arguments: Vec<String>,
    /// Paths that are handed out.
    pub bring: Vec<PathBuf>,
    /// Whether a person sits at the console.
    pub terminal: bool,
}

impl Job {
    /// The job as a text.
    ///
    /// # Errors
    /// Where a value has a line break.
    pub fn text(&self) -> Result<String, String> {
        let path = |path: &PathBuf| path.display().to_string();
        let mut lines = vec![("console", path(&self.console)), ("results", path(&self.results))];
        lines.extend(self.modules.iter().map(|module| ("module", module.clone())));
        lines.extend(self.environment.iter().map(|(name, value)| ("env", format!("{name}={value}"))));
        lines.extend(self.arguments.iter().map(|argument| ("argument", argument.clone())));
        lines.extend(self.bring.iter().map(|bring| ("bring", path(bring))));
        lines.extend(self.terminal.then(|| ("terminal", String::new())));
        match lines.iter().find(|(_, value)| value.contains('\n')) {
            Some((word, value)) => {
                Err(format!("{value:?} has a line break: it can't be an {word} in the lab"))
            }
            None => Ok(lines.iter().map(|(word, value)| format!("{word} {value}\n")).collect()),
        }
    }

    /// Reads it again.
    ///
    /// # Errors
    /// A sentence, where a line makes no sense or no program is named.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut job = Self::default();
        for line in text.lines() {
            let (word, value) = line.split_once(' ').unwrap_or((line, ""));
            match word {
                "console" => job.console = value.into(),
                "results" => job.results = value.into(),
                "module" => job.modules.push(value.to_owned()),
                "env" => {
                    let (name, value) = value.split_once('=').ok_or_else(|| format!("no = in `{line}`"))?;
                    job.environment.push((name.to_owned(), value.to_owned()));
                }
                "argument" => job.arguments.push(value.to_owned()),
                "bring" => job.bring.push(PathBuf::from(value)),
                "terminal" => job.terminal = true,
                _ => return Err(format!("`{word}` is no word of a job")),
            }
        }
        if job.arguments.is_empty() { Err("no program is named".to_owned()) } else { Ok(job) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_read_as_it_was_written() {
        let job = Job {
            console: "/dev/hvc0".into(),
            results: "/dev/vport0p1".into(),
            modules: vec!["/lib/modules/kvm_amd.ko npt=0".to_owned()],
            environment: vec![("A".to_owned(), "b=c d".to_owned()), ("E".to_owned(), String::new())],
            arguments: vec!["/bin/ballast".to_owned(), "two words".to_owned(), String::new()],
            bring: vec!["/tmp/trace".into()],
            terminal: true,
        };
        assert_eq!(Job::parse(&job.text().unwrap()), Ok(job.clone()));
        let broken = Job { arguments: vec!["a\nb".to_owned()], ..job };
        assert!(broken.text().is_err_and(|why| why.contains("line break")));
        assert!(Job::parse("bring /x").is_err_and(|why| why.contains("no program")));
        assert!(Job::parse("argument x\nfetch y").is_err_and(|why| why.contains("`fetch`")));
    }
}
