//! `ballast manual-pages`, with which packages are built.

mod settings;
mod vm;

use std::io;
use std::path::PathBuf;

use clap::{Command, CommandFactory};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use crate::failure::Failure;
use crate::{output, vm_file};

/// The settings of the balancer, each with what it means.
const BALANCER_SETTINGS: &str = include_str!("../../resources/balancer.toml");

/// Write the manual's pages, one for each command and file, into a directory
#[derive(clap::Args)]
pub struct Args {
    /// A directory that is there
    #[arg(required_unless_present = "schema")]
    directory: Option<PathBuf>,
    /// Print the schema of VMs' files instead, as it is in resources/vm.schema.json
    #[arg(long, conflicts_with = "directory")]
    schema: bool,
}

pub fn run(args: &Args) -> Result<(), Failure> {
    let Some(directory) = &args.directory else { return output::json(&vm_file::schema::schema()) };
    for (file, page) in pages().map_err(Failure::new)? {
        output::file(&directory.join(file), &page)?;
    }
    Ok(())
}

/// File names with contents.
fn pages() -> io::Result<Vec<(String, String)>> {
    let mut program = crate::Cli::command();
    // So that each command has its whole name and the global options.
    program.build();
    let mut pages = vec![
        ("ballast-balancer.toml.5".to_owned(), settings::page(BALANCER_SETTINGS)),
        ("ballast-vm.toml.5".to_owned(), vm::page()),
    ];
    add(&program, None, &mut pages)?;
    Ok(pages)
}

/// The page of a command, and those of its subcommands.
fn add(command: &Command, above: Option<&str>, pages: &mut Vec<(String, String)>) -> io::Result<()> {
    let name = match above {
        Some(above) => format!("{above}-{}", command.get_name()),
        None => command.get_name().to_owned(),
    };
    let shown = || command.get_subcommands().filter(|command| !command.is_hide_set());
    pages.push((format!("{name}.1"), page(command, &name, above, shown().next().is_some())?));
    shown().try_for_each(|subcommand| add(subcommand, Some(&name), pages))
}

fn page(command: &Command, name: &str, above: Option<&str>, has_subcommands: bool) -> io::Result<String> {
    let mut page = Vec::new();
    let titled = command.clone().display_name(name.to_owned());
    let man = Man::new(titled).manual("ballast").source(format!("ballast {}", env!("CARGO_PKG_VERSION")));
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if has_subcommands {
        man.render_subcommands_section(&mut page)?;
    }
    let mut roff = Roff::new();
    if let Some(more) = command.get_after_long_help().or_else(|| command.get_after_help()) {
        append(&mut roff, &more.to_string());
    }
    roff.control("SH", ["SEE ALSO"]);
    let mut others = vec![
        bold(above.unwrap_or("ballast-balancer.toml")),
        roman(if above.is_some() { "(1)" } else { "(5)" }),
    ];
    let file = match name {
        "ballast-balancer" => Some("ballast-balancer.toml"),
        "ballast-run" => Some("ballast-vm.toml"),
        _ => None,
    };
    if let Some(file) = file {
        others.extend([roman(", "), bold(file), roman("(5)")]);
    }
    others.push(roman(", /usr/share/doc/ballast/manual.md.gz"));
    roff.text(others);
    roff.to_writer(&mut page)?;
    Ok(String::from_utf8_lossy(&page).into_owned())
}

/// What follows a command's options in its help: words to be filled, headings (which end in a colon), and what is
/// indented below them, which stays as it is.
fn append(roff: &mut Roff, help: &str) {
    let mut lines = help.lines().peekable();
    let mut in_paragraph = false;
    while let Some(line) = lines.next() {
        let indented = |line: &str| line.starts_with("  ");
        if line.is_empty() {
            in_paragraph = false;
        } else if indented(line) {
            roff.control("PP", []).control("nf", []);
            roff.text([roman(line)]);
            while let Some(line) = lines.next_if(|line| indented(line)) {
                roff.text([roman(line)]);
            }
            roff.control("fi", []);
            in_paragraph = false;
        } else if let Some(heading) = line.strip_suffix(':').filter(|_| !in_paragraph) {
            roff.control("SH", [heading.to_uppercase().as_str()]);
        } else {
            if !in_paragraph {
                roff.control("PP", []);
            }
            roff.text([roman(line)]);
            in_paragraph = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_command_that_help_shows_has_a_page_with_its_options() {
        let pages = pages().unwrap();
        let page = |name: &str| &pages.iter().find(|(file, _)| file == name).expect(name).1;
        assert!(page("ballast.1").contains("ballast\\-run(1)"));
        let run = page("ballast-run.1");
        for needed in
            [".TH ballast-run 1", "\\-\\-memory", "\\-\\-verbose", ".SH \"EXIT CODES\"", "triple\\-faulted"]
        {
            assert!(run.contains(needed), "{needed}: {run}");
        }
        assert!(page("ballast-slat-run.1").contains("\\-\\-payload"));
        assert!(!pages.iter().any(|(file, _)| file.contains("unpack")), "hidden");
    }

    #[test]
    fn help_below_the_options_keeps_its_tables() {
        let mut roff = Roff::new();
        append(&mut roff, "One sentence\nends here:\nso.\n\nExamples:\n  a  1\n  b  2\n");
        let text = roff.to_roff();
        assert!(text.contains("One sentence\nends here:\nso.\n"), "{text}");
        assert!(text.contains(".SH EXAMPLES\n.PP\n.nf\n  a  1\n  b  2\n.fi\n"), "{text}");
    }
}
