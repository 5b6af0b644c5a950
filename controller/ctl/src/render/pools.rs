//! Pools of storage of workers. Pure: messages in, text out.

use pageport_proto::PoolName;
use pageport_proto::v1::{ListWorkersResponse, Pool, PoolUse, Replica};

use super::table::Align::{Left, Right};
use super::table::Table;
use super::units;

/// `worker pools`
pub fn pools(response: &ListWorkersResponse) -> String {
    let mut table = Table::new([
        ("WORKER", Left),
        ("POOL", Left),
        ("REPLICAS", Right),
        ("POINTS", Right),
        ("SCRATCH", Right),
        ("FREE", Right),
        ("RESERVED", Right),
        ("PATH", Left),
        ("PROBLEM", Left),
    ]);
    for worker in &response.workers {
        for pool in &worker.pools {
            table.row(cells(&worker.name, pool));
        }
    }
    table.render("no pools: no worker is connected that has any")
}

fn cells(worker: &str, pool: &Pool) -> [String; 9] {
    let scratch = if pool.takes_scratch { share(pool.scratch.as_ref()) } else { "-".to_owned() };
    [
        worker.to_owned(),
        pool.name.clone(),
        share(pool.replicas.as_ref()),
        share(pool.points.as_ref()),
        scratch,
        units::bytes(pool.free_bytes),
        units::bytes(pool.reserve_bytes),
        pool.path.clone(),
        pool.problem.clone(),
    ]
}

/// What is used, and of how much where that is bounded.
fn share(used: Option<&PoolUse>) -> String {
    let PoolUse { used_bytes, quota_bytes } = used.copied().unwrap_or_default();
    let bound = quota_bytes.map(|bytes| format!(" of {}", units::bytes(bytes))).unwrap_or_default();
    format!("{}{bound}", units::bytes(used_bytes))
}

/// The site of a replica, and the pool there if it is not the one that every worker has.
pub fn site(replica: &Replica) -> String {
    match replica.pool.as_str() {
        "" => replica.site.clone(),
        pool if pool == PoolName::default().as_str() => replica.site.clone(),
        pool => format!("{} (pool {pool})", replica.site),
    }
}

#[cfg(test)]
mod tests {
    use pageport_proto::v1::Worker;

    use super::*;

    #[test]
    fn pools_look_like_this() {
        let used = |used_bytes, quota_bytes| Some(PoolUse { used_bytes, quota_bytes });
        let default = Pool {
            name: "default".into(),
            path: "/var/lib/pageport/worker".into(),
            replicas: used(3 << 30, Some(4 << 30)),
            points: used(1 << 20, None),
            scratch: used(0, Some(1 << 30)),
            takes_scratch: true,
            free_bytes: 9 << 30,
            reserve_bytes: 1 << 30,
            problem: String::new(),
        };
        let ssd = Pool {
            name: "ssd".into(),
            path: "/srv/ssd".into(),
            problem: "is its file system mounted?".into(),
            ..Pool::default()
        };
        let worker = Worker { name: "worker-a".into(), pools: vec![default, ssd], ..Worker::default() };
        assert_eq!(
            pools(&ListWorkersResponse { workers: vec![worker, Worker::default()] }),
            "WORKER    POOL                 REPLICAS    POINTS          SCRATCH      FREE  RESERVED  PATH                      PROBLEM\n\
             worker-a  default  3.00 GiB of 4.00 GiB  1.00 MiB  0 B of 1.00 GiB  9.00 GiB  1.00 GiB  /var/lib/pageport/worker\n\
             worker-a  ssd                       0 B       0 B                -       0 B       0 B  /srv/ssd                  is its file system mounted?\n"
        );
        assert!(pools(&ListWorkersResponse::default()).contains("no worker is connected"));
    }

    #[test]
    fn only_a_pool_that_not_everybody_has_is_told() {
        let at = |pool: &str| site(&Replica { site: "b".into(), pool: pool.into(), ..Replica::default() });
        assert_eq!([at(""), at("default"), at("ssd")], ["b", "b", "b (pool ssd)"]);
    }
}
