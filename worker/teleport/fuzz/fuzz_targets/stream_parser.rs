//! Any bytes, cut anywhere: the parser's items are those bytes, and the cut does not change what it finds.
//!
//! The first byte of the input is the length of the pieces.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pageport_teleport::qemu::{Item, Mode, StreamParser};

/// The bytes rebuilt, the pages found, and how it ended.
fn parse(stream: &[u8], cut: usize) -> (Vec<u8>, usize, Mode) {
    let mut parser = StreamParser::new();
    let (mut bytes, mut pages) = (Vec::new(), 0);
    let mut take = |item: Item<'_>| match item {
        Item::Verbatim(verbatim) => bytes.extend_from_slice(verbatim),
        Item::Page(record) => {
            pages += 1;
            record.write(&mut bytes);
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
    (bytes, pages, parser.mode())
}

fuzz_target!(|input: &[u8]| {
    let Some((cut, stream)) = input.split_first() else { return };
    let pieces = parse(stream, usize::from(*cut) + 1);
    assert!(pieces.0 == stream, "the bytes differ");
    assert_eq!(pieces, parse(stream, usize::MAX), "the cut changes what is found");
});
