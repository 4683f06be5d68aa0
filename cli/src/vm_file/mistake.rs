//! What is wrong with a VM's file, and where.

use std::path::Path;

use crate::failure::Failure;

/// A line's number, from 1 on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Line(usize);

impl Line {
    /// The line of a byte.
    pub fn at(text: &str, byte: usize) -> Self {
        Self(1 + text.bytes().take(byte).filter(|byte| *byte == b'\n').count())
    }

    /// The line of a mistake of TOML.
    pub fn of_error(text: &str, error: &toml::de::Error) -> Self {
        Self::at(text, error.span().map_or(text.len(), |span| span.start))
    }
}

/// Everything that is wrong with one file.
pub struct Mistakes<'a> {
    path: &'a Path,
    list: Vec<(Line, String)>,
}

impl<'a> Mistakes<'a> {
    pub fn of(path: &'a Path) -> Self {
        Self { path, list: Vec::new() }
    }

    pub fn add(&mut self, line: Line, sentence: String) {
        self.list.push((line, sentence));
    }

    /// # Errors
    /// Where there are some, with all of them.
    pub fn none(mut self) -> Result<(), Failure> {
        if self.list.is_empty() {
            return Ok(());
        }
        self.list.sort();
        let each = self
            .list
            .iter()
            .map(|(Line(line), sentence)| format!("\n  {}, line {line}: {sentence}", self.path.display()));
        Err(Failure::usage(format!("the VM's file is wrong:{}", each.collect::<String>())))
    }
}

/// What clap has to say, without its advice on the command line's usage, in one line.
pub fn sentence(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let said = text.split("\n\nUsage:").next().unwrap_or(text);
    let said = said.split("\n\nFor more").next().unwrap_or(said);
    said.split_whitespace().collect::<Vec<_>>().join(" ")
}
