//! The migrations and seeds that this worker works on, for reports and for cancelling.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use pageport_proto::v1::{MigrationProgress, MigrationRecord, MigrationReport, MigrationRole, SeedReport};
use pageport_proto::{MigrationId, VmId};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::pace::Pace;

/// One migration's side at this worker.
#[derive(Debug)]
pub struct MigrationEntry {
    id: MigrationId,
    role: MigrationRole,
    /// Asks the side to give up while it can.
    pub cancel: CancellationToken,
    /// How fast it may go.
    pub pace: Pace,
    state: Mutex<MigrationState>,
    changed: Arc<Notify>,
}

#[derive(Debug, Default)]
struct MigrationState {
    progress: Option<MigrationProgress>,
    record: Option<MigrationRecord>,
    failure: String,
    ended: bool,
}

impl MigrationEntry {
    /// Live figures.
    pub fn set_progress(&self, progress: MigrationProgress) {
        self.change(|state| state.progress = Some(progress));
    }

    /// It gives up, for this reason: to be said before anything shows that it did, so that nobody hears of the end without it.
    pub fn gives_up(&self, reason: &str) {
        self.change(|state| reason.clone_into(&mut state.failure));
    }

    /// It is done, one way or the other.
    pub fn end(&self, outcome: Result<Option<MigrationRecord>, String>) {
        self.change(|state| {
            state.ended = true;
            match outcome {
                Ok(record) => state.record = record,
                Err(failure) => state.failure = failure,
            }
        });
    }

    /// Nothing is left to do.
    pub fn has_ended(&self) -> bool {
        self.state().ended
    }

    fn report(&self) -> MigrationReport {
        let state = self.state();
        MigrationReport {
            migration_id: self.id.to_string(),
            role: self.role.into(),
            progress: state.progress.clone(),
            record: state.record.clone(),
            failure: state.failure.clone(),
            ended: state.ended,
        }
    }

    fn change(&self, change: impl FnOnce(&mut MigrationState)) {
        change(&mut self.state());
        self.changed.notify_one();
    }

    fn state(&self) -> std::sync::MutexGuard<'_, MigrationState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A seed under way or ended.
#[derive(Debug)]
pub struct SeedEntry {
    /// Gives up.
    pub cancel: CancellationToken,
    report: Mutex<SeedReport>,
    changed: Arc<Notify>,
}

impl SeedEntry {
    /// Changes what is reported.
    pub fn update(&self, change: impl FnOnce(&mut SeedReport)) {
        change(&mut self.report.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_one();
    }

    /// What is reported.
    pub fn report(&self) -> SeedReport {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// All of them.
#[derive(Debug)]
pub struct Registry {
    changed: Arc<Notify>,
    migrations: Mutex<BTreeMap<MigrationId, Arc<MigrationEntry>>>,
    seeds: Mutex<BTreeMap<(VmId, String), Arc<SeedEntry>>>,
}

impl Registry {
    /// Empty; `changed` is notified when a report would differ.
    pub fn new(changed: Arc<Notify>) -> Self {
        Self { changed, migrations: Mutex::default(), seeds: Mutex::default() }
    }

    /// Begins to account for a migration; [`None`] if it is accounted for already.
    pub fn begin_migration(&self, id: MigrationId, role: MigrationRole) -> Option<Arc<MigrationEntry>> {
        let mut migrations = self.migrations.lock().unwrap_or_else(PoisonError::into_inner);
        if migrations.contains_key(&id) {
            return None;
        }
        let (cancel, changed) = (CancellationToken::new(), self.changed.clone());
        let entry =
            Arc::new(MigrationEntry { id, role, cancel, pace: Pace::default(), state: Mutex::default(), changed });
        migrations.insert(id, entry.clone());
        Some(entry)
    }

    /// A migration, if it is accounted for.
    pub fn migration(&self, id: MigrationId) -> Option<Arc<MigrationEntry>> {
        self.migrations.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    /// Forgets the migrations that have ended and that the controllers no longer name.
    pub fn retain_migrations(&self, named: impl Fn(MigrationId) -> bool) {
        let mut migrations = self.migrations.lock().unwrap_or_else(PoisonError::into_inner);
        migrations.retain(|id, entry| named(*id) || !entry.has_ended());
    }

    /// Begins to account for a seed; [`None`] if this order is accounted for already. An older order is cancelled.
    pub fn begin_seed(&self, vm: VmId, to_site: &str, seed_seq: u64) -> Option<Arc<SeedEntry>> {
        let mut seeds = self.seeds.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (vm, to_site.to_owned());
        if let Some(known) = seeds.get(&key) {
            if known.report().seed_seq == seed_seq {
                return None;
            }
            known.cancel.cancel();
        }
        let report =
            SeedReport { vm_id: vm.to_string(), to_site: to_site.to_owned(), seed_seq, ..SeedReport::default() };
        let entry = Arc::new(SeedEntry {
            cancel: CancellationToken::new(),
            report: Mutex::new(report),
            changed: self.changed.clone(),
        });
        seeds.insert(key, entry.clone());
        Some(entry)
    }

    /// Cancels and forgets the seeds that the controllers no longer name.
    pub fn retain_seeds(&self, named: impl Fn(VmId, &str) -> bool) {
        self.seeds.lock().unwrap_or_else(PoisonError::into_inner).retain(|(vm, site), entry| {
            let keep = named(*vm, site);
            if !keep {
                entry.cancel.cancel();
            }
            keep
        });
    }

    /// What is reported of all migrations.
    pub fn migration_reports(&self) -> Vec<MigrationReport> {
        let migrations = self.migrations.lock().unwrap_or_else(PoisonError::into_inner);
        migrations.values().map(|entry| entry.report()).collect()
    }

    /// What is reported of all seeds.
    pub fn seed_reports(&self) -> Vec<SeedReport> {
        self.seeds.lock().unwrap_or_else(PoisonError::into_inner).values().map(|entry| entry.report()).collect()
    }
}
