//! [`Membership`]: who the controllers are and where; a part of what they agree on. Pure.
//!
//! ```text
//!   controller.toml ──(entry 0)──▶ voters        voter ──remove──▶ removed: its number is never given again
//!                                    ▲
//!   add ──▶ learner ──promote────────┘           learner ──remove──▶ removed
//! ```
//! A member has one store (`data_dir`) for its life: which one is noted, by an entry too, when it is first heard. One that comes back
//! with another has lost what it promised, and nobody listens to it any more: it could elect a leader that lacks what it had
//! acknowledged.
//!
//! Members change one at a time, each by an entry of the log of its own, which carries the member's address. Majorities of
//! two successive memberships always share a member. What a change would do is asked before it is proposed: [`Membership::plan`]
//! (in `plan`; the refusals in `error`).
//!
//! Guarantees: [`Membership::after`] is the same everywhere for the same entry; it takes no number twice.

mod error;
mod plan;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use pageport_proto::{SiteName, StoreId};
use raft::eraftpb::{ConfChange, ConfChangeType, ConfState};
use serde::{Deserialize, Serialize};

pub use self::error::ChangeError;
pub use self::plan::{Order, Plan, Quorum};
use super::ConsensusError;
use super::standing::Role;

/// Who lacks more entries than this does not become a voter yet.
pub const NEAR_ENTRIES: u64 = 64;
/// Longest `host:port`, in bytes.
pub const MAX_ADDRESS_BYTES: usize = 261;
/// More members make each command slower and none safer.
pub const MAX_MEMBERS: usize = 9;

/// One controller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its number.
    pub id: u64,
    /// Its site.
    pub site: SiteName,
    /// host:port of its mTLS gRPC.
    pub address: String,
    /// Its store; [`None`]: it was not heard yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store: Option<StoreId>,
}

impl Member {
    /// One that was not heard yet.
    pub fn new(id: u64, site: SiteName, address: String) -> Self {
        Self { id, site, address, store: None }
    }
}

/// Why nobody listens to a controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TurnedAway {
    /// It was removed.
    Removed,
    /// It is a member, with another store than the one that it has now.
    OtherStore,
    /// The controllers were restored from a backup without it.
    OlderGeneration,
}

/// Is this `host:port`?
pub fn is_address(text: &str) -> bool {
    let parts = text.rsplit_once(':');
    text.len() <= MAX_ADDRESS_BYTES
        && parts.is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0))
}

/// Who the controllers are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// The entry of the log that made it so; 0: the configuration did.
    pub index: u64,
    /// Those who elect and agree.
    pub voters: BTreeMap<u64, Member>,
    /// Those who only receive the log.
    pub learners: BTreeMap<u64, Member>,
    /// Numbers that are never given again.
    pub removed: BTreeSet<u64>,
}

/// One change, as it goes into the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// This member has this role from now on.
    Seat(Member, Role),
    /// This member is none any more.
    Remove(u64),
}

impl Change {
    /// For the log.
    ///
    /// # Errors
    /// [`ConsensusError::Encode`].
    pub fn encode(&self) -> Result<ConfChange, ConsensusError> {
        let mut out = ConfChange::default();
        match self {
            Self::Seat(member, role) => {
                out.node_id = member.id;
                out.set_change_type(match role {
                    Role::Voter => ConfChangeType::AddNode,
                    Role::Learner => ConfChangeType::AddLearnerNode,
                });
                out.context = serde_json::to_vec(member).map_err(ConsensusError::Encode)?;
            }
            Self::Remove(id) => {
                out.node_id = *id;
                out.set_change_type(ConfChangeType::RemoveNode);
            }
        }
        Ok(out)
    }
}

impl Membership {
    /// What the configuration says: all vote.
    pub fn first(members: impl IntoIterator<Item = Member>) -> Self {
        Self { voters: members.into_iter().map(|member| (member.id, member)).collect(), ..Self::default() }
    }

    /// Is nothing known yet, as with a controller that is about to join?
    pub fn is_unknown(&self) -> bool {
        self.voters.is_empty()
    }

    /// Every number that was ever given.
    pub fn numbers(&self) -> Vec<u64> {
        let members = self.members().map(|(member, _)| member.id);
        members.chain(self.removed.iter().copied()).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Every member, voters first.
    pub fn members(&self) -> impl Iterator<Item = (&Member, Role)> {
        let voters = self.voters.values().map(|member| (member, Role::Voter));
        voters.chain(self.learners.values().map(|member| (member, Role::Learner)))
    }

    /// One of them.
    pub fn get(&self, id: u64) -> Option<(&Member, Role)> {
        self.members().find(|(member, _)| member.id == id)
    }

    /// Why nothing is taken from this controller, which has this store.
    pub fn turns_away(&self, id: u64, store: Option<StoreId>) -> Option<TurnedAway> {
        if self.removed.contains(&id) {
            return Some(TurnedAway::Removed);
        }
        let known = self.get(id)?.0.store?;
        store.is_some_and(|store| store != known).then_some(TurnedAway::OtherStore)
    }

    /// The store of one of those that were heard, if it is to be noted.
    pub fn news_of(&self, heard: &BTreeMap<u64, StoreId>) -> Option<Change> {
        self.members().find_map(|(member, role)| {
            let store = *heard.get(&member.id).filter(|_| member.store.is_none())?;
            Some(Change::Seat(Member { store: Some(store), ..member.clone() }, role))
        })
    }

    /// For raft.
    pub fn conf_state(&self) -> ConfState {
        let voters = self.voters.keys().copied().collect();
        ConfState { voters, learners: self.learners.keys().copied().collect(), ..ConfState::default() }
    }

    /// What there is after the change in entry `index`.
    ///
    /// # Errors
    /// [`ChangeError::Decode`].
    pub fn after(&self, index: u64, change: &ConfChange) -> Result<Self, ChangeError> {
        let mut next = Self { index, ..self.clone() };
        let id = change.node_id;
        next.voters.remove(&id);
        next.learners.remove(&id);
        let member = || serde_json::from_slice::<Member>(&change.context).map_err(ChangeError::Decode);
        match change.get_change_type() {
            ConfChangeType::AddNode => drop(next.voters.insert(id, member()?)),
            ConfChangeType::AddLearnerNode => drop(next.learners.insert(id, member()?)),
            ConfChangeType::RemoveNode => drop(next.removed.insert(id)),
        }
        Ok(next)
    }
}
