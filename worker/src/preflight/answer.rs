//! The destination's side: what this host is, and what of a move it would refuse. Changes nothing.

use std::time::Duration;

use pageport_proto::VmId;
use pageport_proto::ids::is_name;
use pageport_proto::v1::{PreflightHello, PreflightReply, ReplicationDisk};

use super::facts;
use crate::clock::unix_ms_now;
use crate::hypervisor::command_line::{MAX_DISKS, MAX_NICS, is_bridge_name};
use crate::hypervisor::tap;
use crate::migration::destination::check_memory;
use crate::node::Node;
use crate::replica::points::MAX_DISK_BYTES;
use crate::replica::store::ReplicaError;
use crate::transport::{MessageError, MessageWriter};

/// Time to reach the source.
const BACK_LIMIT: Duration = Duration::from_secs(3);

/// Why a preflight is not answered.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// The question makes no sense.
    #[error("the source's preflight makes no sense: {what}")]
    Request {
        /// What does not.
        what: &'static str,
    },
    /// The stream.
    #[error("answer the source's preflight")]
    Stream(#[from] MessageError),
}

/// Answers one preflight.
///
/// # Errors
/// [`AnswerError`].
pub async fn answer(node: &Node, hello: PreflightHello, mut writer: MessageWriter) -> Result<(), AnswerError> {
    // Before anything takes time: the source compares clocks by it.
    let now_unix_ms = unix_ms_now();
    let vm = check(&hello)?;
    let wanted = hello.wanted.clone().unwrap_or_default();
    let (host, unreachable, missing_bridges) =
        tokio::join!(facts::of(node, &wanted), back(node, &hello), missing(&hello.bridges));
    let (no_room, no_replica) =
        tokio::task::block_in_place(|| (room(node, vm, &hello.disks), replica(node, vm, &hello.disks)));
    let reply = PreflightReply {
        host: Some(host),
        now_unix_ms,
        unreachable,
        no_memory: words(check_memory(hello.memory_bytes)),
        no_room: words(no_room),
        no_replica: words(no_replica),
        missing_bridges,
        owns: node.vms.get(vm).is_some_and(|vm| vm.status().record.owned().is_some()),
    };
    Ok(writer.send(&reply).await?)
}

fn check(hello: &PreflightHello) -> Result<VmId, AnswerError> {
    let request = |what| AnswerError::Request { what };
    if !is_name(&hello.source_worker) {
        return Err(request("it names no worker"));
    }
    let disk = |disk: &ReplicationDisk| is_name(&disk.name) && disk.size_bytes <= MAX_DISK_BYTES;
    if hello.disks.len() > MAX_DISKS || !hello.disks.iter().all(disk) {
        return Err(request("too many disks, one without a name, or one that is too large"));
    }
    if hello.bridges.len() > MAX_NICS || !hello.bridges.iter().all(|bridge| is_bridge_name(bridge)) {
        return Err(request("too many bridges, or one without a name"));
    }
    hello.vm_id.parse().map_err(|_| request("it names no vm"))
}

/// The other way round. Why not; empty: the source was reached.
async fn back(node: &Node, hello: &PreflightHello) -> String {
    let connecting = node.endpoint.connect(&hello.source_worker, &hello.source_address);
    match tokio::time::timeout(BACK_LIMIT, connecting).await {
        Ok(Ok(connection)) => {
            connection.close("the way back was tried");
            String::new()
        }
        Ok(Err(error)) => crate::error::with_causes(&error),
        Err(_) => format!("no answer from {} within {} s", hello.source_address, BACK_LIMIT.as_secs()),
    }
}

async fn missing(bridges: &[String]) -> Vec<String> {
    let mut missing = vec![];
    for bridge in bridges {
        match tap::is_bridge(bridge).await {
            Ok(true) => {}
            Ok(false) => missing.push(bridge.clone()),
            // The move will say it.
            Err(error) => tracing::warn!(bridge, error = %crate::error::with_causes(&error), "bridge not looked for"),
        }
    }
    missing.dedup();
    missing
}

fn room(node: &Node, vm: VmId, disks: &[ReplicationDisk]) -> Result<(), ReplicaError> {
    let wanted: Vec<_> = disks.iter().map(|disk| (disk.name.as_str(), disk.allocated_bytes)).collect();
    node.replicas.has_room(vm, &wanted)
}

fn replica(node: &Node, vm: VmId, disks: &[ReplicationDisk]) -> Result<(), ReplicaError> {
    node.replicas.must_be_flat(vm)?;
    node.replicas.must_be_there(vm)?;
    for ReplicationDisk { name, .. } in disks {
        let missing = || ReplicaError::Missing { vm, disk: name.clone() };
        node.replicas.locate(vm, name)?.ok_or_else(missing)?;
    }
    Ok(())
}

/// Of a refusal; empty: there is none.
fn words<E: std::error::Error>(outcome: Result<(), E>) -> String {
    outcome.err().map(|error| crate::error::with_causes(&error)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked() -> PreflightHello {
        let disk = ReplicationDisk { name: "root".into(), size_bytes: 4096, ..ReplicationDisk::default() };
        PreflightHello {
            vm_id: VmId::generate().to_string(),
            source_worker: "worker-a".into(),
            source_address: "192.0.2.1:7501".into(),
            bridges: vec!["br0".into()],
            disks: vec![disk],
            ..PreflightHello::default()
        }
    }

    #[test]
    fn a_question_is_looked_at_before_anything_is_done_for_it() {
        type Damage = fn(&mut PreflightHello);
        let cases: [(&str, Damage); 7] = [
            ("no vm", |it| it.vm_id = "x".into()),
            ("no worker", |it| it.source_worker = "Worker A".into()),
            ("disks", |it| it.disks = vec![it.disks[0].clone(); MAX_DISKS + 1]),
            ("disks", |it| it.disks[0].name = "../root".into()),
            ("disks", |it| it.disks[0].size_bytes = u64::MAX),
            ("bridges", |it| it.bridges = vec!["br0".into(); MAX_NICS + 1]),
            ("bridges", |it| it.bridges = vec!["-br0".into()]),
        ];
        check(&asked()).unwrap();
        for (what, damage) in cases {
            let mut hello = asked();
            damage(&mut hello);
            let refused = check(&hello).unwrap_err().to_string();
            assert!(refused.contains(what), "{refused}");
        }
    }
}
