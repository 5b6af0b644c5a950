//! Preflights: what would hinder a move, before it is ordered.
//!
//! ```text
//!   request ─▶ the order, rehearsed, and what the scheduler would decide ─▶ findings of the controllers
//!         └──▶ question to the VM's worker, which asks the replica's ─────▶ findings of the workers
//! ```
//! What an order would be refused for, or wait for, is what the order itself says: nothing is judged a second time here.

use std::collections::BTreeSet;
use std::time::Duration;

use pageport_proto::v1::{self, Check, Finding};
use pageport_proto::{MigrationId, RequestId, SiteName, VmId, WorkerName};

use super::error::ApiError;
use super::migration::Way;
use super::{Api, Moment, clip};
use crate::link::questions::Question;
use crate::model::command::ClientOrder;
use crate::model::schedule::Terms;
use crate::model::state::{Life, Vm};
use crate::model::{Rejection, State};
use crate::scheduler::plan::DEFAULT_PRIORITY;
use crate::scheduler::{Decision, Wait};

/// A worker connects to its peer within 10 s, which has 8 s to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);
/// Longest words of a worker that are passed on, in characters.
const MAX_WORDS_CHARS: usize = 1000;

impl Api {
    pub(super) async fn preflight(&self, request: v1::PreflightMigrationRequest) -> Result<Vec<Finding>, ApiError> {
        let moment = self.read().await?;
        let (id, vm) = moment.vm(&request.vm)?;
        let site = moment.site(&request.to_site)?;
        if moment.state.site_of_vm(vm) == Some(&site) {
            return Err(Rejection::AlreadyThere { name: vm.spec.name.clone(), site }.into());
        }
        let mut findings = self.foreseen(&moment, id, &site);
        if !findings.iter().any(|finding| finding.check() == Check::Addresses) {
            findings.push(addresses(&moment.state, id, vm));
        }
        match question(&moment, id, vm, &site) {
            Ok((owner, question)) => findings.extend(self.seen_by_workers(owner, question).await?),
            Err(why) => {
                let fix =
                    "mend that first, and look again: then link, certificates, clocks and both hosts are looked at";
                findings.push(Finding::unchecked(Check::Workers, why.to_string(), fix));
            }
        }
        Ok(findings)
    }

    /// What would become of an order.
    fn foreseen(&self, moment: &Moment, vm: VmId, site: &SiteName) -> Vec<Finding> {
        let migration = MigrationId::generate();
        let terms = Terms { priority: DEFAULT_PRIORITY, ..Terms::default() };
        let order = ClientOrder::QueueMigration {
            id: migration,
            vm,
            site: site.clone(),
            traceparent: String::new(),
            terms: Box::new(terms),
            admitted: None,
        };
        let placement = match self.foresee(moment, RequestId::generate(), Way { migration, vm, site }, &order) {
            Err(error) => return vec![Finding::refused(check_of(&error), &error.to_string())],
            Ok(Some((Decision::Wait(wait), _))) => waiting(&wait),
            Ok(Some((Decision::GiveUp(why), _))) => Finding::refused(Check::Placement, &why.to_string()),
            Ok(Some((Decision::Admit, _)) | None) => Finding::ok(Check::Placement, "it would begin at once"),
        };
        vec![
            Finding::ok(Check::Vm, "it runs, and nothing else is under way with it"),
            Finding::ok(Check::Replica, format!("the replica at site \"{site}\" is complete")),
            placement,
        ]
    }

    async fn seen_by_workers(
        &self,
        owner: WorkerName,
        question: v1::PreflightAssignment,
    ) -> Result<Vec<Finding>, ApiError> {
        let asked = self.hub.questions.ask(owner.clone(), Question::Preflight(question));
        let asked = asked.ok_or(ApiError::TooManyQuestions)?;
        match self.answer(&owner, ANSWER_WITHIN, |report| asked.preflight(report)).await {
            Ok(answer) => Ok(answer.findings.iter().map(|finding| clipped(finding, MAX_WORDS_CHARS)).collect()),
            Err(ApiError::NoAnswer { .. }) => {
                let why = format!("worker \"{owner}\" has not answered within {} s", ANSWER_WITHIN.as_secs());
                let fix = "if pageport-worker there is of an older version, upgrade it; else look at its log";
                Ok(vec![Finding::unchecked(Check::Workers, why, fix)])
            }
            Err(error) => Err(error),
        }
    }
}

