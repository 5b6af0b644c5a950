//! Every pair of state and event at one worker: the rules that hold in all of them, and the rows of the protocol.

#![allow(clippy::unwrap_used, missing_docs)]

use pageport_ownership::{
    Effect, Epoch, Event, Evidence, Guest, Nonce, Owner, Ownership, Record, Standing, Volatile, controller::Fact,
    needs_grant, worker_step,
};

const NONCE: Nonce = Nonce(7);

fn e(n: u64) -> Epoch {
    Epoch::from_raw(n)
}

fn records() -> Vec<Record> {
    let mut records = vec![];
    for seen in 0..4 {
        records.push(Record::Replica { seen: e(seen), refused: None });
        records.push(Record::Replica { seen: e(seen), refused: Some(e(seen)) });
        for own in 1..=seen {
            records.push(Record::Own { own: e(own), seen: e(seen) });
        }
        for own in 1..seen {
            records.push(Record::Prepared { own: e(own), epoch: e(seen) });
        }
        records.push(Record::Released { epoch: e(seen) });
    }
    records
}

fn guests() -> Vec<Guest> {
    let loaded = (1..4).map(|epoch| Guest::Loaded(e(epoch)));
    [Guest::Absent, Guest::Running, Guest::Paused].into_iter().chain(loaded).collect()
}

fn volatiles() -> Vec<Volatile> {
    let mut volatiles = vec![];
    for guest in guests() {
        for question in [None, Some(NONCE)] {
            for authorised in [None, Some(e(2))] {
                for standing in [Standing::KeepRunning, Standing::Leased(e(2)), Standing::Unleased] {
                    volatiles.push(Volatile { guest, question, authorised, standing });
                }
            }
        }
    }
    volatiles
}

fn events() -> Vec<Event> {
    let mut events = vec![Event::Paused, Event::Resumed, Event::Asked(NONCE), Event::Join, Event::QemuGone];
    events.extend([Standing::KeepRunning, Standing::Leased(e(2)), Standing::Unleased].map(Event::Standing));
    events.extend(guests().into_iter().map(Event::Restarted));
    for epoch in (1..5).map(e) {
        events.extend([
            Event::Authorise(epoch),
            Event::Cancel(epoch),
            Event::Ready(epoch),
            Event::AuthReply { nonce: NONCE, epoch },
            Event::AuthReply { nonce: Nonce(8), epoch },
            Event::Grant { nonce: NONCE, own: epoch },
            Event::Grant { nonce: Nonce(8), own: epoch },
            Event::Inherit { nonce: NONCE, own: epoch, image: e(2) },
            Event::Inherit { nonce: Nonce(8), own: epoch, image: e(2) },
            Event::Loaded(epoch),
            Event::Release(epoch),
            Event::Refuse(epoch),
            Event::Revoked(epoch),
            Event::Refused(epoch),
            Event::Acquired(epoch),
            Event::Owned { epoch, owner: Owner::Me },
            Event::Owned { epoch, owner: Owner::Other },
        ]);
    }
    events
}

