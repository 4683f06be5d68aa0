//! The model of Pacemaker's placement beside Pacemaker's own `crm_simulate`.
//!
//! `cargo test -p sim --test pacemaker -- --ignored` compares them; it takes Debian's pacemaker-cli-utils.

use std::fmt::Write;
use std::process::Command;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use sim::fleet::placement::{Host, Vm, place};

/// A cluster as the manual sets one up.
fn configuration(hosts: &[Host], vms: &[Vm]) -> String {
    // Writing to a String does not fail.
    let (mut nodes, mut resources, mut status) = (String::new(), String::new(), String::new());
    for (index, vm) in vms.iter().enumerate() {
        let _ = write!(
            resources,
            "<primitive id='vm-{index:03}' class='ocf' provider='pacemaker' type='Dummy'><utilization id='u{index}'>\
             <nvpair id='m{index}' name='ballast_memory' value='{}'/></utilization></primitive>",
            vm.weight
        );
    }
    for (index, host) in hosts.iter().enumerate() {
        let (id, pressure) = (index + 1, if host.refuses { 90 } else { 0 });
        let _ = write!(
            nodes,
            "<node id='{id}' uname='host{index:02}'><utilization id='n{id}'><nvpair id='c{id}' name='ballast_memory' \
             value='{}'/></utilization></node>",
            host.capacity
        );
        let (in_ccm, crmd, join) =
            if host.is_online { ("true", "online", "member") } else { ("false", "offline", "down") };
        let _ = write!(
            status,
            "<node_state id='{id}' uname='host{index:02}' in_ccm='{in_ccm}' crmd='{crmd}' join='{join}' expected='{join}'>\
             <transient_attributes id='{id}'><instance_attributes id='t{id}'><nvpair id='p{id}' name='ballast_pressure' \
             value='{pressure}'/></instance_attributes></transient_attributes><lrm id='{id}'><lrm_resources>"
        );
        for (vm, _) in vms.iter().enumerate().filter(|(_, vm)| host.is_online && vm.host == Some(index)) {
            let _ = write!(status, "{}", ran(vm));
        }
        let _ = write!(status, "</lrm_resources></lrm></node_state>");
    }
    format!(
        "<cib crm_feature_set='3.16.1' validate-with='pacemaker-3.9' epoch='1' num_updates='0' admin_epoch='0' \
         have-quorum='1' dc-uuid='1'><configuration><crm_config><cluster_property_set id='o'>\
         <nvpair id='o1' name='stonith-enabled' value='false'/><nvpair id='o2' name='placement-strategy' \
         value='balanced'/><nvpair id='o3' name='no-quorum-policy' value='ignore'/></cluster_property_set></crm_config>\
         <nodes>{nodes}</nodes><resources>{resources}</resources><constraints><rsc_location id='l' rsc-pattern='^vm-'>\
         <rule id='r' score='-1000' boolean-op='or'><expression id='e1' attribute='ballast_pressure' operation='gt' \
         value='80' type='integer'/><expression id='e2' attribute='ballast_pressure' operation='not_defined'/></rule>\
         </rsc_location></constraints><rsc_defaults><meta_attributes id='d'><nvpair id='d1' \
         name='resource-stickiness' value='10000'/></meta_attributes></rsc_defaults></configuration>\
         <status>{status}</status></cib>"
    )
}

/// What a host's agent did with a VM that runs there.
fn ran(vm: usize) -> String {
    format!(
        "<lrm_resource id='vm-{vm:03}' class='ocf' provider='pacemaker' type='Dummy'><lrm_rsc_op \
         id='vm-{vm:03}_last_0' operation_key='vm-{vm:03}_start_0' operation='start' crm_feature_set='3.16.1' \
         transition-key='1:1:0:00000000-0000-0000-0000-000000000000' \
         transition-magic='0:0;1:1:0:00000000-0000-0000-0000-000000000000' call-id='{}' rc-code='0' op-status='0' \
         interval='0' last-rc-change='1700000000' exec-time='1' queue-time='0'/></lrm_resource>",
        vm + 1
    )
}

/// Where crm_simulate has each VM once it has done all that it wants to.
fn simulated(hosts: &[Host], vms: &[Vm]) -> Vec<Option<usize>> {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("cib.xml");
    std::fs::write(&file, configuration(hosts, vms)).unwrap();
    let output = Command::new("crm_simulate").arg("--simulate").arg("--xml-file").arg(&file).output();
    let output = output.expect("crm_simulate is there: apt install pacemaker-cli-utils");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    let revised = text.split("Revised Cluster Status:").nth(1).unwrap_or_else(|| panic!("{text}"));
    let place = |vm: usize| {
        let id = format!("vm-{vm:03}");
        let line =
            revised.lines().find(|line| line.contains(&id)).unwrap_or_else(|| panic!("{id} of {revised}"));
        let host = line.split("Started host").nth(1)?;
        Some(host.trim().parse().unwrap())
    };
    (0..vms.len()).map(place).collect()
}

prop_compose! {
    fn cluster()(
        hosts in prop::collection::vec((0u64..4000, prop::bool::weighted(0.85), prop::bool::weighted(0.2)), 1..12),
        vms in prop::collection::vec((1u64..800, prop::option::weighted(0.7, 0usize..12)), 1..60),
    ) -> (Vec<Host>, Vec<Vm>) {
        let count = hosts.len();
        let hosts = hosts.into_iter().map(|(capacity, is_online, refuses)| Host { capacity, is_online, refuses });
        let vms = vms.into_iter().map(|(weight, host)| Vm { weight, host: host.map(|host| host % count) });
        (hosts.collect(), vms.collect())
    }
}

#[test]
#[ignore = "it takes pacemaker-cli-utils; `make fleet-test` runs it"]
fn the_model_places_as_pacemaker_does() {
    let mut runner = TestRunner::new(Config {
        cases: 100,
        // Each step runs a program.
        max_shrink_iters: 300,
        failure_persistence: None,
        ..Config::default()
    });
    runner
        .run(&cluster(), |(hosts, vms)| {
            prop_assert_eq!(place(&hosts, &vms), simulated(&hosts, &vms));
            Ok(())
        })
        .unwrap();
}
