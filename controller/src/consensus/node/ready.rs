//! What raft has ready, done in the order that [`super`] gives: sent, kept, applied, answered.

use std::sync::Arc;

use raft::StateRole;
use raft::eraftpb::{Entry, EntryType, Snapshot};

use super::{Node, NodeError, Outlet};
use crate::consensus::disk::Disk;
use crate::consensus::storage::Place;
use crate::consensus::{ConsensusError, snapshot};
use crate::model::{Command, apply};

impl<D: Disk, O: Outlet> Node<D, O> {
    pub(super) fn handle_ready(&mut self) -> Result<(), NodeError> {
        let mut ready = self.raft.ready();
        if let Some(soft) = ready.ss() {
            let (term, leader) = (self.raft.raft.term, soft.leader_id);
            tracing::info!(term, leader, role = ?soft.raft_state, "raft role");
            if soft.raft_state != StateRole::Leader {
                self.step_down();
            }
        }
        for state in ready.take_read_states() {
            self.reads.confirm(&state.request_ctx, state.index);
        }
        self.outlet.send(ready.take_messages());
        if !ready.snapshot().is_empty() {
            self.install(ready.snapshot())?;
        }
        if let Some(hard) = ready.hs() {
            let hard = hard.clone();
            self.raft.mut_store().note_hard(&hard);
        }
        if ready.must_sync() {
            let entries = ready.take_entries();
            self.raft.mut_store().persist(&entries)?;
        }
        self.outlet.send(ready.take_persisted_messages());
        self.apply(ready.take_committed_entries())?;
        let mut light = self.raft.advance_append(ready);
        if let Some(commit) = light.commit_index() {
            self.raft.mut_store().note_commit(commit);
        }
        self.outlet.send(light.take_messages());
        self.apply(light.take_committed_entries())?;
        self.raft.advance_apply();
        Ok(())
    }

    /// Whoever waits for this node as a leader learns that it is none.
    fn step_down(&mut self) {
        self.proposals.clear();
        self.changes.clear();
        for answer in self.reads.drain() {
            drop(answer.send(Err(ConsensusError::NotLeader)));
        }
    }

    fn apply(&mut self, entries: Vec<Entry>) -> Result<(), NodeError> {
        let mut answers = vec![];
        let mut changed = false;
        for entry in entries {
            let waiting = self.proposals.take(entry.index, entry.term);
            self.applied = entry.index;
            if entry.get_entry_type() != EntryType::EntryNormal {
                self.apply_change(&entry)?;
                continue;
            }
            if entry.data.is_empty() {
                continue;
            }
            let command: Command = serde_json::from_slice(&entry.data)
                .map_err(|source| NodeError::Decode { index: entry.index, source })?;
            let outcome = apply(Arc::make_mut(&mut self.state), command);
            changed = true;
            if let Some(waiting) = waiting {
                answers.push((waiting, outcome));
            }
        }
        if changed {
            self.outlet.publish(&self.state);
        }
        for (waiting, outcome) in answers {
            drop(waiting.send(Ok(outcome)));
        }
        Ok(())
    }

    fn install(&mut self, snapshot: &Snapshot) -> Result<(), NodeError> {
        let decoded = snapshot::decode(&snapshot.data)?;
        let at = Place { index: decoded.index, term: decoded.term };
        tracing::info!(index = at.index, "taking the leader's snapshot");
        self.raft.mut_store().install(&snapshot.data, at, decoded.membership)?;
        self.state = Arc::new(decoded.state);
        self.applied = at.index;
        self.outlet.publish(&self.state);
        self.regroup()
    }

    pub(super) fn make_snapshot_if_due(&mut self) -> Result<(), NodeError> {
        let since = self.applied.saturating_sub(self.raft.store().snapshot_place().index);
        let wanted = self.raft.store().take_snapshot_wanted() && since > 0;
        // The first entry is dropped at once: see `LogStorage::make_snapshot`.
        let begins_at_one = self.applied > 0 && self.raft.store().truncated().index == 0;
        if since < self.snapshot_every && !wanted && !begins_at_one {
            return Ok(());
        }
        let (applied, keep) = (self.applied, self.keep_entries);
        let state = self.state.clone();
        self.raft.mut_store().make_snapshot(applied, &state, keep)?;
        tracing::info!(index = applied, entries_kept = self.raft.store().kept(), "snapshot made");
        Ok(())
    }
}