#[test]
fn the_rules_hold_for_every_pair_of_state_and_event() {
    for record in records() {
        for volatile in volatiles() {
            for event in events() {
                let step = worker_step(&record, &volatile, event);
                let after = step.record.unwrap_or(record);
                let case = format!("{record:?} {volatile:?} {event:?} gave {step:?}");
                assert!(after.seen() >= record.seen(), "seen fell: {case}");
                assert_ne!(step.record, Some(record), "a write that changes nothing: {case}");
                let effects = &step.effects;
                let starts = step.effects.iter().any(|effect| matches!(effect, Effect::Resume | Effect::Boot));
                assert!(!starts || matches!(after, Record::Own { .. }), "started without Own: {case}");
                let standing = step.volatile.standing;
                let arms = effects.iter().position(|effect| *effect == Effect::Arm);
                let begins = effects.iter().position(|effect| matches!(effect, Effect::Resume | Effect::Boot));
                assert!(!starts || standing != Standing::Unleased, "started without a lease: {case}");
                assert!(!starts || standing.permits(after.owned().unwrap()), "started under another's lease: {case}");
                assert!(
                    !starts || !matches!(standing, Standing::Leased(_)) || arms < begins && arms.is_some(),
                    "unarmed: {case}"
                );
                assert!(arms.is_none() || after.owned().is_some(), "armed what must not run: {case}");
                let disarms = effects.contains(&Effect::Disarm);
                let unfenced = standing == Standing::KeepRunning || matches!(after, Record::Released { .. });
                assert!(!disarms || unfenced, "disarmed what may run: {case}");
                if let Record::Released { epoch } = after
                    && record != after
                {
                    assert_eq!((event, volatile.guest), (Event::Ready(epoch), Guest::Paused), "{case}");
                    assert!(matches!(record, Record::Prepared { epoch: prepared, .. } if prepared == epoch), "{case}");
                }
                if after.owned() > record.owned() {
                    let by_release = matches!((event, after), (Event::Release(epoch), Record::Own { own, .. })
                        if epoch == own && volatile.guest == Guest::Loaded(epoch) && epoch > record.seen()
                            && standing.permits(epoch));
                    let by_grant = matches!((event, after), (Event::Grant { nonce, own: granted } | Event::Inherit { nonce, own: granted, .. }, Record::Own { own, .. })
                        if volatile.question == Some(nonce) && granted == own && own > record.seen());
                    assert!(by_release || by_grant, "became owner otherwise: {case}");
                }
                if matches!(event, Event::Release(_)) && volatile.guest == Guest::Absent {
                    assert!(!starts, "a release without an image started something: {case}");
                }
                let again = worker_step(&after, &step.volatile, event);
                assert_eq!(again.record, None, "the same event once more wrote again: {case}");
            }
        }
    }
}

/// Record, guest, event; then the record that is written and the effects.
type Row = (Record, Guest, Event, Option<Record>, Vec<Effect>);

