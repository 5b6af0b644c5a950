//! [`evacuate`]: where each VM goes of a site or worker that is to be emptied, and which cannot go.
//!
//! The largest VMs are placed first, while there is most room, and are moved first: what takes longest ends last otherwise. Each goes
//! where it can be placed and the least is to cross the link so far; then where most memory is free.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use pageport_proto::{SiteName, VmId, WorkerName};

use super::fleet::Fleet;
use super::plan::Book;

/// A VM that is to leave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaver {
    /// The VM; it must be among the fleet's guests to go anywhere.
    pub vm: VmId,
    /// Sites with a replica: the worker that holds it, or why it cannot go there as things stand.
    pub ways: BTreeMap<SiteName, Result<WorkerName, String>>,
}

/// Where one goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leave {
    /// The VM.
    pub vm: VmId,
    /// The site.
    pub to: SiteName,
    /// The worker there.
    pub worker: WorkerName,
}

/// One that stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stay {
    /// The VM.
    pub vm: VmId,
    /// Why, in one sentence.
    pub why: String,
}

/// Who goes where, in this order, and who cannot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Evacuation {
    /// Those that go.
    pub leave: Vec<Leave>,
    /// Those that stay.
    pub stay: Vec<Stay>,
}

/// Plans where the leavers go; `only`: no other site will do.
pub fn evacuate(fleet: &Fleet, leavers: &[Leaver], only: Option<&SiteName>) -> Evacuation {
    let mut book = Book::of(fleet);
    let mut sent_bytes: BTreeMap<SiteName, u64> = BTreeMap::new();
    let mut largest_first: Vec<&Leaver> = leavers.iter().collect();
    let memory = |leaver: &Leaver| fleet.guests.get(&leaver.vm).map_or(0, |guest| guest.memory_bytes);
    largest_first.sort_by_key(|leaver| (std::cmp::Reverse(memory(leaver)), leaver.vm));
    // What is under way or ordered already comes there, too.
    for queued in fleet.queued.values() {
        if let (Ok(to), Some(guest)) = (&queued.to, fleet.guests.get(&queued.vm)) {
            book.settle(queued.vm, guest, to);
        }
    }
    let mut out = Evacuation::default();
    for leaver in largest_first {
        let chosen = choose(fleet, &book, leaver, only, &sent_bytes);
        match (chosen, fleet.guests.get(&leaver.vm)) {
            (Ok((to, worker)), Some(guest)) => {
                book.settle(leaver.vm, guest, &worker);
                *sent_bytes.entry(to.clone()).or_default() += guest.memory_bytes;
                out.leave.push(Leave { vm: leaver.vm, to, worker });
            }
            (Err(why), _) => out.stay.push(Stay { vm: leaver.vm, why }),
            (Ok(_), None) => {}
        }
    }
    out
}

fn choose(
    fleet: &Fleet,
    book: &Book<'_>,
    leaver: &Leaver,
    only: Option<&SiteName>,
    sent_bytes: &BTreeMap<SiteName, u64>,
) -> Result<(SiteName, WorkerName), String> {
    let guest = fleet.guests.get(&leaver.vm).ok_or("it does not run: a stopped vm stays where its disks are")?;
    let ways = leaver.ways.iter().filter(|(site, _)| only.is_none_or(|only| only == *site));
    let (mut fit, mut hindered) = (vec![], vec![]);
    for (site, worker) in ways {
        let placed = match worker {
            Ok(worker) => book.place(leaver.vm, guest, worker).map(|()| worker).map_err(|wait| wait.to_string()),
            Err(why) => Err(why.clone()),
        };
        match placed {
            Ok(worker) => {
                let sent = sent_bytes.get(site).copied().unwrap_or_default();
                fit.push(((sent, Reverse(book.free_bytes(worker))), site, worker));
            }
            Err(why) => hindered.push(format!("to \"{site}\": {why}")),
        }
    }
    // Of equals the first.
    if let Some((_, site, worker)) = fit.into_iter().min_by_key(|(score, ..)| *score) {
        return Ok((site.clone(), worker.clone()));
    }
    if hindered.is_empty() {
        let name = &guest.name;
        let (place, site) = only
            .map_or_else(|| ("at another site".to_owned(), "SITE"), |to| (format!("at site \"{to}\""), to.as_str()));
        return Err(format!("it has no replica {place}: run \"pageportctl protect {name} --to {site}\" first"));
    }
    Err(hindered.join("; "))
}
