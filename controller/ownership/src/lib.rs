//! Who may run a VM: pure state machines, used by controller, worker, simulator and model alike.
//!
//! ```text
//!  event ──▶ worker_step(record, volatile) ──▶ Step ──persist──▶ Committed { durable record, effects, messages }
//!  evidence ─▶ Ownership::step ──▶ next ownership of the VM (a command of the replicated log)
//! ```
//! | module | what |
//! |---|---|
//! | [`epoch`] | [`Epoch`]: a number per VM that only grows |
//! | [`record`] | [`Record`]: what a worker has on disk about one VM; [`Durable`]: the proof that it is there |
//! | [`event`] | [`Event`], [`Effect`], [`Volatile`]: what goes into a step and comes out of it |
//! | [`worker`] | [`worker_step`]: one event at one worker |
//! | [`message`] | [`Message`]: what a worker says, a function of its state |
//! | [`controller`] | [`Ownership`]: what the controllers have committed about one VM |
//! | [`failover`] | [`Proof`]: what permits to give a VM to another worker that the possible holders did not give up |
//! | [`lease`] | [`WorkerLease`], [`LeaseTable`]: for how long a worker that is cut off may run what fences itself |
//! | [`recover`] | [`Recover`]: who owns a VM after the controllers were restored from a backup |
//!
//! Guarantees: no I/O, no clock, no randomness; `seen` never falls; at most one durable write per step; a guest is
//! resumed only on the proof of a durable [`Record::Own`] and, where the VM fences itself, of a lease that is valid; and a
//! release is sent only on the proof of a durable [`Record::Released`]. What it does not do: end a guest whose lease has run out
//! (the keeper does), or notice that somebody is gone (the driver passes time in and proofs).

pub mod controller;
pub mod epoch;
pub mod event;
pub mod failover;
pub mod lease;
pub mod message;
pub mod record;
pub mod recover;
pub mod worker;

pub use controller::{Evidence, Fact, Ownership};
pub use epoch::Epoch;
pub use event::{Effect, Event, Guest, Nonce, Owner, Standing, Volatile};
pub use failover::{FailoverError, Proof};
pub use lease::{LeaseTable, LeaseTerms, Policy, ValidLease, WorkerLease};
pub use message::{Message, emits};
pub use record::{Durable, Licence, MayRelease, MayRun, Record};
pub use recover::{Generation, Recover, Recovered, Report};
pub use worker::{Committed, Step, needs_grant, worker_step};
