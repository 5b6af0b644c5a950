//! The QEMUs of a lab, and the other processes at its sites.

use std::fs;
use std::path::Path;

use super::network::SITES;
use super::{Lab, processes};

impl Lab {
    /// Finds a VM's QEMUs again and again, for a witness in a thread of its own: their process numbers.
    pub fn hypervisors_of(&self, vm: &str) -> impl Fn() -> Vec<i32> + Send + 'static {
        let is_its_qemu = is_qemu_of(vm);
        let run = self.runtime().to_string_lossy().into_owned();
        move || processes::of_labs(|argument| argument.contains(&run)).into_iter().filter(&is_its_qemu).collect()
    }

    /// The processes of a VM's QEMUs and the sites they are at.
    #[must_use]
    pub fn qemu_pids(&self, vm: &str) -> Vec<(&'static str, i32)> {
        let is_its_qemu = is_qemu_of(vm);
        let at_sites = SITES.iter().map(|site| (*site, self.network.processes_at(site)));
        at_sites.flat_map(|(site, pids)| pids.into_iter().filter(&is_its_qemu).map(move |pid| (site, pid))).collect()
    }

    /// The keeper of a QEMU: its parent, if that is one.
    #[must_use]
    pub fn keeper_of(&self, qemu: i32) -> Option<i32> {
        let stat = fs::read_to_string(format!("/proc/{qemu}/stat")).ok()?;
        let parent = stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()?;
        processes::command_line(parent).first()?.ends_with("pageport-keeper").then_some(parent)
    }

    /// The processes at a site and the names of their programs; the dead are not among them.
    #[must_use]
    pub fn programs(&self, site: &str) -> Vec<(i32, String)> {
        let name_of = |pid: i32| {
            let line = processes::command_line(pid);
            let name = Path::new(line.first()?).file_name()?.to_str()?.to_owned();
            Some((pid, name))
        };
        self.network.processes_at(site).into_iter().filter_map(name_of).collect()
    }
}

/// Is this process a QEMU of that VM?
fn is_qemu_of(vm: &str) -> impl Fn(&i32) -> bool + Send + 'static {
    let guest = format!("guest={vm}");
    move |pid| {
        let line = processes::command_line(*pid);
        line.first().is_some_and(|program| program.contains("qemu")) && line.contains(&guest)
    }
}
