//! What `worker fence` shows. Pure: messages in, text out.

use pageport_proto::v1::FenceWorkerResponse;
use pageport_proto::v1::fence_worker_response::Phase;

use super::table::Align::Left;
use super::table::Table;
use super::words::or_dash;

/// The phase as a word.
pub fn phase(fence: &FenceWorkerResponse) -> &'static str {
    match fence.phase() {
        Phase::Unspecified => "?",
        Phase::Agent => "turning it off",
        Phase::Takeover => "taking over",
        Phase::Done => "done",
        Phase::Failed => "failed",
    }
}

/// How far it is, in one line.
pub fn line(fence: &FenceWorkerResponse) -> String {
    let FenceWorkerResponse { worker, agent, vms, .. } = fence;
    let wanted = vms.iter().filter(|vm| !vm.to_worker.is_empty()).count();
    let taken = vms.iter().filter(|vm| vm.taken_over).count();
    match fence.phase() {
        Phase::Agent => format!("{worker}: fence agent {agent} runs; {wanted} of {} VMs can go elsewhere", vms.len()),
        Phase::Takeover | Phase::Done => format!("{worker} is off; {taken} of {wanted} VMs have another owner"),
        Phase::Failed | Phase::Unspecified => format!("{worker}: {}", phase(fence)),
    }
}

/// The end: what became of each VM.
pub fn ended(fence: &FenceWorkerResponse) -> String {
    let mut table = Table::new([("VM", Left), ("STARTED AT", Left), ("WORKER", Left), ("PROBLEM", Left)]);
    for vm in &fence.vms {
        table.row([
            vm.name.clone(),
            or_dash(if vm.taken_over { &vm.to_site } else { "" }).to_owned(),
            or_dash(if vm.taken_over { &vm.to_worker } else { "" }).to_owned(),
            vm.problem.clone(),
        ]);
    }
    format!("{} is off{}\n{}", fence.worker, said(fence), table.render("no VM was left there"))
}

/// The answer to a check.
pub fn checked(fence: &FenceWorkerResponse) -> String {
    format!("{} can be fenced{}", fence.worker, said(fence))
}

fn said(fence: &FenceWorkerResponse) -> String {
    match fence.agent_output.as_str() {
        "" => format!(" (fence agent {})", fence.agent),
        words => format!(" (fence agent {}: {words})", fence.agent),
    }
}

#[cfg(test)]
mod tests {
    use pageport_proto::v1::FencedVm;

    use super::*;

    fn fence(phase: Phase) -> FenceWorkerResponse {
        let vm = |name: &str, site: &str, problem: &str| FencedVm {
            name: name.into(),
            to_site: site.into(),
            to_worker: if site.is_empty() { String::new() } else { format!("worker-{site}") },
            problem: problem.into(),
            taken_over: !site.is_empty() && phase == Phase::Done,
            ..FencedVm::default()
        };
        FenceWorkerResponse {
            phase: phase.into(),
            worker: "worker-a".into(),
            agent: "ipmi".into(),
            agent_output: "Chassis Power is off".into(),
            vms: vec![vm("db", "", "no replica"), vm("web", "b", "")],
            ..FenceWorkerResponse::default()
        }
    }

    #[test]
    fn a_fence_looks_like_this() {
        assert_eq!(line(&fence(Phase::Agent)), "worker-a: fence agent ipmi runs; 1 of 2 VMs can go elsewhere");
        assert_eq!(line(&fence(Phase::Takeover)), "worker-a is off; 0 of 1 VMs have another owner");
        assert_eq!(
            ended(&fence(Phase::Done)),
            "worker-a is off (fence agent ipmi: Chassis Power is off)\n\
             VM   STARTED AT  WORKER    PROBLEM\n\
             db   -           -         no replica\n\
             web  b           worker-b\n"
        );
        let silent = FenceWorkerResponse { agent_output: String::new(), vms: vec![], ..fence(Phase::Done) };
        assert!(ended(&silent).starts_with("worker-a is off (fence agent ipmi)\nno VM was left there"));
        assert_eq!(checked(&silent), "worker-a can be fenced (fence agent ipmi)");
    }
}
