//! A peer that lies: each lie is one error, never a panic, never memory beyond the limits.

#![allow(clippy::unwrap_used)]

mod common;

use common::{MemoryReplica, StreamBuilder, page};
use pageport_teleport::index::EmptyReplica;
use pageport_teleport::wire::limits::{BATCH_OPS_MAX, BATCH_RAW_MAX, FRAME_LENGTH_MAX};
use pageport_teleport::wire::{OpsError, stream_header};
use pageport_teleport::{
    BlockLookup, DecodeError, Decoded, Decoder, EncodedBatch, Encoder, EncoderParams, Frame, FrameError, FrameReader,
    PAGE_SIZE, encode_fallback,
};
use proptest::collection::vec;
use proptest::prelude::*;

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// A frame as a peer may make it up.
fn forge(kind: u8, sequence: u64, raw_length: u64, ops: &[u8], literals: &[u8]) -> Vec<u8> {
    let mut body = vec![kind];
    body.extend([varint(sequence), varint(raw_length), vec![0; 32], varint(ops.len() as u64)].concat());
    body.extend([ops, &varint(literals.len() as u64), literals].concat());
    [&(body.len() as u32).to_be_bytes()[..], &body].concat()
}

fn read(frame: &[u8]) -> Result<Option<Frame>, FrameError> {
    let mut reader = FrameReader::new();
    reader.push(&stream_header());
    reader.push(frame);
    reader.next_frame()
}

fn decode(frame: &[u8]) -> Result<Decoded, DecodeError> {
    Decoder::new().unwrap().decode(&read(frame).unwrap().unwrap(), &mut MemoryReplica::default())
}

/// An operation: `value << 4 | code`.
fn op(code: u64, value: u64) -> Vec<u8> {
    varint(value << 4 | code)
}

fn encode(stream: &[u8], index: &dyn BlockLookup) -> Vec<EncodedBatch> {
    let mut encoder = Encoder::new(EncoderParams::default()).unwrap();
    encoder.push(stream, index).unwrap();
    encoder.finish(index).unwrap();
    std::iter::from_fn(|| encoder.next_batch()).collect()
}

fn sample() -> (Vec<u8>, MemoryReplica) {
    let mut stream = StreamBuilder::preamble(&[("pc.ram", 1 << 24)]);
    let mut image = Vec::new();
    stream.fill(0, Some("pc.ram"), 0);
    for seed in 0..20 {
        stream.page(u64::from(seed), None, &page(seed));
        if seed % 3 > 0 {
            image.extend_from_slice(&page(seed));
        }
    }
    (stream.end_section().0.clone(), MemoryReplica::with_disk(0, image))
}

#[test]
fn streams_that_are_not_ours_are_refused_for_good() {
    let mut reader = FrameReader::new();
    reader.push(b"QEVM\x01");
    let error = FrameError::Magic { found: *b"QEVM" };
    assert_eq!(reader.next_frame().unwrap_err(), error);
    reader.push(&stream_header());
    assert_eq!(reader.next_frame().unwrap_err(), error);
    for version in [0, 2, 255] {
        let mut reader = FrameReader::new();
        reader.push(&[b'P', b'G', b'P', b'T', version]);
        assert_eq!(reader.next_frame().unwrap_err(), FrameError::Version { version });
    }
}

#[test]
fn each_bad_frame_is_named() {
    let long = |field, length, limit| FrameError::TooLong { field, length, limit };
    let raw = BATCH_RAW_MAX as u64 + 1;
    let frame_length = FRAME_LENGTH_MAX as u32 + 1;
    let cases = [
        (frame_length.to_be_bytes().to_vec(), long("frame", u64::from(frame_length), FRAME_LENGTH_MAX)),
        (forge(3, 0, 1, &[], &[]), FrameError::Kind { kind: 3 }),
        (forge(1, 0, raw, &[], &[]), long("raw length", raw, BATCH_RAW_MAX)),
        (forge(1, 0, 1, &vec![0; BATCH_OPS_MAX + 1], &[]), long("operations", BATCH_OPS_MAX as u64 + 1, BATCH_OPS_MAX)),
        (vec![0, 0, 0, 0], FrameError::Truncated { field: "kind" }),
        (vec![0, 0, 0, 2, 1, 0x80], FrameError::Truncated { field: "sequence" }),
        (vec![0, 0, 0, 5, 1, 0, 0, 1, 1], FrameError::Truncated { field: "digest" }),
    ];
    for (frame, error) in cases {
        assert_eq!(read(&frame).unwrap_err(), error);
    }
    let mut trailing = forge(1, 0, 1, &[], &[]);
    trailing.push(9);
    trailing[3] += 1;
    assert_eq!(read(&trailing).unwrap_err(), FrameError::Trailing { length: 1 });
}

