//! The lab: sites on one machine.

pub mod network;
