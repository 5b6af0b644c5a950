//! The replications that this worker works on, for reports; and each VM's turn, which rounds and migrations share.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use pageport_proto::VmId;
use pageport_proto::v1::{ReplicationReport, ReplicationStatus};
use tokio::sync::{Notify, OwnedMutexGuard, watch};

/// What of a VM's disks only one may do at a time: take a recovery point, or migrate.
#[derive(Debug)]
pub struct Turn {
    held: Arc<tokio::sync::Mutex<()>>,
    /// Migrations that hold the turn or wait for it.
    migrations: watch::Sender<u32>,
    /// Rounds, of whichever replica, and parts of scrubs that wait for it.
    waiting: watch::Sender<u32>,
}

/// One that waits; it is counted until this is dropped.
struct Waits<'a>(&'a watch::Sender<u32>);

impl<'a> Waits<'a> {
    fn count(waiting: &'a watch::Sender<u32>) -> Self {
        waiting.send_modify(|count| *count += 1);
        Self(waiting)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

/// The turn of a migration, or its wish for it; it ends with this.
#[derive(Debug)]
pub struct MigrationTurn {
    turn: Arc<Turn>,
    held: Option<OwnedMutexGuard<()>>,
}

impl Drop for MigrationTurn {
    fn drop(&mut self) {
        self.held = None;
        self.turn.migrations.send_modify(|count| *count -= 1);
    }
}

impl Turn {
    fn new() -> Self {
        Self { held: Arc::default(), migrations: watch::Sender::new(0), waiting: watch::Sender::new(0) }
    }

    /// The turn of a round; [`None`]: a migration comes first.
    pub async fn take(&self) -> Option<OwnedMutexGuard<()>> {
        let mut migrations = self.migrations.subscribe();
        let _waits = Waits::count(&self.waiting);
        tokio::select! {
            biased;
            _ = migrations.wait_for(|count| *count > 0) => None,
            held = self.held.clone().lock_owned() => Some(held),
        }
    }

    /// Ends when a migration wants the turn.
    pub async fn wanted(&self) {
        // The sender lives as long as this.
        let _ = self.migrations.subscribe().wait_for(|count| *count > 0).await;
    }

    /// Ends when anybody wants the turn: for what can wait.
    pub async fn contended(&self) {
        let mut waiting = self.waiting.subscribe();
        tokio::select! {
            () = self.wanted() => {}
            // The sender lives as long as this.
            _ = waiting.wait_for(|count| *count > 0) => {}
        }
    }

    /// The turn of a migration, or of who changes the disks: a round under way is interrupted.
    pub async fn take_for_migration(self: &Arc<Self>) -> MigrationTurn {
        self.migrations.send_modify(|count| *count += 1);
        let mut turn = MigrationTurn { turn: self.clone(), held: None };
        turn.held = Some(self.held.clone().lock_owned().await);
        turn
    }
}

/// One replication.
#[derive(Debug)]
pub struct Entry {
    turn: Arc<Turn>,
    state: Mutex<EntryState>,
    changed: Arc<Notify>,
}

#[derive(Debug, Default)]
struct EntryState {
    report: ReplicationReport,
    /// The bitmap of what the guest has written since the newest point.
    mark: Option<String>,
    /// Blocks of the replica are known not to be what they should, whatever the bitmap says.
    damaged: bool,
}

impl Entry {
    /// The VM's turn.
    pub fn turn(&self) -> Arc<Turn> {
        self.turn.clone()
    }

    /// The bitmap of what the guest has written since the newest point.
    pub fn mark(&self) -> Option<String> {
        self.state().mark.clone()
    }

    /// See [`Self::mark`].
    pub fn set_mark(&self, mark: Option<String>) {
        self.state().mark = mark;
    }

    /// The replica has damage that no point has put right yet.
    pub fn set_damaged(&self, damaged: bool) {
        self.state().damaged = damaged;
    }

    /// Changes what is reported.
    pub fn update(&self, change: impl FnOnce(&mut ReplicationStatus)) {
        change(self.state().report.status.get_or_insert_default());
        self.changed.notify_one();
    }

    /// The order has a new number.
    pub fn set_seq(&self, protect_seq: u64) {
        self.state().report.protect_seq = protect_seq;
    }

    fn state(&self) -> std::sync::MutexGuard<'_, EntryState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All of them.
#[derive(Debug)]
pub struct Replications {
    changed: Arc<Notify>,
    entries: Mutex<BTreeMap<(VmId, String), Arc<Entry>>>,
    turns: Mutex<BTreeMap<VmId, Arc<Turn>>>,
}

impl Replications {
    /// None yet; `changed` is notified when a report would differ.
    pub fn new(changed: Arc<Notify>) -> Self {
        Self { changed, entries: Mutex::default(), turns: Mutex::default() }
    }

    /// Accounts for a replication from now on.
    pub fn begin(&self, vm: VmId, to_site: &str, protect_seq: u64) -> Arc<Entry> {
        let report = ReplicationReport {
            vm_id: vm.to_string(),
            to_site: to_site.to_owned(),
            protect_seq,
            ..ReplicationReport::default()
        };
        let state = Mutex::new(EntryState { report, ..EntryState::default() });
        let entry = Arc::new(Entry { turn: self.turn(vm), state, changed: self.changed.clone() });
        self.lock().insert((vm, to_site.to_owned()), entry.clone());
        entry
    }

    /// Forgets a replication.
    pub fn end(&self, vm: VmId, to_site: &str) {
        self.lock().remove(&(vm, to_site.to_owned()));
    }

    /// A VM's turn.
    pub fn turn(&self, vm: VmId) -> Arc<Turn> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.entry(vm).or_insert_with(|| Arc::new(Turn::new())).clone()
    }

    /// Whether a replica of the VM has damage that no point has put right yet.
    pub fn has_damage(&self, vm: VmId) -> bool {
        self.lock().iter().any(|((of, _), entry)| *of == vm && entry.state().damaged)
    }

    /// What is reported.
    pub fn reports(&self) -> Vec<ReplicationReport> {
        self.lock().values().map(|entry| entry.state().report.clone()).collect()
    }

    /// What a VM has written since the newest recovery point of its replica at a site; 0: it is not known.
    pub fn lag_bytes(&self, vm: VmId, to_site: &str) -> u64 {
        let entry = self.lock().get(&(vm, to_site.to_owned())).cloned();
        entry.and_then(|entry| Some(entry.state().report.status.as_ref()?.lag_bytes)).unwrap_or_default()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<(VmId, String), Arc<Entry>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_migration_interrupts_a_round_and_keeps_the_next_from_beginning() {
        let turn = Arc::new(Turn::new());
        let round = turn.take().await.unwrap();
        let migration = tokio::spawn({
            let turn = turn.clone();
            async move { turn.take_for_migration().await }
        });
        turn.wanted().await;
        drop(round);
        let migration = migration.await.unwrap();
        assert!(turn.take().await.is_none());
        drop(migration);
        assert!(turn.take().await.is_some());
    }

    #[tokio::test]
    async fn what_can_wait_makes_way_for_the_round_of_another_replica() {
        let turn = Arc::new(Turn::new());
        let pass = turn.take().await.unwrap();
        let quiet = tokio::time::timeout(std::time::Duration::from_millis(1), turn.contended()).await;
        assert!(quiet.is_err(), "whoever holds it does not wait for it");
        let round = tokio::spawn({
            let turn = turn.clone();
            async move { turn.take().await }
        });
        turn.contended().await;
        drop(pass);
        let round = round.await.unwrap().unwrap();
        let quiet = tokio::time::timeout(std::time::Duration::from_millis(1), turn.contended()).await;
        assert!(quiet.is_err());
        drop(round);
    }

    #[test]
    fn damage_is_known_until_a_point_has_put_it_right() {
        let (replications, vm) = (Replications::new(Arc::default()), VmId::generate());
        let entry = replications.begin(vm, "b", 1);
        let _other = replications.begin(VmId::generate(), "b", 2);
        assert!(!replications.has_damage(vm));
        entry.set_damaged(true);
        assert!(replications.has_damage(vm));
        entry.set_damaged(false);
        assert!(!replications.has_damage(vm));
    }

    #[tokio::test]
    async fn a_migration_that_gave_up_waiting_wants_nothing() {
        let turn = Arc::new(Turn::new());
        let round = turn.take().await.unwrap();
        let waiting = turn.take_for_migration();
        let gave_up = tokio::time::timeout(std::time::Duration::from_millis(1), waiting).await;
        assert!(gave_up.is_err());
        drop(round);
        assert!(turn.take().await.is_some());
    }
}
