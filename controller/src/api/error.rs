//! [`ApiError`]: every failure of a client's request, its gRPC code and what the client may do, in one place.

use pageport_proto::ids::ParseIdError;
use pageport_proto::{PoolName, SiteName, VmId, WorkerName};
use tonic::{Code, Status};

use crate::consensus::ConsensusError;
use crate::consensus::membership::ChangeError;
use crate::consensus::standing::TransferError;
use crate::fence::desk::FenceError;
use crate::model::Rejection;
use crate::model::protection::TermsError;
use crate::model::schedule::ScheduleError;
use crate::model::spec::SpecError;
use crate::scheduler::wait::SameAddress;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The state does not allow it.
    #[error(transparent)]
    Rejected(#[from] Rejection),
    /// The definition is not valid.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// What is asked of a replication or a link cannot be kept.
    #[error(transparent)]
    Terms(#[from] TermsError),
    /// Terms or limits of moves cannot be.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// No agreement.
    #[error(transparent)]
    Consensus(#[from] ConsensusError),
    /// The members stay who they are.
    #[error(transparent)]
    Change(#[from] ChangeError),
    /// A controller that is being added.
    #[error(
        "controller {member} does not answer at {address}: start it there with \"join = true\" in its configuration, and give \
         the same command again; \"cluster remove {member}\" takes the addition back. It does not vote yet"
    )]
    MemberSilent {
        /// Its number.
        member: u64,
        /// Where it should be.
        address: String,
    },
    /// Leadership stays where it is.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// No such site.
    #[error("site \"{site}\" is unknown; known sites: {known}")]
    SiteUnknown {
        /// What was asked for.
        site: String,
        /// What there is.
        known: String,
    },
    /// Nobody there.
    #[error("no worker of site \"{site}\" is connected: start pageport-worker there, or look at its log")]
    NoWorker {
        /// The site.
        site: SiteName,
    },
    /// Somebody is needed who is away.
    #[error("worker \"{worker}\" is not connected: start pageport-worker there, or look at its log")]
    WorkerLost {
        /// The worker.
        worker: WorkerName,
    },
    /// It has others.
    #[error(
        "worker \"{worker}\" has no pool \"{pool}\"; it has: {known}. Choose one of these, or name it under [[pools]] in its worker.toml and restart it \
         (none at all: it is of a version without pools)"
    )]
    PoolUnknown {
        /// The worker.
        worker: WorkerName,
        /// What was asked for.
        pool: PoolName,
        /// What it has.
        known: String,
    },
    /// The name that was typed is not the VM's.
    #[error("\"{typed}\" is not the name of the vm (\"{name}\"): nothing was changed")]
    NotConfirmed {
        /// What was typed.
        typed: String,
        /// What it is called.
        name: String,
    },
    /// Force is for workers that do not answer.
    #[error(
        "worker \"{worker}\" is connected and may run vm \"{name}\": stop it there or migrate it; force is for workers that do not answer"
    )]
    HolderAnswers {
        /// The worker.
        worker: WorkerName,
        /// The VM.
        name: String,
    },
    /// A stopped keeper would let the VM outlive its lease there.
    #[error(
        "vm \"{name}\" fences itself and worker \"{worker}\" has no guard: start pageport-guard.service on its host (\"pageportctl worker list\" shows who is guarded)"
    )]
    NotGuarded {
        /// The VM.
        name: String,
        /// The worker.
        worker: WorkerName,
    },
    /// It would meet its own address.
    #[error(transparent)]
    SameAddress(#[from] SameAddress),
    /// Nobody can tell what the VM is.
    #[error(
        "worker \"{worker}\" has not kept the definition of vm {vm}, which an earlier version started: shut its guest down, and define the vm again with its image"
    )]
    NoDefinition {
        /// Its id.
        vm: VmId,
        /// Who owns it.
        worker: WorkerName,
    },
    /// The definition that a worker has kept.
    #[error("the definition of vm {vm} that worker \"{worker}\" has kept cannot be used: {source}")]
    KeptDefinition {
        /// Its id.
        vm: VmId,
        /// Who has kept it.
        worker: WorkerName,
        /// Why.
        #[source]
        source: SpecError,
    },
    /// Several VMs of one name.
    #[error("{count} vms that workers speak of are called \"{name}\": give the id of one")]
    SeveralFound {
        /// Their name.
        name: String,
        /// How many there are.
        count: usize,
    },
    /// Nobody has seen the disk yet.
    #[error("the size of disk \"{disk}\" of vm \"{name}\" is not known yet: start the vm first")]
    DiskNotSeen {
        /// The VM.
        name: String,
        /// Its disk.
        disk: String,
    },
    /// The name that was typed is not the worker's.
    #[error("\"{typed}\" is not the name of the worker (\"{worker}\"): nothing was changed")]
    WorkerNotConfirmed {
        /// What was typed.
        typed: String,
        /// What it is called.
        worker: WorkerName,
    },
    /// Fences are for workers that do not answer.
    #[error(
        "worker \"{worker}\" is connected: migrate its VMs away, or stop pageport-worker there if it must be turned off all the same"
    )]
    WorkerAnswers {
        /// The worker.
        worker: WorkerName,
    },
    /// No fence.
    #[error(transparent)]
    Fence(#[from] FenceError),
    /// A forecast cannot be made.
    #[error("no quote of vm \"{name}\": {reason}")]
    NoQuote {
        /// The VM.
        name: String,
        /// The worker's words.
        reason: String,
    },
    /// The worker does not answer a question in time.
    #[error("worker \"{worker}\" has not answered within {} s: ask again, and look at its log", limit.as_secs())]
    NoAnswer {
        /// The worker.
        worker: WorkerName,
        /// How long was waited.
        limit: std::time::Duration,
    },
    /// Too much is asked.
    #[error("too many quotes and preflights are being made: ask again in a few seconds")]
    TooManyQuestions,
    /// Not an id.
    #[error("{field}: {source}")]
    BadId {
        /// The field.
        field: &'static str,
        /// Why.
        source: ParseIdError,
    },
    /// A field is missing.
    #[error("{field} is missing: {fix}")]
    Missing {
        /// The field.
        field: &'static str,
        /// What to give.
        fix: &'static str,
    },
    /// The leader went away during a stream.
    #[error("the leader has changed: ask again")]
    LeaderChanged,
}

