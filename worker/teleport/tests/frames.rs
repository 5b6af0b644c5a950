//! The wire format, byte for byte. A change here is a new version of the format.

#![allow(clippy::unwrap_used)]

mod common;

use common::{MemoryReplica, StreamBuilder};
use pageport_teleport::wire::stream_header;
use pageport_teleport::{BlockDigest, BlockIndex, BlockRef, Encoder, EncoderParams, PAGE_SIZE, Page, encode_fallback};

const HELD: Page = [0x11; PAGE_SIZE];
const NEXT: Page = [0x22; PAGE_SIZE];

/// Reads annotated hex: what follows a `|` is a remark.
fn hex(annotated: &str) -> Vec<u8> {
    let digits: String =
        annotated.lines().flat_map(|line| line.split('|').next().unwrap().split_whitespace()).collect();
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
}

fn assert_golden(found: &[u8], annotated: &str) {
    let expected = hex(annotated);
    let show = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x} ")).collect::<String>();
    assert!(found == expected, "\nfound    {}\nexpected {}", show(found), show(&expected));
}

/// Two pages that lie at blocks 300 and 301 of disk 2, zeros of both kinds, a page of one byte.
fn batch() -> pageport_teleport::EncodedBatch {
    let mut index = BlockIndex::new();
    index.add_disk(2, 1000).unwrap();
    index.set(BlockRef { disk: 2, block: 300 }, BlockDigest::of(&HELD)).unwrap();
    index.set(BlockRef { disk: 2, block: 301 }, BlockDigest::of(&NEXT)).unwrap();
    let mut encoder = Encoder::new(EncoderParams::default()).unwrap();
    encoder.push(&StreamBuilder::preamble(&[("pc.ram", 1 << 24)]).0, &index).unwrap();
    encoder.flush().unwrap();
    encoder.next_batch().unwrap();
    let mut records = StreamBuilder::default();
    records.page(16, Some("pc.ram"), &HELD).page(17, None, &NEXT);
    records.fill(18, None, 0).fill(19, None, 0).fill(20, None, 0).fill(10, None, 0xff).page(11, None, &[0; PAGE_SIZE]);
    encoder.push(&records.0, &index).unwrap();
    encoder.flush().unwrap();
    encoder.next_batch().unwrap()
}

#[test]
fn the_stream_header() {
    assert_golden(&stream_header(), "50 47 50 54 | PGPT \n 01 | version");
}

#[test]
fn a_batch_of_references_and_zeros() {
    assert_golden(&batch().frame, GOLDEN_BATCH);
}

#[test]
fn its_fallback() {
    let fallback = encode_fallback(&batch().retained.unwrap()).unwrap();
    // How zstd packs the two pages is its own affair.
    let ops_end = hex(GOLDEN_FALLBACK).len();
    assert_golden(&fallback[4..4 + ops_end], GOLDEN_FALLBACK);
    let literals = zstd::bulk::decompress(&fallback[4 + ops_end + 1..], 2 * PAGE_SIZE).unwrap();
    assert!(literals == [HELD, NEXT].concat());
}

#[test]
fn the_golden_batch_decodes() {
    use pageport_teleport::{Decoded, Decoder, FrameReader};
    let mut image = vec![0; 300 * PAGE_SIZE];
    image.extend([HELD, NEXT].concat());
    let mut reader = FrameReader::new();
    reader.push(&stream_header());
    // As if it were the first batch.
    let mut frame = hex(GOLDEN_BATCH);
    frame[5] = 0;
    reader.push(&frame);
    let frame = reader.next_frame().unwrap().unwrap();
    let decoded = Decoder::new().unwrap().decode(&frame, &mut MemoryReplica::with_disk(2, image)).unwrap();
    let Decoded::Verified(verified) = decoded else { panic!("{decoded:?}") };
    assert_eq!((verified.counts.zero, verified.counts.teleported), (5, 2));
    assert_eq!(verified.bytes[..15], *b"\0\0\0\0\0\x01\0\x08\x06pc.ram");
}

const GOLDEN_BATCH: &str = "
    00 00 00 39             | length of what follows
    01                      | kind: batch
    01                      | sequence
    c3 60                   | raw length: 4111 + 4104 + 4 * 9 + 4104
    e4 db 54 19 d3 3b 87 41 d1 9f 04 77 14 4e 64 94
    b6 9b 90 e3 95 52 09 5d 04 db 7a 0e 4c 5d d4 72 | digest of the batch
    13                      | length of the operations
    67 70 63 2e 72 61 6d    | the next record names its block: pc.ram
    86 04                   | skip 16 pages
    28                      | the next extents are of disk 2
    15 d8 04                | 2 pages from the replica, from block 300 on
    21                      | 3 records of zero pages
    d6 02                   | skip 11 pages backwards
    02 ff                   | 1 record of a page of ff
    03                      | 1 page sent in full, all zero
    00                      | length of the literals
";

/// From the kind to the operations: the length before and the literals behind depend on zstd.
const GOLDEN_FALLBACK: &str = "
    02                      | kind: fallback
    01                      | sequence, raw length and digest as announced
    c3 60
    e4 db 54 19 d3 3b 87 41 d1 9f 04 77 14 4e 64 94
    b6 9b 90 e3 95 52 09 5d 04 db 7a 0e 4c 5d d4 72
    10                      | length of the operations
    67 70 63 2e 72 61 6d    | the next record names its block: pc.ram
    86 04                   | skip 16 pages
    14                      | 2 pages from the literals
    21                      | 3 records of zero pages
    d6 02                   | skip 11 pages backwards
    02 ff                   | 1 record of a page of ff
    03                      | 1 page sent in full, all zero
";
