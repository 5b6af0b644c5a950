//! Whatever the stream, the cuts, the index and the replica: what comes out is what went in.

#![allow(clippy::unwrap_used)]

mod common;

use common::{MemoryReplica, StreamBuilder, page, through};
use pageport_teleport::index::EmptyReplica;
use pageport_teleport::{KEPT_MEMORY, PAGE_SIZE, Page};
use proptest::collection::vec;
use proptest::prelude::*;

const BLOCKS: [(&str, u64); 3] = [("pc.ram", 1 << 30), ("vga.vram", 16 << 20), ("/rom@etc/acpi/tables", 1 << 17)];

/// One step of a generated stream.
#[derive(Clone, Debug)]
enum Step {
    /// Consecutive pages whose contents are consecutive seeds.
    Pages {
        at: u64,
        block: Option<usize>,
        seed: u32,
        count: u32,
    },
    Fills {
        at: u64,
        block: Option<usize>,
        fill: u8,
        count: u32,
    },
    ZeroPages {
        at: u64,
        count: u32,
    },
    NextPart,
    Garbage(Vec<u8>),
}

fn step() -> impl Strategy<Value = Step> {
    let block = prop::option::of(0..BLOCKS.len());
    let at = prop_oneof![4 => 0..2000_u64, 1 => 0..(1_u64 << 52) - 200];
    prop_oneof![
        8 => (at.clone(), block.clone(), 0..400_u32, 1..60_u32)
            .prop_map(|(at, block, seed, count)| Step::Pages { at, block, seed, count }),
        4 => (at.clone(), block, prop_oneof![3 => Just(0), 1 => any::<u8>()], 1..100_u32)
            .prop_map(|(at, block, fill, count)| Step::Fills { at, block, fill, count }),
        1 => (at, 1..10_u32).prop_map(|(at, count)| Step::ZeroPages { at, count }),
        2 => Just(Step::NextPart),
        1 => vec(any::<u8>(), 1..40).prop_map(Step::Garbage),
    ]
}

fn build(steps: &[Step], tail: &[u8]) -> Vec<u8> {
    let mut stream = StreamBuilder::preamble(&BLOCKS);
    stream.fill(0, Some("pc.ram"), 0);
    for step in steps {
        match step {
            Step::Pages { at, block, seed, count } => {
                for place in 0..*count {
                    let name = block.filter(|_| place == 0).map(|block| BLOCKS[block].0);
                    stream.page(at + u64::from(place), name, &page(seed + place));
                }
            }
            Step::Fills { at, block, fill, count } => {
                for place in 0..*count {
                    let name = block.filter(|_| place == 0).map(|block| BLOCKS[block].0);
                    stream.fill(at + u64::from(place), name, *fill);
                }
            }
            Step::ZeroPages { at, count } => {
                for place in 0..*count {
                    stream.page(at + u64::from(place), None, &[0; PAGE_SIZE]);
                }
            }
            Step::NextPart => {
                stream.end_section().part();
            }
            Step::Garbage(bytes) => {
                stream.raw(bytes);
            }
        }
    }
    stream.end_section().last_part().end_section().raw(tail);
    stream.0
}

/// An image that holds, in some order, the pages of some seeds, and holes.
fn image() -> impl Strategy<Value = Vec<u8>> {
    vec((0..420_u32, 1..50_u32, 0..3_usize), 0..12).prop_map(|runs| {
        let mut image = Vec::new();
        for (seed, count, holes) in runs {
            (0..count).for_each(|place| image.extend_from_slice(&page(seed + place)));
            image.resize(image.len() + holes * PAGE_SIZE, 0);
        }
        image
    })
}

#[test]
fn pages_that_lie_on_no_disk_are_told_whether_they_are_sent_or_were_kept() {
    let mut stream = StreamBuilder::preamble(&BLOCKS);
    for seed in 0..40 {
        stream.page(u64::from(seed), (seed == 0).then_some("pc.ram"), &page(seed));
    }
    stream.fill(40, None, 0).end_section();
    // Of these the first ten lie on a disk, and the next ten were kept.
    let image = |seeds: std::ops::Range<u32>| seeds.flat_map(page).collect::<Vec<u8>>();
    let mut replica = MemoryReplica::with_disk(0, image(0..10));
    replica.disks.insert(KEPT_MEMORY, image(10..20));
    let outcome = through(&stream.0, &[5000], &replica.index(), &mut replica);
    assert_eq!(outcome.bytes, stream.0);
    assert_eq!((outcome.counts.teleported, outcome.counts.literal), (20, 20));
    assert_eq!(outcome.memory_pages, image(10..40));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn any_stream_comes_out_as_it_went_in(
        steps in vec(step(), 0..30),
        tail in vec(any::<u8>(), 0..5000),
        cuts in vec(prop_oneof![1 => Just(0), 2 => 1..40_usize, 4 => 1..20_000_usize], 1..12),
        image in image(),
        corrupt in vec((any::<prop::sample::Index>(), 1..=255_u8), 0..4),
        cut_off in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut stream = build(&steps, &tail);
        if let Some(at) = cut_off {
            stream.truncate(at.index(stream.len()));
        }
        let cuts: Vec<usize> = if cuts.iter().all(|cut| *cut == 0) { vec![1000] } else { cuts };
        let replica = MemoryReplica::with_disk(3, image);
        let index = replica.index();
        let mut behind = replica.clone();
        for (at, change) in corrupt {
            let disk = behind.disks.get_mut(&3).unwrap();
            if !disk.is_empty() {
                let at = at.index(disk.len());
                disk[at] ^= change;
            }
        }
        let outcome = through(&stream, &cuts, &index, &mut behind);
        prop_assert!(outcome.bytes == stream, "the bytes differ");
    }

    #[test]
    fn any_bytes_at_all_come_out_as_they_went_in(bytes in vec(any::<u8>(), 0..20_000), cut in 1..3000_usize) {
        let outcome = through(&bytes, &[cut], &EmptyReplica, &mut MemoryReplica::default());
        prop_assert_eq!(outcome.bytes, bytes);
    }
}

