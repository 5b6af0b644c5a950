//! A backup on its way over a connection: cut into parts, and put together again.

use std::ops::Range;

/// Bytes in one part; less at the end.
const PART_BYTES: usize = 1 << 20;

/// Where a file of this length is cut.
pub fn parts(file_bytes: usize) -> impl Iterator<Item = Range<usize>> {
    (0..file_bytes).step_by(PART_BYTES).map(move |from| from..file_bytes.min(from + PART_BYTES))
}

/// A part does not follow those that came before it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a part of a backup does not fit to those before it")]
pub struct Misfit;

/// A file of which parts have come.
#[derive(Debug, Default)]
pub struct Assembly {
    file: Vec<u8>,
    total_bytes: Option<u64>,
}

impl Assembly {
    /// Takes the next part, which begins at `offset` of a file of `total_bytes`.
    ///
    /// # Errors
    /// [`Misfit`].
    pub fn take(&mut self, offset: u64, chunk: &[u8], total_bytes: u64) -> Result<(), Misfit> {
        let total = *self.total_bytes.get_or_insert(total_bytes);
        let has = self.file.len() as u64;
        if total_bytes != total || offset != has || chunk.len() as u64 > total - has {
            return Err(Misfit);
        }
        self.file.extend_from_slice(chunk);
        Ok(())
    }

    /// Is all of it here?
    pub fn is_whole(&self) -> bool {
        self.total_bytes == Some(self.file.len() as u64)
    }

    /// The file, if all of it is here.
    pub fn into_file(self) -> Option<Vec<u8>> {
        self.is_whole().then_some(self.file)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_cut_is_put_together_again() {
        for length in [1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES + 7] {
            let file: Vec<u8> = (0..length).map(|at| (at / 1000) as u8).collect();
            let mut assembly = Assembly::default();
            for part in parts(length) {
                assert!(!assembly.is_whole() && part.len() <= PART_BYTES);
                assembly.take(part.start as u64, &file[part], length as u64).unwrap();
            }
            assert_eq!(assembly.into_file().unwrap(), file);
        }
        assert_eq!(parts(0).count(), 0);
    }

    #[test]
    fn a_part_that_does_not_follow_and_a_file_that_is_not_whole_are_refused() {
        let mut assembly = Assembly::default();
        assert!(!assembly.is_whole());
        assembly.take(0, b"abc", 6).unwrap();
        for (offset, chunk, total_bytes) in [(0, &b"abc"[..], 6), (4, b"d", 6), (3, b"d", 7), (3, b"defg", 6)] {
            assert_eq!(assembly.take(offset, chunk, total_bytes), Err(Misfit));
        }
        assert_eq!(assembly.into_file(), None);
    }
}
