//! One self-contained page: no script, no font, no picture from elsewhere.

use std::fmt::Write;

use api::units::Bytes;

use super::plot::{self, Line};
use super::verdict;
use crate::claims::{Claim, Material, Outcome, PAGE_TABLE_WORK, both, chase_of, claims, scaling_points};
use crate::figure::short;
use crate::lab::{Findings, Pair, Vendor};
use crate::linux::Workload;
use crate::payload::{Payload, Place, Setup};
use crate::run::{Run, SPACES, cell, spaces};

const STYLE: &str = "
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222b33; background: #fff; margin: 0 auto;
       max-width: 62rem; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; }
.lead { font-size: 1.1rem; border-left: 4px solid #1b6ca8; padding-left: .8rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1rem; }
figure { margin: 0; border: 1px solid #dde2e6; border-radius: 8px; padding: .6rem; break-inside: avoid; }
code { font-size: .9em; background: #f4f6f8; padding: 0 .2em; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .9rem; color: #4a5560; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .4rem .6rem; border-bottom: 1px solid #dde2e6; }
th { background: #f4f6f8; }
td.n { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.n:last-child { white-space: normal; min-width: 8rem; }
.tag { display: inline-block; border-radius: 1rem; padding: 0 .6rem; font-size: .85rem; white-space: nowrap;
       background: #e8ecef; }
.holds { background: #d9efdc; } .partly { background: #fdf0cf; } .fails { background: #f8d9d3; }
.model { background: #dfeaf5; }
.needs { color: #4a5560; }
@media (max-width: 40rem) {
  .claims thead { display: none; }
  .claims tr, .claims td { display: block; width: 100%; border: 0; padding: .1rem 0; }
  .claims tr { border-bottom: 1px solid #dde2e6; padding: .7rem 0; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  .plots { grid-template-columns: 1fr 1fr; }
  tr { break-inside: avoid; }
  .scroll { overflow: visible; }
  table { font-size: 8.5pt; }
  th, td { padding: .25rem .35rem; }
  td.n { white-space: normal; }
  td.n:first-child { min-width: 11rem; }
  td.n:last-child { min-width: 0; }
}
";

/// Text as HTML.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Text as HTML, with what stands between backticks as code.
fn prose(text: &str) -> String {
    let escaped = escape(text);
    let mut html = String::new();
    for (number, part) in escaped.split('`').enumerate() {
        let (before, after) = if number % 2 == 1 { ("<code>", "</code>") } else { ("", "") };
        html.extend([before, part, after]);
    }
    html
}

/// The whole page.
pub fn page(material: Material<'_>) -> String {
    let claims = claims(material);
    let mut page = String::from(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>What SLAT does here</title>\n<style>",
    );
    page += STYLE;
    page += "</style></head><body>\n<h1>What second-level address translation does here</h1>\n";
    let _ = writeln!(page, "<p class=\"lead\">{}</p>", prose(&lead(material, &claims)));
    page += &plots(material);
    page += &claim_table(&claims);
    if let Some(run) = material.here {
        page += &host_section("This host", run);
    }
    page += &vendors_section(material);
    for (vendor, lab) in material.labs() {
        page += &lab_section(vendor, lab);
    }
    page += "<h2>How to read this</h2>\n<p><b>Exact</b>: a count, the same each time. <b>Real time</b>: median, with \
             the lowest and highest sample behind it. <b>Direction only</b>: time under an emulator; which is larger \
             may hold, by how much does not. A dash: not available. Where samples overlap there is no \
             difference.</p>\n</body></html>\n";
    page
}

fn lead(material: Material<'_>, claims: &[Claim]) -> String {
    let mut text = String::new();
    if let Some(run) = material.here {
        text += run.probe.verdict.sentence();
        text.push(' ');
        if let Some(why) = run.refusal() {
            let _ = write!(text, "So this host gives no verdict on SLAT's time: {why}. ");
        }
    }
    let names: Vec<_> = material.labs().map(|(vendor, _)| vendor.name()).collect();
    if !names.is_empty() {
        let _ = write!(text, "SLAT on and off was counted in emulated {} hosts. ", names.join(" and "));
    }
    text + &verdict(claims)
}

fn figure(svg: Option<String>, caption: &str) -> String {
    match svg {
        Some(svg) => format!("<figure>{svg}<figcaption>{}</figcaption></figure>\n", escape(caption)),
        None => String::new(),
    }
}

/// VM exits an operation with SLAT on and off, as SVG, of the first vendor that there is; nothing without figures
/// of the lab.
pub fn exits_plot(material: Material<'_>) -> Option<String> {
    plot_exits(material.labs().next()?.1)
}

fn plot_exits(lab: &Findings) -> Option<String> {
    let pair = &lab.counted;
    let rows: Vec<_> = PAGE_TABLE_WORK
        .iter()
        .chain(&[Payload::ColdTouch])
        .filter_map(|payload| {
            let (on, off) = both(pair, &Setup::usual(*payload).at(Place::Ring0))?;
            Some((payload.name().to_owned(), on.exits.median()?, off.exits.median()?))
        })
        .collect();
    plot::bars(&rows)
}

fn plots(material: Material<'_>) -> String {
    let mut all = String::new();
    for (vendor, lab) in material.labs() {
        let of = |caption: &str| format!("{}. {caption}", vendor.name());
        let figure = |svg, caption: &str| figure(svg, &of(caption));
        all += &figure(plot_exits(lab), "C1 and C11: VM exits an operation (exact).");
        all += &figure(
            memory_plot(lab),
            "C3: kernel memory for the tables of one VM, by address spaces of 32 MiB in its guest (exact). \
             Shadow tables are capped: KVM recycles them.",
        );
        let saved = |payload| -> Vec<_> {
            let points = lab.scaling.iter().flat_map(|pair| scaling_points(pair, payload, |m| &m.exits));
            points.map(|(vcpus, on, off)| (vcpus as f64, off - on)).collect()
        };
        let lines = [
            Line { name: "churn", colour: plot::ON, points: saved(Payload::Churn) },
            Line { name: "demand fault", colour: plot::OFF, points: saved(Payload::DemandFault) },
        ];
        all += &figure(
            plot::lines("vCPUs", "exits saved an operation", &lines),
            "C8: VM exits an operation that SLAT saves, by vCPUs (exact). How long they wait for each other the lab \
             can't tell: its emulated CPUs take turns on one thread.",
        );
        all += &figure(
            density_plot(lab),
            "C4: how late 19 of 20 answers come at most, by sessions on one CPU, in the lab's time of a thousand \
             instructions a microsecond (exact; blind to TLBs).",
        );
    }
    if let Some(run) = material.here {
        let line = |place, name, colour| Line { name, colour, points: latencies(run, place) };
        let lines = [line(Place::Native, "native", plot::OFF), line(Place::Ring3, "guest, ring 3", plot::ON)];
        let caption = format!(
            "C7: a dependent load from a random page, by working set, on this host ({}).",
            if run.refusal().is_some() { "says nothing of SLAT" } else { "real time" }
        );
        all += &figure(plot::lines("MiB", "ns a load", &lines), &caption);
    }
    if all.is_empty() { all } else { format!("<div class=\"plots\">\n{all}</div>\n") }
}

fn latencies(run: &Run, place: Place) -> Vec<(f64, f64)> {
    (1..=12)
        .filter_map(|power| {
            let mib = 1 << power;
            let found = run.find(&chase_of(Bytes::mib(mib), place))?;
            Some((mib as f64, found.time.median()?))
        })
        .collect()
}

fn memory_plot(lab: &Findings) -> Option<String> {
    let points = |run: &Run| -> Vec<_> {
        SPACES
            .into_iter()
            .filter_map(|roots| {
                let bytes = run.find(&spaces(roots))?.tables.median()?;
                Some((roots as f64, bytes / 1024.0))
            })
            .collect()
    };
    let line = |name, colour, run| Line { name, colour, points: points(run) };
    let mut lines =
        vec![line("SLAT on", plot::ON, &lab.counted.on), line("SLAT off", plot::OFF, &lab.counted.off)];
    lines.extend(lab.old_mmu.as_ref().map(|run| line("on, older MMU", plot::THIRD, run)));
    plot::lines("address spaces", "KiB", &lines)
}

/// How late the slowest twentieth of answers comes, by guests.
fn density_plot(lab: &Findings) -> Option<String> {
    let pair = lab.density.as_ref()?;
    let line = |name, colour, run: &Run| {
        let steps = run.density.iter().flat_map(|density| &density.steps);
        Line { name, colour, points: steps.map(|step| (step.guests as f64, step.p95)).collect() }
    };
    let lines = [line("SLAT on", plot::ON, &pair.on), line("SLAT off", plot::OFF, &pair.off)];
    plot::lines("sessions", "ms, 19 of 20 answers", &lines)
}

fn claim_table(claims: &[Claim]) -> String {
    let mut text = String::from(
        "<h2>The claims</h2>\n<table class=\"claims\"><thead><tr><th></th><th>Claim</th><th></th>\
         <th>Measured</th></tr></thead><tbody>\n",
    );
    for claim in claims {
        let class = match claim.outcome {
            Outcome::Holds => "holds",
            Outcome::Fails => "fails",
            Outcome::Partly => "partly",
            Outcome::Model => "model",
            Outcome::NotMeasured => "not",
        };
        let needs = match claim.outcome {
            Outcome::Holds => String::new(),
            _ => format!(" <span class=\"needs\">Needs: {}.</span>", prose(claim.needs)),
        };
        let _ = writeln!(
            text,
            "<tr><td>{}</td><td>{}</td><td><span class=\"tag {class}\">{}</span></td><td>{}{needs}</td></tr>",
            claim.id,
            escape(claim.claim),
            claim.outcome.name(),
            prose(&claim.measured)
        );
    }
    text + "</tbody></table>\n"
}

fn table<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> String {
    let mut text = String::from("<div class=\"scroll\"><table><thead><tr>");
    for name in head {
        let _ = write!(text, "<th>{}</th>", escape(name));
    }
    text += "</tr></thead><tbody>\n";
    for row in rows {
        text += "<tr>";
        for value in row {
            let _ = write!(text, "<td class=\"n\">{}</td>", escape(value));
        }
        text += "</tr>\n";
    }
    text + "</tbody></table></div>\n"
}

fn host_section(title: &str, run: &Run) -> String {
    let host = &run.fingerprint;
    let mut text = format!("<h2>{title}</h2>\n<p>");
    let _ = writeln!(
        text,
        "{}, {} CPUs, {}, Linux {}{}. {}</p>",
        escape(&host.processor),
        host.cpus,
        host.memory,
        escape(&host.kernel),
        host.hypervisor.as_ref().map_or(String::new(), |h| format!(", under {}", escape(h))),
        if run.interrupted { "The run was stopped before its end." } else { "" }
    );
    if let Some(sentence) = &run.probe.disagreement {
        let _ = writeln!(text, "<p>{}</p>", escape(sentence));
    }
    let head =
        ["payload", "exits an operation", run.clock.unit(), "time is", "walk cycles", "huge pages", "note"];
    text += &table(head, &run.rows());
    for line in run.remarks().lines() {
        let _ = writeln!(text, "<p>{}</p>", escape(line));
    }
    let rows = run.reason_rows();
    if !rows.is_empty() {
        text += "<p>Why guests left (traced in a pass of its own; exits an operation):</p>\n";
        text += &table(["payload", "reasons"], &rows);
    }
    text
}

/// What a guest left for with SLAT by each vendor, and without.
fn vendors_section(material: Material<'_>) -> String {
    let (Some(amd), Some(intel)) = (material.amd, material.intel) else { return String::new() };
    let mut text = String::from(
        "<h2>AMD and Intel side by side</h2>\n<p>Exits an operation (exact), from the same payloads on KVM's two \
         modules. With SLAT KVM has the same code for both and a processor that leaves at the same events. \
         Without it both shadow the guest's tables with the same code.</p>\n",
    );
    let head = ["payload", "NPT (npt=1)", "EPT (ept=1)", "AMD, npt=0", "Intel, ept=0"];
    text += &table(head, &vendor_rows(&amd.counted, &intel.counted));
    let rows: Vec<_> = amd
        .counted
        .workloads()
        .filter_map(|(on, off)| {
            let (other_on, other_off) = intel.counted.workloads().find(|(other, _)| other.name == on.name)?;
            let exits = |workload: &Workload| workload.exits.map_or("-".into(), short);
            Some([on.name.clone(), exits(on), exits(other_on), exits(off), exits(other_off)])
        })
        .collect();
    if !rows.is_empty() {
        text += &table(["Linux guest", "NPT (npt=1)", "EPT (ept=1)", "AMD, npt=0", "Intel, ept=0"], &rows);
    }
    text
}

/// Exits of each setup that both vendors' hosts ran: with SLAT on, then off.
fn vendor_rows(amd: &Pair, intel: &Pair) -> Vec<[String; 5]> {
    let guests = amd.on.measurements.iter().filter(|m| m.setup.place != Place::Native);
    let rows = guests.filter_map(|m| {
        let all = [&amd.on, &intel.on, &amd.off, &intel.off].map(|run| run.find(&m.setup));
        let [Some(a), Some(b), Some(c), Some(d)] = all else { return None };
        let [a, b, c, d] = [a, b, c, d].map(|m| cell(&m.exits));
        Some([m.setup.describe(), a, b, c, d])
    });
    rows.collect()
}

fn lab_section(vendor: Vendor, lab: &Findings) -> String {
    let host = &lab.counted.on.fingerprint;
    let mut text = format!(
        "<h2>The lab, {}</h2>\n<p>Emulated {}, Linux {}, {} with {slat}=1 and {slat}=0. Instructions are those of \
         the whole emulated host, hypervisor and all. ",
        vendor.name(),
        escape(&host.processor),
        escape(&host.kernel),
        vendor.module(),
        slat = vendor.parameter(),
    );
    text += match (&lab.twice, &lab.difference) {
        (true, None) => "Counted twice: identical.",
        (true, Some(_)) => "Counted twice: the two differ, see below.",
        (false, _) => "Counted once.",
    };
    text += "</p>\n";
    if lab.interrupted {
        text += "<p>Stopped before its end.</p>\n";
    }
    for why in lab.difference.iter().chain(&lab.mixed()) {
        let _ = writeln!(text, "<p>{}</p>", escape(why));
    }
    let head = ["payload", "exits, on", "off", "instructions, on", "off", "note"];
    text += &table(head, &lab.rows());
    let rows = lab.linux_rows();
    if !rows.is_empty() {
        text += "<p>A stock Linux guest under <code>ballast run</code>, each workload between two turns at its \
                 doorbell:</p>\n";
        let head = ["Linux guest", "exits, on", "off", "instructions, on", "off", "off / on"];
        text += &table(head, &rows);
    }
    let rows = lab.reason_rows();
    if !rows.is_empty() {
        text += "<p>Why that guest left, by reason (traced in a host of its own; exits an operation):</p>\n";
        text += &table(["Linux guest", "SLAT on", "SLAT off"], &rows);
    }
    let rows = lab.miss_rows();
    if !rows.is_empty() {
        text += "<p>Memory references of a load that misses the TLB (exact; by the emulator's own record of each):</p>\n";
        let head = ["guest's page", "host's page", "SLAT on", "by the model", "SLAT off"];
        text += &table(head, &rows);
    }
    for why in lab.failures() {
        let _ = writeln!(text, "<p>Missing: {}</p>", escape(why));
    }
    let memory = |run: &Run, setup: &Setup| run.find(setup).map_or("-".into(), |m| cell(&m.tables));
    let rows: Vec<_> = SPACES
        .into_iter()
        .map(|n| {
            let old = lab.old_mmu.as_ref().map_or("-".into(), |run| memory(run, &spaces(n)));
            let (on, off) = (&lab.counted.on, &lab.counted.off);
            [n.to_string(), memory(on, &spaces(n)), old, memory(off, &spaces(n))]
        })
        .collect();
    text + &table(["address spaces", "bytes of tables, on", "on, older MMU", "off"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_holds_every_claim_and_nothing_from_elsewhere() {
        let page = page(Material::default());
        for id in ["C1", "C11", "D1", "D2"] {
            assert!(page.contains(&format!("<td>{id}</td>")), "{id}");
        }
        for outside in ["http:", "https:", "<script", "<img", "<link"] {
            assert!(!page.contains(outside), "{outside}");
        }
    }

    #[test]
    fn text_is_escaped() {
        assert_eq!(prose("a `b<` c"), "a <code>b&lt;</code> c");
        assert_eq!(escape("<a href=\"x\">&"), "&lt;a href=&quot;x&quot;&gt;&amp;");
    }
}
