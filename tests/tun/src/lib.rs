//! Opens a TUN (IP packets) or TAP (Ethernet frames) device of the calling thread's network namespace.
//!
//! Exists because attaching to `/dev/net/tun` needs the `TUNSETIFF` ioctl, which has no safe wrapper; everything else of
//! the lab is safe code. Guarantees that the returned file reads and writes exactly one packet per call, without a
//! header and without blocking. Does not configure the device: addresses, routes and link state are the caller's.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use nix::libc;

/// What the device carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// IP packets.
    Tun,
    /// Ethernet frames.
    Tap,
}

mod ioctl {
    #![allow(missing_docs)]
    use nix::libc;
    nix::ioctl_write_ptr_bad!(
        tun_set_iff,
        nix::request_code_write!(b'T', 202, std::mem::size_of::<libc::c_int>()),
        libc::ifreq
    );
}

/// Creates (or attaches to) the device `name`; it disappears when the file is closed unless it was made persistent.
///
/// # Errors
/// When the name is too long for the kernel, `/dev/net/tun` cannot be opened, or the kernel refuses the device.
pub fn open(name: &str, kind: Kind) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")?;
    let mode = match kind {
        Kind::Tun => libc::IFF_TUN,
        Kind::Tap => libc::IFF_TAP,
    };
    let mut request = interface_request(name, mode | libc::IFF_NO_PI)?;
    // SAFETY: the descriptor is open for the whole call and `request` is a fully initialised `ifreq`, which the kernel
    // reads and writes back within its own size.
    #[allow(unsafe_code)]
    unsafe { ioctl::tun_set_iff(file.as_raw_fd(), (&raw mut request).cast_const()) }?;
    Ok(file)
}

fn interface_request(name: &str, flags: libc::c_int) -> io::Result<libc::ifreq> {
    let mut ifr_name = [0; libc::IFNAMSIZ];
    if name.is_empty() || name.len() >= ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "device name must have 1 to 15 bytes"));
    }
    for (slot, byte) in ifr_name.iter_mut().zip(name.bytes()) {
        *slot = byte.cast_signed();
    }
    let flags = libc::c_short::try_from(flags)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "device flags out of range"))?;
    Ok(libc::ifreq { ifr_name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags } })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_do_not_fit_are_refused() {
        assert!(interface_request("", 0).is_err());
        assert!(interface_request("exactly15chars_", 0).is_ok());
        assert!(interface_request("sixteen_chars_xx", 0).is_err());
    }
}
