//! What an order comes to, and when it must not be: a change may leave no number given twice, no two controllers at one address,
//! nobody who votes without the log, and a majority that answers.

use super::{Change, ChangeError, MAX_ADDRESS_BYTES, MAX_MEMBERS, Member, Membership, NEAR_ENTRIES, is_address};
use crate::consensus::standing::{Role, Standing};

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

/// What an order comes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// It is so already.
    Done,
    /// An entry of the log.
    Propose(Change),
}

impl Membership {
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
