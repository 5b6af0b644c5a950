//! The lab: sites on one machine.

pub mod guest;
pub mod network;
