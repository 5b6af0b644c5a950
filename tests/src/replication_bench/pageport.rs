//! Pageport's own replication: a VM at one site, protected to the other, steered with `pageportctl` as an operator does.
//!
//! A point is ordered by ordering a tighter target: with one of an hour nothing is sent until then. What is measured ends when the
//! controllers know of the point.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::BenchError;
use super::digest::same;
use super::meter::REPLICA;
use super::stages::Replication;
use crate::kept::unix_ms;
use crate::lab::Lab;

const POLL: Duration = Duration::from_millis(50);
const COPY_DEADLINE: Duration = Duration::from_secs(900);
/// How long the replica of a guest that writes nothing may take to become the disk.
const EQUAL_DEADLINE: Duration = Duration::from_secs(60);
/// No point is due for a while.
const SELDOM: &str = "1h";
/// A point is due.
const OFTEN: &str = "5s";

/// A VM that runs at the source's site.
#[derive(Debug)]
pub struct Protected<'a> {
    lab: &'a Lab,
    name: &'a str,
    disk: PathBuf,
}

impl<'a> Protected<'a> {
    /// A VM of this lab that is not protected yet.
    #[must_use]
    pub fn new(lab: &'a Lab, name: &'a str, disk: PathBuf) -> Self {
        Self { lab, name, disk }
    }

    async fn order(&self, target: &str) -> Result<(), BenchError> {
        self.lab.ctl(["protect", self.name, "--to", REPLICA, "--rpo", target, "--keep", "4"]).await?;
        Ok(())
    }

    /// Waits for a point that was taken then or later.
    async fn point_since(&self, unix_ms: u64) -> Result<(), BenchError> {
        let deadline = Instant::now() + COPY_DEADLINE;
        loop {
            let vm = self.lab.ctl_json(["vm", "get", self.name]).await?;
            if taken_unix_ms(&vm).is_some_and(|taken| taken >= unix_ms) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(BenchError::NoPoint { seen: vm["replicas"].to_string() });
            }
            sleep(POLL).await;
        }
    }

    async fn replica(&self) -> Result<PathBuf, BenchError> {
        let vm = self.lab.ctl_json(["vm", "get", self.name]).await?;
        let id = vm["id"].as_str().unwrap_or_default();
        Ok(self.lab.worker_data(REPLICA).join("replicas").join(id).join("root.raw"))
    }
}

impl Replication for Protected<'_> {
    async fn first_copy(&mut self) -> Result<(), BenchError> {
        self.order(SELDOM).await?;
        self.point_since(0).await
    }

    async fn catch_up(&mut self) -> Result<(), BenchError> {
        let now = unix_ms();
        self.order(OFTEN).await?;
        self.point_since(now).await
    }

    async fn keep_up(&mut self, time: Duration) -> Result<(), BenchError> {
        self.order(OFTEN).await?;
        sleep(time).await;
        Ok(())
    }

    async fn is_equal(&mut self) -> Result<bool, BenchError> {
        let replica = self.replica().await?;
        let deadline = Instant::now() + EQUAL_DEADLINE;
        let mut equal = same(&self.disk, &replica).await?;
        while !equal && Instant::now() < deadline {
            // The guest's file system may have written something of its own, or a point is being applied.
            self.catch_up().await?;
            equal = same(&self.disk, &replica).await?;
        }
        self.order(SELDOM).await?;
        Ok(equal)
    }
}

/// When the newest point was taken.
fn taken_unix_ms(vm: &Value) -> Option<u64> {
    let replicas = vm["replicas"].as_array()?;
    let here = replicas.iter().find(|replica| replica["site"] == REPLICA)?;
    let taken = &here["replication"]["newest"]["taken_unix_ms"];
    taken.as_u64().or_else(|| taken.as_str()?.parse().ok())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_the_point_at_the_replicas_site_counts() {
        let replica = |site: &str, taken| json!({"site": site, "replication": {"newest": {"taken_unix_ms": taken}}});
        let vm = json!({"replicas": [replica("c", json!(9)), replica("b", json!("7"))]});
        assert_eq!(taken_unix_ms(&vm), Some(7));
        assert_eq!(taken_unix_ms(&json!({"replicas": [{"site": "b", "replication": {}}]})), None);
        assert_eq!(taken_unix_ms(&json!({})), None);
    }
}
