//! The parser, case by case: what each kind of stream is taken for, and that nothing is lost of it.

#![allow(clippy::unwrap_used)]

mod common;

use common::StreamBuilder;
use pageport_teleport::qemu::{BlockName, Item, Mode, PageContent, PassThrough, StreamParser};
use pageport_teleport::{PAGE_SIZE, Page};

const BLOCKS: [(&str, u64); 2] = [("pc.ram", 1 << 24), ("pc.rom", 1 << 17)];
const CONTENT: Page = [7; PAGE_SIZE];

/// Parses at every cut that could matter, compares the bytes, gives the mode at the end and the pages.
fn parse(stream: &[u8]) -> (Mode, Vec<String>) {
    let mut results = Vec::new();
    for cut in [1, 2, 3, 5, 8, 13, 4096, usize::MAX] {
        let mut parser = StreamParser::new();
        let (mut bytes, mut pages) = (Vec::new(), Vec::new());
        let mut take = |item: Item<'_>| match item {
            Item::Verbatim(verbatim) => bytes.extend_from_slice(verbatim),
            Item::Page(record) => {
                let before = bytes.len();
                record.write(&mut bytes);
                assert_eq!(bytes.len() - before, record.length());
                let block = match record.header.block {
                    BlockName::Same => "",
                    BlockName::Named(name) => str::from_utf8(name).unwrap(),
                };
                let kind = match record.content {
                    PageContent::Fill(fill) => format!("fill {fill}"),
                    PageContent::Bytes(page) => format!("bytes {}", page[0]),
                };
                pages.push(format!("{block}@{} {kind}", record.header.page));
            }
        };
        for mut piece in stream.chunks(cut) {
            while !piece.is_empty() {
                let (used, item) = parser.next(piece);
                piece = &piece[used..];
                item.into_iter().for_each(&mut take);
            }
        }
        parser.finish().into_iter().for_each(&mut take);
        assert!(bytes == stream, "bytes differ when cut at {cut}");
        results.push((parser.mode(), pages));
    }
    results.dedup();
    assert_eq!(results.len(), 1, "the cut changes what is found: {results:?}");
    results.remove(0)
}

fn stream(build: impl FnOnce(&mut StreamBuilder)) -> Vec<u8> {
    let mut stream = StreamBuilder::preamble(&BLOCKS);
    build(&mut stream);
    stream.0
}

#[test]
fn records_of_all_kinds_are_told_apart() {
    let stream = stream(|stream| {
        stream.fill(0, Some("pc.ram"), 0).fill(1, None, 0xaa).page(2, None, &CONTENT).page(5, Some("pc.rom"), &CONTENT);
        stream.end_section().part().fill(6, None, 0).end_section();
        // The announcement of the switchover stands between sections.
        stream.u8(8).u32(0x000b_0000).u8(8).u32(0x0002_0003).raw(&[1, 2, 3]);
        stream.last_part().page(3, Some("pc.ram"), &[0; PAGE_SIZE]).end_section().raw(b"\x04device state");
    });
    let (mode, pages) = parse(&stream);
    assert_eq!(mode, Mode::DeviceState);
    let expected =
        ["pc.ram@0 fill 0", "@1 fill 170", "@2 bytes 7", "pc.rom@5 bytes 7", "@6 fill 0", "pc.ram@3 bytes 0"];
    assert_eq!(pages, expected);
}

#[test]
fn parts_of_the_configuration_that_do_not_matter_are_stepped_over() {
    let mut stream = StreamBuilder::default();
    stream.u32(0x5145_564d).u32(3).u8(7).u32(2).raw(b"pc");
    stream.u8(5).name(b"configuration/uuid").u32(1).raw(&[9; 16]);
    stream.u8(5).name(b"configuration/target-page-bits").u32(1).u32(12);
    stream.u8(1).u32(77).name(b"ram").u32(0).u32(4).u64(0x1004).name(b"m").u64(0x1000);
    stream.fill(0, Some("m"), 0).u64(0x10).u8(0x7e).u32(77);
    let (mode, pages) = parse(&stream.0);
    assert_eq!((mode, pages.len()), (Mode::Ram, 1));
}

