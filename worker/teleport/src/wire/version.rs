//! Which versions of the format are spoken: this one and the one before.

/// What a worker sends.
pub const CURRENT: u8 = 1;
/// The first version there was.
const FIRST: u8 = 1;

/// Whether a stream of this version can be decoded.
pub fn accepts(version: u8) -> bool {
    (FIRST..=CURRENT).contains(&version) && CURRENT - version <= 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_version_and_the_one_before_it_are_accepted() {
        let accepted: Vec<u8> = (0..=u8::MAX).filter(|version| accepts(*version)).collect();
        assert_eq!(accepted.last(), Some(&CURRENT));
        assert!(accepted.len() <= 2);
        assert!(!accepts(0));
    }
}