fn rows() -> Vec<Row> {
    let own = |own, seen| Record::Own { own: e(own), seen: e(seen) };
    let prepared = Record::Prepared { own: e(1), epoch: e(2) };
    let released = Record::Released { epoch: e(2) };
    let replica = |seen| Record::Replica { seen: e(seen), refused: None };
    let refused = |seen| Record::Replica { seen: e(seen), refused: Some(e(seen)) };
    let grant = |own| Event::Grant { nonce: NONCE, own: e(own) };
    let inherit = |own, image| Event::Inherit { nonce: NONCE, own: e(own), image: e(image) };
    let other = |epoch| Event::Owned { epoch: e(epoch), owner: Owner::Other };
    let (absent, running, paused, loaded) = (Guest::Absent, Guest::Running, Guest::Paused, Guest::Loaded(e(2)));
    vec![
        // The source.
        (own(1, 1), running, Event::Authorise(e(2)), Some(prepared), vec![]),
        (own(1, 1), absent, Event::Authorise(e(2)), Some(own(1, 2)), vec![]),
        (own(1, 2), running, Event::Authorise(e(2)), None, vec![]),
        (own(1, 1), running, Event::Cancel(e(2)), Some(own(1, 2)), vec![]),
        (prepared, running, Event::Cancel(e(2)), Some(own(1, 2)), vec![]),
        (prepared, paused, Event::Cancel(e(2)), Some(own(1, 2)), vec![Effect::Resume]),
        (prepared, paused, Event::Refused(e(2)), Some(own(1, 2)), vec![Effect::Resume]),
        (prepared, paused, Event::Ready(e(2)), Some(released), vec![]),
        (prepared, running, Event::Ready(e(2)), None, vec![]),
        (prepared, paused, Event::Ready(e(1)), None, vec![]),
        (prepared, running, Event::QemuGone, Some(own(1, 2)), vec![]),
        (released, paused, Event::Cancel(e(2)), None, vec![]),
        (released, paused, Event::Refused(e(2)), None, vec![]),
        (released, paused, Event::Acquired(e(2)), Some(replica(2)), vec![Effect::KillGuest]),
        (released, paused, grant(3), Some(own(3, 3)), vec![Effect::Resume]),
        (released, paused, grant(2), None, vec![]),
        // The destination.
        (replica(1), absent, Event::AuthReply { nonce: NONCE, epoch: e(2) }, None, vec![Effect::LoadImage(e(2))]),
        (replica(2), absent, Event::AuthReply { nonce: NONCE, epoch: e(2) }, None, vec![]),
        (replica(1), loaded, Event::Release(e(2)), Some(own(2, 2)), vec![Effect::Resume]),
        (replica(1), absent, Event::Release(e(2)), Some(refused(2)), vec![]),
        (replica(2), loaded, Event::Release(e(2)), None, vec![]),
        (replica(1), loaded, Event::Refuse(e(2)), Some(refused(2)), vec![Effect::DropImage]),
        (replica(1), loaded, Event::Revoked(e(2)), Some(replica(2)), vec![Effect::DropImage]),
        (replica(1), loaded, other(1), None, vec![]),
        // Cold boot: one grant is recorded, the next one boots.
        (replica(0), absent, grant(1), Some(own(1, 1)), vec![]),
        (own(1, 1), absent, grant(1), None, vec![Effect::Boot]),
        (own(1, 1), running, grant(1), None, vec![]),
        // Another owner: the guest ends before the tombstone says so.
        (own(1, 1), running, other(2), None, vec![Effect::KillGuest]),
        (own(1, 1), absent, other(2), Some(replica(2)), vec![]),
        // Restart of the worker.
        (own(1, 1), running, Event::Restarted(running), None, vec![]),
        (own(1, 1), absent, Event::Restarted(paused), None, vec![Effect::Resume]),
        (own(1, 1), absent, Event::Restarted(absent), None, vec![]),
        (prepared, absent, Event::Restarted(paused), Some(own(1, 2)), vec![Effect::Resume]),
        (prepared, absent, Event::Restarted(running), Some(own(1, 2)), vec![]),
        (released, absent, Event::Restarted(paused), None, vec![]),
        (released, absent, Event::Restarted(running), None, vec![Effect::Pause]),
        (replica(1), absent, Event::Restarted(loaded), None, vec![]),
        (replica(2), absent, Event::Restarted(loaded), None, vec![Effect::KillGuest]),
        (replica(1), absent, Event::Restarted(running), None, vec![Effect::KillGuest]),
        (own(2, 2), absent, Event::Restarted(loaded), None, vec![Effect::Resume]),
        (own(3, 3), absent, Event::Restarted(loaded), None, vec![Effect::KillGuest]),
        // The store was lost: who runs goes on, and is taken over with a grant or ended by a tombstone.
        (Record::UNKNOWN, absent, Event::Restarted(running), None, vec![]),
        (Record::UNKNOWN, absent, Event::Restarted(paused), None, vec![Effect::KillGuest]),
        (Record::UNKNOWN, absent, Event::Restarted(loaded), None, vec![]),
        (Record::UNKNOWN, absent, Event::StoreLost(loaded), None, vec![Effect::KillGuest]),
        (Record::UNKNOWN, absent, Event::StoreLost(running), None, vec![]),
        (Record::UNKNOWN, running, grant(2), Some(own(2, 2)), vec![]),
        (Record::UNKNOWN, running, other(2), None, vec![Effect::KillGuest]),
        (Record::UNKNOWN, running, Event::Release(e(2)), None, vec![]),
        (Record::UNKNOWN, running, Event::Revoked(e(2)), None, vec![]),
        // Failover: a newer epoch for who holds the VM, or the image of the move.
        (replica(1), loaded, grant(3), Some(own(3, 3)), vec![Effect::DropImage]),
        (replica(1), loaded, inherit(3, 2), Some(own(3, 3)), vec![Effect::Resume]),
        (replica(1), absent, inherit(3, 2), Some(own(3, 3)), vec![]),
        (own(2, 2), loaded, grant(3), Some(own(3, 3)), vec![Effect::Resume]),
        (prepared, running, Event::Owned { epoch: e(3), owner: Owner::Me }, Some(own(1, 2)), vec![]),
        (prepared, running, Event::Owned { epoch: e(1), owner: Owner::Me }, None, vec![]),
        (prepared, paused, Event::Join, Some(own(1, 2)), vec![Effect::Resume]),
        (released, paused, Event::Join, None, vec![]),
    ]
}