/// A stream of `pages` consecutive pages of consecutive seeds.
fn sequential(pages: u32) -> (Vec<u8>, MemoryReplica) {
    let mut stream = StreamBuilder::preamble(&BLOCKS);
    let mut image = Vec::new();
    for seed in 0..pages {
        let content: Page = page(seed);
        stream.page(u64::from(seed), (seed == 0).then_some("pc.ram"), &content);
        image.extend_from_slice(&content);
    }
    stream.end_section().last_part().end_section().raw(&[1, 2, 3]);
    (stream.0, MemoryReplica::with_disk(0, image))
}

#[test]
fn a_sequential_file_costs_less_than_a_tenth_of_a_byte_a_page() {
    let (stream, mut replica) = sequential(4000);
    let outcome = through(&stream, &[1 << 20], &replica.index(), &mut replica);
    assert!(outcome.bytes == stream);
    assert_eq!(outcome.counts.teleported, 4000);
    assert_eq!(outcome.counts.literal + outcome.counts.fallback, 0);
    assert!(outcome.wire_bytes < 400 + 100, "{} bytes", outcome.wire_bytes);
}

#[test]
fn only_the_batch_of_a_changed_block_falls_back() {
    let (stream, mut replica) = sequential(4000);
    let index = replica.index();
    replica.disks.get_mut(&0).unwrap()[2500 * PAGE_SIZE + 17] ^= 1;
    let outcome = through(&stream, &[1 << 20], &index, &mut replica);
    assert!(outcome.bytes == stream);
    assert!(outcome.counts.fallback > 0 && outcome.counts.fallback <= 1030, "{:?}", outcome.counts);
    assert_eq!(outcome.counts.fallback + outcome.counts.teleported, 4000);
}

#[test]
fn a_replica_that_cannot_be_read_is_all_fallback() {
    let (stream, mut replica) = sequential(1500);
    let index = replica.index();
    replica.disks.clear();
    let outcome = through(&stream, &[4096], &index, &mut replica);
    assert!(outcome.bytes == stream);
    assert_eq!((outcome.counts.fallback, outcome.counts.teleported), (1500, 0));
}

#[test]
fn literals_are_compressed_across_batches() {
    let mut stream = StreamBuilder::preamble(&BLOCKS);
    stream.fill(0, Some("pc.ram"), 0);
    for round in 0..4 {
        (0..256).for_each(|seed| {
            stream.page(round * 256 + u64::from(seed), None, &page(seed));
        });
    }
    let outcome = through(&stream.0, &[4096, 4096, 0], &EmptyReplica, &mut MemoryReplica::default());
    assert!(outcome.bytes == stream.0);
    assert_eq!(outcome.counts.literal, 1024);
    assert!(outcome.batches > 100);
    // 1 MiB of contents that each come four times.
    assert!(outcome.wire_bytes < 1 << 20, "{} bytes", outcome.wire_bytes);
}

#[test]
fn the_level_may_change_between_any_two_batches() {
    use pageport_teleport::{Decoded, Decoder, Encoder, EncoderParams, FrameReader, Level, wire};
    let mut encoder = Encoder::new(EncoderParams::default()).unwrap();
    let mut decoder = Decoder::new().unwrap();
    let mut reader = FrameReader::new();
    reader.push(&wire::stream_header());
    let (stream, _) = sequential(200);
    let (mut bytes, mut lengths) = (Vec::new(), Vec::new());
    for (piece, level) in stream.chunks(100_000).zip([1, 1, -7, 15, 15, -1, 3, 99, -99].into_iter().cycle()) {
        encoder.set_level(Level::nearest(level));
        encoder.push(piece, &EmptyReplica).unwrap();
        encoder.flush().unwrap();
        while let Some(batch) = encoder.next_batch() {
            lengths.push(batch.frame.len());
            reader.push(&batch.frame);
            let frame = reader.next_frame().unwrap().unwrap();
            let decoded = decoder.decode(&frame, &mut MemoryReplica::default()).unwrap();
            let Decoded::Verified(verified) = decoded else { panic!("{decoded:?}") };
            bytes.extend_from_slice(&verified.bytes);
        }
    }
    let held_back = stream.len() - bytes.len();
    assert!(held_back < 5000 && stream.starts_with(&bytes), "{held_back} bytes held back");
    assert!(lengths[2] > lengths[3], "level -7 is no larger than level 15: {lengths:?}");
}
