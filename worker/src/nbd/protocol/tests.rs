//! Golden bytes, every refusal, and: whatever comes, no panic and no unchecked length.

use super::*;
use proptest::prelude::*;

const SIZE: u64 = 1 << 20;

fn request(flags: u16, code: u16, offset: u64, length: u32) -> [u8; REQUEST_HEADER_BYTES] {
    let mut bytes = Vec::new();
    bytes.extend(REQUEST_MAGIC.to_be_bytes());
    bytes.extend(flags.to_be_bytes());
    bytes.extend(code.to_be_bytes());
    bytes.extend(7u64.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes.try_into().unwrap()
}

#[test]
fn the_greeting_offers_fixed_newstyle() {
    assert_eq!(&greeting(), b"NBDMAGICIHAVEOPT\x00\x03");
    assert_eq!(parse_client_flags([0, 0, 0, 3]), Ok(()));
    for flags in [0u32, 2, 4, 7, u32::MAX] {
        assert_eq!(parse_client_flags(flags.to_be_bytes()), Err(ProtocolError::ClientFlags { flags }));
    }
}

#[test]
fn options_as_qemu_sends_them() {
    let go = *b"IHAVEOPT\x00\x00\x00\x07\x00\x00\x00\x10";
    assert_eq!(parse_option_header(&go), Ok((OptionKind::Go, 16)));
    let data = b"\x00\x00\x00\x04disk\x00\x02\x00\x00\x00\x03";
    assert_eq!(parse_export_name(data), Some("disk"));
    for cut in 0..data.len() {
        assert_eq!(parse_export_name(&data[..cut]), None, "cut at {cut}");
    }
    assert_eq!(parse_export_name(b"\xff\xff\xff\xffdisk"), None);
    let long = *b"IHAVEOPT\x00\x00\x00\x07\x00\x00\x04\x01";
    assert!(matches!(parse_option_header(&long), Err(ProtocolError::TooLong { length: 1025, .. })));
}

#[test]
fn option_replies_have_their_golden_bytes() {
    let magic = b"\x00\x03\xe8\x89\x04\x55\x65\xa9";
    let golden = |rest: &[u8]| [magic, rest].concat();
    // option GO, type ACK, length 0
    assert_eq!(OptionReply::Ack.format(OptionKind::Go), golden(b"\x00\x00\x00\x07\x00\x00\x00\x01\x00\x00\x00\x00"));
    // option GO, type INFO, length 12: export, size, flags (has flags, flush, FUA, write zeroes)
    let export = b"\x00\x00\x00\x07\x00\x00\x00\x03\x00\x00\x00\x0c\x00\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x4d";
    let offered = |access| OptionReply::Export { size: SIZE, access }.format(OptionKind::Go);
    assert_eq!(offered(Access::ReadWrite), golden(export));
    // flags: has flags, read-only, flush, several connections
    let read_only = [&export[..export.len() - 2], b"\x01\x07"].concat();
    assert_eq!(offered(Access::ReadOnly), golden(&read_only));
    // option INFO, type INFO, length 14: block sizes 4 KiB, 4 KiB, 32 MiB
    let sizes =
        b"\x00\x00\x00\x06\x00\x00\x00\x03\x00\x00\x00\x0e\x00\x03\x00\x00\x10\x00\x00\x00\x10\x00\x02\x00\x00\x00";
    assert_eq!(OptionReply::BlockSize { minimum: 4096 }.format(OptionKind::Info), golden(sizes));
    let unsupported = b"\x00\x00\x00\x08\x80\x00\x00\x01\x00\x00\x00\x00";
    assert_eq!(OptionReply::Unsupported.format(OptionKind::Unknown(8)), golden(unsupported));
}

#[test]
fn replies_have_their_golden_bytes() {
    assert_eq!(format_reply(7, None), *b"\x67\x44\x66\x98\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x07");
    let full = format_reply(7, Some(WireError::Space));
    assert_eq!(full, *b"\x67\x44\x66\x98\x00\x00\x00\x1c\x00\x00\x00\x00\x00\x00\x00\x07");
}

#[test]
fn every_request_is_served_or_refused_with_its_error() {
    use Action::*;
    let table = [
        ((0, 0, 0, 4096), Read),
        ((0, 1, SIZE - 4096, 4096), Write { fua: false }),
        ((1, 1, 0, 4096), Write { fua: true }),
        ((1, 6, 0, SIZE as u32), WriteZeroes { fua: true }),
        ((2, 6, 0, 4096), WriteZeroes { fua: false }),
        ((0, 3, 0, 0), Flush),
        ((0, 2, 99, 99), Disconnect),
        ((0, 0, 0, 0), Refused(WireError::Invalid)),
        ((0, 0, SIZE, 4096), Refused(WireError::Invalid)),
        ((0, 1, SIZE, 4096), Refused(WireError::Space)),
        ((0, 6, u64::MAX - 4095, 4096), Refused(WireError::Space)),
        ((0, 1, 512, 4096), Refused(WireError::Invalid)),
        ((0, 1, 0, 100), Refused(WireError::Invalid)),
        ((0, 0, 0, MAX_PAYLOAD_BYTES + 4096), Refused(WireError::Invalid)),
        ((2, 1, 0, 4096), Refused(WireError::Invalid)),
        ((16, 6, 0, 4096), Refused(WireError::Unsupported)),
        ((0, 4, 0, 4096), Refused(WireError::Invalid)),
        ((0, 5, 0, 4096), Refused(WireError::Invalid)),
        ((0, 99, 0, 0), Refused(WireError::Invalid)),
    ];
    for ((flags, code, offset, length), action) in table {
        let parsed = parse_request(&request(flags, code, offset, length), SIZE, Access::ReadWrite).unwrap();
        assert_eq!(parsed.action, action, "flags {flags} code {code} offset {offset} length {length}");
        assert_eq!((parsed.cookie, parsed.payload), (7, if code == 1 { length } else { 0 }));
    }
}

#[test]
fn a_write_that_would_not_fit_ends_the_connection() {
    let refused = parse_request(&request(0, 1, 0, MAX_PAYLOAD_BYTES + 4096), u64::MAX, Access::ReadWrite);
    assert!(matches!(refused, Err(ProtocolError::TooLong { what: "write", .. })));
}

#[test]
fn what_would_change_a_read_only_export_is_refused_and_its_payload_still_belongs_to_it() {
    use Action::*;
    for ((flags, code), action) in [
        ((0, 0), Read),
        ((0, 3), Flush),
        ((0, 2), Disconnect),
        ((0, 1), Refused(WireError::Permission)),
        ((1, 1), Refused(WireError::Permission)),
        ((2, 6), Refused(WireError::Permission)),
    ] {
        let parsed = parse_request(&request(flags, code, 0, 4096), SIZE, Access::ReadOnly).unwrap();
        assert_eq!((parsed.action, parsed.payload), (action, if code == 1 { 4096 } else { 0 }), "{flags} {code}");
    }
}

#[test]
fn the_block_size_divides_the_export() {
    for (size, block) in [(SIZE, 4096), (SIZE + 512, 512), (SIZE + 1, 1), (0, 4096), (4096 * 3, 4096)] {
        assert_eq!(block_size(size), block, "{size}");
    }
}

proptest! {
    #[test]
    fn no_bytes_make_a_parser_panic_or_believe_a_length(
        option: [u8; OPTION_HEADER_BYTES],
        mut header: [u8; REQUEST_HEADER_BYTES],
        data in proptest::collection::vec(any::<u8>(), 0..64),
        size: u64,
        real_magic: bool,
    ) {
        if let Ok((_, length)) = parse_option_header(&option) {
            prop_assert!(length <= MAX_OPTION_BYTES);
        }
        if let Some(name) = parse_export_name(&data) {
            prop_assert!(name.len() <= MAX_NAME_BYTES);
        }
        if real_magic {
            header[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        }
        if let Ok(request) = parse_request(&header, size, Access::ReadWrite) {
            prop_assert!(request.payload <= MAX_PAYLOAD_BYTES);
            if matches!(request.action, Action::Read | Action::Write { .. } | Action::WriteZeroes { .. }) {
                prop_assert!(request.offset + u64::from(request.length) <= size);
            }
        }
    }
}
