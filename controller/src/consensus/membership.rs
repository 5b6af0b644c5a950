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
//! two successive memberships always share a member. What a change would do is asked before it is proposed: [`Membership::plan`].
//!
//! Guarantees: [`Membership::after`] is the same everywhere for the same entry; it takes no number twice.

use std::collections::{BTreeMap, BTreeSet};

use pageport_proto::{SiteName, StoreId};
use raft::eraftpb::{ConfChange, ConfChangeType, ConfState};
use serde::{Deserialize, Serialize};

use super::ConsensusError;
use super::standing::{Role, Standing, list};

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

/// What somebody wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// A member more, as a learner; or another address for one that is there.
    Add(Member),
    /// A learner is to vote.
    Promote(u64),
    /// A member less.
    Remove {
        /// Which.
        id: u64,
        /// What if too few are left that answer?
        quorum: Quorum,
    },
}

/// What a removal may do to the majority.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quorum {
    /// Refuse what leaves no majority that answers.
    Keep,
    /// Remove all the same.
    Risk,
}

/// One change, as it goes into the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// This member has this role from now on.
    Seat(Member, Role),
    /// This member is none any more.
    Remove(u64),
}

/// What an order comes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// It is so already.
    Done,
    /// An entry of the log.
    Propose(Change),
}

