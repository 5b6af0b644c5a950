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
//! | [`worker`] | [`worker_step`]: one event at one worker |
//! | [`message`] | [`Message`]: what a worker says, a function of its state |
//! | [`controller`] | [`Ownership`]: what the controllers have committed about one VM |
//!
//! Guarantees: no I/O, no clock, no randomness; `seen` never falls; at most one durable write per step; a guest is
//! resumed only on the proof of a durable [`Record::Own`], and a release is sent only on the proof of a durable
//! [`Record::Released`]. What it does not do: leases and the fence (the driver's power to resume has no end in time yet).

pub mod controller;
pub mod epoch;
pub mod message;
pub mod record;
pub mod worker;

pub use controller::{Evidence, Fact, Ownership};
pub use epoch::Epoch;
pub use message::{Message, emits};
pub use record::{Durable, MayRelease, MayRun, Record};
pub use worker::{Committed, Effect, Event, Guest, Nonce, Owner, Step, Volatile, needs_grant, worker_step};
