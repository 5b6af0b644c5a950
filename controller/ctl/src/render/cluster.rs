//! What `cluster ...` shows.

use std::path::Path;

use pageport_proto::v1::{
    AddMemberResponse, ClusterMember, GetClusterStatusResponse, RestoreResponse, TransferLeadershipResponse,
};

use super::table::Align::{Left, Right};
use super::table::Table;
use super::units;

/// `cluster status`
pub fn status(status: &GetClusterStatusResponse) -> String {
    let leaderless = !status.members.is_empty() && !status.members.iter().any(|member| member.leader);
    format!(
        "{}\nterm {}, committed {}, applied {}; answered by member {}{}{}\n",
        members(&status.members),
        status.term,
        units::count(status.committed_index),
        units::count(status.applied_index),
        status.answered_by,
        restored(status),
        if leaderless { "\nno leader: commands wait until one is elected" } else { "" },
    )
}

fn members(members: &[ClusterMember]) -> String {
    let columns =
        [("MEMBER", Right), ("SITE", Left), ("ROLE", Left), ("ADDRESS", Left), ("LACKS", Right), ("HEARD", Left)];
    let mut table = Table::new(columns);
    for member in members {
        let role = match member {
            ClusterMember { leader: true, .. } => "leader",
            ClusterMember { learner: true, .. } => "learner",
            ClusterMember { .. } => "follower",
        };
        // Only the leader knows, and of itself there is nothing to know.
        let heard = match (member.lacks_entries, member.silent_ms) {
            (None, _) => "-".to_owned(),
            (Some(_), None) => "never".to_owned(),
            (Some(_), Some(silent_ms)) => format!("{} ago", units::duration(silent_ms)),
        };
        table.row([
            member.id.to_string(),
            member.site.clone(),
            role.to_owned(),
            member.address.clone(),
            member.lacks_entries.map_or("-".to_owned(), units::count),
            heard,
        ]);
    }
    table.render("no members")
}

/// `cluster backup`
pub fn backed_up(file: &Path, size_bytes: u64) -> String {
    format!("{} holds all that the controllers have agreed on ({})\n", file.display(), units::bytes(size_bytes))
}

/// `cluster restore --at`
pub fn restored_elsewhere(response: &RestoreResponse) -> String {
    response.in_words("the controller runs; add others to it with \"pageportctl cluster add\"")
}

/// What a restore has left to be done.
fn restored(status: &GetClusterStatusResponse) -> String {
    let GetClusterStatusResponse { generation, vms_unknown, awaited_workers, .. } = status;
    match (generation, vms_unknown) {
        (0, _) => String::new(),
        (_, 0) => format!("\ngeneration {generation}: restored from a backup; every VM is known"),
        _ => format!(
            "\ngeneration {generation}: restored from a backup; {vms_unknown} VMs are unknown until these workers have reported: {}",
            awaited_workers.join(", ")
        ),
    }
}

/// The live line of `cluster add`.
pub fn catching_up(id: u64, now: &AddMemberResponse) -> String {
    let (has, of) = (units::count(now.has_entries), units::count(now.of_entries));
    let silent = if now.answers { "" } else { "; it does not answer yet: is it started there, with join = true?" };
    format!("controller {id} has {has} of {of} entries{silent}")
}

/// The end of `cluster add`.
pub fn added(id: u64, all: &[ClusterMember]) -> String {
    format!("controller {id} votes\n\n{}{}", members(all), advice(all))
}

/// `cluster remove`
pub fn removed(id: u64, all: &[ClusterMember]) -> String {
    format!("controller {id} is removed: stop its service for good\n\n{}{}", members(all), advice(all))
}

fn advice(all: &[ClusterMember]) -> String {
    let voters = all.iter().filter(|member| !member.learner).count();
    match voters {
        0 | 1 => "\none controller: its loss is the loss of all; add two more\n".to_owned(),
        _ if voters % 2 == 0 => {
            format!("\n{voters} that vote tolerate no more failures than {}: add or remove one\n", voters - 1)
        }
        _ => String::new(),
    }
}

/// `cluster transfer-leader`
pub fn transferred(now: &TransferLeadershipResponse) -> String {
    format!("controller {} leads, term {}", now.leader, now.term)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(id: u64) -> ClusterMember {
        ClusterMember { id, site: "a".into(), address: "a:7400".into(), ..Default::default() }
    }

    #[test]
    fn members_are_shown_with_what_the_leader_knows_of_them() {
        let late = ClusterMember { lacks_entries: Some(1200), silent_ms: Some(300), ..member(2) };
        let learner = ClusterMember { learner: true, lacks_entries: Some(1300), ..member(4) };
        let cluster = GetClusterStatusResponse {
            members: vec![ClusterMember { leader: true, ..member(1) }, late, learner],
            term: 4,
            committed_index: 1200,
            applied_index: 1199,
            answered_by: 1,
            ..GetClusterStatusResponse::default()
        };
        assert_eq!(
            status(&cluster),
            "MEMBER  SITE  ROLE      ADDRESS  LACKS  HEARD\n     1  a     leader    a:7400       -  -\n     \
             2  a     follower  a:7400   1,200  300 ms ago\n     4  a     learner   a:7400   1,300  never\n\n\
             term 4, committed 1,200, applied 1,199; answered by member 1\n"
        );
    }

    #[test]
    fn a_cluster_without_a_leader_says_so() {
        let cluster = GetClusterStatusResponse { members: vec![member(1), member(2)], ..Default::default() };
        assert!(status(&cluster).contains("no leader"));
    }

    #[test]
    fn a_number_of_voters_that_buys_nothing_is_remarked() {
        let three: Vec<_> = (1..=3).map(member).collect();
        let four: Vec<_> = (1..=4).map(member).collect();
        assert!(!added(3, &three).contains("tolerate"));
        assert!(added(4, &four).contains("4 that vote tolerate no more failures than 3"));
        assert!(removed(2, &[member(1)]).contains("add two more"));
    }
}
