//! Has this host the memory for a guest?

use super::DestinationError;

/// Memory that a host keeps for itself, in bytes.
const HOST_RESERVE_BYTES: u64 = 256 << 20;

/// Refuses a guest of so many bytes that this host has no memory for.
///
/// # Errors
/// [`DestinationError::NoMemory`]; the host cannot be looked at.
pub fn check_memory(needed_bytes: u64) -> Result<(), DestinationError> {
    let text = std::fs::read_to_string("/proc/meminfo").map_err(DestinationError::Memory)?;
    let kib = |line: &str| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok();
    let available_bytes = text.lines().find_map(kib).unwrap_or(u64::MAX >> 10) << 10;
    if needed_bytes.saturating_add(HOST_RESERVE_BYTES) > available_bytes {
        return Err(DestinationError::NoMemory { needed_bytes, available_bytes });
    }
    Ok(())
}
