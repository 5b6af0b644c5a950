//! What the points that a replica has mean for the next: its number, and the bitmap from which an increment can go on.

use std::collections::BTreeMap;

use pageport_proto::v1::{ReplicaPoints, VmSpec};

use super::mark::Mark;
use crate::hypervisor::{HypervisorError, Vm};

/// How the next point comes about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The history that the newest point belongs to; 0: there is none.
    pub lineage: u64,
    /// The next point's number.
    pub number: u64,
    /// There is no point that could be kept: the replica is written in place.
    pub in_place: bool,
    /// The bitmap of what changed since the newest point; [`None`]: the whole disks are compared.
    pub since: Option<String>,
}

impl Plan {
    /// Compares the replica's points with the hypervisor's bitmaps; those that are of no use any more are removed.
    ///
    /// # Errors
    /// The hypervisor does not answer.
    pub async fn make(
        qemu: &Vm,
        disks: &[String],
        points: &ReplicaPoints,
        worker: &str,
    ) -> Result<Self, HypervisorError> {
        if !points.damage.is_empty() {
            tracing::warn!(damage = points.damage, "the replica's points are lost: the disks are compared anew");
        }
        let mut found: BTreeMap<String, usize> = BTreeMap::new();
        for bitmap in qemu.bitmaps().await? {
            // Only one that records on every disk has missed nothing.
            *found.entry(bitmap.name).or_default() += usize::from(bitmap.recording);
        }
        let plan = plan(points, &found, disks.len(), worker);
        let ours = |name: &&String| Mark::parse(name).is_some_and(|mark| mark.worker == worker);
        for stale in found.keys().filter(ours).filter(|name| Some(*name) != plan.since.as_ref()) {
            qemu.remove_bitmap(disks, stale).await?;
        }
        Ok(plan)
    }
}

/// The disks that a point is taken of, in their order: those that the hypervisor has open. One that was added to the definition may not be yet.
///
/// # Errors
/// The hypervisor does not answer.
pub async fn disks_of(qemu: &Vm, spec: &VmSpec) -> Result<Vec<String>, HypervisorError> {
    let open = qemu.open_disks().await?;
    let names = spec.disks.iter().map(|disk| disk.name.clone());
    Ok(names.take_while(|name| open.contains(name)).collect())
}

fn plan(points: &ReplicaPoints, bitmaps: &BTreeMap<String, usize>, disks: usize, worker: &str) -> Plan {
    let newest = points.newest.as_ref().filter(|_| points.damage.is_empty());
    let mark = newest.map(|point| Mark { worker: worker.to_owned(), lineage: points.lineage, point: point.number });
    let since = mark.map(|mark| mark.to_string()).filter(|name| bitmaps.get(name) == Some(&disks));
    Plan {
        lineage: points.lineage,
        number: newest.map_or(1, |point| point.number + 1),
        in_place: newest.is_none(),
        since,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageport_proto::v1::RecoveryPoint;

    fn points(lineage: u64, newest: Option<u64>, damage: &str) -> ReplicaPoints {
        let newest = newest.map(|number| RecoveryPoint { number, ..RecoveryPoint::default() });
        ReplicaPoints { lineage, newest, damage: damage.to_owned() }
    }

    fn name(worker: &str, lineage: u64, point: u64) -> String {
        Mark { worker: worker.to_owned(), lineage, point }.to_string()
    }

    #[test]
    fn an_increment_goes_on_from_the_whole_bitmap_of_the_newest_point_and_from_no_other() {
        let bitmaps = BTreeMap::from([
            (name("b", 1, 4), 2),
            (name("b", 1, 5), 2),
            (name("b", 1, 6), 1),
            (name("b", 2, 7), 2),
            (name("c", 1, 8), 2),
        ]);
        let since = |newest| plan(&points(1, Some(newest), ""), &bitmaps, 2, "b").since;
        for newest in [4, 5] {
            assert_eq!(since(newest), Some(name("b", 1, newest)));
        }
        for newest in [3, 6, 7, 8] {
            assert_eq!(since(newest), None);
        }
        let next = plan(&points(1, Some(5), ""), &bitmaps, 2, "b");
        assert_eq!((next.number, next.in_place), (6, false));
    }

    #[test]
    fn a_replica_without_a_point_or_with_damage_is_copied_in_place() {
        let bitmaps = BTreeMap::from([(name("b", 1, 5), 1)]);
        for points in [points(0, None, ""), points(1, Some(5), "a checksum is wrong")] {
            let plan = plan(&points, &bitmaps, 1, "b");
            assert_eq!((plan.number, plan.in_place, plan.since), (1, true, None));
        }
    }
}
