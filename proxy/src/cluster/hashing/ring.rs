//! RING_HASH: every host has points on a ring of 2^64 numbers, and a hash belongs to the next point (ketama).

use std::fmt::Write as _;

use xxhash_rust::xxh64::xxh64;

use super::indexes::Indexes;
use super::{Counts, Weighted, key, murmur};
use crate::config::cluster::{HashFunction, RingHash};

/// A ring. Points and their hosts lie apart, so that a search touches points only.
#[derive(Debug)]
pub(super) struct Ring {
    /// Ascending.
    points: Box<[u64]>,
    hosts: Indexes,
    counts: Option<Counts>,
}

impl Ring {
    pub(super) fn new(config: &RingHash, hosts: &[Weighted]) -> Self {
        let smallest = hosts.iter().map(|host| host.share).fold(1.0, f64::min);
        // So many that the smallest host has a whole number of points, as long as that is not too many.
        let minimum = config.minimum_ring_size as f64;
        let scale = ((smallest * minimum).ceil() / smallest).min(config.maximum_ring_size as f64);
        let size = if hosts.is_empty() { 0 } else { scale.ceil() as u64 };
        let mut points: Vec<(u64, u32)> = Vec::with_capacity(size as usize);
        let mut counts = Counts { size, min_per_host: size, max_per_host: 0 };
        // Running sums: a host gets as many points as bring the whole to where it should be. Counted in floating point,
        // because the last point of a host can depend on its rounding.
        let (mut placed, mut wanted) = (0.0, 0.0);
        for (index, host) in hosts.iter().enumerate() {
            wanted += scale * host.share;
            let mut text = key(&host.endpoint, &config.hashing).into_string();
            text.push('_');
            let length = text.len();
            let mut number = 0;
            while placed < wanted {
                text.truncate(length);
                let _ = write!(text, "{number}"); // writing to a String does not fail
                points.push((point(config.hash_function, &text), index as u32));
                number += 1;
                placed += 1.0;
            }
            counts.min_per_host = counts.min_per_host.min(number);
            counts.max_per_host = counts.max_per_host.max(number);
        }
        points.sort_by_key(|(point, _)| *point);
        let indexes: Vec<u32> = points.iter().map(|(_, index)| *index).collect();
        Self {
            hosts: Indexes::new(&indexes, hosts.len()),
            points: points.into_iter().map(|(point, _)| point).collect(),
            counts: (!hosts.is_empty()).then_some(counts),
        }
    }

    /// The index of the host that a hash belongs to; beyond the hosts if there is none.
    pub(super) fn at(&self, hash: u64) -> usize {
        let next = self.points.partition_point(|point| *point < hash);
        let place = if next == self.points.len() { 0 } else { next };
        self.hosts.at(place).unwrap_or(usize::MAX)
    }

    pub(super) fn points(&self) -> &[u64] {
        &self.points
    }

    pub(super) fn hosts(&self) -> &Indexes {
        &self.hosts
    }

    pub(super) fn counts(&self) -> Option<Counts> {
        self.counts
    }
}

fn point(function: HashFunction, text: &str) -> u64 {
    match function {
        HashFunction::XxHash => xxh64(text.as_bytes(), 0),
        HashFunction::MurmurHash2 => murmur::hash(text.as_bytes(), murmur::SEED),
    }
}
