//! How fast the parts of the codec are on one core, and how small they make pages.
//!
//! `cargo bench -p pageport-teleport --bench codec --profile dev` prints a table; a file after `--` serves as literals. Each figure is the best of a few runs.

#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::hint::black_box;
use std::time::Instant;

use common::{MemoryReplica, StreamBuilder, page};
use pageport_teleport::index::EmptyReplica;
use pageport_teleport::qemu::StreamParser;
use pageport_teleport::{
    BlockDigest, BlockIndex, BlockLookup, BlockRef, Decoded, Decoder, EncodedBatch, Encoder, EncoderParams,
    FrameReader, Level, PAGE_SIZE, is_zero, wire,
};

const PAGES: u32 = 64 << 10;
const RUNS: usize = 3;

fn best(mut run: impl FnMut()) -> f64 {
    (0..RUNS)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

fn report(name: &str, bytes: usize, seconds: f64, remark: &str) {
    println!("{name:<44} {:>7.2} GB/s  {remark}", bytes as f64 / seconds / 1e9);
}

fn encode(stream: &[u8], index: &dyn BlockLookup, level: Level) -> Vec<EncodedBatch> {
    let mut encoder = Encoder::new(EncoderParams { level, ..EncoderParams::default() }).unwrap();
    let mut batches = Vec::new();
    for piece in stream.chunks(1 << 20) {
        encoder.push(piece, index).unwrap();
        batches.extend(std::iter::from_fn(|| encoder.next_batch()));
    }
    encoder.finish(index).unwrap();
    batches.extend(std::iter::from_fn(|| encoder.next_batch()));
    batches
}

/// Encodes as a worker does, which drops each batch once it is acknowledged.
fn encode_and_drop(stream: &[u8], index: &dyn BlockLookup, level: Level) -> usize {
    let mut encoder = Encoder::new(EncoderParams { level, ..EncoderParams::default() }).unwrap();
    let mut wire = 0;
    for piece in stream.chunks(1 << 20) {
        encoder.push(piece, index).unwrap();
        wire += std::iter::from_fn(|| encoder.next_batch()).map(|batch| batch.frame.len()).sum::<usize>();
    }
    encoder.finish(index).unwrap();
    wire + std::iter::from_fn(|| encoder.next_batch()).map(|batch| batch.frame.len()).sum::<usize>()
}

fn decode(batches: &[EncodedBatch], replica: &mut MemoryReplica) -> usize {
    let mut decoder = Decoder::new().unwrap();
    let mut reader = FrameReader::new();
    reader.push(&wire::stream_header());
    let mut bytes = 0;
    for batch in batches {
        reader.push(&batch.frame);
        let frame = reader.next_frame().unwrap().unwrap();
        match decoder.decode(&frame, replica).unwrap() {
            Decoded::Verified(verified) => bytes += verified.bytes.len(),
            Decoded::Mismatch { .. } => panic!("a batch does not verify"),
        }
    }
    bytes
}

fn main() {
    let mut stream = StreamBuilder::preamble(&[("pc.ram", 1 << 30)]);
    let mut image = Vec::new();
    for seed in 0..PAGES {
        let content = page(seed);
        stream.page(u64::from(seed), (seed == 0).then_some("pc.ram"), &content);
        image.extend_from_slice(&content);
    }
    let stream = stream.0;
    let length = stream.len();
    let mut replica = MemoryReplica::with_disk(0, image.clone());
    let (blocks, _) = image.as_chunks::<PAGE_SIZE>();

    let zeros = vec![0; image.len()];
    let (zero_blocks, _) = zeros.as_chunks::<PAGE_SIZE>();
    report("zero check", zeros.len(), best(|| assert!(zero_blocks.iter().all(is_zero))), "");
    let hash = || {
        blocks.iter().for_each(|block| {
            black_box(BlockDigest::of(block));
        })
    };
    report("hash of each page", image.len(), best(hash), "");
    let parse = || {
        let (mut parser, mut rest) = (StreamParser::new(), &stream[..]);
        while !rest.is_empty() {
            let (used, item) = parser.next(rest);
            black_box(item);
            rest = &rest[used..];
        }
    };
    report("parse", length, best(parse), "");

    let index = replica.index();
    let per_block = index.memory_bytes() as f64 / f64::from(PAGES);
    report(
        "build the index, hashing included",
        image.len(),
        best(|| {
            black_box(replica.index());
        }),
        "",
    );
    println!("{:<44} {per_block:>7.2} bytes a block", "index");

    let mut wire = 0;
    let seconds = best(|| wire = encode_and_drop(&stream, &index, Level::DEFAULT));
    let remark = format!("{:.3} bytes a page", wire as f64 / f64::from(PAGES));
    report("encode, in sequence on the disk", length, seconds, &remark);
    let batches = encode(&stream, &index, Level::DEFAULT);
    report("decode, in sequence on the disk", length, best(|| assert!(decode(&batches, &mut replica) == length)), "");

    // Extents of 8 blocks, scattered.
    let mut scattered = BlockIndex::new();
    scattered.add_disk(0, u64::from(PAGES)).unwrap();
    let mut scattered_image = vec![0; image.len()];
    let extents = PAGES / 8;
    for (place, block) in blocks.iter().enumerate() {
        let extent = (place as u32 / 8).wrapping_mul(0x9e37_79b1) % extents;
        let to = extent as usize * 8 + place % 8;
        scattered_image[to * PAGE_SIZE..(to + 1) * PAGE_SIZE].copy_from_slice(block);
        scattered.set(BlockRef { disk: 0, block: to as u64 }, BlockDigest::of(block)).unwrap();
    }
    let mut scattered_replica = MemoryReplica::with_disk(0, scattered_image);
    let batches = encode(&stream, &scattered, Level::DEFAULT);
    let wire: usize = batches.iter().map(|batch| batch.frame.len()).sum();
    let teleported: u64 = batches.iter().map(|batch| batch.counts.teleported).sum();
    let literal_share = 100.0 - 100.0 * teleported as f64 / f64::from(PAGES);
    let seconds = best(|| {
        black_box(encode_and_drop(&stream, &scattered, Level::DEFAULT));
    });
    let remark = format!("{:.3} bytes a page, {literal_share:.1} % literal", wire as f64 / f64::from(PAGES));
    report("encode, extents of 8 blocks", length, seconds, &remark);
    report(
        "decode, extents of 8 blocks",
        length,
        best(|| assert!(decode(&batches, &mut scattered_replica) == length)),
        "",
    );

    // Literals: made up, or the file given, such as a dump of a guest's memory.
    let stream = match std::env::args().skip(1).find(|argument| !argument.starts_with('-')) {
        None => stream,
        Some(path) => {
            let mut stream = StreamBuilder::preamble(&[("pc.ram", 1 << 40)]);
            stream.fill(0, Some("pc.ram"), 0);
            let dump = std::fs::read(path).unwrap();
            let (pages, _) = dump.as_chunks::<PAGE_SIZE>();
            for (place, content) in pages.iter().enumerate().filter(|(_, content)| !is_zero(content)) {
                stream.page(place as u64, None, content);
            }
            stream.0
        }
    };
    for level in [-5, -1, 1, 3, 6] {
        let level = Level::nearest(level);
        let mut wire = 0;
        let seconds = best(|| wire = encode_and_drop(&stream, &EmptyReplica, level));
        let remark = format!("ratio {:.2}", stream.len() as f64 / wire as f64);
        report(&format!("encode literally, level {}", level.get()), stream.len(), seconds, &remark);
    }
    let batches = encode(&stream, &EmptyReplica, Level::DEFAULT);
    let seconds = best(|| assert!(decode(&batches, &mut replica) == stream.len()));
    report("decode literals", stream.len(), seconds, "");
}