/// Why members do not change.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// No agreement.
    #[error(transparent)]
    Consensus(#[from] ConsensusError),
    /// One at a time.
    #[error("another change of the members is under way: try again in a moment")]
    Busy,
    /// Nobody by that number.
    #[error("there is no controller {member}: members are {}", list(members))]
    NotMember {
        /// Who was asked for.
        member: u64,
        /// Who there is.
        members: Vec<u64>,
    },
    /// A number is given once.
    #[error(
        "controller {member} was removed and its number is not given again: add the new controller under another number, with an empty data_dir"
    )]
    Removed {
        /// The number.
        member: u64,
    },
    /// Not `host:port`, or 0.
    #[error("{what} \"{given}\" is not usable: {fix}")]
    Unusable {
        /// Which part.
        what: &'static str,
        /// What was given.
        given: String,
        /// What is.
        fix: &'static str,
    },
    /// Two at one place.
    #[error("controller {member} has the address {address} already: each controller has its own")]
    AddressTaken {
        /// Who has it.
        member: u64,
        /// Which.
        address: String,
    },
    /// A controller stays where it is.
    #[error(
        "controller {member} stands at site \"{site}\" already: only its address can be changed; for another site add a controller under another number"
    )]
    AnotherSite {
        /// Who.
        member: u64,
        /// Where.
        site: SiteName,
    },
    /// Enough.
    #[error(
        "there are {MAX_MEMBERS} controllers already, and more make commands slower and nothing safer: remove one first"
    )]
    TooMany,
    /// A learner that lacks too much, or does not answer.
    #[error("controller {member} has not caught up yet: it lacks {entries} entries")]
    NotNear {
        /// Who.
        member: u64,
        /// How much.
        entries: u64,
    },
    /// The leader goes on leading until another does.
    #[error("controller {member} leads: it hands leadership over first")]
    Leads {
        /// Who.
        member: u64,
    },
    /// Nobody would be left.
    #[error("controller {member} is the only one that votes: add another first")]
    LastVoter {
        /// Who.
        member: u64,
    },
    /// Nothing could be decided any more.
    #[error(
        "without controller {member} only {} of {voters} voting controllers would answer, and {needed} are needed for any \
         decision: start the silent ones or remove them first; with force it is removed all the same",
        list(answering)
    )]
    QuorumLost {
        /// Who is to go.
        member: u64,
        /// Who would answer.
        answering: Vec<u64>,
        /// Voters that would be left.
        voters: usize,
        /// A majority of them.
        needed: usize,
    },
    /// An entry of another version.
    #[error("the member in an entry of the log cannot be read: is this controller older than its peers?")]
    Decode(#[source] serde_json::Error),
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

    /// What an order comes to, now.
    ///
    /// # Errors
    /// [`ChangeError`] when it must not be.
    pub fn plan(&self, order: &Order, standing: &Standing) -> Result<Plan, ChangeError> {
        match order {
            Order::Add(member) => self.plan_add(member),
            Order::Promote(id) => self.plan_promote(*id, standing),
            Order::Remove { id, quorum } => self.plan_remove(*id, *quorum, standing),
        }
    }

    fn plan_add(&self, new: &Member) -> Result<Plan, ChangeError> {
        let unusable = |what, given: String, fix| Err(ChangeError::Unusable { what, given, fix });
        if new.id == 0 {
            return unusable("the number", "0".into(), "controllers are numbered from 1");
        }
        if !is_address(&new.address) {
            let given = new.address.chars().take(MAX_ADDRESS_BYTES).collect();
            return unusable("the address", given, "name host and port, such as \"192.0.2.4:7400\"");
        }
        if self.removed.contains(&new.id) {
            return Err(ChangeError::Removed { member: new.id });
        }
        let mut others = self.members().filter(|(member, _)| member.id != new.id);
        if let Some((other, _)) = others.find(|(member, _)| member.address == new.address) {
            return Err(ChangeError::AddressTaken { member: other.id, address: other.address.clone() });
        }
        match self.get(new.id) {
            Some((there, _)) if there.site == new.site && there.address == new.address => Ok(Plan::Done),
            Some((there, _)) if there.site != new.site => {
                Err(ChangeError::AnotherSite { member: there.id, site: there.site.clone() })
            }
            Some((there, role)) => {
                let moved = Member { address: new.address.clone(), ..there.clone() };
                Ok(Plan::Propose(Change::Seat(moved, role)))
            }
            None if self.members().count() >= MAX_MEMBERS => Err(ChangeError::TooMany),
            None => Ok(Plan::Propose(Change::Seat(new.clone(), Role::Learner))),
        }
    }

    fn plan_promote(&self, id: u64, standing: &Standing) -> Result<Plan, ChangeError> {
        let (member, role) = self.get(id).ok_or_else(|| self.not_member(id))?;
        if role == Role::Voter {
            return Ok(Plan::Done);
        }
        let peer = standing.peer(id);
        let entries = peer.map_or(standing.last, |peer| standing.behind(peer));
        if peer.is_some_and(|peer| peer.answers()) && entries <= NEAR_ENTRIES {
            Ok(Plan::Propose(Change::Seat(member.clone(), Role::Voter)))
        } else {
            Err(ChangeError::NotNear { member: id, entries })
        }
    }

    fn plan_remove(&self, id: u64, quorum: Quorum, standing: &Standing) -> Result<Plan, ChangeError> {
        if self.removed.contains(&id) {
            return Ok(Plan::Done);
        }
        let (_, role) = self.get(id).ok_or_else(|| self.not_member(id))?;
        if role == Role::Learner {
            return Ok(Plan::Propose(Change::Remove(id)));
        }
        let left: Vec<u64> = self.voters.keys().copied().filter(|voter| *voter != id).collect();
        if left.is_empty() {
            return Err(ChangeError::LastVoter { member: id });
        }
        if id == standing.leader {
            return Err(ChangeError::Leads { member: id });
        }
        let (voters, needed) = (left.len(), left.len() / 2 + 1);
        let answers = |voter: &u64| *voter == standing.leader || standing.peer(*voter).is_some_and(|it| it.answers());
        let answering: Vec<u64> = left.into_iter().filter(answers).collect();
        if answering.len() < needed && quorum == Quorum::Keep {
            return Err(ChangeError::QuorumLost { member: id, answering, voters, needed });
        }
        Ok(Plan::Propose(Change::Remove(id)))
    }

    fn not_member(&self, member: u64) -> ChangeError {
        ChangeError::NotMember { member, members: self.members().map(|(member, _)| member.id).collect() }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use super::super::standing::Peer;
    use super::*;

    const NOW: Option<Duration> = Some(Duration::ZERO);

    fn member(id: u64) -> Member {
        Member::new(id, "a".parse().unwrap(), format!("192.0.2.{id}:7400"))
    }

    fn three() -> Membership {
        Membership::first([1, 2, 3].map(member))
    }

    /// Led by 1, with 1000 entries; each of these with what it lacks, if it answers.
    fn standing(peers: &[(u64, Option<u64>)]) -> Standing {
        let peer = |(id, lacks): &(u64, Option<u64>)| Peer {
            id: *id,
            role: Role::Voter,
            matched: 1000 - lacks.unwrap_or(0),
            silent: lacks.and(NOW),
        };
        Standing { leader: 1, last: 1000, peers: peers.iter().map(peer).collect() }
    }

    fn all_well() -> Standing {
        standing(&[(2, Some(0)), (3, Some(0)), (4, Some(0))])
    }

    fn take(membership: &Membership, index: u64, order: &Order, standing: &Standing) -> Membership {
        let Plan::Propose(change) = membership.plan(order, standing).unwrap() else { panic!("{order:?} is done") };
        membership.after(index, &change.encode().unwrap()).unwrap()
    }

    #[test]
    fn a_store_is_noted_once_and_another_is_turned_away() {
        let (first, other) = (StoreId::generate(), StoreId::generate());
        let heard = BTreeMap::from([(2, first), (9, other)]);
        let change = three().news_of(&heard).unwrap();
        let noted = three().after(5, &change.encode().unwrap()).unwrap();
        assert_eq!((noted.get(2).unwrap().0.store, noted.news_of(&heard)), (Some(first), None));
        assert_eq!((noted.turns_away(2, Some(first)), noted.turns_away(2, None)), (None, None));
        assert_eq!(noted.turns_away(2, Some(other)), Some(TurnedAway::OtherStore));
        assert_eq!(noted.turns_away(3, Some(other)), None, "it was not heard yet");
        let moved =
            take(&noted, 6, &Order::Add(Member { address: "controller-2:7400".into(), ..member(2) }), &all_well());
        assert_eq!(moved.get(2).unwrap().0.store, Some(first), "another address is no other store");
    }

    #[test]
    fn a_member_learns_then_votes_then_is_gone_for_good() {
        let learning = take(&three(), 7, &Order::Add(member(4)), &all_well());
        assert_eq!((learning.index, learning.get(4).unwrap().1), (7, Role::Learner));
        assert_eq!(learning.plan(&Order::Add(member(4)), &all_well()).unwrap(), Plan::Done, "repeated");
        let voting = take(&learning, 8, &Order::Promote(4), &all_well());
        assert_eq!((voting.voters.len(), voting.learners.len()), (4, 0));
        assert_eq!(voting.plan(&Order::Promote(4), &all_well()).unwrap(), Plan::Done, "repeated");
        let remove = Order::Remove { id: 4, quorum: Quorum::Keep };
        let removed = take(&voting, 9, &remove, &all_well());
        assert_eq!((removed.conf_state(), removed.get(4)), (three().conf_state(), None));
        assert_eq!(removed.plan(&remove, &all_well()).unwrap(), Plan::Done, "repeated");
        let again = removed.plan(&Order::Add(member(4)), &all_well()).unwrap_err();
        assert!(again.to_string().contains("its number is not given again"), "{again}");
    }

    #[test]
    fn an_address_changes_and_the_vote_stays() {
        let moved = Member { address: "controller-2:7400".into(), ..member(2) };
        let after = take(&three(), 5, &Order::Add(moved.clone()), &all_well());
        assert_eq!(after.get(2), Some((&moved, Role::Voter)));
    }

    #[test]
    fn what_must_not_be_added_is_refused_with_the_way_out() {
        let elsewhere = Member { site: "b".parse().unwrap(), ..member(2) };
        let cases = [
            (Member { id: 0, ..member(4) }, "numbered from 1"),
            (Member { address: "192.0.2.4".into(), ..member(4) }, "name host and port"),
            (Member { address: "192.0.2.4:0".into(), ..member(4) }, "name host and port"),
            (Member { id: 4, ..member(2) }, "controller 2 has the address"),
            (elsewhere, "under another number"),
        ];
        for (new, expected) in cases {
            let refused = three().plan(&Order::Add(new), &all_well()).unwrap_err().to_string();
            assert!(refused.contains(expected), "{refused}");
        }
        let full = Membership::first((1..=MAX_MEMBERS as u64).map(member));
        assert!(matches!(full.plan(&Order::Add(member(10)), &all_well()), Err(ChangeError::TooMany)));
    }

    #[test]
    fn who_lacks_entries_or_is_silent_does_not_get_to_vote() {
        let learning = take(&three(), 7, &Order::Add(member(4)), &all_well());
        for (lacks, promoted) in [(Some(NEAR_ENTRIES), true), (Some(NEAR_ENTRIES + 1), false), (None, false)] {
            let plan = learning.plan(&Order::Promote(4), &standing(&[(4, lacks)]));
            assert_eq!(plan.is_ok(), promoted, "{lacks:?}: {plan:?}");
        }
    }

    #[test]
    fn a_removal_leaves_a_majority_that_answers() {
        let (alive, dead) = (Some(0), None);
        let five = || Membership::first((1..=5).map(member));
        let cases = [
            (three(), 3, standing(&[(2, alive), (3, alive)]), true),
            (three(), 3, standing(&[(2, alive), (3, dead)]), true),
            (three(), 2, standing(&[(2, alive), (3, dead)]), false),
            (five(), 5, standing(&[(2, alive), (3, alive), (4, dead), (5, dead)]), true),
            (five(), 3, standing(&[(2, alive), (3, alive), (4, dead), (5, dead)]), false),
        ];
        for (membership, id, standing, allowed) in cases {
            let plan = membership.plan(&Order::Remove { id, quorum: Quorum::Keep }, &standing);
            assert_eq!(plan.is_ok(), allowed, "{plan:?}");
            let forced = membership.plan(&Order::Remove { id, quorum: Quorum::Risk }, &standing);
            assert_eq!(forced.unwrap(), Plan::Propose(Change::Remove(id)));
        }
        let leader = Order::Remove { id: 1, quorum: Quorum::Risk };
        assert!(matches!(three().plan(&leader, &all_well()), Err(ChangeError::Leads { .. })));
        let alone = Membership::first([member(1)]);
        assert!(matches!(alone.plan(&leader, &standing(&[])), Err(ChangeError::LastVoter { .. })));
        let unknown = Order::Remove { id: 9, quorum: Quorum::Keep };
        assert!(matches!(three().plan(&unknown, &all_well()), Err(ChangeError::NotMember { .. })));
    }
}