/// With a fence: the standing before, and the row.
fn fenced_rows() -> Vec<(Standing, Row)> {
    let own = |own, seen| Record::Own { own: e(own), seen: e(seen) };
    let prepared = Record::Prepared { own: e(1), epoch: e(2) };
    let released = Record::Released { epoch: e(2) };
    let replica = Record::Replica { seen: e(1), refused: None };
    let grant = |own| Event::Grant { nonce: NONCE, own: e(own) };
    let (absent, running, paused, loaded) = (Guest::Absent, Guest::Running, Guest::Paused, Guest::Loaded(e(2)));
    let (one, leased, three) = (Standing::Leased(e(1)), Standing::Leased(e(2)), Standing::Leased(e(3)));
    let unleased = Standing::Unleased;
    let extended = Event::Standing;
    let arm_resume = vec![Effect::Arm, Effect::Resume];
    vec![
        (leased, (replica, loaded, Event::Release(e(2)), Some(own(2, 2)), arm_resume.clone())),
        (unleased, (replica, loaded, Event::Release(e(2)), None, vec![])),
        (
            unleased,
            (replica, absent, Event::Release(e(2)), Some(Record::Replica { seen: e(2), refused: Some(e(2)) }), vec![]),
        ),
        (unleased, (own(2, 2), loaded, extended(leased), None, arm_resume.clone())),
        (unleased, (own(1, 1), paused, extended(one), None, arm_resume.clone())),
        (unleased, (own(1, 1), running, extended(one), None, vec![Effect::Arm])),
        (unleased, (own(1, 1), running, extended(leased), None, vec![])),
        (unleased, (own(1, 1), paused, extended(leased), None, vec![])),
        (leased, (own(1, 1), running, Event::Standing(Standing::KeepRunning), None, vec![Effect::Disarm])),
        (leased, (own(1, 1), running, Event::Standing(unleased), None, vec![])),
        (one, (prepared, paused, extended(one), None, vec![Effect::Arm])),
        (one, (released, paused, extended(leased), None, vec![])),
        (leased, (prepared, paused, Event::Ready(e(2)), Some(released), vec![Effect::Disarm])),
        (one, (prepared, paused, Event::Cancel(e(2)), Some(own(1, 2)), arm_resume.clone())),
        (unleased, (prepared, paused, Event::Cancel(e(2)), Some(own(1, 2)), vec![])),
        (one, (own(1, 1), absent, grant(1), None, vec![Effect::Arm, Effect::Boot])),
        (unleased, (own(1, 1), absent, grant(1), None, vec![])),
        (leased, (own(1, 1), absent, grant(1), None, vec![])),
        (one, (replica, loaded, Event::Release(e(2)), None, vec![])),
        (three, (released, paused, grant(3), Some(own(3, 3)), arm_resume)),
        (unleased, (released, paused, grant(3), Some(own(3, 3)), vec![])),
        // The lease is lost with the worker.
        (leased, (own(1, 1), absent, Event::Restarted(paused), None, vec![])),
        (leased, (released, absent, Event::Restarted(running), None, vec![Effect::Pause, Effect::Disarm])),
    ]
}

#[test]
fn each_row_of_the_protocol() {
    let plain = rows().into_iter().map(|row| (Standing::KeepRunning, row));
    for (standing, (record, guest, event, written, effects)) in plain.chain(fenced_rows()) {
        let volatile = Volatile { guest, question: Some(NONCE), authorised: None, standing };
        let step = worker_step(&record, &volatile, event);
        assert_eq!((step.record, step.effects), (written, effects), "{standing:?} {record:?} {guest:?} {event:?}");
    }
}

#[test]
fn an_image_counts_as_loaded_only_when_it_was_authorised() {
    let record = Record::Replica { seen: e(1), refused: None };
    let unasked = worker_step(&record, &Volatile::default(), Event::Loaded(e(2)));
    assert_eq!(unasked.volatile.guest, Guest::Absent);
    let asked = Volatile { authorised: Some(e(2)), ..Volatile::default() };
    assert_eq!(worker_step(&record, &asked, Event::Loaded(e(2))).volatile.guest, Guest::Loaded(e(2)));
}

