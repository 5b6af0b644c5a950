//! What the tests share: replicas in memory, a stream of QEMU's made by hand, a run through both halves.

#![allow(dead_code, clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::io;

use pageport_teleport::{
    BlockDigest, BlockIndex, BlockLookup, BlockRef, Decoded, Decoder, Encoder, EncoderParams, FrameReader, PAGE_SIZE,
    Page, PageCounts, ReplicaRead, StreamDigest, encode_fallback, wire,
};

/// A disk image in memory; reads beyond its end fail.
#[derive(Clone, Debug, Default)]
pub struct MemoryReplica {
    pub disks: BTreeMap<u16, Vec<u8>>,
}

impl MemoryReplica {
    pub fn with_disk(disk: u16, image: Vec<u8>) -> Self {
        Self { disks: BTreeMap::from([(disk, image)]) }
    }

    /// An index of everything in it.
    pub fn index(&self) -> BlockIndex {
        let mut index = BlockIndex::new();
        for (disk, image) in &self.disks {
            let (blocks, _): (&[Page], _) = image.as_chunks::<PAGE_SIZE>();
            index.add_disk(*disk, blocks.len() as u64).unwrap();
            for (block, content) in blocks.iter().enumerate() {
                let at = BlockRef { disk: *disk, block: block as u64 };
                index.set(at, BlockDigest::of(content)).unwrap();
            }
        }
        index
    }
}

impl ReplicaRead for MemoryReplica {
    fn read(&mut self, at: BlockRef, count: u32, into: &mut [u8]) -> io::Result<()> {
        assert_eq!(into.len(), count as usize * PAGE_SIZE);
        let image = self.disks.get(&at.disk).ok_or(io::ErrorKind::NotFound)?;
        let start = usize::try_from(at.block).unwrap() * PAGE_SIZE;
        let content = image.get(start..start + into.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        into.copy_from_slice(content);
        Ok(())
    }
}

/// What a run through both halves came to.
#[derive(Debug, Default)]
pub struct Outcome {
    pub bytes: Vec<u8>,
    pub counts: PageCounts,
    pub wire_bytes: usize,
    pub fallback_wire_bytes: usize,
    pub batches: u64,
    pub memory_pages: Vec<u8>,
}

/// Sends `stream`, cut as `cuts` says (lengths, used in turn; 0 means a flush), through encoder and decoder, answers
/// every mismatch, and compares digests.
pub fn through(stream: &[u8], cuts: &[usize], index: &dyn BlockLookup, replica: &mut dyn ReplicaRead) -> Outcome {
    let mut encoder = Encoder::new(EncoderParams { memory_pages: true, ..EncoderParams::default() }).unwrap();
    let mut rest = stream;
    let mut batches = Vec::new();
    let mut cuts = cuts.iter().copied().cycle();
    while !rest.is_empty() {
        match cuts.next().unwrap_or(usize::MAX) {
            0 => encoder.flush().unwrap(),
            cut => {
                let (front, back) = rest.split_at(cut.min(rest.len()));
                rest = back;
                encoder.push(front, index).unwrap();
            }
        }
        batches.extend(std::iter::from_fn(|| encoder.next_batch()));
    }
    encoder.finish(index).unwrap();
    batches.extend(std::iter::from_fn(|| encoder.next_batch()));

    let mut decoder = Decoder::new().unwrap();
    let (mut main, mut fallbacks) = (FrameReader::new(), FrameReader::new());
    main.push(&wire::stream_header());
    fallbacks.push(&wire::stream_header());
    let mut outcome = Outcome { batches: batches.len() as u64, ..Outcome::default() };
    let mut digest = StreamDigest::new();
    for batch in &batches {
        outcome.wire_bytes += batch.frame.len();
        let mut frame = None;
        for piece in batch.frame.chunks(cuts.next().unwrap_or(1).clamp(1000, 100_000)) {
            assert!(frame.is_none());
            main.push(piece);
            frame = main.next_frame().unwrap();
        }
        let (pages, rest): (&[Page], _) = batch.memory_pages.as_chunks();
        assert!(rest.is_empty());
        outcome.memory_pages.extend_from_slice(&batch.memory_pages);
        let mut known: Vec<_> = pages.iter().map(|page| Some(BlockDigest::of(page))).collect();
        let verified = match decoder.decode(&frame.unwrap(), replica).unwrap() {
            Decoded::Verified(verified) => {
                assert_eq!(verified.counts, batch.counts);
                verified
            }
            Decoded::Mismatch { sequence, teleported_pages } => {
                assert_eq!((sequence, teleported_pages), (batch.summary.sequence, batch.counts.teleported));
                let answer = encode_fallback(batch.retained.as_ref().unwrap()).unwrap();
                outcome.fallback_wire_bytes += answer.len();
                fallbacks.push(&answer);
                let verified = decoder.decode_fallback(&fallbacks.next_frame().unwrap().unwrap()).unwrap();
                assert_eq!(verified.counts, batch.counts.fallen_back());
                known.fill(None);
                verified
            }
        };
        assert_eq!(verified.summary, batch.summary);
        assert_eq!(verified.memory_pages, known);
        outcome.counts += verified.counts;
        digest.append(&verified.summary).unwrap();
        outcome.bytes.extend_from_slice(&verified.bytes);
    }
    assert!(main.next_frame().unwrap().is_none() && fallbacks.next_frame().unwrap().is_none());
    assert!(main.is_at_boundary() && fallbacks.is_at_boundary());
    assert_eq!(decoder.pending(), 0);
    assert_eq!(digest.value(), encoder.stream_digest().value());
    assert_eq!(digest.raw_bytes(), stream.len() as u64);
    outcome
}

/// A page of which each seed has its own; compressible as memory is.
pub fn page(seed: u32) -> Page {
    let mut page = [0; PAGE_SIZE];
    let mut state = u64::from(seed) * 2 + 1;
    for (place, byte) in page.iter_mut().enumerate() {
        if place % 3 == 0 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        }
        *byte = (state >> 33) as u8 & 0x3f;
    }
    page[..4].copy_from_slice(&(seed + 1).to_le_bytes());
    page
}

