//! The page of a settings file, made from the documented example of it.

use clap_mangen::roff::{Roff, bold, roman};

/// The page ballast-balancer.toml(5).
///
/// In the example a comment's lines begin with `# `, and a setting that is commented out with `#`.
pub fn page(example: &str) -> String {
    let mut roff = Roff::new();
    let source = format!("ballast {}", env!("CARGO_PKG_VERSION"));
    roff.control("TH", ["ballast-balancer.toml", "5", "", &source, "ballast"]);
    roff.control("SH", ["NAME"]);
    roff.text([roman("ballast-balancer.toml - settings of ballast's balancer")]);
    roff.control("SH", ["SYNOPSIS"]);
    roff.text([roman("/etc/ballast/balancer.toml")]);
    roff.control("SH", ["DESCRIPTION"]);
    let mut comment = Vec::new();
    let mut in_description = true;
    for line in example.lines().chain([""]) {
        let commented = line.strip_prefix('#');
        if let Some(text) = line.strip_prefix("# ") {
            comment.push(text);
        } else if commented.is_some_and(|text| text.starts_with(':')) {
            // For editors.
        } else if line.is_empty() {
            if !comment.is_empty() {
                paragraph(&mut roff, &comment);
                comment.clear();
            }
            if std::mem::take(&mut in_description) {
                roff.control("SH", ["SETTINGS"]);
            }
        } else {
            let setting = commented.unwrap_or(line);
            if setting.starts_with('[') {
                roff.control("SS", [setting]);
                if !comment.is_empty() {
                    paragraph(&mut roff, &comment);
                }
            } else {
                roff.control("TP", []);
                roff.text([bold(setting)]);
                roff.text(comment.iter().flat_map(|text| [roman(*text), roman("\n")]).collect::<Vec<_>>());
            }
            comment.clear();
        }
    }
    roff.control("SH", ["SEE ALSO"]);
    roff.text([bold("ballast-balancer"), roman("(1), /usr/share/ballast/schema/balancer.schema.json")]);
    roff.to_roff()
}

fn paragraph(roff: &mut Roff, lines: &[&str]) {
    roff.control("PP", []);
    roff.text(lines.iter().flat_map(|text| [roman(*text), roman("\n")]).collect::<Vec<_>>());
}

#[cfg(test)]
mod tests {
    use super::page;
    use crate::manual_pages::BALANCER_SETTINGS;

    #[test]
    fn each_setting_of_the_example_is_on_the_page_with_its_words() {
        let page = page(BALANCER_SETTINGS);
        for needed in
            [".SH SETTINGS", "host_reserve = \"512M\"", "What the host keeps for itself", ".SS [policy]"]
        {
            assert!(page.contains(needed), "{needed}: {page}");
        }
        assert!(!page.contains("schema balancer"), "{page}");
    }
}
