//! The lab: sites on one machine, a WAN emulator, real guests, QEMU's own migration as the baseline, the demo, the
//! fault matrix.

pub mod baseline;
pub mod demo;
pub mod faults;
pub mod lab;
pub mod netns;
pub mod paths;
pub mod wan;
