//! QEMU, unmodified, over QMP: everything that the worker does with a hypervisor process.
//!
//! ```text
//!   accel          which accelerator runs guests here, by trying       offer  machine types and CPU models
//!   memory         what a guest's memory is made of
//!   command_line   VmSpec ─▶ arguments (pure)                  disk  the nodes of a disk (pure)
//!   process        start, find again, watch, kill          tap   its network devices
//!   keeper         its parent, which enforces its lease
//!   qmp            commands, replies, events over a socket event what they mean (pure)
//!   vm ─ watcher   the handle, and the task behind it
//!   block          nodes and block jobs                    bitmap    what the guest has written since a moment
//!   mirror         a disk copied to an NBD server          freeze    all disks as they were at one moment, copied likewise
//!   grow           disks that become larger                     attach  disks that are added
//!   migrate        the two ends of a live migration        console   the serial port, for many viewers
//!   guest_agent    the guest's file systems at rest for a moment
//!   stats          counts of the guest's writes                ram       its memory, looked at while it runs
//! ```
//!
//! Guarantees: QEMU outlives the worker and is found again; its end is noticed whoever caused it; every command and every
//! wait has a deadline; a lease is enforced whether or not a worker lives. Does not decide whether a VM may run.

pub mod accel;
mod attach;
mod bitmap;
mod block;
pub mod command_line;
pub mod console;
mod disk;
mod error;
pub mod event;
pub mod freeze;
mod grow;
pub mod guest_agent;
pub mod keeper;
mod memory;
pub mod migrate;
pub mod mirror;
pub mod offer;
mod paths;
mod process;
mod qmp;
mod ram;
pub mod stats;
pub mod tap;
mod vm;
mod watcher;

pub use accel::{Accelerator, QemuVersion};
pub use attach::AddedDisk;
pub use bitmap::BitmapInfo;
pub use command_line::{Launch, SpecError, StartMode, check_spec};
pub use console::Console;
pub use error::HypervisorError;
pub use event::{EventTime, ExitCause, ExitReport, MigrationStatus, VmEvent, VmEventKind};
pub use freeze::{Consistency, FreezeDisk, Frozen, Outcome};
pub use memory::{GuestMemory, HugePages};
pub use mirror::{MirrorHandle, MirrorSync};
pub use pageport_keeper::{BootTime, Lease};
pub use paths::VmPaths;
pub use process::end_writers_of;
pub use qmp::QmpError;
pub use ram::GuestRam;
pub use stats::WriteCount;
pub use vm::{Host, Marks, RunState, Vm, clean_up, list_running, remove};
