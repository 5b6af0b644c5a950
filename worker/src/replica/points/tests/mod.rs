//! Tests of recovery points.
//!
//! - `sim`: files, disks and a record in memory, where the power ends after any step and unsynced bytes are lost.
//! - `history`: random histories, and what must be found after each.
//! - `crash`, `faults`: every history is ended, or disturbed, at every step.
//! - `damage`, `hostile`, `quota`, `readers`, `leases`, `host`: one question each.

mod crash;
mod damage;
mod faults;
mod history;
mod host;
mod hostile;
mod leases;
mod quota;
mod readers;
mod sim;
