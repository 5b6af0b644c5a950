//! The clock of leases: nanoseconds since this host booted, time in suspend included (`CLOCK_BOOTTIME`).
//!
//! It never goes back, is the same for all processes of the host, and means nothing on another host or after a reboot.
//! Time namespaces shift it: worker and keepers must share one.

use std::fmt;
use std::ops::Add;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// A moment since the host booted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BootTime(u64);

impl BootTime {
    /// When the host booted.
    pub const ZERO: Self = Self(0);

    /// Now. A clock that cannot be read says that all time is over: what hangs on a deadline ends.
    #[must_use]
    pub fn now() -> Self {
        let now = clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from);
        Self(now.map_or(u64::MAX, |now| u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// So many nanoseconds after the boot.
    #[must_use]
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Nanoseconds since the boot.
    #[must_use]
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// How long after `earlier` this is; zero if it is before.
    #[must_use]
    pub fn saturating_since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for BootTime {
    type Output = Self;

    /// Ends at the end of time.
    fn add(self, span: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)))
    }
}

impl fmt::Display for BootTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:03} s after the boot", self.0 / 1_000_000_000, self.0 / 1_000_000 % 1000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_only_grows_and_adding_never_wraps() {
        let earlier = BootTime::now();
        assert!(BootTime::now() >= earlier && earlier > BootTime::ZERO);
        assert_eq!(BootTime::from_nanos(u64::MAX - 1) + Duration::from_secs(1), BootTime::from_nanos(u64::MAX));
        assert_eq!(earlier.saturating_since(earlier + Duration::from_secs(1)), Duration::ZERO);
        assert_eq!((earlier + Duration::from_secs(1)).saturating_since(earlier), Duration::from_secs(1));
        assert_eq!(BootTime::from_nanos(61_002_000_000).to_string(), "61.002 s after the boot");
    }
}
