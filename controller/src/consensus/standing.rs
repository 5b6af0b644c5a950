//! [`Standing`]: how far the members are, as their leader sees it, and what follows from that. Pure.
//!
//! | question | answer |
//! |---|---|
//! | who may lead instead? | a voter that was heard within [`SILENCE`] and lacks at most [`MAX_BEHIND`] entries |
//!
//! A member that has just died still counts as heard: what is begun with it then ends at its own deadline.

use std::time::Duration;

use super::ConsensusError;

/// A member that was not heard for so long does not answer: half a dozen heartbeats.
pub const SILENCE: Duration = Duration::from_millis(1500);
/// Who lacks more entries than this would take too long to lead: commands wait meanwhile.
pub const MAX_BEHIND: u64 = 10_000;

/// What a member takes part in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Elections and majorities.
    Voter,
    /// Neither: it only receives the log.
    Learner,
}

/// Another member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Which.
    pub id: u64,
    /// What it takes part in.
    pub role: Role,
    /// The newest entry that it is known to have on disk.
    pub matched: u64,
    /// Since it was last heard; [`None`]: never.
    pub silent: Option<Duration>,
}

impl Peer {
    /// Was it heard of late?
    pub fn answers(&self) -> bool {
        self.silent.is_some_and(|silent| silent <= SILENCE)
    }
}

/// How far the members are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// The leader itself, which is a voter.
    pub leader: u64,
    /// The newest entry of its log.
    pub last: u64,
    /// The others.
    pub peers: Vec<Peer>,
}

/// Why leadership is not handed over.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// No agreement.
    #[error(transparent)]
    Consensus(#[from] ConsensusError),
    /// Nobody by that number, or one that does not vote.
    #[error("controller {member} is not a voting member: those are {}", list(voters))]
    NotVoter {
        /// Who was asked for.
        member: u64,
        /// Who could be.
        voters: Vec<u64>,
    },
    /// It is down or cut off.
    #[error(
        "controller {member} does not answer the leader: start it, or look at its log and the network; controller {leader} leads on"
    )]
    Silent {
        /// Who.
        member: u64,
        /// Who leads.
        leader: u64,
    },
    /// It lacks too much.
    #[error(
        "controller {member} lacks {entries} entries of the log, and commands would wait for them: try again when it has caught up; controller {leader} leads on"
    )]
    Behind {
        /// Who.
        member: u64,
        /// How much.
        entries: u64,
        /// Who leads.
        leader: u64,
    },
    /// There is nobody else.
    #[error("no other voting controller answers: controller {leader} leads on")]
    Alone {
        /// Who leads.
        leader: u64,
    },
    /// It did not become the leader in time.
    #[error("controller {member} did not take over within {} s: {}", within.as_secs(), leads(*leader))]
    NotTaken {
        /// Who.
        member: u64,
        /// What it had.
        within: Duration,
        /// Who leads instead.
        leader: Option<u64>,
    },
}

/// Numbers as text.
pub fn list(ids: &[u64]) -> String {
    ids.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")
}

fn leads(leader: Option<u64>) -> String {
    match leader {
        Some(leader) => format!("controller {leader} leads"),
        None => "there is no leader now".to_owned(),
    }
}

impl Standing {
    /// One of the others.
    pub fn peer(&self, id: u64) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.id == id)
    }

    /// Entries of the leader's log that a member is not known to have.
    pub fn behind(&self, peer: &Peer) -> u64 {
        self.last.saturating_sub(peer.matched)
    }

    /// Who is to lead: the one asked for, or the other voter that has the most of the log.
    ///
    /// # Errors
    /// [`TransferError`] when that cannot be, or not at once.
    pub fn heir(&self, asked: Option<u64>) -> Result<u64, TransferError> {
        let leader = self.leader;
        let voters = || self.peers.iter().filter(|peer| peer.role == Role::Voter);
        let peer = match asked {
            Some(member) if member == leader => return Ok(leader),
            Some(member) => voters().find(|peer| peer.id == member).ok_or_else(|| {
                let mut voters: Vec<u64> = voters().map(|peer| peer.id).chain([leader]).collect();
                voters.sort_unstable();
                TransferError::NotVoter { member, voters }
            })?,
            None => {
                let answering = voters().filter(|peer| peer.answers());
                // Of equals the one with the lowest number, so that a repeated order means the same.
                let best = answering.max_by_key(|peer| (peer.matched, std::cmp::Reverse(peer.id)));
                best.ok_or(TransferError::Alone { leader })?
            }
        };
        let (member, entries) = (peer.id, self.behind(peer));
        match peer.answers() {
            false => Err(TransferError::Silent { member, leader }),
            true if entries > MAX_BEHIND => Err(TransferError::Behind { member, entries, leader }),
            true => Ok(member),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const NOW: Option<Duration> = Some(Duration::ZERO);
    const LONG_AGO: Option<Duration> = Some(Duration::from_secs(9));

    fn peer(id: u64, matched: u64, silent: Option<Duration>) -> Peer {
        Peer { id, role: Role::Voter, matched, silent }
    }

    fn standing(peers: &[Peer]) -> Standing {
        Standing { leader: 1, last: 20_000, peers: peers.to_vec() }
    }

    #[test]
    fn who_is_asked_for_leads_only_if_it_votes_answers_and_is_near() {
        let learner = Peer { role: Role::Learner, ..peer(4, 20_000, NOW) };
        let cluster = standing(&[peer(2, 19_990, NOW), peer(3, 20_000, LONG_AGO), learner, peer(5, 9_999, NOW)]);
        assert_eq!(cluster.heir(Some(2)).unwrap(), 2);
        assert_eq!(cluster.heir(Some(1)).unwrap(), 1, "it leads already");
        let refusals = [
            (3, "controller 3 does not answer the leader"),
            (4, "controller 4 is not a voting member: those are 1, 2, 3, 5"),
            (5, "controller 5 lacks 10001 entries of the log"),
            (9, "controller 9 is not a voting member"),
        ];
        for (member, expected) in refusals {
            let refused = cluster.heir(Some(member)).unwrap_err().to_string();
            assert!(refused.starts_with(expected), "{refused}");
        }
    }

    #[test]
    fn unless_someone_is_named_the_fullest_log_that_answers_leads() {
        let cases = [
            (vec![peer(2, 5_000, NOW), peer(3, 20_000, NOW)], Some(3)),
            (vec![peer(2, 19_000, NOW), peer(3, 20_000, LONG_AGO)], Some(2)),
            (vec![peer(2, 20_000, NOW), peer(3, 20_000, NOW)], Some(2)),
            (vec![peer(2, 20_000, None), peer(3, 20_000, LONG_AGO)], None),
            (vec![], None),
        ];
        for (peers, expected) in cases {
            assert_eq!(standing(&peers).heir(None).ok(), expected, "{peers:?}");
        }
    }
}
