//! The record that the files of this crate are made of: four little-endian words, a magic number, two words of content,
//! and FNV-1a of the three.
//!
//! Guarantees: what was read in parts from two writes, or was never whole, does not pass its check. Against accidents,
//! not against forgers.

/// Its size.
pub(crate) const RECORD_BYTES: usize = 32;

pub(crate) fn encode(magic: u64, first: u64, second: u64) -> [u8; RECORD_BYTES] {
    let mut record = [0; RECORD_BYTES];
    for (place, word) in record.chunks_exact_mut(8).zip([magic, first, second]) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    let check = fnv1a(&record[..24]);
    record[24..].copy_from_slice(&check.to_le_bytes());
    record
}

pub(crate) fn decode(record: &[u8; RECORD_BYTES], magic: u64) -> Option<(u64, u64)> {
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(record.as_chunks::<8>().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    let whole = words[0] == magic && words[3] == fnv1a(&record[..24]);
    whole.then_some((words[1], words[2]))
}

fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAGIC: u64 = u64::from_le_bytes(*b"PPLEASE1");

    #[test]
    fn the_record_is_these_bytes() {
        let record = encode(MAGIC, 1, 0x0102_0304_0506_0708);
        assert_eq!(&record[..24], b"PPLEASE1\x01\0\0\0\0\0\0\0\x08\x07\x06\x05\x04\x03\x02\x01");
        assert_eq!(record[24..], fnv1a(b"PPLEASE1\x01\0\0\0\0\0\0\0\x08\x07\x06\x05\x04\x03\x02\x01").to_le_bytes());
        assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8, "the published test vector");
    }

    #[test]
    fn a_record_torn_between_two_writes_is_one_of_the_two_or_none() {
        let words = [0, 1, 0xff, 0x1234_5678_9abc_def0, u64::MAX - 1];
        for (old, new) in words.iter().flat_map(|old| words.iter().map(move |new| (*old, *new))) {
            let (before, after) = (encode(MAGIC, 1, old), encode(MAGIC, 1, new));
            for cut in 0..=RECORD_BYTES {
                let torn: Vec<u8> = after[..cut].iter().chain(&before[cut..]).copied().collect();
                let torn: [u8; RECORD_BYTES] = torn.try_into().unwrap();
                let read = decode(&torn, MAGIC);
                assert!([None, Some((1, old)), Some((1, new))].contains(&read), "{old:x} {new:x} {cut}: {read:?}");
            }
        }
    }

    #[test]
    fn one_changed_bit_spoils_a_record() {
        let record = encode(MAGIC, 1, 77);
        for bit in 0..RECORD_BYTES * 8 {
            let mut changed = record;
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&changed, MAGIC), None, "bit {bit}");
        }
    }
}
