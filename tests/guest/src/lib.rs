//! What runs inside the lab's guest: loads with content that can be checked, checksums, and a server that counts.
//!
//! | file | what |
//! |---|---|
//! | `protocol` | the commands and replies; the lab's client uses the same types |
//! | `memory`, `records`, `files` | memory that stays and memory that changes, the writing load, the static files |
//! | `changes` | changes of files that are done once, with content as real files have it |
//! | `history` | a writing load whose moments can be told from the disk |
//! | `kernel_log` | what the guest's kernel says of its disk |
//! | `server` | the TCP servers |
//! | `heartbeat` | numbered datagrams that show which copy of a guest executes |
//! | `serial` | the commands over a serial port, for guests without a network |
//!
//! Trusts the segment that it is attached to: it is a test fixture. Does not mount or configure anything: the initramfs does.

pub mod changes;
pub mod files;
pub mod heartbeat;
pub mod history;
pub mod kernel_log;
pub mod memory;
pub mod protocol;
pub mod records;
pub mod serial;
pub mod server;
