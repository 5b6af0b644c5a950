//! Tap devices: one per NIC, named after the VM, joined to the NIC's bridge.
//!
//! A name is a function of VM and position, so making a device twice finds the first one, and a worker that lost its
//! memory still knows what to remove. Works through `ip`, in the network namespace of the worker.

use std::process::Stdio;
use std::time::Duration;

use pageport_proto::VmId;
use pageport_proto::v1::NicSpec;
use tokio::process::Command;

/// Time that one `ip` call has.
const IP_DEADLINE: Duration = Duration::from_secs(5);
/// Hex digits of the VM's digest in a name; with `pp`, `n` and two digits this fills Linux's 15 characters.
const DIGEST_DIGITS: usize = 10;

/// A tap device that could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// `ip` did not start.
    #[error("run ip for tap device {tap}")]
    Run {
        /// The device.
        tap: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// `ip` failed.
    #[error("ip {arguments} failed: {message}")]
    Refused {
        /// What was asked.
        arguments: String,
        /// Its words.
        message: String,
    },
    /// `ip` did not end.
    #[error("ip {arguments} did not end in time")]
    Deadline {
        /// What was asked.
        arguments: String,
    },
}

/// The device of a VM's `index`th NIC.
pub fn tap_name(vm: VmId, index: usize) -> String {
    let digest = blake3::hash(vm.to_string().as_bytes()).to_hex();
    format!("pp{}n{index}", &digest[..DIGEST_DIGITS])
}

/// Makes the devices of all NICs; on failure none is left.
pub async fn create(vm: VmId, nics: &[NicSpec]) -> Result<Vec<String>, TapError> {
    let mut taps = Vec::new();
    for (index, nic) in nics.iter().enumerate() {
        let tap = tap_name(vm, index);
        taps.push(tap.clone());
        if let Err(error) = create_one(&tap, &nic.bridge).await {
            remove(&taps).await;
            return Err(error);
        }
    }
    Ok(taps)
}

async fn create_one(tap: &str, bridge: &str) -> Result<(), TapError> {
    // A device left by a QEMU that was killed together with its worker is taken over. Asked of `ip`, not of /sys, which may
    // show another namespace's devices.
    if ip(tap, &["link", "show", "dev", tap]).await.is_err() {
        ip(tap, &["tuntap", "add", "dev", tap, "mode", "tap"]).await?;
    }
    ip(tap, &["link", "set", "dev", tap, "master", bridge, "up"]).await.map(drop)
}

/// Is there a bridge of this name, where tap devices are made?
///
/// # Errors
/// `ip` did not run, or did not end.
pub async fn is_bridge(bridge: &str) -> Result<bool, TapError> {
    match ip(bridge, &["link", "show", "dev", bridge, "type", "bridge"]).await {
        Ok(said) => Ok(!said.is_empty()),
        Err(TapError::Refused { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes devices; one that is gone or cannot be removed is no error here, only logged.
pub async fn remove(taps: &[String]) {
    for tap in taps {
        if let Err(error) = ip(tap, &["link", "delete", "dev", tap]).await {
            tracing::warn!(tap, error = %error, "tap device not removed");
        }
    }
}

/// What it says.
async fn ip(tap: &str, arguments: &[&str]) -> Result<String, TapError> {
    let run = Command::new("ip").args(arguments).stdin(Stdio::null()).kill_on_drop(true).output();
    let output = tokio::time::timeout(IP_DEADLINE, run)
        .await
        .map_err(|_| TapError::Deadline { arguments: arguments.join(" ") })?
        .map_err(|source| TapError::Run { tap: tap.to_owned(), source })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(TapError::Refused { arguments: arguments.join(" "), message })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_linux_and_tell_vms_apart() {
        let (a, b) = (VmId::generate(), VmId::generate());
        assert!(tap_name(a, 99).len() <= 15);
        assert_eq!(tap_name(a, 0), tap_name(a, 0));
        assert_ne!(tap_name(a, 0), tap_name(b, 0));
        assert_ne!(tap_name(a, 0), tap_name(a, 1));
    }
}
