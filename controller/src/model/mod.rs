//! What the controllers agree on: pure, deterministic, replicated.
//!
//! ```text
//!   command (with its time and ids) ──▶ apply(&mut state) ──▶ answer or rejection
//! ```
//! | module | what |
//! |---|---|
//! | [`spec`] | a VM's validated definition |
//! | [`state`] | everything that is committed |
//! | [`migration`] | the migration state machine |
//! | [`command`], [`rejection`] | what can be asked of the state, and what comes back |
//! | [`takeover`] | a VM gets another owner without the word of the one before |
//! | [`schedule`], [`queue`] | what the scheduler is told, and the moves that wait for it |
//! | [`convergence`] | what becomes of a move that does not converge |
//! | [`recovery`] | who owns what after a restore from a backup |
//! | [`shelf`] | maps whose copies share what has not changed |
//! | [`protection`] | replicas that are kept up to date, and the caps of links |
//! | [`apply`] | the one function that changes it |
//!
//! Guarantees: the same commands in the same order give the same state and the same answers at every node. What a
//! worker last said is not here: see [`crate::link`].

pub mod apply;
pub mod command;
pub mod convergence;
pub mod disks;
pub mod migration;
pub mod protection;
pub mod queue;
pub mod recovery;
pub mod rejection;
pub mod schedule;
pub mod shelf;
pub mod spec;
pub mod state;
pub mod takeover;

pub use apply::apply;
pub use command::{Answer, Command, Order, Outcome};
pub use migration::{Migration, Phase};
pub use protection::{Links, Protection, Terms};
pub use rejection::Rejection;
pub use spec::Spec;
pub use state::State;
