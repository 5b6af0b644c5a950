//! [`Event`], [`Effect`] and [`Volatile`]: what goes into [`crate::worker_step`] and comes out of it besides the record.
//!
//! Plain values. The rules are in [`crate::worker`].

use serde::{Deserialize, Serialize};

use crate::epoch::Epoch;
use crate::lease::{Policy, ValidLease};

/// Makes the controller's answer belong to one question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Nonce(pub u64);

/// What the hypervisor on this host does for the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub enum Guest {
    /// No process.
    #[default]
    Absent,
    /// Its CPUs run (or its user paused it: it counts as running).
    Running,
    /// Stopped by us, with its memory complete and its disk drained: the source at the switchover.
    Paused,
    /// An incoming image: complete, its digest agrees, the disk is on stable storage, never resumed.
    Loaded(Epoch),
}

/// What is lost when the worker ends ([`Guest`] is found again by looking at the host).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Volatile {
    /// What the hypervisor does.
    pub guest: Guest,
    /// The question to the controller that is open.
    pub question: Option<Nonce>,
    /// The move that the controller authorised in answer to this worker's own question.
    pub authorised: Option<Epoch>,
    /// Whether a guest may be set running.
    pub standing: Standing,
}

/// Whether a guest of the VM may be set running, as far as its policy and the lease go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Standing {
    /// Policy keep-running: the record alone decides.
    #[default]
    KeepRunning,
    /// Policy self-fence, and a lease to run under this epoch was valid when the driver looked, which it does before each
    /// step. Each effect that sets a guest running comes after [`Effect::Arm`], and needs the lease to be valid still.
    Leased(Epoch),
    /// Policy self-fence without a valid lease; or the policy is not known yet. Nothing is set running.
    Unleased,
}

impl Standing {
    /// Of a policy, and a lease that is valid or not.
    pub fn of(policy: Policy, lease: Option<ValidLease>) -> Self {
        match (policy, lease) {
            (Policy::KeepRunning, _) => Self::KeepRunning,
            (Policy::SelfFence, Some(lease)) => Self::Leased(lease.own()),
            (Policy::SelfFence, None) => Self::Unleased,
        }
    }

    /// May the VM be run under this epoch?
    pub fn permits(&self, own: Epoch) -> bool {
        match *self {
            Self::KeepRunning => true,
            Self::Leased(leased) => leased == own,
            Self::Unleased => false,
        }
    }
}

/// Who owns the VM, as seen from this worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Owner {
    /// This worker.
    Me,
    /// Another worker.
    Other,
}

/// What can happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Event {
    /// Controller: move the VM away under this epoch (this worker is the source).
    Authorise(Epoch),
    /// Give this move up while it can be: the controller's request, or this worker's own failure as the source.
    Cancel(Epoch),
    /// The guest is paused, its last page is sent and its disk is drained.
    Paused,
    /// The guest runs: the effect `Resume` or `Boot` took place.
    Resumed,
    /// The peer has the whole image.
    Ready(Epoch),
    /// This worker sends a question to the controller.
    Asked(Nonce),
    /// Answer: the image of this move may be loaded here.
    AuthReply {
        /// Of the question.
        nonce: Nonce,
        /// The move.
        epoch: Epoch,
    },
    /// Answer: this worker may run the VM under this epoch.
    Grant {
        /// Of the question.
        nonce: Nonce,
        /// The epoch.
        own: Epoch,
    },
    /// Answer after a failover: this worker may run the VM under this epoch, and may go on from the image of that move
    /// instead of booting, since the disk under it was sealed when the image was complete.
    Inherit {
        /// Of the question.
        nonce: Nonce,
        /// The epoch.
        own: Epoch,
        /// The move.
        image: Epoch,
    },
    /// The policy, or the validity of the lease, as they are now. Said again whenever the lease was extended.
    Standing(Standing),
    /// The image of this move is loaded and verified, the replica is on stable storage.
    Loaded(Epoch),
    /// The source (or the controller for it) says that it has released this epoch.
    Release(Epoch),
    /// Give this move up as its destination.
    Refuse(Epoch),
    /// The source will never release this epoch.
    Revoked(Epoch),
    /// The destination will never acquire this epoch.
    Refused(Epoch),
    /// The destination holds the VM under this epoch.
    Acquired(Epoch),
    /// Controller: the newest ownership that is committed.
    Owned {
        /// The epoch.
        epoch: Epoch,
        /// Whose.
        owner: Owner,
    },
    /// The worker has joined a new generation of the controllers, and hears no older one any more.
    Join,
    /// The hypervisor ended, told to or not.
    QemuGone,
    /// The worker started; this is what it found on its host.
    Restarted(Guest),
}

/// What the driver does after persisting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Effect {
    /// Give the keeper the end of the lease as its deadline, or move the deadline there.
    Arm,
    /// Take the deadline away from the keeper.
    Disarm,
    /// Set the paused guest or the loaded image running. Needs [`crate::MayRun`].
    Resume,
    /// Start the VM from its disk. Needs [`crate::MayRun`]. Under a lease: start it *stopped*, with the keeper armed, and then
    /// look at the lease, arm and resume as if it had been found so. Starting takes time, and a hypervisor that comes into
    /// being after its deadline would run until the keeper gets to it.
    Boot,
    /// Stop the guest's CPUs.
    Pause,
    /// End the guest.
    KillGuest,
    /// End the hypervisor that holds (or receives) an incoming image.
    DropImage,
    /// Start a hypervisor that receives the image of this move.
    LoadImage(Epoch),
}
