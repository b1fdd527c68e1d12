//! MurmurHash2 for 64 bits (its variant A).

/// The seed that libstdc++ has for `std::hash`, and Envoy for rings.
pub(super) const SEED: u64 = 0xc70f_6907;

const FACTOR: u64 = 0xc6a4_a793_5bd1_e995;

/// Hashes words of 8 bytes, little-endian, and what is left of them as one short word.
pub(super) fn hash(bytes: &[u8], seed: u64) -> u64 {
    let mixed = |value: u64| value ^ (value >> 47);
    let (words, rest) = bytes.as_chunks::<8>();
    let mut hash = seed ^ (bytes.len() as u64).wrapping_mul(FACTOR);
    for word in words {
        let word = mixed(u64::from_le_bytes(*word).wrapping_mul(FACTOR)).wrapping_mul(FACTOR);
        hash = (hash ^ word).wrapping_mul(FACTOR);
    }
    if !rest.is_empty() {
        let word = rest.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        hash = (hash ^ word).wrapping_mul(FACTOR);
    }
    mixed(mixed(hash).wrapping_mul(FACTOR))
}
