//! What a case may have left behind, at any site.
//!
//! | | at the VM's owner | elsewhere |
//! |---|---|---|
//! | processes | controller, worker, guard, one QEMU of the VM and its keeper | controller, worker, guard |
//! | tap devices of guests | one | none |
//! | the VM's runtime folder | what QEMU that runs needs | nothing but QEMU's last words |
//! | sockets of open recovery points | none | none |
//! | the worker's data folder | store, replicas | store, replicas |

use std::fs;
use std::path::{Path, PathBuf};

use crate::lab::Lab;
use crate::lab::network::SITES;
use crate::netns;
use crate::wan::config::{TAP_DEVICE, TUN_DEVICE};

/// Each thing that should not be there, or is missing, in a few words.
#[must_use]
pub fn find(lab: &Lab, vm: &str, owner: &str) -> Vec<String> {
    SITES.iter().flat_map(|site| find_at(lab, vm, site, *site == owner)).collect()
}

fn find_at(lab: &Lab, vm: &str, site: &str, owns: bool) -> Vec<String> {
    let mut found = processes(lab, site, owns);
    let ours = lab.qemu_pids(vm).iter().filter(|(at, _)| *at == site).count();
    if ours != usize::from(owns) {
        found.push(format!("{ours} qemu of {vm} at {site}"));
    }
    let taps = taps(lab.network().namespace(site));
    if taps.len() != usize::from(owns) {
        found.push(format!("tap devices {taps:?} at {site}"));
    }
    let runtime = lab.runtime().join(site);
    for path in files_below(&runtime) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let expected = path == runtime.join("guard")
            || match owns {
                true => {
                    ["qmp.sock", "console.sock", "agent.sock", "pid", "taps", "deadline", "qemu.log"].contains(&&*name)
                }
                false => name == "qemu.log",
            };
        if !expected {
            found.push(path.display().to_string());
        }
    }
    let data = lab.worker_data(site);
    let foreign = files_below(&data).into_iter().filter(|path| !is_workers_own(path, &data, owns));
    found.extend(foreign.map(|path| path.display().to_string()));
    found
}

/// More of a program than there should be.
fn processes(lab: &Lab, site: &str, owns: bool) -> Vec<String> {
    let programs = lab.programs(site);
    let allowed = |program: &str| match program {
        "pageport-controller" | "pageport-worker" => 1,
        // The guard is the same program.
        "pageport-keeper" => 1 + usize::from(owns),
        program if program.starts_with("qemu-system-") => usize::from(owns),
        _ => 0,
    };
    let too_many = |(_, program): &&(i32, String)| {
        programs.iter().filter(|(_, other)| other == program).count() > allowed(program)
    };
    programs.iter().filter(too_many).map(|(pid, program)| format!("process {pid} ({program}) at {site}")).collect()
}

/// The devices of guests in a namespace.
fn taps(namespace: &str) -> Vec<String> {
    let devices = netns::within(namespace, || fs::read_to_string("/proc/thread-self/net/dev")).and_then(|text| text);
    let devices = devices.unwrap_or_default();
    let names = devices.lines().filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()));
    names.filter(|name| name.starts_with("pp") && ![TUN_DEVICE, TAP_DEVICE].contains(&name.as_str())).collect()
}

/// The store, and complete files of replicas.
fn is_workers_own(path: &Path, data: &Path, owns: bool) -> bool {
    let Ok(inside) = path.strip_prefix(data) else { return false };
    let mut parts = inside.components().map(|part| part.as_os_str().to_string_lossy().into_owned());
    match parts.next().as_deref() {
        Some("store" | "lock") => true,
        // What is known of replicas elsewhere, as long as the VM is here.
        Some("index") => owns,
        // Memory that it left when it moved away, complete.
        Some("kept") => !owns && path.extension().is_none(),
        Some("replicas") => path.extension().is_some_and(|extension| extension == "raw"),
        _ => false,
    }
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}
