//! Failpoints: places of a move at which a test holds this worker, so that a fault strikes there and nowhere else.
//!
//! | file in the folder | made by | means |
//! |---|---|---|
//! | `<role>.<point>.hold` | the test | whoever reaches the point waits while this exists |
//! | `<role>.<point>.reached` | the worker | the point was reached, once or more |
//!
//! The folder is named by [`VARIABLE`]. Where that is not set, and it never is in production, a point costs one load. A hold
//! ends after [`HOLD_LIMIT`] whatever the test does. Points change nothing else: what a test sees with them happens without.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The environment variable that names the folder.
pub const VARIABLE: &str = "PAGEPORT_FAILPOINTS";
/// The longest hold: more than the longest fault, so that only a test that died lets it pass.
const HOLD_LIMIT: Duration = Duration::from_secs(180);
const POLL: Duration = Duration::from_millis(5);

/// Says that `point` is reached, and waits while it is held.
pub async fn reach(role: &str, point: &str) {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    if let Some(folder) = FOLDER.get_or_init(|| std::env::var_os(VARIABLE).map(PathBuf::from)) {
        reach_in(folder, role, point, HOLD_LIMIT).await;
    }
}

async fn reach_in(folder: &Path, role: &str, point: &str, limit: Duration) {
    let file = |kind| folder.join(format!("{role}.{point}.{kind}"));
    let began = Instant::now();
    if let Err(error) = std::fs::write(file("reached"), b"") {
        tracing::error!(role, point, %error, "failpoint cannot be told");
    }
    let hold = file("hold");
    while hold.exists() {
        if began.elapsed() >= limit {
            tracing::error!(role, point, "failpoint was held too long");
            return;
        }
        tokio::time::sleep(POLL).await;
    }
    tracing::info!(role, point, held_ms = began.elapsed().as_millis() as u64, "failpoint passed");
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_reaches_a_held_point_waits_until_it_is_let_go() {
        let folder = tempfile::tempdir().unwrap();
        let hold = folder.path().join("source.memory.hold");
        std::fs::write(&hold, b"").unwrap();
        let path = folder.path().to_owned();
        let held = tokio::spawn(async move { reach_in(&path, "source", "memory", HOLD_LIMIT).await });
        let deadline = Instant::now() + Duration::from_secs(30);
        while !folder.path().join("source.memory.reached").exists() {
            assert!(Instant::now() < deadline);
            tokio::time::sleep(POLL).await;
        }
        assert!(!held.is_finished());
        std::fs::remove_file(hold).unwrap();
        tokio::time::timeout(Duration::from_secs(30), held).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_point_that_nobody_holds_is_passed_and_a_hold_that_nobody_ends_is_not_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        reach_in(folder.path(), "source", "connect", HOLD_LIMIT).await;
        assert!(folder.path().join("source.connect.reached").exists());
        std::fs::write(folder.path().join("source.connect.hold"), b"").unwrap();
        reach_in(folder.path(), "source", "connect", Duration::ZERO).await;
    }
}
