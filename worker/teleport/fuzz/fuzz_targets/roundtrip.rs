//! Any bytes as a stream of QEMU's, any index, any replica: what comes out is what went in.
//!
//! The first bytes say how the stream is cut, which blocks the index takes the replica to hold, and which it does hold.
#![no_main]

use std::io;

use libfuzzer_sys::fuzz_target;
use pageport_teleport::{
    BlockDigest, BlockLookup, BlockRef, Decoded, Decoder, Encoder, EncoderParams, FrameReader, PAGE_SIZE, Page,
    ReplicaRead, StreamDigest, encode_fallback, wire,
};

/// Block n is full of byte n; the index knows those below `known`, the replica has those below `held`.
struct Bytes {
    known: u64,
    held: u64,
}

impl BlockLookup for Bytes {
    fn find(&self, digest: &BlockDigest) -> Option<BlockRef> {
        (1..self.known).map(|block| BlockRef { disk: 0, block }).find(|at| self.holds(*at, digest))
    }

    fn holds(&self, at: BlockRef, digest: &BlockDigest) -> bool {
        let content: Page = [at.block as u8; PAGE_SIZE];
        at.block < self.known && BlockDigest::of(&content) == *digest
    }
}

impl ReplicaRead for Bytes {
    fn read(&mut self, at: BlockRef, _: u32, into: &mut [u8]) -> io::Result<()> {
        for (block, into) in (at.block..).zip(into.chunks_mut(PAGE_SIZE)) {
            into.fill(if block < self.held { block as u8 } else { 0 });
        }
        Ok(())
    }
}

fuzz_target!(|input: &[u8]| {
    let [cut, flush, known, held, stream @ ..] = input else { return };
    let mut blocks = Bytes { known: u64::from(*known % 8), held: u64::from(*held % 8) };
    let mut encoder = Encoder::new(EncoderParams::default()).expect("an encoder");
    for (place, piece) in stream.chunks(usize::from(*cut) * 16 + 1).enumerate() {
        encoder.push(piece, &blocks).expect("pushed");
        if *flush > 0 && place % usize::from(*flush) == 0 {
            encoder.flush().expect("flushed");
        }
    }
    encoder.finish(&blocks).expect("finished");
    let mut decoder = Decoder::new().expect("a decoder");
    let (mut main, mut fallbacks) = (FrameReader::new(), FrameReader::new());
    main.push(&wire::stream_header());
    fallbacks.push(&wire::stream_header());
    let (mut bytes, mut digest) = (Vec::new(), StreamDigest::new());
    while let Some(batch) = encoder.next_batch() {
        main.push(&batch.frame);
        let frame = main.next_frame().expect("a sound stream").expect("a whole frame");
        let verified = match decoder.decode(&frame, &mut blocks).expect("decoded") {
            Decoded::Verified(verified) => verified,
            Decoded::Mismatch { .. } => {
                fallbacks.push(&encode_fallback(&batch.retained.expect("retained")).expect("encoded"));
                let frame = fallbacks.next_frame().expect("a sound stream").expect("a whole frame");
                decoder.decode_fallback(&frame).expect("decoded")
            }
        };
        digest.append(&verified.summary).expect("in order");
        bytes.extend_from_slice(&verified.bytes);
    }
    assert!(bytes == stream, "the bytes differ");
    assert_eq!(digest.value(), encoder.stream_digest().value());
});
