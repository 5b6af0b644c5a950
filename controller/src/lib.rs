//! The replicated brain of Pageport: what the fleet should be, agreed on by three or five nodes.
//!
//! ```text
//!   clients ──▶ api ──▶ consensus ──▶ model::apply ──▶ state ──▶ link::assignment ──▶ workers
//!                          ▲                             │
//!                          └── link::reconcile ◀─────────┴── reports ◀── workers
//! ```
//! | module | what |
//! |---|---|
//! | [`model`] | the state and the one function that changes it: pure |
//! | [`consensus`] | raft: log, snapshots, peers |
//! | [`link`] | reports from workers, assignments to them |
//! | [`scheduler`] | what moves when, over which link, at what rate: pure |

//! | [`fence`] | commands that turn a worker's host off, and what follows |
//! | [`api`] | what clients see |
//! | [`web`] | the same for browsers, and the UI |
//! | [`dial`] | the ways to the other controllers |
//! | [`peer`] | who is at the other end |
//! | [`backup`] | all that is agreed on as a file, and a new cluster from one |
//! | [`config`] | the configuration, validated |
//! | [`server`] | all of it, put together |

pub mod api;
pub mod backup;
pub mod config;
pub mod consensus;
pub mod dial;
pub mod fence;
pub mod link;
pub mod model;
pub mod peer;
pub mod scheduler;
pub mod server;
pub mod web;
