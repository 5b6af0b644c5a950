//! What an assignment asks of one VM, without doing it: pure, so that the simulator decides as the worker does.

use pageport_ownership::{Epoch, Event, Nonce, Owner, Record};
use pageport_proto::v1::{AskGrantResponse, VmAssignment, vm_assignment::Power};

/// What it says about who owns the VM, as events in their order.
pub fn ownership(wanted: &VmAssignment, me: &str) -> Vec<Event> {
    let owner = if wanted.owner_worker == me { Owner::Me } else { Owner::Other };
    let mut events = vec![Event::Owned { epoch: Epoch::from_raw(wanted.owner_epoch), owner }];
    if wanted.deleted {
        return events;
    }
    let said = |epoch: u64| Some(Epoch::from_raw(epoch)).filter(|epoch| *epoch != Epoch::ZERO);
    events.extend(said(wanted.released_epoch).map(Event::Release));
    events.extend(said(wanted.refused_epoch).map(Event::Refused));
    events
}

/// The epoch under which this worker owns the VM, if it does.
pub fn owned(wanted: &VmAssignment, me: &str) -> Option<Epoch> {
    (wanted.owner_worker == me).then(|| Epoch::from_raw(wanted.owner_epoch))
}

/// How a guest is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// It is asked to shut down.
    Ask,
    /// The plug is pulled.
    PullThePlug,
}

/// Is the guest to end, if there is one?
pub fn stop(wanted: &VmAssignment, record: &Record) -> Option<Stop> {
    match (wanted.power(), record) {
        (Power::Stop, Record::Own { .. }) => Some(Stop::Ask),
        (Power::Kill, Record::Own { .. }) => Some(Stop::PullThePlug),
        _ => None,
    }
}

/// Is the guest to run? Not if it has ended under this very order.
pub fn power_on(wanted: &VmAssignment, halted_under: Option<u64>) -> bool {
    wanted.power() == Power::Run && halted_under != Some(wanted.power_seq)
}

/// The controllers' answer to a question whether the VM may run; [`None`]: it may not.
pub fn granted(answer: &AskGrantResponse) -> Option<Event> {
    let (nonce, own) = (Nonce(answer.nonce), Epoch::from_raw(answer.own));
    answer.granted.then(|| match answer.image {
        0 => Event::Grant { nonce, own },
        image => Event::Inherit { nonce, own, image: Epoch::from_raw(image) },
    })
}
