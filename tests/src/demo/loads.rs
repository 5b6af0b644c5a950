//! What the demo's guests do while they move, and how it is checked that the move changed nothing.

use std::time::Duration;

use pageport_guest::protocol::{Reply, Request};

use super::report::GuestChecks;
use crate::lab::guest::Variant;
use crate::lab::guest::client::{GuestClient, GuestError};

/// Reading or digesting gigabytes under software emulation takes its time.
const LONG: Duration = Duration::from_secs(600);
const SHORT: Duration = Duration::from_secs(60);
/// Of how many files one is digested.
const SAMPLE: u64 = 4;
const DIRTY_PAGES_PER_SECOND: u64 = 300;
const RECORDS_PER_SECOND: u64 = 5;

/// What was seen before the move.
#[derive(Clone, Debug)]
pub struct Before {
    files: String,
    memory: String,
    uptime_s: f64,
    boot_id: String,
    /// The kernel's release.
    pub kernel: String,
    /// Page cache that equals the disk: `Cached` + `Buffers` - `Dirty`.
    pub page_cache_bytes: u64,
}

/// Digests a sample of the files, fills the page cache, starts the loads, and looks at everything once.
///
/// # Errors
/// When the guest does not answer.
pub async fn begin(guest: &mut GuestClient, variant: Variant) -> Result<Before, GuestError> {
    let files = guest.checksum(&Request::ChecksumFiles { every: SAMPLE }, LONG).await?;
    warm(guest, variant).await?;
    let memory = guest.checksum(&Request::ChecksumMemory, SHORT).await?;
    let (uptime_s, boot_id, kernel) = guest.uptime().await?;
    let page_cache_bytes = page_cache(guest).await?;
    Ok(Before { files, memory, uptime_s, boot_id, kernel, page_cache_bytes })
}

impl Before {
    /// What named the boot.
    #[must_use]
    pub fn boot_id(&self) -> &str {
        &self.boot_id
    }
}

/// Compares the files alone: what is left of a guest that was booted anew from its disk.
///
/// # Errors
/// When the guest does not answer.
pub async fn files_equal(guest: &mut GuestClient, before: &Before) -> Result<bool, GuestError> {
    Ok(guest.checksum(&Request::ChecksumFiles { every: SAMPLE }, LONG).await? == before.files)
}

/// Rewrites so many bytes of blocks all over the files.
///
/// # Errors
/// When the guest does not answer.
pub async fn rewrite(guest: &mut GuestClient, bytes: u64) -> Result<(), GuestError> {
    guest.call(&Request::RewriteBlocks { bytes, seed: 14 }, LONG).await?;
    Ok(())
}

/// Fills the page cache and starts the loads.
///
/// # Errors
/// When the guest does not answer.
pub async fn warm(guest: &mut GuestClient, variant: Variant) -> Result<(), GuestError> {
    let dirty_bytes = variant.memory_bytes / 32;
    guest.call(&Request::StaticStart { bytes: dirty_bytes / 4, seed: 11 }, SHORT).await?;
    guest.call(&Request::Warm { bytes: variant.warm_bytes }, LONG).await?;
    let dirty = Request::DirtyStart { bytes: dirty_bytes, pages_per_second: DIRTY_PAGES_PER_SECOND, seed: 12 };
    guest.call(&dirty, SHORT).await?;
    guest.call(&Request::WriteStart { records_per_second: RECORDS_PER_SECOND, seed: 13 }, SHORT).await?;
    Ok(())
}

/// Stops the loads, as far as they run.
///
/// # Errors
/// When the guest does not answer.
pub async fn stop(guest: &mut GuestClient) -> Result<(), GuestError> {
    for request in [Request::DirtyStop, Request::WriteStop] {
        match guest.call(&request, SHORT).await {
            Ok(_) | Err(GuestError::Refused { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Page cache that equals the disk.
///
/// # Errors
/// When the guest does not answer.
pub async fn page_cache(guest: &mut GuestClient) -> Result<u64, GuestError> {
    let memory = guest.meminfo().await?;
    let figure = |name: &str| memory.get(name).copied().unwrap_or(0);
    // The initramfs and other shared memory count as cached but lie on no disk.
    Ok((figure("Cached") + figure("Buffers")).saturating_sub(figure("Dirty") + figure("Shmem")))
}

/// Stops the loads and compares with what was seen before; whether the session survived is known only where there was one.
///
/// # Errors
/// When the guest does not answer.
pub async fn compare(
    guest: &mut GuestClient,
    before: &Before,
    tcp_session_survived: impl Into<Option<bool>>,
) -> Result<GuestChecks, GuestError> {
    let (uptime_s, boot_id, _) = guest.uptime().await?;
    let memory = guest.checksum(&Request::ChecksumMemory, SHORT).await?;
    let dirty = guest.call(&Request::DirtyStop, SHORT).await?;
    let written = guest.call(&Request::WriteStop, SHORT).await?;
    let files = guest.checksum(&Request::ChecksumFiles { every: SAMPLE }, LONG).await?;
    Ok(GuestChecks {
        files_checksum_equal: files == before.files && matches!(written, Reply::Written { lost: 0, synced: 1.. }),
        memory_checksum_equal: memory == before.memory
            && matches!(dirty, Reply::Dirty { corrupt_pages: 0, writes: 1.. }),
        uptime_continued: boot_id == before.boot_id && uptime_s > before.uptime_s,
        tcp_session_survived: tcp_session_survived.into(),
    })
}
