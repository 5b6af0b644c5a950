//! The WAN between the lab's sites, emulated in user space: rate, delay, loss and queue per direction, counted by service.
//!
//! ```text
//!  site a (netns)                       emulator                          site b (netns)
//!  hosts ── ppwan (TUN) ─▶┐                                        ┌─▶ ppwan (TUN) ── hosts
//!                         ├─▶ Link a→b: pace, queue, delay, lose ──┤
//!  br-guest ─ ppseg (TAP)─▶┘   (both planes share the line)         └─▶ ppseg (TAP) ─ br-guest
//! ```
//! | file | what |
//! |---|---|
//! | `link` | one direction, pure |
//! | `flow`, `switch`, `fabric` | classes and counters, the guests' switch, all together, pure |
//! | `lines` | the links of all pairs, pure |
//! | `relay`, `stream` | without namespaces: the shell for UDP and TCP between ports of one machine |
//! | `emulator`, `steer`, `control`, `config` | the shell: devices and clock, the socket that steers it, the configuration |
//!
//! Does not emulate jitter, reordering, duplication or an MTU other than the devices' own.

pub mod config;
pub mod control;
pub mod emulator;
pub mod fabric;
pub mod flow;
pub mod lines;
pub mod link;
pub mod relay;
pub mod steer;
mod stream;
pub mod switch;