#[test]
fn a_grant_is_asked_for_when_it_would_change_something() {
    let absent = Volatile::default();
    let running = Volatile { guest: Guest::Running, ..absent };
    let own = Record::Own { own: e(1), seen: e(2) };
    assert!(needs_grant(&Record::UNKNOWN, &absent, true, Some(e(1))));
    assert!(!needs_grant(&Record::UNKNOWN, &absent, false, Some(e(1))));
    assert!(!needs_grant(&Record::UNKNOWN, &absent, true, None));
    assert!(needs_grant(&own, &absent, true, Some(e(1))));
    assert!(!needs_grant(&own, &running, true, Some(e(1))));
    assert!(needs_grant(&Record::Released { epoch: e(2) }, &running, false, Some(e(3))));
    assert!(!needs_grant(&Record::Released { epoch: e(2) }, &running, true, Some(e(1))));
}

#[test]
fn the_register_follows_each_fact_as_the_protocol_says() {
    let held =
        |owner, own, last, confirmed| Ownership::Owned { owner, own: e(own), last: e(last), image: None, confirmed };
    let owned = |owner, own, last| held(owner, own, last, true);
    let given = |owner, own| held(owner, own, own, false);
    let floor = Epoch::ZERO;
    let moving = |released, refused| Ownership::Migrating {
        from: 'a',
        to: 'b',
        own: e(1),
        epoch: e(2),
        released,
        refused,
        floor,
    };
    let revoked = Fact::Revoked(e(2));
    let (released, refused, acquired) = (Fact::Released(e(2)), Fact::Refused(e(2)), Fact::Acquired(e(2)));
    let rows = [
        (moving(false, false), 'a', revoked, Some(owned('a', 1, 2))),
        (moving(false, true), 'a', revoked, Some(owned('a', 1, 2))),
        (moving(true, false), 'a', revoked, None),
        (moving(false, false), 'b', revoked, None),
        (moving(false, false), 'a', Fact::Revoked(e(1)), None),
        (moving(false, false), 'a', released, Some(moving(true, false))),
        (moving(true, false), 'a', released, None),
        (moving(false, true), 'a', released, Some(given('a', 3))),
        (moving(false, false), 'b', refused, Some(moving(false, true))),
        (moving(true, false), 'b', refused, Some(given('a', 3))),
        (moving(false, false), 'a', refused, None),
        (moving(false, false), 'b', acquired, Some(owned('b', 2, 2))),
        (moving(true, false), 'b', acquired, Some(owned('b', 2, 2))),
        (moving(true, false), 'a', Fact::Acquired(e(1)), None),
        (owned('a', 1, 1), 'b', acquired, None),
        (given('b', 2), 'b', acquired, Some(owned('b', 2, 2))),
        (given('b', 2), 'a', acquired, None),
        (given('b', 3), 'b', acquired, None),
        (owned('a', 1, 2), 'a', released, None),
    ];
    for (before, worker, fact, after) in rows {
        assert_eq!(before.step(&Evidence { worker, fact }), after, "{before:?} {worker} {fact:?}");
    }
    assert_eq!(owned('a', 1, 4).order('b').map(|next| next.last()), Some(e(5)));
    assert_eq!(owned('a', 1, 1).order('a'), None);
    assert_eq!(given('a', 1).order('b'), None, "its owner has not confirmed");
    assert_eq!(moving(false, false).order('c'), None);
    assert_eq!(moving(true, false).grantable(&'a'), None);
    assert_eq!(moving(false, false).authorised(&'b'), Some(e(2)));
    assert_eq!(moving(false, false).authorised(&'a'), None);
    assert_eq!(owned('a', 1, 1).possible_holders(), [&'a']);
    assert_eq!(moving(false, false).possible_holders(), [&'a', &'b']);
    assert_eq!(moving(true, false).possible_holders(), [&'b']);
    assert_eq!(moving(false, true).possible_holders(), [&'a']);
    assert!(moving(true, false).in_doubt() && !moving(false, false).in_doubt() && !moving(false, true).in_doubt());
}
