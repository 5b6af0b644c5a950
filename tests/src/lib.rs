//! The lab: sites on one machine, a WAN emulator, real guests, QEMU's own migration as the baseline, the demo, the
//! fault matrix, the faults and the benchmark of replication, the benchmark of the controllers.

pub mod baseline;
pub mod controller_bench;
pub mod demo;
pub mod faults;
pub mod kept;
pub mod lab;
pub mod netns;
pub mod paths;
pub mod replication_bench;
pub mod replication_faults;
pub mod wan;
