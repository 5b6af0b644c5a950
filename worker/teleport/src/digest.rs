//! The strong digests: of a batch, and of the whole stream.
//!
//! ```text
//! transcript of a batch := item*            batch digest  = BLAKE3(transcript)
//!   verbatim  00  u64 length  bytes         stream digest = BLAKE3((u64 sequence, u64 raw length, batch digest)*)
//!   fill      01  record as in the stream
//!   page      02  header as in the stream, BLAKE3 of the page
//! ```
//! Guarantees: equal batch digests mean equal items, hence equal bytes, since an item determines its bytes. Both digests
//! have a key of their own, so that neither stands for the other or for the hash of a page.

use crate::page::PageHash;
use crate::qemu::RecordHeader;

const BATCH_CONTEXT: &str = "pageport 2026-11 teleport batch digest, format 1";
const STREAM_CONTEXT: &str = "pageport 2026-11 teleport stream digest, format 1";
const ITEM_VERBATIM: u8 = 0;
const ITEM_FILL: u8 = 1;
const ITEM_PAGE: u8 = 2;

/// Digest of the source's actual content of a batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BatchDigest(pub [u8; BatchDigest::LENGTH]);

impl BatchDigest {
    /// Bytes of a digest.
    pub const LENGTH: usize = 32;
}

/// The items of one batch as they enter its digest. Bounded by the bound on a batch.
#[derive(Debug, Default)]
pub(crate) struct Transcript(Vec<u8>);

impl Transcript {
    pub(crate) fn verbatim(&mut self, bytes: &[u8]) {
        self.0.push(ITEM_VERBATIM);
        self.0.extend_from_slice(&(bytes.len() as u64).to_be_bytes());
        self.0.extend_from_slice(bytes);
    }

    pub(crate) fn fill(&mut self, header: RecordHeader<'_>, fill: u8) {
        self.0.push(ITEM_FILL);
        header.write_fill(fill, &mut self.0);
    }

    pub(crate) fn page(&mut self, header: RecordHeader<'_>, hash: &PageHash) {
        self.0.push(ITEM_PAGE);
        header.write_page(&mut self.0);
        self.0.extend_from_slice(&hash.0);
    }

    /// The digest; the transcript is empty again.
    pub(crate) fn finish(&mut self) -> BatchDigest {
        let digest = blake3::derive_key(BATCH_CONTEXT, &self.0);
        self.0.clear();
        BatchDigest(digest)
    }
}

/// What identifies a batch: both sides must agree on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BatchSummary {
    /// Its place in the stream, from 0.
    pub sequence: u64,
    /// Bytes of QEMU's stream that it stands for.
    pub raw_length: u32,
    /// The digest of its items.
    pub digest: BatchDigest,
}

/// A batch was given to the stream digest out of its turn.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("stream digest: batch {found} given, {expected} is next")]
pub struct OutOfOrder {
    /// The batch whose turn it is.
    pub expected: u64,
    /// The batch that was given.
    pub found: u64,
}

/// Digest over the whole stream, fed batch by batch in order of sequence.
#[derive(Clone, Debug)]
pub struct StreamDigest {
    hasher: blake3::Hasher,
    batches: u64,
    raw_bytes: u64,
}

impl Default for StreamDigest {
    fn default() -> Self {
        Self::new()
    }
}

impl StreamDigest {
    /// The digest of a stream of which nothing was seen.
    pub fn new() -> Self {
        Self { hasher: blake3::Hasher::new_derive_key(STREAM_CONTEXT), batches: 0, raw_bytes: 0 }
    }

    /// Adds the next batch.
    pub fn append(&mut self, batch: &BatchSummary) -> Result<(), OutOfOrder> {
        if batch.sequence != self.batches {
            return Err(OutOfOrder { expected: self.batches, found: batch.sequence });
        }
        self.hasher.update(&batch.sequence.to_be_bytes());
        self.hasher.update(&u64::from(batch.raw_length).to_be_bytes());
        self.hasher.update(&batch.digest.0);
        self.batches += 1;
        self.raw_bytes += u64::from(batch.raw_length);
        Ok(())
    }

    /// Batches so far.
    pub fn batches(&self) -> u64 {
        self.batches
    }

    /// Bytes of QEMU's stream so far.
    pub fn raw_bytes(&self) -> u64 {
        self.raw_bytes
    }

    /// The digest of what was added so far.
    pub fn value(&self) -> [u8; 32] {
        *self.hasher.finalize().as_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(sequence: u64) -> BatchSummary {
        BatchSummary { sequence, raw_length: 7, digest: BatchDigest([sequence as u8; 32]) }
    }

    #[test]
    fn batches_out_of_order_are_refused_and_leave_the_digest_as_it_was() {
        let mut digest = StreamDigest::new();
        assert_eq!(digest.append(&batch(0)), Ok(()));
        let before = digest.value();
        assert_eq!(digest.append(&batch(0)), Err(OutOfOrder { expected: 1, found: 0 }));
        assert_eq!(digest.append(&batch(2)), Err(OutOfOrder { expected: 1, found: 2 }));
        assert_eq!(digest.value(), before);
        assert_eq!(digest.append(&batch(1)), Ok(()));
        assert_ne!(digest.value(), before);
        assert_eq!((digest.batches(), digest.raw_bytes()), (2, 14));
    }

    #[test]
    fn every_field_of_a_batch_enters_the_stream_digest() {
        let value = |batch: BatchSummary| {
            let mut digest = StreamDigest::new();
            digest.append(&batch).map(|()| digest.value())
        };
        let plain = value(batch(0));
        assert_ne!(plain, value(BatchSummary { raw_length: 8, ..batch(0) }));
        assert_ne!(plain, value(BatchSummary { digest: BatchDigest([1; 32]), ..batch(0) }));
    }
}
