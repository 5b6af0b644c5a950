//! [`Size`]: how large a fleet is, and who is where in it.

use std::fmt;
use std::str::FromStr;

use pageport_proto::v1::{DiskSpec, VmSpec};
use serde::{Deserialize, Serialize};

use crate::lab::network::SITES;

/// Memory of each VM.
const VM_MEMORY_BYTES: u64 = 1 << 30;
/// Memory of each host.
pub const HOST_MEMORY_BYTES: u64 = 256 << 30;
/// The site that is evacuated: every fifth VM is there.
pub const EVACUATED: &str = SITES[2];
const ELSEWHERE: [&str; 2] = [SITES[0], SITES[1]];
const FIFTH: usize = 5;

/// Workers and VMs, written `1000/10000`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Size {
    /// Hosts, a third at each site.
    pub workers: usize,
    /// VMs, a fifth of them at [`EVACUATED`], the others at the other two sites.
    pub vms: usize,
}

/// A text that is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{text}\" is not WORKERS/VMS with 3 to {} workers and 10 to {} vms, such as 1000/10000",
    Size::MAX_WORKERS,
    Size::MAX_VMS
)]
pub struct SizeError {
    text: String,
}

impl Size {
    /// What the goals are about.
    pub const LARGE: Self = Self { workers: 1000, vms: 10_000 };
    /// Each is a connection to a controller, and a certificate.
    const MAX_WORKERS: usize = 3000;
    const MAX_VMS: usize = 100_000;

    /// Names of the workers of a site.
    pub fn workers_at(self, site: &str) -> impl Iterator<Item = String> {
        let first = SITES.iter().position(|name| *name == site).unwrap_or_default();
        let prefix = format!("sim-{site}-");
        (first..self.workers).step_by(SITES.len()).map(move |number| format!("{prefix}{number}"))
    }

    /// Where a VM is defined, by its number.
    #[must_use]
    pub fn site_of(vm: usize) -> &'static str {
        if vm.is_multiple_of(FIFTH) { EVACUATED } else { ELSEWHERE[vm % ELSEWHERE.len()] }
    }

    /// The VMs that run at the site that is evacuated, by number, and where each has a replica.
    pub fn leavers(self) -> impl Iterator<Item = (usize, &'static str)> {
        (0..self.vms).step_by(FIFTH).enumerate().map(|(n, vm)| (vm, ELSEWHERE[n % ELSEWHERE.len()]))
    }

    /// How many those are.
    #[must_use]
    pub fn evacuated(self) -> usize {
        self.vms.div_ceil(FIFTH)
    }
}

/// The name of a VM, by number.
#[must_use]
pub fn vm_name(vm: usize) -> String {
    format!("vm-{vm}")
}

/// Its definition.
#[must_use]
pub fn vm_spec(vm: usize) -> VmSpec {
    let disk = DiskSpec { name: "root".into(), path: format!("/vms/{vm}.raw"), ..DiskSpec::default() };
    VmSpec { name: vm_name(vm), memory_bytes: VM_MEMORY_BYTES, vcpus: 1, disks: vec![disk], ..VmSpec::default() }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} workers, {} VMs", self.workers, self.vms)
    }
}

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let parsed = text.split_once('/').and_then(|(workers, vms)| Some((workers.parse().ok()?, vms.parse().ok()?)));
        let fits = |(workers, vms): &(usize, usize)| {
            (SITES.len()..=Self::MAX_WORKERS).contains(workers) && (2 * FIFTH..=Self::MAX_VMS).contains(vms)
        };
        let size = parsed.filter(fits).map(|(workers, vms)| Self { workers, vms });
        size.ok_or_else(|| SizeError { text: text.to_owned() })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn everybody_is_somewhere_and_a_fifth_leaves() {
        let size: Size = "1000/10000".parse().unwrap();
        assert_eq!(size, Size::LARGE);
        assert_eq!(SITES.iter().map(|site| size.workers_at(site).count()).sum::<usize>(), 1000);
        let at = |site| (0..size.vms).filter(|vm| Size::site_of(*vm) == site).count();
        assert_eq!(SITES.map(at), [4000, 4000, 2000]);
        assert_eq!((size.leavers().count(), size.evacuated()), (2000, 2000));
        assert!(size.leavers().all(|(vm, to)| Size::site_of(vm) == EVACUATED && to != EVACUATED));
        assert_eq!(size.leavers().filter(|(_, to)| *to == "a").count(), 1000);
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "1000", "1000/", "2/10", "3/9", "3001/10", "3/100001", "-3/10"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }
}
