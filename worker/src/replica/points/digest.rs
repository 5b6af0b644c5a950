//! The digest that source and destination must agree on before a point is committed.

use std::collections::BTreeMap;

/// BLAKE3 over what a point changes: of each disk its changes in order, then over the disks in order of their names.
///
/// The source computes it from raw data before compression. Only the order within a disk counts, so disks may be sent
/// side by side.
#[derive(Debug, Default, Clone)]
pub struct ChangeDigest {
    disks: BTreeMap<String, blake3::Hasher>,
}

const DATA: u8 = 1;
const ZERO: u8 = 2;
const RESIZE: u8 = 3;

impl ChangeDigest {
    /// Bytes are written.
    pub fn data(&mut self, disk: &str, offset: u64, raw: &[u8]) {
        self.content(disk, offset, raw.len() as u64, &blake3::hash(raw));
    }

    /// The same, of bytes that have been hashed elsewhere.
    pub fn content(&mut self, disk: &str, offset: u64, length: u64, content: &blake3::Hash) {
        self.change(disk, DATA, offset, length).update(content.as_bytes());
    }

    /// Takes the changes of other disks in.
    pub fn join(&mut self, others: Self) {
        self.disks.extend(others.disks);
    }

    /// A range becomes zeros.
    pub fn zero(&mut self, disk: &str, offset: u64, length: u64) {
        self.change(disk, ZERO, offset, length);
    }

    /// The disk grows to `size_bytes`.
    pub fn resize(&mut self, disk: &str, size_bytes: u64) {
        self.change(disk, RESIZE, size_bytes, 0);
    }

    /// The digest of all changes so far.
    pub fn finish(&self) -> [u8; 32] {
        let mut whole = blake3::Hasher::new();
        for (name, changes) in &self.disks {
            whole.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes());
            whole.update(changes.finalize().as_bytes());
        }
        *whole.finalize().as_bytes()
    }

    fn change(&mut self, disk: &str, kind: u8, offset: u64, length: u64) -> &mut blake3::Hasher {
        let hasher = self.disks.entry(disk.to_owned()).or_default();
        hasher.update(&[kind]).update(&offset.to_le_bytes()).update(&length.to_le_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_within_a_disk_counts_and_that_between_disks_does_not() {
        let digest = |changes: &[(&str, u64, u8)]| {
            let mut digest = ChangeDigest::default();
            changes.iter().for_each(|(disk, offset, byte)| digest.data(disk, *offset, &[*byte; 3]));
            digest.finish()
        };
        let one = digest(&[("a", 0, 1), ("b", 0, 2), ("a", 8, 3)]);
        assert_eq!(one, digest(&[("b", 0, 2), ("a", 0, 1), ("a", 8, 3)]));
        assert_ne!(one, digest(&[("a", 8, 3), ("b", 0, 2), ("a", 0, 1)]));
        assert_ne!(one, digest(&[("b", 0, 1), ("a", 0, 2), ("b", 8, 3)]));
    }

    #[test]
    fn kinds_and_boundaries_count() {
        let (mut data, mut zero, mut resize, mut split) = Default::default();
        ChangeDigest::data(&mut data, "a", 0, &[0; 4]);
        ChangeDigest::zero(&mut zero, "a", 0, 4);
        ChangeDigest::resize(&mut resize, "a", 4);
        ChangeDigest::data(&mut split, "a", 0, &[0; 2]);
        split.data("a", 2, &[0; 2]);
        let mut all = [data.finish(), zero.finish(), resize.finish(), split.finish(), ChangeDigest::default().finish()];
        all.sort_unstable();
        assert!(all.windows(2).all(|pair| pair[0] != pair[1]));
    }
}
