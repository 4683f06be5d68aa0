//! Disks of VMs that run.

use std::time::Duration;

use api::status::{DiskStatus, ResizeRequest, VmStatus};
use api::units::Bytes;
use disks::file::{self, NewSize};
use serde::Serialize;

use crate::failure::Failure;
use crate::{client, output, sentence, statuses, table};

/// How long a VM may take to make a disk larger; it gives up itself before.
const GROWING: Duration = Duration::from_secs(35);

/// Makes a disk of a VM larger; says what came of it.
pub fn resize(vm: &str, disk: &str, size: NewSize) -> Result<String, Failure> {
    let mut client = client::named(vm)?.with_timeout(GROWING);
    client::block_on(async {
        let size = match size {
            NewSize::To(size) => file::whole(size).map_err(Failure::usage)?,
            NewSize::By(more) => {
                let more = file::whole(more).map_err(Failure::usage)?;
                is(&client.status().await?, disk)?.saturating_add(more)
            }
        };
        client.resize_disk(&ResizeRequest { disk: disk.to_owned(), size }).await?;
        Ok(format!("{disk} of {vm}: {size}, and its guest was told\n"))
    })
}

/// How large a disk is.
fn is(vm: &VmStatus, id: &str) -> Result<Bytes, Failure> {
    let disk = vm.disks.iter().find(|disk| disk.id == id);
    disk.map(|disk| disk.size).ok_or_else(|| {
        let known: Vec<_> = vm.disks.iter().map(|disk| disk.id.as_str()).collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        Failure::new(format_args!("the VM {} has no disk `{id}`: it has {known}", vm.name))
    })
}

/// The disks of one VM.
#[derive(Serialize)]
struct Row {
    vm: String,
    #[serde(flatten)]
    disk: DiskStatus,
}

/// Lists the disks of a VM, or of all.
pub fn list(name: Option<&str>, json: bool) -> Result<(), Failure> {
    let (directory, vms) = statuses::of(name)?;
    let of_vm = |vm: VmStatus| vm.disks.into_iter().map(move |disk| Row { vm: vm.name.clone(), disk });
    let rows: Vec<Row> = vms.into_iter().flat_map(of_vm).collect();
    if json {
        return output::json(&rows);
    }
    if rows.is_empty() {
        sentence::say(format_args!("no VM has a disk in {}", directory.display()));
        return Ok(());
    }
    let head = ["VM", "DISK", "SIZE", "READS", "READ", "WRITES", "WRITTEN", "FLUSHES", "ERRORS", "LIMITED"];
    let cells: Vec<_> = rows.iter().map(cells).collect();
    output::text(&table::render(head, &cells))?;
    for Row { vm, disk } in &rows {
        if let Some(failure) = &disk.failure {
            sentence::say(failed(vm, &disk.id, failure));
        }
    }
    Ok(())
}

/// What to do about a disk for which its VM is paused.
pub fn failed(vm: &str, disk: &str, failure: &str) -> String {
    format!(
        "{vm}: the host could not do what the guest asked of {disk}: {failure}, then let it go on with `ballast \
         resume {vm}`"
    )
}

fn cells(Row { vm, disk }: &Row) -> [String; 10] {
    [
        vm.clone(),
        disk.id.clone(),
        disk.size.to_string(),
        disk.reads.operations.to_string(),
        disk.reads.bytes.to_string(),
        disk.writes.operations.to_string(),
        disk.writes.bytes.to_string(),
        disk.flushes.to_string(),
        disk.errors.to_string(),
        format!("{:.1} s", disk.limited_ms as f64 / 1000.0),
    ]
}
