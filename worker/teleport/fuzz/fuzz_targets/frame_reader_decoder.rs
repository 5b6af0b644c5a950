//! Any bytes from a peer: frames or errors, no panic, no memory beyond the limits (run with `-rss_limit_mb=512`).
//!
//! The first byte is the length of the pieces, the second says whether the stream's header is put before the rest.
#![no_main]

use std::io;

use libfuzzer_sys::fuzz_target;
use pageport_teleport::wire::limits::BATCH_RAW_MAX;
use pageport_teleport::{BlockRef, Decoded, Decoder, FrameKind, FrameReader, ReplicaRead, wire};

/// A replica whose blocks hold their number, up to some block.
struct Numbers;

impl ReplicaRead for Numbers {
    fn read(&mut self, at: BlockRef, _: u32, into: &mut [u8]) -> io::Result<()> {
        if at.block > 1 << 20 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        into.fill(at.block as u8);
        Ok(())
    }
}

fuzz_target!(|input: &[u8]| {
    let [cut, header, stream @ ..] = input else { return };
    let mut reader = FrameReader::new();
    let Ok(mut decoder) = Decoder::new() else { return };
    if header & 1 == 0 {
        reader.push(&wire::stream_header());
    }
    for piece in stream.chunks(usize::from(*cut) + 1) {
        reader.push(piece);
        while let Ok(Some(frame)) = reader.next_frame() {
            match frame.kind {
                FrameKind::Batch => {
                    if let Ok(Decoded::Verified(verified)) = decoder.decode(&frame, &mut Numbers) {
                        assert!(verified.bytes.len() <= BATCH_RAW_MAX);
                        assert_eq!(verified.bytes.len(), verified.summary.raw_length as usize);
                    }
                }
                FrameKind::Fallback => drop(decoder.decode_fallback(&frame)),
            }
        }
    }
});