/// To the VM's worker, about the worker that holds the replica.
fn question(
    moment: &Moment,
    id: VmId,
    vm: &Vm,
    site: &SiteName,
) -> Result<(WorkerName, v1::PreflightAssignment), ApiError> {
    moment.must_run(id, vm)?;
    let owner = vm.ownership.owner().0.clone();
    if moment.observations.connected(&owner, moment.now).is_none() {
        return Err(ApiError::WorkerLost { worker: owner });
    }
    let missing = || Rejection::NoReplica { name: vm.spec.name.clone(), site: site.clone() };
    let peer = &vm.replicas.get(site).ok_or_else(missing)?.worker;
    let question = v1::PreflightAssignment {
        seq: 0,
        vm_id: id.to_string(),
        peer_worker: peer.to_string(),
        peer_address: moment.state.peer_address(peer),
    };
    Ok((owner, question))
}

/// What an order would be refused for.
fn check_of(error: &ApiError) -> Check {
    match error {
        ApiError::SameAddress(_) => Check::Addresses,
        ApiError::WorkerLost { .. } | ApiError::NotGuarded { .. } => Check::Placement,
        ApiError::Rejected(
            Rejection::NoReplica { .. }
            | Rejection::ReplicaNotSeeded { .. }
            | Rejection::NoPointYet { .. }
            | Rejection::LacksDisk { .. },
        ) => Check::Replica,
        _ => Check::Vm,
    }
}

/// What an order would wait for: its turn, or something that does not come by itself.
fn waiting(wait: &Wait) -> Finding {
    let why = wait.to_string();
    let blocks = |fix| Finding::blocks(Check::Placement, why.clone(), fix);
    match wait {
        Wait::Paused
        | Wait::After { .. }
        | Wait::Window { .. }
        | Wait::WorkerBusy { .. }
        | Wait::LinkBusy { .. }
        | Wait::LinkFull { .. }
        | Wait::Behind { .. } => Finding::warns(
            Check::Placement,
            why,
            "order it all the same: it begins when its turn comes, which a --priority brings nearer",
        ),
        Wait::NotMovable { why } => Finding::refused(Check::Vm, why),
        Wait::Drained { .. } => Finding::refused(Check::Placement, &why),
        Wait::SameAddress(same) => Finding::refused(Check::Addresses, &same.to_string()),
        Wait::WorkerAway { .. } => blocks("start pageport-worker there, or look at its log"),
        Wait::NotGuarded { .. } => blocks("start pageport-guard.service on its host"),
        Wait::NoMemory { .. } => {
            blocks("stop or move a vm there, or let hosts be fuller: pageportctl scheduler set --memory-percent")
        }
        Wait::Apart { .. } => blocks("move the other one away first, or protect this one at another site"),
    }
}

/// MAC addresses that another VM has, too, wherever it is: what the scheduler minds is only what meets at the target.
fn addresses(state: &State, id: VmId, vm: &Vm) -> Finding {
    let own: BTreeSet<&str> = vm.spec.nics().map(|(_, mac)| mac).collect();
    let others = state.vms.iter().filter(|(other, vm)| **other != id && vm.life == Life::Defined);
    let shared = others.flat_map(|(_, vm)| vm.spec.nics().map(move |(_, mac)| (vm.spec.name.as_str(), mac)));
    match shared.into_iter().find(|(_, mac)| own.contains(mac)) {
        Some((name, mac)) => Finding::warns(
            Check::Addresses,
            format!("vm \"{name}\" has the same MAC address, {mac}"),
            "define one of the two anew with an address of its own before both are on one segment",
        ),
        None => Finding::ok(Check::Addresses, "no other vm has a MAC address of it"),
    }
}

/// A worker's finding, with the beginning of what it says.
pub fn clipped(finding: &Finding, max_chars: usize) -> Finding {
    let Finding { check, severity, seen, fix } = finding;
    Finding { check: *check, severity: *severity, seen: clip(seen, max_chars), fix: clip(fix, max_chars) }
}