#[test]
fn each_bad_operation_is_named() {
    let raw = BATCH_RAW_MAX as u64;
    let wrong = OpsError::RawLength { raw_length: BATCH_RAW_MAX as u32 };
    let name = [op(7, 2), b"pc".to_vec()].concat();
    let cases = [
        (op(9, 0), OpsError::Unknown { code: 9 }),
        (op(15, 3), OpsError::Unknown { code: 15 }),
        (vec![], wrong),
        (vec![0x81], OpsError::Truncated),
        (op(2, 0), OpsError::Truncated),
        (op(5, 0), OpsError::Truncated),
        (op(7, 5), OpsError::Truncated),
        (op(0, raw), wrong),
        (op(1, raw), wrong),
        (op(4, (1 << 60) - 1), wrong),
        (op(1, (1 << 60) - 1), wrong),
        (op(4, raw / 4104), wrong),
        (op(7, 256), OpsError::Name),
        ([name.clone(), op(0, 0)].concat(), OpsError::Name),
        ([name.clone(), name].concat(), OpsError::Name),
        (op(6, 1), OpsError::Page),
        (op(6, (1 << 60) - 2), OpsError::Page),
        ([op(6, 1 << 53), op(1, 0)].concat(), OpsError::Page),
        ([op(5, 0), varint(1)].concat(), OpsError::Block),
        ([op(5, 0), varint(1 << 41)].concat(), OpsError::Block),
        ([op(5, 0), varint(u64::MAX)].concat(), OpsError::Block),
        (op(8, 1 << 16), OpsError::Block),
    ];
    for (ops, error) in cases {
        match decode(&forge(1, 0, raw, &ops, &[])) {
            Err(DecodeError::Ops { sequence: 0, source }) => assert_eq!(source, error, "{ops:02x?}"),
            other => panic!("{ops:02x?} gave {other:?}"),
        }
    }
}

#[test]
fn literals_of_another_length_or_that_expand_are_refused() {
    let bomb = zstd::bulk::compress(&vec![0; 100 << 20], 1).unwrap();
    assert!(bomb.len() < 20_000);
    let ops = op(0, 99);
    for literals in [bomb, zstd::bulk::compress(&[1; 99], 1).unwrap(), vec![]] {
        let error = decode(&forge(1, 0, 100, &ops, &literals)).unwrap_err();
        assert!(matches!(error, DecodeError::LiteralLength { sequence: 0, expected: 100 }), "{error:?}");
    }
    let error = decode(&forge(1, 0, 100, &ops, b"not zstd at all")).unwrap_err();
    assert!(matches!(error, DecodeError::Literals { .. }), "{error:?}");
    let much = 600 << 10;
    let error = decode(&forge(1, 0, much, &op(0, much - 1), &[])).unwrap_err();
    assert!(matches!(error, DecodeError::LiteralLength { .. }), "{error:?}");
}

#[test]
fn a_window_beyond_the_limit_is_refused() {
    use std::io::Write;
    let mut encoder = zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
    encoder.window_log(26).unwrap();
    encoder.write_all(&[1; 100]).unwrap();
    let literals = encoder.finish().unwrap();
    let error = decode(&forge(1, 0, 100, &op(0, 99), &literals)).unwrap_err();
    assert!(matches!(error, DecodeError::Literals { .. }), "{error:?}");
}

#[test]
fn a_batch_whose_own_bytes_are_wrong_is_fatal_and_not_a_fallback() {
    let literals = zstd::bulk::compress(&[1; 100], 1).unwrap();
    let error = decode(&forge(1, 0, 100, &op(0, 99), &literals)).unwrap_err();
    assert!(matches!(error, DecodeError::Digest { sequence: 0 }), "{error:?}");
}

