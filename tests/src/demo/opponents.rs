//! The same guest under the same loads, moved by QEMU alone over the same link.

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use super::{DemoError, loads, say};
use crate::baseline::vm::{FreePageHints, PlainSpec};
use crate::baseline::{Baseline, Figures, Method};
use crate::lab::guest::{GuestImages, Variant};
use crate::lab::network::Network;

const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 11);
const BOOT_DEADLINE: Duration = Duration::from_secs(60);
const MOVE_DEADLINE: Duration = Duration::from_secs(900);

/// What moves, and how.
#[derive(Clone, Debug)]
pub struct Opponents<'a> {
    /// What the guest boots.
    pub images: &'a GuestImages,
    /// The guest.
    pub variant: Variant,
    /// `tcg` or `kvm`.
    pub accelerator: String,
    /// Whether QEMU may skip what the guest says is free.
    pub hints: FreePageHints,
}

impl Opponents<'_> {
    /// Plain pre-copy there, multifd with zstd back. QEMU's sockets and logs lie in `folder`, the guest's own disk is made at `disk`.
    ///
    /// # Errors
    /// When a guest does not boot or a migration fails.
    pub async fn run(self, network: &Network, folder: &Path, disk: &Path) -> Result<(Figures, Figures), DemoError> {
        let Self { images, variant, accelerator, hints } = self;
        images.copy_disk(disk)?;
        let spec = PlainSpec {
            name: "opponent".into(),
            images: images.clone(),
            disk: disk.to_owned(),
            memory_bytes: variant.memory_bytes,
            address: ADDRESS,
            mac_suffix: 11,
            accelerator,
            hints,
        };
        let mut baseline = Baseline::boot(network, "a", spec, folder).await?;
        let mut guest = baseline.reach(BOOT_DEADLINE).await?;
        say("  an identical guest boots at a, fills its page cache and runs the same loads");
        loads::warm(&mut guest, variant).await?;
        say("  QEMU pre-copy, a to b ...");
        let precopy = baseline.migrate("b", Method::Precopy, MOVE_DEADLINE).await?;
        say(&format!("  took {:.1} s; QEMU multifd with zstd, b to a ...", precopy.total_time_ms as f64 / 1e3));
        let zstd = baseline.migrate("a", Method::MultifdZstd, MOVE_DEADLINE).await?;
        Ok((precopy, zstd))
    }
}
