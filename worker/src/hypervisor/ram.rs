//! A guest's memory, looked at while it runs.
//!
//! The pages are read from the hypervisor's process, not asked of it: its own commands for that hold back everything else that it does.
//! A page that nobody has touched yet is told from the page table and not read, so that nothing is allocated for it.
//!
//! Needs the right to trace the hypervisor (`CAP_SYS_PTRACE`, which root has). What is read is a glimpse: the guest goes on writing, also while a page is read.
//! Formats: Linux, `Documentation/admin-guide/mm/pagemap.rst`; the reply of QEMU's monitor command `gpa2hva`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use pageport_teleport::PAGE_SIZE;
use serde::Deserialize;

use super::error::HypervisorError;
use super::qmp::{Ignored, qmp_command};
use super::vm::Vm;

/// Of a page in the page table: it is in memory, or swapped.
const PAGEMAP_EXISTS: u64 = 0b11 << 62;
const PAGEMAP_ENTRY_BYTES: usize = 8;
/// Over how long the rate of dirtying is taken, in seconds: the least that QEMU offers.
const DIRTY_RATE_S: u32 = 1;
const DIRTY_RATE_LIMIT: Duration = Duration::from_secs(5);
const DIRTY_RATE_POLL: Duration = Duration::from_millis(100);
const MIB: u64 = 1 << 20;

qmp_command!(/// A command of the human monitor.
    HumanMonitorCommand = "human-monitor-command" -> String { command_line: String });
qmp_command!(/// Begins to take the rate at which the guest dirties memory.
    CalcDirtyRate = "calc-dirty-rate" -> Ignored { calc_time: u32 });
qmp_command!(/// That rate.
    QueryDirtyRate = "query-dirty-rate" -> DirtyRate {});

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct DirtyRate {
    status: String,
    /// MiB per second; absent until it is measured.
    dirty_rate: Option<u64>,
}

/// A running guest's memory.
#[derive(Debug)]
pub struct GuestRam {
    memory: File,
    page_table: File,
    /// Where it begins in the hypervisor's process.
    base: u64,
    pages: u64,
}

impl GuestRam {
    fn open(pid: u32, base: u64, bytes: u64) -> io::Result<Self> {
        let memory = File::open(format!("/proc/{pid}/mem"))?;
        let page_table = File::open(format!("/proc/{pid}/pagemap"))?;
        Ok(Self { memory, page_table, base, pages: bytes / PAGE_SIZE as u64 })
    }

    /// Pages of 4 KiB.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Reads as many pages as there is room for, from number `first` on.
    ///
    /// # Errors
    /// There are not so many, they may not be read, or the hypervisor has ended.
    pub fn read(&self, first: u64, into: &mut [[u8; PAGE_SIZE]]) -> io::Result<()> {
        if first.checked_add(into.len() as u64).is_none_or(|end| end > self.pages) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let address = self.base + first * PAGE_SIZE as u64;
        let mut entries = vec![0; into.len() * PAGEMAP_ENTRY_BYTES];
        self.page_table.read_exact_at(&mut entries, address / PAGE_SIZE as u64 * PAGEMAP_ENTRY_BYTES as u64)?;
        let (entries, _) = entries.as_chunks::<PAGEMAP_ENTRY_BYTES>();
        for ((page, entry), place) in into.iter_mut().zip(entries).zip((address..).step_by(PAGE_SIZE)) {
            match u64::from_ne_bytes(*entry) & PAGEMAP_EXISTS {
                0 => page.fill(0),
                _ => self.memory.read_exact_at(page, place)?,
            }
        }
        Ok(())
    }
}

impl Vm {
    /// Its guest's memory, of this size.
    ///
    /// # Errors
    /// The hypervisor does not say where it lies, or it may not be read.
    pub async fn ram(&self, bytes: u64) -> Result<GuestRam, HypervisorError> {
        let said = self.execute(&HumanMonitorCommand { command_line: "gpa2hva 0".to_owned() }).await?;
        let unread = |operation, source| HypervisorError::File {
            operation,
            path: format!("/proc/{}/mem", self.pid()).into(),
            source,
        };
        let base = host_address(&said)
            .ok_or_else(|| unread("find the guest's memory in", io::Error::new(io::ErrorKind::InvalidData, said)))?;
        let ram = GuestRam::open(self.pid(), base, bytes);
        ram.map_err(|source| unread("open (the worker needs CAP_SYS_PTRACE for that)", source))
    }

    /// The rate at which the guest dirties memory, in bytes per second, taken over a second by looking at a few of its pages twice.
    ///
    /// # Errors
    /// The hypervisor does not take it.
    pub async fn dirty_rate(&self) -> Result<u64, HypervisorError> {
        self.execute(&CalcDirtyRate { calc_time: DIRTY_RATE_S }).await?;
        let measured = async {
            loop {
                tokio::time::sleep(DIRTY_RATE_POLL).await;
                let rate = self.execute(&QueryDirtyRate {}).await?;
                if let (Some(rate), "measured") = (rate.dirty_rate, rate.status.as_str()) {
                    return Ok(rate.saturating_mul(MIB));
                }
            }
        };
        let in_time = tokio::time::timeout(DIRTY_RATE_LIMIT, measured).await;
        in_time.unwrap_or_else(|_| {
            let (vm, deadline) = (self.id(), DIRTY_RATE_LIMIT);
            Err(HypervisorError::Deadline { vm, operation: "take the dirty rate", deadline })
        })
    }
}

/// From `Host virtual address for 0x0 (ram) is 0x7f0000000000`.
fn host_address(said: &str) -> Option<u64> {
    let (_, address) = said.trim().rsplit_once(" is 0x")?;
    let address = u64::from_str_radix(address, 16).ok()?;
    address.is_multiple_of(PAGE_SIZE as u64).then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_memory_lies_is_read_and_anything_else_is_not() {
        assert_eq!(host_address("Host virtual address for 0x0 (ram) is 0x7f5d2be00000\r\n"), Some(0x7f5d_2be0_0000));
        for other in ["", "No memory is mapped at address 0x0", "x is 0xzz", "x is 0x7f5d2be00001"] {
            assert_eq!(host_address(other), None, "{other}");
        }
    }

    #[test]
    fn what_was_written_is_read_and_what_was_never_touched_is_zero() {
        // Of this process, whose memory may be read.
        let pages = 64;
        let mut memory = vec![0u8; (pages + 1) * PAGE_SIZE];
        let base = memory.as_ptr().addr().next_multiple_of(PAGE_SIZE);
        let skip = base - memory.as_ptr().addr();
        memory[skip + 3 * PAGE_SIZE..][..PAGE_SIZE].fill(7);
        let ram = GuestRam::open(std::process::id(), base as u64, (pages * PAGE_SIZE) as u64).unwrap();
        let mut read = vec![[1; PAGE_SIZE]; pages];
        ram.read(0, &mut read).unwrap();
        assert_eq!(read.as_flattened(), &memory[skip..][..pages * PAGE_SIZE]);
        assert_eq!(read[3], [7; PAGE_SIZE]);
        assert!(ram.read(1, &mut read).is_err() && ram.read(u64::MAX, &mut read[..1]).is_err());
    }
}
