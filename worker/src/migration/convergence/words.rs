//! The outlook of a move in one sentence. Pure.

use pageport_proto::LONGEST_PAUSE_MS;
use pageport_proto::v1::Convergence;

use super::policy::{Measures, Policy, whole_pause_for};
use super::rounds::Estimate;

/// What the words are of.
#[derive(Debug, Clone, Copy)]
pub struct Terms<'a> {
    /// Id of the move.
    pub migration: &'a str,
    /// Its policy.
    pub policy: Policy,
    /// Its guest can be slowed down.
    pub can_throttle: bool,
}

impl Terms<'_> {
    /// What there is to say of the move; empty while there is nothing.
    pub fn sentence(&self, estimate: Option<&Estimate>, in_force: Measures) -> String {
        let Some(estimate) = estimate else { return what_is_tried(in_force) };
        match estimate.outlook {
            Convergence::No => {
                format!("will not converge: {}; {}{}", figures(estimate), self.why(estimate), self.ways_out(estimate))
            }
            Convergence::Uncertain => format!("may not converge: {}", figures(estimate)),
            Convergence::Yes => match estimate.rounds_to_come {
                Some(0) | None => "converges".to_owned(),
                Some(1) => "converges: one more round".to_owned(),
                Some(rounds) => format!("converges: about {rounds} more rounds"),
            },
            Convergence::Unspecified => String::new(),
        }
    }

    /// Why its policy has not helped; nothing where that does nothing.
    fn why(&self, estimate: &Estimate) -> String {
        match self.policy {
            Policy::Wait | Policy::GiveUp => String::new(),
            Policy::Throttle => "the guest cannot be slowed down further: ".to_owned(),
            Policy::LongerPause { longest } => {
                let (needed, longest) = (whole_pause_for(estimate).as_secs_f64(), longest.as_secs_f64());
                format!("it takes a pause of {needed:.1} s, and {longest:.1} s are permitted: ")
            }
        }
    }

    fn ways_out(&self, estimate: &Estimate) -> String {
        let set = |option: &str| format!("pageportctl migration set {} {option}", self.migration);
        let longer = longer_pause(estimate).map(|option| set(&option));
        let slower = match (self.policy, self.can_throttle) {
            (Policy::Throttle, _) => None,
            (_, true) => Some(set("--convergence throttle")),
            (_, false) => Some("cancel it and order it again with --convergence throttle".to_owned()),
        };
        let ways: Vec<String> = longer.into_iter().chain(slower).collect();
        if ways.is_empty() { "cancel it, and move it at a quieter time".to_owned() } else { ways.join(", or ") }
    }
}

/// Why a move that did not converge was given up.
pub fn given_up(estimate: &Estimate) -> String {
    let longer = longer_pause(estimate).map_or_else(String::new, |longer| format!(" or {longer}"));
    format!(
        "memory did not converge, and the move was given up as was ordered: {}; move it at a quieter time, or with --convergence throttle{longer}",
        figures(estimate),
    )
}

fn figures(estimate: &Estimate) -> String {
    format!(
        "the guest dirties {}, which is {} on the wire, and the link carries {}",
        rate(estimate.dirtied_bytes_per_s),
        rate(estimate.dirtied_wire_bytes_per_s),
        rate(estimate.carried_bytes_per_s),
    )
}

/// The option that permits a pause that is long enough, if that can be ordered.
fn longer_pause(estimate: &Estimate) -> Option<String> {
    let pause_ms = u64::try_from(whole_pause_for(estimate).as_millis()).unwrap_or(u64::MAX);
    let whole_s = pause_ms.div_ceil(1000);
    (whole_s * 1000 <= *LONGEST_PAUSE_MS.end())
        .then(|| format!("--convergence longer-pause --longest-pause {whole_s}s"))
}

fn what_is_tried(in_force: Measures) -> String {
    let Measures { throttle_percent, pause } = in_force;
    if throttle_percent > 0 {
        format!("the guest is denied {throttle_percent} % of its CPUs; two rounds will show whether that is enough")
    } else if pause > super::USUAL_PAUSE {
        format!("the guest may stand still for {:.1} s for the last of its memory", pause.as_secs_f64())
    } else {
        String::new()
    }
}

fn rate(bytes_per_s: f64) -> String {
    format!("{:.1} MB/s", bytes_per_s / 1e6)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::rounds::tests::seen;
    use super::*;

    fn sentence(policy: Policy, can_throttle: bool, lefts: &[u64], in_force: Measures) -> String {
        let terms = Terms { migration: "0190", policy, can_throttle };
        terms.sentence(seen(lefts).estimate(1_000_000).as_ref(), in_force)
    }

    #[test]
    fn the_sentence_has_the_figures_and_a_way_out() {
        let of = |policy, can_throttle| sentence(policy, can_throttle, &[48, 48, 48], Measures::default());
        assert_eq!(
            of(Policy::Wait, false),
            "will not converge: the guest dirties 10.0 MB/s, which is 5.0 MB/s on the wire, and the link carries 5.0 MB/s; \
             pageportctl migration set 0190 --convergence longer-pause --longest-pause 11s, \
             or cancel it and order it again with --convergence throttle"
        );
        assert!(of(Policy::Wait, true).ends_with(", or pageportctl migration set 0190 --convergence throttle"));
        let further = of(Policy::Throttle, true);
        assert!(further.contains("the guest cannot be slowed down further: pageportctl") && !further.contains(", or"));
        let short = of(Policy::LongerPause { longest: Duration::from_secs(2) }, false);
        assert!(short.contains("a pause of 10.9 s, and 2.0 s are permitted: pageportctl"), "{short}");
        let hopeless = seen(&[48, 48, 48]).estimate(1_000_000).unwrap();
        assert!(given_up(&hopeless).contains("the link carries 5.0 MB/s; move it at a quieter time"));
    }

    #[test]
    fn no_pause_is_recommended_that_cannot_be_ordered() {
        let large = [480, 480, 480];
        for policy in [Policy::Wait, Policy::Throttle, Policy::LongerPause { longest: Duration::from_secs(2) }] {
            let sentence = sentence(policy, true, &large, Measures::default());
            assert!(!sentence.contains("--longest-pause"), "{sentence}");
        }
        assert!(sentence(Policy::Throttle, true, &large, Measures::default()).ends_with("move it at a quieter time"));
        assert!(!given_up(&seen(&large).estimate(1).unwrap()).contains("--longest-pause"));
    }

    #[test]
    fn while_there_is_hope_the_sentence_is_short() {
        let of = |lefts: &[u64], in_force| sentence(Policy::Throttle, true, lefts, in_force);
        assert_eq!(of(&[80], Measures::default()), "");
        assert_eq!(of(&[80, 40, 20], Measures::default()), "converges: about 5 more rounds");
        assert!(of(&[48, 48], Measures::default()).starts_with("may not converge: the guest dirties 10.0 MB/s"));
        let slowed = Measures { throttle_percent: 75, ..Measures::default() };
        assert!(of(&[80], slowed).starts_with("the guest is denied 75 % of its CPUs"));
    }
}
