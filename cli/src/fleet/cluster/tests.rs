//! What three hosts of Pacemaker 2.1.5 said in packaging/test-fleet, and what nobody should say.

use proptest::prelude::*;

use super::*;
use crate::fleet::view::View;

macro_rules! recorded {
    ($name:literal) => {
        (
            include_str!(concat!("../recorded/", $name, ".status.xml")),
            include_str!(concat!("../recorded/", $name, ".configuration.xml")),
        )
    };
}

fn cluster((status, configuration): (&str, &str)) -> Cluster {
    let mut cluster = Cluster::of_status(status).unwrap();
    cluster.add_configuration(configuration).unwrap();
    cluster
}

fn vm<'a>(cluster: &'a Cluster, name: &str) -> &'a Vm {
    cluster.vms.iter().find(|vm| vm.name == name).unwrap()
}

/// The row of the tables that begins with a name, in one-space columns.
fn row(cluster: &Cluster, name: &str) -> String {
    let text = View::of(cluster).render();
    let row =
        text.lines().find(|line| line.split(' ').next() == Some(name)).unwrap_or_else(|| panic!("{text}"));
    row.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn a_host_under_pressure_keeps_what_it_has_and_takes_no_newcomer() {
    let cluster = cluster(recorded!("pressure"));
    assert_eq!(cluster.controller.as_deref(), Some("host3"));
    assert!(cluster.has_quorum && cluster.fences && cluster.counts_floors);
    assert_eq!(cluster.pressure_limit, Some(80));
    assert_eq!(row(&cluster, "host1"), "host1 online yes 960 MiB 600 MiB 360 MiB 0 3");
    assert_eq!(row(&cluster, "host3"), "host3 online no 550 MiB 550 MiB 0 MiB 100 2");
    assert_eq!(
        row(&cluster, "vm3"),
        "vm3 running host1 300 MiB it fits here, and nowhere else: host2 has 260 MiB left; host3 is under pressure (100)"
    );
    assert_eq!(
        row(&cluster, "vm8"),
        "vm8 running host2 100 MiB it fits here, and stays; host1 could take it"
    );
    assert_eq!(View::of(&cluster).remarks, [""; 0]);
}

/// In all that `ballast fleet --json` says, amounts are in MiB and what is not known is null.
#[test]
fn json_has_the_same() {
    let json = serde_json::to_value(View::of(&cluster(recorded!("lost")))).unwrap();
    assert_eq!(json["hosts"][0]["capacity_mib"], 960);
    assert_eq!(json["hosts"][1]["state"], "unclean");
    assert_eq!(json["hosts"][1]["takes_newcomers"], false);
    assert_eq!(json["hosts"][1]["pressure"], serde_json::Value::Null);
    assert_eq!(json["vms"].as_array().unwrap().len(), 6);
}

#[test]
fn a_vm_of_a_lost_host_waits_and_then_fits_elsewhere() {
    let lost = cluster(recorded!("lost"));
    assert!(row(&lost, "host2").starts_with("host2 lost no"), "{}", row(&lost, "host2"));
    let recovering = cluster(recorded!("recovering"));
    assert!(row(&recovering, "host2").starts_with("host2 offline no 960 MiB 0 MiB"));
    let waiting: Vec<_> = recovering.vms.iter().filter(|vm| vm.state == VmState::Waiting).collect();
    assert!(!waiting.is_empty());
    for vm in waiting {
        assert!(vm.hosts.is_empty());
        assert!(row(&recovering, &vm.name).contains("may take it"), "{}", row(&recovering, &vm.name));
    }
}

#[test]
fn why_a_vm_starts_nowhere_is_said_with_its_agents_words() {
    let cluster = cluster(recorded!("start-failed"));
    let vm = vm(&cluster, "vm7");
    assert_eq!((vm.state, vm.floor), (VmState::Waiting, Some(50)));
    assert_eq!(vm.failures.len(), 3);
    assert!(
        row(&cluster, "vm7")
            .contains("no host may take it: host1 (start failed: ballast: the VM's file is wrong:)"),
        "{}",
        row(&cluster, "vm7")
    );
    assert!(View::of(&cluster).remarks.iter().any(|remark| remark.contains("pcs resource cleanup vm7")));
}

/// The whole cluster of a recording, with some of its text replaced.
fn altered(changes: &[(&str, &str)]) -> Cluster {
    let (mut status, mut configuration) =
        (recorded!("pressure").0.to_owned(), recorded!("pressure").1.to_owned());
    for (from, to) in changes {
        assert!(status.contains(from) || configuration.contains(from), "{from}");
        status = status.replace(from, to);
        configuration = configuration.replace(from, to);
    }
    cluster((&status, &configuration))
}

#[test]
fn what_an_administrator_left_out_is_said() {
    for (change, remark) in [
        (("stonith-enabled=\"true\"", "stonith-enabled=\"false\""), "no fencing"),
        (("value=\"balanced\"", "value=\"default\""), "floors are not counted"),
        (("attribute=\"ballast_pressure\"", "attribute=\"other\""), "no rule keeps newcomers"),
        (("with_quorum=\"true\"", "with_quorum=\"false\""), "no quorum"),
        (("maintenance-mode=\"false\"", "maintenance-mode=\"true\""), "maintenance mode"),
        (("ocf:ballast:node", "ocf:heartbeat:Dummy"), "host1 tells nothing of itself"),
        (("<nvpair id=\"vm8-u-m\" name=\"ballast_memory\" value=\"100\"/>", ""), "vm8 counts nothing"),
        (("<current_dc present=\"true\"", "<none present=\"false\""), "no controller"),
    ] {
        let remarks = View::of(&altered(&[change])).remarks;
        assert!(remarks.iter().any(|said| said.contains(remark)), "{change:?}: {remarks:?}");
    }
}

#[test]
fn the_state_of_a_vm_is_pacemakers() {
    let of = |from: &str, to: &str| {
        let whole = format!("<resource id=\"vm8\" resource_agent=\"ocf:ballast:vm\" role=\"Started\" {from}");
        let cluster = altered(&[(&whole, &whole.replace(from, to))]);
        vm(&cluster, "vm8").state
    };
    let rest = "active=\"true\" orphaned=\"false\" blocked=\"false\" managed=\"true\" failed=\"false\"";
    assert_eq!(of(rest, rest), VmState::Running);
    assert_eq!(of(rest, &rest.replace("blocked=\"false\"", "blocked=\"true\"")), VmState::Blocked);
    assert_eq!(of(rest, &rest.replace("managed=\"true\"", "managed=\"false\"")), VmState::Blocked);
    assert_eq!(of(rest, &rest.replace("failed=\"false\"", "failed=\"true\"")), VmState::Failed);
    // The first look at one that has started is no more than a look.
    assert_eq!(of(rest, &format!("{rest} pending=\"Monitoring\"")), VmState::Running);
    for role in ["Starting", "Stopping"] {
        let started = "<resource id=\"vm8\" resource_agent=\"ocf:ballast:vm\" role=\"Started\"";
        let cluster = altered(&[(started, &started.replace("Started", role))]);
        assert_eq!(vm(&cluster, "vm8").state, VmState::Moving, "{role}");
    }
    let twice = "<node name=\"host2\" id=\"2\" cached=\"true\"/>";
    let cluster = altered(&[(twice, &format!("{twice}{}", twice.replace('2', "1")))]);
    assert_eq!(vm(&cluster, "vm8").state, VmState::Twice);
    assert!(row(&cluster, "vm8").contains("more than one host runs it"));
}

#[test]
fn what_a_template_counts_its_vms_count() {
    let own = "<utilization id=\"vm8-u\">\n        <nvpair id=\"vm8-u-m\" name=\"ballast_memory\" value=\"100\"/>\n      \
               </utilization>";
    let template = "<resources>\n    <template id=\"small\" class=\"ocf\" provider=\"ballast\" type=\"vm\"><utilization \
                    id=\"u\"><nvpair id=\"n\" name=\"ballast_memory\" value=\"70\"/></utilization></template>";
    let cluster = altered(&[
        (own, ""),
        (
            "<primitive id=\"vm8\" class=\"ocf\" provider=\"ballast\" type=\"vm\">",
            "<primitive id=\"vm8\" template=\"small\">",
        ),
        ("<resources>\n    <primitive", &format!("{template}\n    <primitive")),
    ]);
    assert_eq!(vm(&cluster, "vm8").floor, Some(70));
    assert_eq!(cluster.placed("host2"), 670);
}

#[test]
fn what_is_no_xml_of_pacemaker_is_a_sentence() {
    let deep = "<a>".repeat(200_000);
    let bomb = "<!DOCTYPE a [<!ENTITY b \"bbbbbbbb\"><!ENTITY c \"&b;&b;&b;&b;\">]><a>&c;</a>";
    for hostile in
        ["", "no XML", "<a", "<pacemaker-result/>", "<a></b>", &deep, bomb, "<a>\0</a>", "\u{feff}"]
    {
        let error = Cluster::of_status(hostile).unwrap_err().to_string();
        assert!(!error.contains('\n') && error.len() < 500, "{error}");
    }
    let mut cluster = Cluster::of_status(recorded!("pressure").0).unwrap();
    assert_eq!(
        cluster.add_configuration("<cib/>").unwrap_err().to_string(),
        "it has no <configuration>; ballast knows Pacemaker 2.1"
    );
}

#[test]
fn a_name_cannot_drive_a_terminal_and_a_number_cannot_overflow() {
    let most = u64::MAX.to_string();
    let cluster = altered(&[
        ("name=\"host3\"", "name=\"host3&#10;&#9;x\""),
        ("name=\"ballast_memory\" value=\"300\"", &format!("name=\"ballast_memory\" value=\"{most}\"")),
        ("name=\"ballast_pressure\" value=\"0\"", &format!("name=\"ballast_pressure\" value=\"{most}\"")),
        ("name=\"ballast_floors\" value=", "name=\"ballast_floors\" value=\"-7\" was="),
    ]);
    let text = View::of(&cluster).render();
    assert!(!text.chars().any(|c| c.is_control() && c != '\n'));
    assert_eq!(text.lines().filter(|line| line.starts_with("host3")).count(), 1);
    assert_eq!(cluster.hosts[0].pressure, Some(100));
    assert_eq!(cluster.hosts[0].floors, None);
    assert_eq!(cluster.placed("host2"), u64::MAX);
}

proptest! {
    /// Whatever bytes are lost or changed on the way, an answer comes, or a sentence.
    #[test]
    fn a_damaged_answer_is_shown_or_refused(cut in 0usize..12_000, at in 0usize..12_000, byte in any::<char>()) {
        let damage = |text: &str| {
            let mut chars: Vec<char> = text.chars().take(text.len().saturating_sub(cut)).collect();
            if let Some(c) = chars.get_mut(at) {
                *c = byte;
            }
            chars.into_iter().collect::<String>()
        };
        let whole = |text: &str| {
            let mut chars: Vec<char> = text.chars().collect();
            let at = at % chars.len();
            chars[at] = byte;
            chars.into_iter().collect::<String>()
        };
        let _ = Cluster::of_status(&damage(recorded!("lost").0));
        if let Ok(mut cluster) = Cluster::of_status(&whole(recorded!("lost").0)) {
            let _ = cluster.add_configuration(&damage(recorded!("lost").1));
            let _ = cluster.add_configuration(&whole(recorded!("lost").1));
            let _ = View::of(&cluster).render();
        }
    }
}