#[test]
fn batches_out_of_turn_or_on_the_wrong_stream_are_refused() {
    let (stream, mut replica) = sample();
    let batch = encode(&stream, &replica.index()).remove(0);
    let frame = read(&batch.frame).unwrap().unwrap();
    let retained = batch.retained.unwrap();
    let fallback = read(&encode_fallback(&retained).unwrap()).unwrap().unwrap();
    let mut decoder = Decoder::new().unwrap();
    assert!(matches!(decoder.decode(&fallback, &mut replica), Err(DecodeError::Kind { .. })));
    assert!(matches!(decoder.decode_fallback(&frame), Err(DecodeError::Kind { .. })));
    assert!(matches!(decoder.decode_fallback(&fallback), Err(DecodeError::Unasked { sequence: 0 })));
    assert!(matches!(decoder.decode(&frame, &mut replica), Ok(Decoded::Verified(_))));
    assert!(matches!(decoder.decode_fallback(&fallback), Err(DecodeError::Unasked { sequence: 0 })));
    let again = decoder.decode(&frame, &mut replica);
    assert!(matches!(again, Err(DecodeError::Sequence { expected: 1, found: 0 })), "{again:?}");
}

#[test]
fn a_fallback_is_held_to_the_digest_that_was_announced_first() {
    let (stream, replica) = sample();
    let index = replica.index();
    let batch = encode(&stream, &index).remove(0);
    let mut changed = stream.clone();
    *changed.last_mut().unwrap() ^= 1;
    let changed_batch = encode(&changed, &index).remove(0);
    let mut decoder = Decoder::new().unwrap();
    let mismatch = decoder.decode(&read(&batch.frame).unwrap().unwrap(), &mut MemoryReplica::default()).unwrap();
    assert!(matches!(mismatch, Decoded::Mismatch { sequence: 0, teleported_pages: 13 }), "{mismatch:?}");
    let other = encode_fallback(&changed_batch.retained.unwrap()).unwrap();
    let refused = decoder.decode_fallback(&read(&other).unwrap().unwrap());
    assert!(matches!(refused, Err(DecodeError::NotAsAnnounced { sequence: 0 })), "{refused:?}");
    let forged = {
        // The right digest on the wrong bytes.
        let mut forged = other.clone();
        forged[4..50].copy_from_slice(&encode_fallback(batch.retained.as_ref().unwrap()).unwrap()[4..50]);
        decoder.decode_fallback(&read(&forged).unwrap().unwrap())
    };
    assert!(forged.is_err(), "{forged:?}");
    let right = encode_fallback(&batch.retained.unwrap()).unwrap();
    let verified = decoder.decode_fallback(&read(&right).unwrap().unwrap()).unwrap();
    assert!(verified.bytes == stream);
    assert_eq!((verified.counts.fallback, verified.counts.teleported), (13, 0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn any_bytes_after_the_header_are_an_error_or_a_frame(bytes in vec(any::<u8>(), 0..4000), cut in 1..500_usize) {
        let mut reader = FrameReader::new();
        let mut decoder = Decoder::new().unwrap();
        reader.push(&stream_header());
        for piece in bytes.chunks(cut) {
            reader.push(piece);
            while let Ok(Some(frame)) = reader.next_frame() {
                let _ = decoder.decode(&frame, &mut MemoryReplica::default());
            }
        }
    }

    #[test]
    fn any_operations_and_literals_are_decoded_or_refused(
        ops in vec(any::<u8>(), 0..200), literals in vec(any::<u8>(), 0..200), raw_length in 0..200_000_u64,
    ) {
        let _ = decode(&forge(1, 0, raw_length, &ops, &literals));
    }

    #[test]
    fn a_flipped_bit_is_never_taken_for_the_stream(at in any::<prop::sample::Index>(), bit in 0..8_u32) {
        let (stream, mut replica) = sample();
        let mut frame = encode(&stream, &replica.index()).remove(0).frame;
        let at = at.index(frame.len());
        frame[at] ^= 1 << bit;
        if let Ok(Some(frame)) = read(&frame) {
            match Decoder::new().unwrap().decode(&frame, &mut replica) {
                // zstd and varints have more than one form for the same; the bytes then are the same.
                Ok(Decoded::Verified(verified)) => prop_assert!(verified.bytes == stream),
                Ok(Decoded::Mismatch { .. }) | Err(_) => {}
            }
        }
    }
}

#[test]
fn a_page_run_cannot_announce_more_than_the_batch_holds() {
    let (stream, _) = sample();
    let batches = encode(&stream, &EmptyReplica);
    assert!(batches.iter().all(|batch| (batch.summary.raw_length as usize) <= BATCH_RAW_MAX));
    let pages = (BATCH_RAW_MAX / (8 + PAGE_SIZE)) as u64;
    let extent = [op(5, pages), varint(0)].concat();
    let error = decode(&forge(1, 0, BATCH_RAW_MAX as u64, &extent, &[])).unwrap_err();
    assert!(matches!(error, DecodeError::Ops { source: OpsError::RawLength { .. }, .. }), "{error:?}");
}