/// Builds a stream as QEMU writes it.
#[derive(Clone, Debug, Default)]
pub struct StreamBuilder(pub Vec<u8>);

impl StreamBuilder {
    pub const RAM: u32 = 2;

    /// Everything before the first record.
    pub fn preamble(blocks: &[(&str, u64)]) -> Self {
        let mut stream = Self::default();
        stream.u32(0x5145_564d).u32(3).u8(7).u32(4).raw(b"test");
        stream.u8(1).u32(Self::RAM).name(b"ram").u32(0).u32(4);
        let total: u64 = blocks.iter().map(|(_, length)| length).sum();
        stream.u64(total | 4);
        for (name, length) in blocks {
            stream.name(name.as_bytes()).u64(*length);
        }
        stream
    }

    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.raw(&[value])
    }

    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.raw(&value.to_be_bytes())
    }

    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.raw(&value.to_be_bytes())
    }

    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub fn name(&mut self, name: &[u8]) -> &mut Self {
        self.u8(name.len() as u8).raw(name)
    }

    fn header(&mut self, page: u64, block: Option<&str>, flag: u64) -> &mut Self {
        let word = (page * PAGE_SIZE as u64) | flag;
        match block {
            Some(name) => self.u64(word).name(name.as_bytes()),
            None => self.u64(word | 0x20),
        }
    }

    pub fn page(&mut self, page: u64, block: Option<&str>, content: &Page) -> &mut Self {
        self.header(page, block, 8).raw(content)
    }

    pub fn fill(&mut self, page: u64, block: Option<&str>, fill: u8) -> &mut Self {
        self.header(page, block, 2).u8(fill)
    }

    /// The end of a section's records.
    pub fn end_section(&mut self) -> &mut Self {
        self.u64(0x10).u8(0x7e).u32(Self::RAM)
    }

    pub fn part(&mut self) -> &mut Self {
        self.u8(2).u32(Self::RAM)
    }

    pub fn last_part(&mut self) -> &mut Self {
        self.u8(3).u32(Self::RAM)
    }
}
