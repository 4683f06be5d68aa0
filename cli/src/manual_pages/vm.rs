//! The page of a VM's file, made from the options of `ballast run`.

use clap::{ArgAction, Args as _, Command};
use clap_mangen::roff::{Roff, bold, italic, roman};

use crate::run;
use crate::vm_file::{key, keys};

const EXAMPLE: &str = "\
# /etc/ballast/vms/web.toml
kernel = \"/boot/vmlinuz\"
initrd = \"/var/lib/ballast/web.cpio.gz\"
memory = \"256M,min=128M,max=1G\"
cpus = 2
disk = [\"/var/lib/ballast/web.img\", \"/var/lib/ballast/data.qcow2,readonly\"]
no_agent = true";

/// The page ballast-vm.toml(5).
pub fn page() -> String {
    let command = run::Args::augment_args(Command::new("run"));
    let mut roff = Roff::new();
    let source = format!("ballast {}", env!("CARGO_PKG_VERSION"));
    roff.control("TH", ["ballast-vm.toml", "5", "", &source, "ballast"]);
    roff.control("SH", ["NAME"]);
    roff.text([roman("ballast-vm.toml - a virtual machine of ballast")]);
    roff.control("SH", ["SYNOPSIS"]);
    roff.text([roman("/etc/ballast/vms/"), italic("NAME"), roman(".toml")]);
    roff.control("SH", ["DESCRIPTION"]);
    roff.text([
        roman("A VM as a file, which "),
        bold("ballast run --config"),
        roman(" takes, and ballast@"),
        italic("NAME"),
        roman(".service with it. "),
        bold("ballast check"),
        roman(
            " says everything that is wrong with one. It is TOML. Its settings are the options of ballast run, with _ \
             for -. An option of the command line goes before the same setting.",
        ),
    ]);
    roff.control("SH", ["SETTINGS"]);
    for (name, arg) in keys(&command).filter_map(|arg| Some((key(arg)?, arg))) {
        let value =
            arg.get_value_names().and_then(|names| names.first()).map_or("TEXT", |name| name.as_str());
        roff.control("TP", []);
        roff.text(match arg.get_action() {
            ArgAction::SetTrue => vec![bold(name), roman(" = true|false")],
            ArgAction::Append => vec![bold(name), roman(" = ["), italic(value), roman(", ...]")],
            _ => vec![bold(name), roman(" = "), italic(value)],
        });
        let help =
            arg.get_long_help().or_else(|| arg.get_help()).map(ToString::to_string).unwrap_or_default();
        for (number, paragraph) in help.split("\n\n").enumerate() {
            if number > 0 {
                roff.control("IP", []);
            }
            roff.text([roman(paragraph)]);
        }
        let values: Vec<String> =
            arg.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect();
        if arg.get_action().takes_values() && !values.is_empty() {
            roff.control("IP", []);
            roff.text([roman(format!("One of {}.", values.join(", ")))]);
        }
        if let ([default], false, true) =
            (arg.get_default_values(), arg.is_hide_default_value_set(), arg.get_action().takes_values())
        {
            roff.control("IP", []);
            roff.text([roman(format!("Without it: {}", default.to_string_lossy()))]);
        }
    }
    roff.control("SH", ["EXAMPLE"]).control("nf", []);
    roff.text([roman(EXAMPLE)]);
    roff.control("fi", []);
    roff.control("SH", ["SEE ALSO"]);
    roff.text([bold("ballast-run"), roman("(1), /usr/share/ballast/schema/vm.schema.json")]);
    roff.to_roff()
}

#[cfg(test)]
mod tests {
    use super::page;

    #[test]
    fn each_setting_is_on_the_page_with_its_words() {
        let page = page();
        for needed in
            ["\\fBno_unpack\\fR = true|false", "\\fBdisk\\fR = [", "Without it: balloon", "and divides by"]
        {
            assert!(page.contains(needed), "{needed}: {page}");
        }
        assert!(!page.contains("\\fBconfig\\fR"), "{page}");
    }
}
