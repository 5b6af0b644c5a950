//! What moves when, over which link and at what rate: pure, `(fleet, time) -> decisions`.
//!
//! ```text
//!   Fleet (hosts, lines, guests, running and queued moves) + unix_ms ──▶ plan ──▶ for each queued move: admit, wait (why), or give up
//! ```
//! | module | what |
//! |---|---|
//! | [`fleet`] | the plain view that decisions are made from |
//! | [`window`] | a time of the day in which a move may begin |
//! | [`wait`] | why a move waits, as one sentence |
//! | [`plan`] | the decisions: rank, gates, room |
//! | [`rates`] | how a link's budget is shared by what runs on it |
//! | [`evacuate`] | where each VM of a site or worker goes that is to be emptied |
//!
//! | order of | is |
//! |---|---|
//! | moves | points: the priority, one more for each minute of waiting, and [`plan::URGENT_POINTS`] near a deadline; then the deadline, then the age |
//! | who takes a slot | strictly that order, for each worker and link: a move that waits for one of them is not overtaken there |
//! | everything else | that of ordered maps |
//!
//! Guarantees: the same fleet and time give the same decisions; no limit is exceeded by what is admitted; a move that waits only for
//! slots is admitted once it has waited long enough, whatever is ordered after it; each decision to wait has its reason.
//! No clock, no I/O. Does not know how the fleet became what it is: see [`crate::link::fleet`].

pub mod evacuate;
pub mod fleet;
pub mod plan;
pub mod rates;
pub mod wait;
pub mod window;

pub use fleet::Fleet;
pub use plan::{Decision, plan};
pub use wait::{GivenUp, Wait};
pub use window::Window;
