//! Why members do not change.

use pageport_proto::SiteName;

use super::MAX_MEMBERS;
use crate::consensus::ConsensusError;
use crate::consensus::standing::list;

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
