//! The hypervisor and NBD modules against real QEMU, with software emulation. The guest is a boot sector: it counts in
//! memory, writes the count to its disk and prints a dot (or an `E`, if the write failed), with each tick of its clock.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a helper that fails is a test that fails")]

mod attach;
mod freeze;
mod freeze_mirror;
mod grow;
mod lease;
mod life;
mod migration;
mod mirror;
mod qcow2;
mod support;
mod targets;
mod writer;
