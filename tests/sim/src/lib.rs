//! The simulator: controllers and workers in virtual time on a simulated network, struck by faults, watched by invariants.
//!
//! ```text
//!   seed ──▶ chance ──▶ faults, delays, orders ──▶ world ──facts──▶ invariants ──▶ verdict, digest of the trace
//!                                                 │   ▲
//!                 controllers: raft's node, apply, │   │ hosts: worker_step, fence, plan; a hypervisor and a keeper
//!                 reconcile, leases, failovers ◀───┴───┘ that are simulated
//! ```
//! | module | what |
//! |---|---|
//! | [`executor`] | tasks, processes and time |
//! | [`world`] | chance, clocks, facts, what all actors share |
//! | [`network`] | datagrams, calls and pipes, lost and cut |
//! | [`disk`] | a controller's disk, which fails where it is told to |
//! | [`calls`] | what is asked of controllers, and how their leader is found |
//! | [`controller`] | one controller: the product's node and link logic |
//! | [`hypervisor`] | QEMU and keeper of a host, and what a guest remembers |
//! | [`worker`] | one worker: the product's ownership, fence and plan |
//! | [`operator`] | orders |
//! | [`faults`] | what goes wrong, and when |
//! | [`invariant`] | what must hold, a file each |
//! | [`schedule`] | one seed from beginning to end |
//!
//! What is the product's own code: raft's node with its log and snapshots, `apply`, `reconcile`, `Failovers`, `Leases`, `Telling`, the
//! answers to workers' questions; `worker_step`, `Durable`, `Licence`, `Fence`, `needs_grant` and the plan of a VM. What is
//! written anew here, in the product's order of steps: the tasks around them, gRPC and QUIC, QEMU, the keeper, and the two sides of a
//! move. A replay of a seed gives the same trace.

pub mod calls;
pub mod controller;
pub mod disk;
pub mod executor;
pub mod faults;
pub mod hypervisor;
pub mod invariant;
pub mod network;
pub mod operator;
pub mod schedule;
pub mod worker;
pub mod world;
