use std::time::Duration;

use super::*;
use crate::consensus::standing::{Peer, Standing};

const NOW: Option<Duration> = Some(Duration::ZERO);

fn member(id: u64) -> Member {
    Member::new(id, "a".parse().unwrap(), format!("192.0.2.{id}:7400"))
}

fn three() -> Membership {
    Membership::first([1, 2, 3].map(member))
}

/// Led by 1, with 1000 entries; each of these with what it lacks, if it answers.
fn standing(peers: &[(u64, Option<u64>)]) -> Standing {
    let peer = |(id, lacks): &(u64, Option<u64>)| Peer {
        id: *id,
        role: Role::Voter,
        matched: 1000 - lacks.unwrap_or(0),
        silent: lacks.and(NOW),
    };
    Standing { leader: 1, last: 1000, peers: peers.iter().map(peer).collect() }
}

fn all_well() -> Standing {
    standing(&[(2, Some(0)), (3, Some(0)), (4, Some(0))])
}

fn take(membership: &Membership, index: u64, order: &Order, standing: &Standing) -> Membership {
    let Plan::Propose(change) = membership.plan(order, standing).unwrap() else { panic!("{order:?} is done") };
    membership.after(index, &change.encode().unwrap()).unwrap()
}

#[test]
fn a_store_is_noted_once_and_another_is_turned_away() {
    let (first, other) = (StoreId::generate(), StoreId::generate());
    let heard = BTreeMap::from([(2, first), (9, other)]);
    let change = three().news_of(&heard).unwrap();
    let noted = three().after(5, &change.encode().unwrap()).unwrap();
    assert_eq!((noted.get(2).unwrap().0.store, noted.news_of(&heard)), (Some(first), None));
    assert_eq!((noted.turns_away(2, Some(first)), noted.turns_away(2, None)), (None, None));
    assert_eq!(noted.turns_away(2, Some(other)), Some(TurnedAway::OtherStore));
    assert_eq!(noted.turns_away(3, Some(other)), None, "it was not heard yet");
    let moved = take(&noted, 6, &Order::Add(Member { address: "controller-2:7400".into(), ..member(2) }), &all_well());
    assert_eq!(moved.get(2).unwrap().0.store, Some(first), "another address is no other store");
}

#[test]
fn a_member_learns_then_votes_then_is_gone_for_good() {
    let learning = take(&three(), 7, &Order::Add(member(4)), &all_well());
    assert_eq!((learning.index, learning.get(4).unwrap().1), (7, Role::Learner));
    assert_eq!(learning.plan(&Order::Add(member(4)), &all_well()).unwrap(), Plan::Done, "repeated");
    let voting = take(&learning, 8, &Order::Promote(4), &all_well());
    assert_eq!((voting.voters.len(), voting.learners.len()), (4, 0));
    assert_eq!(voting.plan(&Order::Promote(4), &all_well()).unwrap(), Plan::Done, "repeated");
    let remove = Order::Remove { id: 4, quorum: Quorum::Keep };
    let removed = take(&voting, 9, &remove, &all_well());
    assert_eq!((removed.conf_state(), removed.get(4)), (three().conf_state(), None));
    assert_eq!(removed.plan(&remove, &all_well()).unwrap(), Plan::Done, "repeated");
    let again = removed.plan(&Order::Add(member(4)), &all_well()).unwrap_err();
    assert!(again.to_string().contains("its number is not given again"), "{again}");
}

#[test]
fn an_address_changes_and_the_vote_stays() {
    let moved = Member { address: "controller-2:7400".into(), ..member(2) };
    let after = take(&three(), 5, &Order::Add(moved.clone()), &all_well());
    assert_eq!(after.get(2), Some((&moved, Role::Voter)));
}

#[test]
fn what_must_not_be_added_is_refused_with_the_way_out() {
    let elsewhere = Member { site: "b".parse().unwrap(), ..member(2) };
    let cases = [
        (Member { id: 0, ..member(4) }, "numbered from 1"),
        (Member { address: "192.0.2.4".into(), ..member(4) }, "name host and port"),
        (Member { address: "192.0.2.4:0".into(), ..member(4) }, "name host and port"),
        (Member { id: 4, ..member(2) }, "controller 2 has the address"),
        (elsewhere, "under another number"),
    ];
    for (new, expected) in cases {
        let refused = three().plan(&Order::Add(new), &all_well()).unwrap_err().to_string();
        assert!(refused.contains(expected), "{refused}");
    }
    let full = Membership::first((1..=MAX_MEMBERS as u64).map(member));
    assert!(matches!(full.plan(&Order::Add(member(10)), &all_well()), Err(ChangeError::TooMany)));
}

#[test]
fn who_lacks_entries_or_is_silent_does_not_get_to_vote() {
    let learning = take(&three(), 7, &Order::Add(member(4)), &all_well());
    for (lacks, promoted) in [(Some(NEAR_ENTRIES), true), (Some(NEAR_ENTRIES + 1), false), (None, false)] {
        let plan = learning.plan(&Order::Promote(4), &standing(&[(4, lacks)]));
        assert_eq!(plan.is_ok(), promoted, "{lacks:?}: {plan:?}");
    }
}

#[test]
fn a_removal_leaves_a_majority_that_answers() {
    let (alive, dead) = (Some(0), None);
    let five = || Membership::first((1..=5).map(member));
    let cases = [
        (three(), 3, standing(&[(2, alive), (3, alive)]), true),
        (three(), 3, standing(&[(2, alive), (3, dead)]), true),
        (three(), 2, standing(&[(2, alive), (3, dead)]), false),
        (five(), 5, standing(&[(2, alive), (3, alive), (4, dead), (5, dead)]), true),
        (five(), 3, standing(&[(2, alive), (3, alive), (4, dead), (5, dead)]), false),
    ];
    for (membership, id, standing, allowed) in cases {
        let plan = membership.plan(&Order::Remove { id, quorum: Quorum::Keep }, &standing);
        assert_eq!(plan.is_ok(), allowed, "{plan:?}");
        let forced = membership.plan(&Order::Remove { id, quorum: Quorum::Risk }, &standing);
        assert_eq!(forced.unwrap(), Plan::Propose(Change::Remove(id)));
    }
    let leader = Order::Remove { id: 1, quorum: Quorum::Risk };
    assert!(matches!(three().plan(&leader, &all_well()), Err(ChangeError::Leads { .. })));
    let alone = Membership::first([member(1)]);
    assert!(matches!(alone.plan(&leader, &standing(&[])), Err(ChangeError::LastVoter { .. })));
    let unknown = Order::Remove { id: 9, quorum: Quorum::Keep };
    assert!(matches!(three().plan(&unknown, &all_well()), Err(ChangeError::NotMember { .. })));
}
