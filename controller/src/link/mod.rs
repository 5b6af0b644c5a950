//! Between the leader and the workers.
//!
//! ```text
//!   worker ──WorkerReport──▶ service ──▶ hub: observations ──▶ reconcile ──▶ commands ──▶ log
//!   worker ◀─WorkerAssignment── service ◀── assignment(state, worker) ◀── committed state
//! ```
//! | module | what |
//! |---|---|
//! | [`observation`] | what each worker last said; the hub that keeps it, in the leader's memory only |
//! | [`assignment`] | what each worker should do: a pure function of the state |
//! | [`stakes`] | the same for a large fleet: what each worker has to do with, and whom a change concerns |
//! | [`reconcile`] | which commands the reports call for: a pure function of state, observations and time |
//! | [`found`] | VMs that a restore of the controllers has left out |
//! | [`questions`] | what workers are asked for somebody who waits for the answer |
//! | [`fleet`], [`drain`], [`scheduling`] | the scheduler's view, and which commands its decisions call for: pure |
//! | [`budget`] | what may be sent over a link, by moves and by replication: pure |
//! | [`leases`] | what the leader has granted to whom |
//! | [`answers`] | what workers' questions are answered with |
//! | [`failover`] | which VMs that fence themselves should run elsewhere |
//! | [`driver`] | proposes them |
//! | [`service`] | the gRPC side |
//!
//! Everything is level-triggered: a new leader knows all it needs from committed state and the next reports.

pub mod answers;
pub mod assignment;
pub mod budget;
pub mod drain;
pub mod driver;
pub mod failover;
pub mod fleet;
pub mod found;
pub mod leases;
pub mod observation;
pub mod questions;
pub mod reconcile;
pub mod scheduling;
pub mod service;
pub mod stakes;
