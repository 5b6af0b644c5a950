//! What a guest's memory is made of: ordinary pages, or those that the host has set aside as huge pages.
//!
//! Huge pages are there from the start: a guest that arrives does not wait for the host to find, and to clear, half a million small ones. The migration
//! stream knows nothing of it, so a VM moves between hosts that have them and hosts that have not.
//!
//! Guarantees: the memory of a guest that starts is reserved as a whole, or QEMU does not start. Looks at the pool of the default size only, which
//! is the one that `vm.nr_hugepages` sets (Linux, `Documentation/admin-guide/mm/hugetlbpage.rst`).

use std::io;

use pageport_proto::VmId;
use serde::Deserialize;

use super::error::HypervisorError;

const MEMINFO: &str = "/proc/meminfo";

/// `hypervisor.huge_pages`: whether guests get them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HugePages {
    /// No.
    #[default]
    Never,
    /// A guest that fits into those that are free as it starts.
    IfFree,
    /// Every guest; one that does not fit does not start.
    Always,
}

/// What a guest's memory is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestMemory {
    /// Ordinary pages, when they are first touched.
    Ordinary,
    /// Huge pages, reserved at the start.
    Huge,
}

impl HugePages {
    /// For a guest of this size that starts now.
    ///
    /// # Errors
    /// It is to have huge pages, and they are not there.
    pub fn choose(self, vm: VmId, memory_bytes: u64) -> Result<GuestMemory, HypervisorError> {
        if self == Self::Never {
            return Ok(GuestMemory::Ordinary);
        }
        let text = std::fs::read_to_string(MEMINFO);
        let pool = text.map(|text| Pool::parse(&text)).map_err(|source: io::Error| HypervisorError::File {
            operation: "read",
            path: MEMINFO.into(),
            source,
        })?;
        match self {
            _ if pool.holds(memory_bytes) => Ok(GuestMemory::Huge),
            Self::Always => {
                let Pool { page_bytes, free_bytes } = pool;
                Err(HypervisorError::NoHugePages { vm, memory_bytes, page_bytes, free_bytes })
            }
            Self::Never | Self::IfFree => Ok(GuestMemory::Ordinary),
        }
    }
}

/// The host's huge pages of the default size.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Pool {
    /// Of one page; 0: the kernel has none.
    page_bytes: u64,
    /// That nobody has, or has reserved.
    free_bytes: u64,
}

impl Pool {
    fn parse(meminfo: &str) -> Self {
        let number = |name: &str| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0u64)
        };
        let page_bytes = number("Hugepagesize") * 1024;
        let free = number("HugePages_Free").saturating_sub(number("HugePages_Rsvd"));
        Self { page_bytes, free_bytes: free * page_bytes }
    }

    fn holds(&self, memory_bytes: u64) -> bool {
        self.page_bytes > 0 && memory_bytes.is_multiple_of(self.page_bytes) && memory_bytes <= self.free_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn what_somebody_has_reserved_is_not_free() {
        let text = "MemFree:  100 kB\nHugePages_Total:      40\nHugePages_Free:       10\nHugePages_Rsvd:        4\n\
                    HugePages_Surp:        0\nHugepagesize:       2048 kB\nHugetlb:           81920 kB\n";
        let pool = Pool::parse(text);
        assert_eq!(pool, Pool { page_bytes: 2 * MIB, free_bytes: 12 * MIB });
        assert!(pool.holds(12 * MIB) && !pool.holds(14 * MIB) && !pool.holds(11 * MIB));
    }

    #[test]
    fn a_kernel_without_huge_pages_holds_nothing() {
        let pool = Pool::parse("MemFree:  100 kB\n");
        assert!(!pool.holds(0) && !pool.holds(2 * MIB));
    }

    #[test]
    fn nothing_is_looked_at_where_they_are_not_wanted_and_a_guest_that_must_have_them_says_how() {
        let vm = VmId::generate();
        assert_eq!(HugePages::Never.choose(vm, u64::MAX).unwrap(), GuestMemory::Ordinary);
        assert_eq!(HugePages::IfFree.choose(vm, 1 << 60).unwrap(), GuestMemory::Ordinary);
        let refused = HugePages::Always.choose(vm, 1 << 60).unwrap_err().to_string();
        assert!(refused.contains("vm.nr_hugepages") && refused.contains("hypervisor.huge_pages"), "{refused}");
    }
}
