//! What a switchover waits for, in a few words, and whether the disks hold it back.
//!
//! The guest stands still while the last of its writes is copied, so it is not stopped before that is little. Pure.

use std::time::Duration;

/// The guest is not stopped while what its disks lag behind takes longer than this to copy.
const DISK_DRAIN: Duration = Duration::from_millis(100);

/// While the last increment is copied memory is held back from here on: a hypervisor with nothing left to send stops the guest. More than one sends
/// between two looks.
const HELD_BACK_BYTES: u64 = 512 << 20;

/// Whether memory has to wait for the last increment of the disks.
pub fn holds_memory(memory_left_bytes: u64, last_increment_bytes: u64) -> bool {
    last_increment_bytes > 0 && memory_left_bytes < HELD_BACK_BYTES
}

/// Whether a disk's lag is too much for a link that carries so much.
pub fn disks_lag(lag_bytes: u64, carried_bytes_per_s: u64) -> bool {
    lag_bytes as f64 > carried_bytes_per_s as f64 * DISK_DRAIN.as_secs_f64()
}

/// While the replica catches up: of so many bytes so many are done.
pub fn for_replica(done_bytes: u64, total_bytes: u64) -> String {
    format!("the replica: {} of {} to catch up on", mega(total_bytes.saturating_sub(done_bytes)), mega(total_bytes))
}

/// While memory moves.
pub fn for_memory(remaining_bytes: u64) -> String {
    format!("memory: {} to send", mega(remaining_bytes))
}

/// While it is paused.
pub fn for_an_operator() -> String {
    "an operator, who has paused it".to_owned()
}

/// While memory is held back because of the disks.
pub fn for_disks(lag_bytes: u64) -> String {
    format!("the disks: {} of the guest's writes to copy", mega(lag_bytes))
}

fn mega(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_hold_back_while_their_lag_takes_longer_than_the_guest_may_stand_still() {
        assert!(!disks_lag(0, 0) && !disks_lag(1_000_000, 10_000_000));
        assert!(disks_lag(1_000_001, 10_000_000) && disks_lag(1, 0));
    }

    #[test]
    fn memory_waits_for_the_last_increment_only_with_its_end() {
        assert!(holds_memory(0, 1) && holds_memory(HELD_BACK_BYTES - 1, 1 << 30));
        assert!(!holds_memory(HELD_BACK_BYTES, 1 << 30) && !holds_memory(0, 0));
    }

    #[test]
    fn the_words_name_what_is_left() {
        assert_eq!(for_replica(40_000_000, 50_000_000), "the replica: 10.0 MB of 50.0 MB to catch up on");
        assert_eq!(for_memory(1_500_000), "memory: 1.5 MB to send");
        assert_eq!(for_disks(2_000_000), "the disks: 2.0 MB of the guest's writes to copy");
    }
}
