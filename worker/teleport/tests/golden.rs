//! Streams captured from a real QEMU (`golden/capture.sh`): understood, or passed through, and always rebuilt.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;

use common::{MemoryReplica, through};
use pageport_teleport::index::EmptyReplica;
use pageport_teleport::qemu::{BlockName, Item, Mode, PageContent, PassThrough, StreamParser};
use pageport_teleport::{PageCounts, is_zero};

/// Most bytes that a golden stream may come to.
const STREAM_MAX: usize = 64 << 20;

fn golden(compressed: &[u8]) -> Vec<u8> {
    zstd::bulk::decompress(compressed, STREAM_MAX).unwrap()
}

const PAUSED: &[u8] = include_bytes!("golden/paused.zst");
const BOOTED: &[u8] = include_bytes!("golden/booted.zst");
const XBZRLE: &[u8] = include_bytes!("golden/xbzrle.zst");
const BITMAPS: &[u8] = include_bytes!("golden/bitmaps.zst");

/// What the parser found in a stream.
#[derive(Debug, Default)]
struct Found {
    pages: u64,
    zero: u64,
    blocks: BTreeSet<String>,
    image: Vec<u8>,
    last_mode: Option<Mode>,
    rebuilt: Vec<u8>,
}

fn parse(stream: &[u8], cut: usize) -> Found {
    let mut parser = StreamParser::new();
    let mut found = Found::default();
    for mut piece in stream.chunks(cut) {
        while !piece.is_empty() {
            let (used, item) = parser.next(piece);
            piece = &piece[used..];
            match item {
                None => assert!(piece.is_empty()),
                Some(Item::Verbatim(bytes)) => found.rebuilt.extend_from_slice(bytes),
                Some(Item::Page(record)) => {
                    record.write(&mut found.rebuilt);
                    found.pages += 1;
                    if let BlockName::Named(name) = record.header.block {
                        found.blocks.insert(String::from_utf8(name.to_vec()).unwrap());
                    }
                    match record.content {
                        PageContent::Fill(0) => found.zero += 1,
                        PageContent::Fill(_) => {}
                        PageContent::Bytes(page) if is_zero(page) => found.zero += 1,
                        PageContent::Bytes(page) => found.image.extend_from_slice(page),
                    }
                }
            }
        }
    }
    assert_eq!(parser.finish(), None);
    found.last_mode = Some(parser.mode());
    found
}

#[test]
fn streams_of_a_plain_migration_are_understood_to_the_last_page() {
    for (name, stream, megabytes, block) in
        [("paused", golden(PAUSED), 16, "pc.ram"), ("booted", golden(BOOTED), 32, "0000:00:01.0/vga.vram")]
    {
        for cut in [usize::MAX, 4099, 7] {
            let found = parse(&stream, cut);
            assert!(found.rebuilt == stream, "{name} at {cut}: differs");
            assert_eq!(found.last_mode, Some(Mode::DeviceState), "{name}");
            assert!(found.pages >= megabytes * 256, "{name}: {} pages", found.pages);
            assert!(found.zero > found.pages / 2, "{name}: {} zero pages of {}", found.zero, found.pages);
            assert!(found.image.len() > 50 * 4096, "{name}: {} bytes that are not zero", found.image.len());
            assert!(found.blocks.contains("pc.ram") && found.blocks.contains(block), "{name}: {:?}", found.blocks);
        }
    }
}

#[test]
fn streams_of_other_formats_pass_through() {
    let xbzrle = parse(&golden(XBZRLE), 10_000);
    assert!(matches!(
        xbzrle.last_mode,
        Some(Mode::PassingThrough(PassThrough::RecordFlags { flags })) if flags & 0x40 != 0
    ));
    assert!(xbzrle.pages > 1000, "the pages before the first of the other format are still told apart");
    assert!(xbzrle.rebuilt == golden(XBZRLE));

    let bitmaps = parse(&golden(BITMAPS), 10_000);
    assert!(matches!(bitmaps.last_mode, Some(Mode::PassingThrough(PassThrough::ForeignSection { .. }))));
    assert!(bitmaps.rebuilt == golden(BITMAPS));
}

#[test]
fn every_golden_stream_crosses_unchanged_with_and_without_a_replica() {
    for (name, compressed) in [("paused", PAUSED), ("booted", BOOTED), ("xbzrle", XBZRLE), ("bitmaps", BITMAPS)] {
        let stream = golden(compressed);
        let plain = through(&stream, &[65_536], &EmptyReplica, &mut MemoryReplica::default());
        assert!(plain.bytes == stream, "{name}");
        assert_eq!((plain.counts.teleported, plain.counts.fallback), (0, 0), "{name}");

        let found = parse(&stream, usize::MAX);
        let mut replica = MemoryReplica::with_disk(0, found.image);
        let held = through(&stream, &[65_536, 0, 10], &replica.index(), &mut replica);
        assert!(held.bytes == stream, "{name}");
        let PageCounts { zero, teleported, literal, fallback } = held.counts;
        assert_eq!((zero + teleported, literal, fallback), (found.pages, 0, 0), "{name}: a page was not found");
        assert!(held.wire_bytes < plain.wire_bytes || found.pages == 0, "{name}");
    }
}

#[test]
fn a_stream_cut_off_anywhere_still_crosses() {
    let stream = golden(PAUSED);
    for end in [1, 7, 8, 30, 57, 63, 64, 200, 5000, stream.len() / 2, stream.len() - 1] {
        let outcome = through(&stream[..end], &[997], &EmptyReplica, &mut MemoryReplica::default());
        assert!(outcome.bytes == stream[..end], "{end}");
    }
}