#[test]
fn what_is_not_understood_passes_through_and_says_why() {
    use PassThrough as Why;
    let magic = |value: u32, version: u32| {
        let mut stream = StreamBuilder::default();
        stream.u32(value).u32(version).raw(&[3; 50]);
        stream.0
    };
    let opened = |build: &dyn Fn(&mut StreamBuilder)| {
        let mut stream = StreamBuilder::default();
        stream.u32(0x5145_564d).u32(3);
        build(&mut stream);
        stream.raw(&[6; 5000]);
        stream.0
    };
    let after_records = |build: &dyn Fn(&mut StreamBuilder)| {
        stream(|stream| {
            stream.fill(0, Some("pc.ram"), 0);
            build(stream);
            stream.raw(&[6; 5000]);
        })
    };
    let ram = |version: u32, total: u64| {
        opened(&move |stream| {
            stream.u8(1).u32(2).name(b"ram").u32(0).u32(version).u64(total).name(b"a").u64(0x2000);
        })
    };
    let cases = [
        (magic(0x1234_5678, 3), Why::Magic { found: 0x1234_5678 }),
        (magic(0x5145_564d, 4), Why::Version { found: 4 }),
        (
            opened(&|s| {
                s.u8(7).u32(4097);
            }),
            Why::Configuration,
        ),
        (
            opened(&|s| {
                s.u8(5).name(b"configuration/capabilities").u32(1);
            }),
            Why::Configuration,
        ),
        (
            opened(&|s| {
                s.u8(5).name(b"configuration/target-page-bits").u32(1).u32(14);
            }),
            Why::Configuration,
        ),
        (
            opened(&|s| {
                s.u8(5).name(b"configuration/target-page-bits").u32(1).u32(64);
            }),
            Why::Configuration,
        ),
        (
            opened(&|s| {
                s.u8(4).u32(0);
            }),
            Why::SectionKind { kind: 4 },
        ),
        (
            opened(&|s| {
                s.u8(2).u32(2);
            }),
            Why::SectionKind { kind: 2 },
        ),
        (
            opened(&|s| {
                s.u8(8).u32(0x0007_0004);
            }),
            Why::Command { command: 7 },
        ),
        (
            opened(&|s| {
                s.u8(1).u32(9).name(b"dirty-bitmap").u32(0).u32(1);
            }),
            Why::ForeignSection { id: 9 },
        ),
        (ram(5, 0x2004), Why::RamVersion { found: 5 }),
        (ram(4, 0x2000), Why::RamBlocks),
        (ram(4, 0x1004), Why::RamBlocks),
        (
            after_records(&|s| {
                s.u64(0x40 | 0x20);
            }),
            Why::RecordFlags { flags: 0x60 },
        ),
        (
            after_records(&|s| {
                s.u64(0x100);
            }),
            Why::RecordFlags { flags: 0x100 },
        ),
        (
            after_records(&|s| {
                s.u64(0x200);
            }),
            Why::RecordFlags { flags: 0x200 },
        ),
        (
            after_records(&|s| {
                s.u64(0x0a);
            }),
            Why::RecordFlags { flags: 0x0a },
        ),
        (
            after_records(&|s| {
                s.u64(0x1010);
            }),
            Why::RecordFlags { flags: 0x10 },
        ),
        (
            after_records(&|s| {
                s.fill(0, Some("other"), 0);
            }),
            Why::UnknownBlock,
        ),
        (
            stream(|s| {
                s.fill(0, None, 0);
            }),
            Why::UnknownBlock,
        ),
        (
            after_records(&|s| {
                s.u64(0x10).u8(0x7d);
            }),
            Why::Footer,
        ),
        (
            after_records(&|s| {
                s.u64(0x10).u8(0x7e).u32(3);
            }),
            Why::Footer,
        ),
        (
            after_records(&|s| {
                s.end_section().u8(2).u32(3);
            }),
            Why::ForeignSection { id: 3 },
        ),
        (
            after_records(&|s| {
                s.end_section().u8(7).u32(1);
            }),
            Why::SectionKind { kind: 7 },
        ),
    ];
    for (stream, why) in cases {
        assert_eq!(parse(&stream).0, Mode::PassingThrough(why));
    }
}

#[test]
fn a_machine_with_too_many_blocks_passes_through() {
    let names: Vec<String> = (0..1025).map(|number| format!("block{number}")).collect();
    let blocks = |count: usize| {
        let blocks: Vec<(&str, u64)> = names[..count].iter().map(|name| (name.as_str(), 4096)).collect();
        let mut stream = StreamBuilder::preamble(&blocks);
        stream.fill(0, Some("block3"), 0);
        stream.0
    };
    assert_eq!(parse(&blocks(1024)).0, Mode::Ram);
    assert_eq!(parse(&blocks(1025)).0, Mode::PassingThrough(PassThrough::RamBlocks));
}

#[test]
fn a_token_that_never_ends_is_given_back_at_the_end() {
    let whole = stream(|stream| {
        stream.page(1, Some("pc.ram"), &CONTENT);
    });
    let (mode, pages) = parse(&whole[..whole.len() - 1]);
    assert_eq!((mode, pages.len()), (Mode::Ram, 0));
    assert_eq!(parse(&whole).1.len(), 1);
}