/// What a client may do about a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remedy {
    /// The same request again, with the same id.
    Retry,
    /// Another request.
    Reject,
}

impl ApiError {
    /// The gRPC code.
    pub fn code(&self) -> Code {
        match self {
            Self::Rejected(rejection) => match rejection {
                Rejection::VmUnknown { .. }
                | Rejection::NotFound { .. }
                | Rejection::MigrationUnknown { .. }
                | Rejection::DiskUnknown { .. }
                | Rejection::WorkerUnknown { .. } => Code::NotFound,
                Rejection::NameTaken { .. } | Rejection::MigrationKnown { .. } => Code::AlreadyExists,
                Rejection::RequestReused { .. }
                | Rejection::NoLink { .. }
                | Rejection::SiteWithoutWorkers { .. }
                | Rejection::Disk(_)
                | Rejection::DiskSize { .. }
                | Rejection::DiskShrinks { .. } => Code::InvalidArgument,
                Rejection::AlreadyThere { .. }
                | Rejection::AlreadyMigrating { .. }
                | Rejection::AlreadyQueued { .. }
                | Rejection::BeingCancelled { .. }
                | Rejection::HandedOver { .. }
                | Rejection::CannotThrottle { .. }
                | Rejection::NotDrained { .. }
                | Rejection::NotConfirmed { .. }
                | Rejection::NotRunning { .. }
                | Rejection::StillRunning { .. }
                | Rejection::NoReplica { .. }
                | Rejection::ReplicaNotSeeded { .. }
                | Rejection::ReplicaLeaving { .. }
                | Rejection::ReplicaPlaced { .. }
                | Rejection::ReplicaPooled { .. }
                | Rejection::ToBePlaced { .. }
                | Rejection::KeptUpToDate { .. }
                | Rejection::BeingSeeded { .. }
                | Rejection::LacksDisk { .. }
                | Rejection::StillProtected { .. }
                | Rejection::NotProtected { .. }
                | Rejection::NoPointYet { .. }
                | Rejection::InDoubt { .. }
                | Rejection::NotToBeTaken { .. }
                | Rejection::OwnerUnknown { .. }
                | Rejection::NotRecovering { .. }
                | Rejection::Overtaken { .. }
                | Rejection::TooLate { .. }
                | Rejection::AlreadyEnded { .. } => Code::FailedPrecondition,
            },
            Self::Spec(_)
            | Self::Terms(_)
            | Self::Schedule(_)
            | Self::BadId { .. }
            | Self::Missing { .. }
            | Self::SeveralFound { .. }
            | Self::NotConfirmed { .. }
            | Self::WorkerNotConfirmed { .. } => Code::InvalidArgument,
            Self::SiteUnknown { .. } | Self::PoolUnknown { .. } => Code::NotFound,
            Self::NoWorker { .. }
            | Self::WorkerLost { .. }
            | Self::HolderAnswers { .. }
            | Self::WorkerAnswers { .. }
            | Self::DiskNotSeen { .. }
            | Self::NoDefinition { .. }
            | Self::KeptDefinition { .. }
            | Self::NoQuote { .. }
            | Self::SameAddress(_)
            | Self::NotGuarded { .. } => Code::FailedPrecondition,
            Self::Fence(error) => match error {
                FenceError::NoAgent { .. } | FenceError::Agent(_) => Code::FailedPrecondition,
                FenceError::Unsettled | FenceError::Busy | FenceError::Stopped => Code::Unavailable,
            },
            Self::LeaderChanged | Self::NoAnswer { .. } => Code::Unavailable,
            Self::TooManyQuestions => Code::ResourceExhausted,
            Self::Consensus(error) => consensus_code(error),
            Self::Change(error) => match error {
                ChangeError::Consensus(error) => consensus_code(error),
                ChangeError::Busy => Code::Unavailable,
                ChangeError::NotMember { .. } => Code::NotFound,
                ChangeError::Unusable { .. } => Code::InvalidArgument,
                ChangeError::Decode(_) => Code::Internal,
                ChangeError::Removed { .. }
                | ChangeError::AddressTaken { .. }
                | ChangeError::AnotherSite { .. }
                | ChangeError::TooMany
                | ChangeError::NotNear { .. }
                | ChangeError::Leads { .. }
                | ChangeError::LastVoter { .. }
                | ChangeError::QuorumLost { .. } => Code::FailedPrecondition,
            },
            Self::MemberSilent { .. } => Code::FailedPrecondition,
            Self::Transfer(error) => match error {
                TransferError::Consensus(error) => consensus_code(error),
                TransferError::NotVoter { .. }
                | TransferError::Silent { .. }
                | TransferError::Behind { .. }
                | TransferError::Alone { .. }
                | TransferError::NotTaken { .. } => Code::FailedPrecondition,
            },
        }
    }

    /// What the client may do.
    pub fn remedy(&self) -> Remedy {
        match self.code() {
            Code::Unavailable => Remedy::Retry,
            _ => Remedy::Reject,
        }
    }
}

fn consensus_code(error: &ConsensusError) -> Code {
    match error {
        ConsensusError::NotLeader | ConsensusError::Unknown | ConsensusError::NoQuorum | ConsensusError::Stopped => {
            Code::Unavailable
        }
        ConsensusError::TooLarge { .. } => Code::InvalidArgument,
        ConsensusError::Encode(_) => Code::Internal,
    }
}

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Self {
        match error.remedy() {
            Remedy::Retry => tracing::info!(%error, "a request could not be served"),
            Remedy::Reject => tracing::debug!(%error, "a request was refused"),
        }
        Status::new(error.code(), error.to_string())
    }
}
