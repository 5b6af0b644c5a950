//! Fence agents: commands that turn a worker's host off, so that its VMs can be started elsewhere without doubt.
//!
//! ```text
//!   operator's order ─┐                          ┌─ refused, timed out ──▶ let go; nothing has changed
//!   silence ──────────┴─▶ desk ─▶ hold its VMs ─▶ agent ─ off ─▶ propose TakeOver, each ─▶ let go of what is certain
//!                                   └──────────────── one term of one leader ────────────────┘
//! ```
//! | module | what |
//! |---|---|
//! | [`config`] | which agent can turn off which hosts |
//! | [`agent`] | the contract with an agent, and how one is run |
//! | [`plan`] | which VMs a fence takes where: pure |
//! | [`job`] | one fence, from the hold to the end |
//! | [`desk`] | which fences are under way; starts those that silence calls for |
//!
//! Guarantees: a VM is granted to nobody from before the agent runs until the takeover on its word was applied, was
//! refused, or can be no more; a change of leader in between voids the agent's word. What it does not do: judge whether an
//! agent tells the truth. One that reports a running host as off makes VMs run twice.

pub mod agent;
pub mod config;
pub mod desk;
pub mod job;
pub mod plan;

pub use config::FenceConfig;
pub use desk::Desk;
