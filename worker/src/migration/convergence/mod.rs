//! Whether the memory of a move converges, and what is done when it does not. Pure.
//!
//! ```text
//!   what hypervisor and wire show ─▶ rounds: what each left ─▶ outlook ─▶ policy: how far the guest is slowed down, how long
//!                                                                         it may stand still, or the end
//! ```
//! A round is one pass of the hypervisor over what was dirtied during the pass before. Its *share* is what it left, dirtied anew, of what it
//! sent: below 1 each round is shorter than the one before, and the rest comes to fit into the permitted pause; at 1 the rounds go on for ever.
//! A guest that dirties the same pages again and again comes to rest at just 1, whatever its rate: pages that are dirtied twice in a
//! round count once.
//!
//! The forecast before a move ([`crate::quote`]) judges shares that it has estimated by the same measure.
//!
//! Guarantees: one odd round changes nothing, since two in a row must say that a move does not converge; the first pass says nothing,
//! since it sends what was never dirtied. Does not drive the hypervisor.

pub mod policy;
pub mod rounds;
pub mod words;

use pageport_proto::v1::Convergence;

/// Rounds that each leave more than this of the one before hardly end.
pub const SURE_SHARE: f64 = 0.8;
/// Rounds that each leave more than this of the one before do not end: what is left halves in 14 rounds at best.
const ENDLESS_SHARE: f64 = 0.95;

/// The pause that is permitted unless a policy says otherwise.
pub const USUAL_PAUSE: std::time::Duration = std::time::Duration::from_millis(300);

/// Does memory converge whose rounds leave `low` to `high` of the one before?
pub fn outlook(low: f64, high: f64) -> Convergence {
    if low >= ENDLESS_SHARE {
        Convergence::No
    } else if high > SURE_SHARE {
        Convergence::Uncertain
    } else {
        Convergence::Yes
    }
}

/// What all rounds together send, in first passes, when each leaves `share` of the one before: 1 + u + u² + …
pub fn passes(share: f64) -> f64 {
    1.0 / (1.0 - share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_one_or_nearly_never_ends_and_a_small_one_surely_does() {
        assert_eq!(outlook(0.1, 0.8), Convergence::Yes);
        assert_eq!(outlook(0.1, 0.81), Convergence::Uncertain);
        assert_eq!(outlook(0.94, 3.0), Convergence::Uncertain);
        assert_eq!(outlook(0.95, 0.95), Convergence::No);
        assert_eq!(outlook(2.0, 9.0), Convergence::No);
        assert!((passes(0.0) - 1.0).abs() < 1e-9 && (passes(0.75) - 4.0).abs() < 1e-9);
    }
}
