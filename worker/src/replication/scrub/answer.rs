//! The destination's end of a scrub: reads blocks of a replica's file, and says whether they are the source's.

use std::io;
use std::sync::Arc;

use pageport_proto::v1::{CompareBlocks, Compared};

use super::piece::{PIECE_BYTES, digest_of, digests};
use crate::replica::store::{BLOCK_BYTES, ReplicaDisk};

/// Why blocks are not compared.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// What no honest peer asks.
    #[error("the peer worker asked for what cannot be: {what}")]
    Hostile {
        /// What it was.
        what: &'static str,
    },
    /// The replica's file.
    #[error("read the replica {disk}")]
    Disk {
        /// Its path.
        disk: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Compares what was asked.
///
/// # Errors
/// [`CompareError`].
pub fn compare(disks: &[(String, Arc<ReplicaDisk>)], ask: &CompareBlocks) -> Result<Compared, CompareError> {
    let hostile = |what| CompareError::Hostile { what };
    let (_, disk) =
        disks.iter().find(|(name, _)| *name == ask.disk).ok_or(hostile("blocks of a disk that is not here"))?;
    if ask.blocks == 0 || ask.blocks > PIECE_BYTES / BLOCK_BYTES {
        return Err(hostile("more blocks than are compared at a time, or none"));
    }
    let range = ask.first_block.checked_add(ask.blocks).and_then(|end| end.checked_mul(BLOCK_BYTES));
    let end =
        range.filter(|end| *end < disk.size_bytes() + BLOCK_BYTES).ok_or(hostile("blocks past the end of a disk"))?;
    let offset = ask.first_block * BLOCK_BYTES;
    let mut content = vec![0; (end.min(disk.size_bytes()) - offset) as usize];
    let read = disk.read_anew(offset, &mut content);
    read.map_err(|source| CompareError::Disk { disk: disk.to_string(), source })?;
    let found = digests(&content);
    if digest_of(&found)[..] == ask.digest[..] {
        return Ok(Compared { same: true, ..Compared::default() });
    }
    let digests = found.iter().flat_map(|digest| digest.0).collect();
    Ok(Compared { same: false, digests })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use pageport_common::store::Store;
    use pageport_proto::VmId;

    use super::*;
    use crate::replica::store::ReplicaStore;

    /// Ends inside a block.
    const SIZE: u64 = 10 * BLOCK_BYTES + 100;

    struct Host {
        folder: tempfile::TempDir,
        vm: VmId,
        disks: Vec<(String, Arc<ReplicaDisk>)>,
    }

    fn host() -> Host {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(&folder.path().join("store")).unwrap());
        let (replicas, vm) = (ReplicaStore::new(store, folder.path()), VmId::generate());
        let disk = replicas.open_for_writing(vm, "root", SIZE, 0).unwrap();
        disk.write(0, &content()).unwrap();
        Host { folder, vm, disks: vec![("root".to_owned(), disk)] }
    }

    fn content() -> Vec<u8> {
        (0..SIZE).map(|at| if at / BLOCK_BYTES == 3 { 0 } else { (at / BLOCK_BYTES) as u8 + 1 }).collect()
    }

    fn ask(first_block: u64, blocks: u64, content: &[u8]) -> CompareBlocks {
        let digest = digest_of(&digests(content)).to_vec().into();
        CompareBlocks { disk: "root".to_owned(), first_block, blocks, digest }
    }

    #[test]
    fn a_file_that_is_as_the_source_is_the_same_and_one_that_was_changed_behind_our_back_tells_its_blocks() {
        let host = host();
        let ours = content();
        assert!(compare(&host.disks, &ask(0, 11, &ours)).unwrap().same);
        assert!(compare(&host.disks, &ask(10, 1, &ours[10 * BLOCK_BYTES as usize..])).unwrap().same);
        let path = host.folder.path().join("replicas").join(host.vm.to_string()).join("root.raw");
        let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        file.write_all_at(&[0xff], 3 * BLOCK_BYTES + 9).unwrap();
        let found = compare(&host.disks, &ask(0, 11, &ours)).unwrap();
        assert!(!found.same);
        let mut damaged = ours;
        damaged[3 * BLOCK_BYTES as usize + 9] = 0xff;
        let expected: Vec<u8> = digests(&damaged).iter().flat_map(|digest| digest.0).collect();
        assert_eq!(found.digests, expected);
    }

    #[test]
    fn what_no_honest_peer_asks_is_refused_before_anything_is_read() {
        let host = host();
        let other = CompareBlocks { disk: "other".to_owned(), ..ask(0, 1, &[]) };
        let wrong = [
            other,
            ask(0, 0, &[]),
            ask(0, 12, &[]),
            ask(11, 1, &[]),
            ask(0, PIECE_BYTES, &[]),
            ask(u64::MAX, 1, &[]),
            ask(u64::MAX / 4096, 2, &[]),
        ];
        for wrong in wrong {
            let refused = compare(&host.disks, &wrong);
            assert!(matches!(refused, Err(CompareError::Hostile { .. })), "{wrong:?}: {refused:?}");
        }
    }
}
