//! MAGLEV: a table of a prime number of places, which hosts fill in turn, each in an order of its own (section 3.4 of
//! Google's paper).

use xxhash_rust::xxh64::xxh64;

use super::indexes::Indexes;
use super::{Counts, Weighted, key};
use crate::config::cluster;

/// A table.
#[derive(Debug)]
pub(super) struct Maglev {
    hosts: Indexes,
    counts: Option<Counts>,
}

/// A host while the table fills.
struct Filling {
    host: u32,
    share: f64,
    /// Its next turn is the round in which `share * round` reaches this.
    due: f64,
    /// The place that it would like next, and from each to the one after it.
    next: u64,
    step: u64,
    entries: u64,
}

const NOBODY: u32 = u32::MAX;

impl Maglev {
    pub(super) fn new(config: &cluster::Maglev, hosts: &[Weighted]) -> Self {
        let size = config.table_size;
        if hosts.is_empty() {
            return Self { hosts: Indexes::new(&[], 0), counts: None };
        }
        let mut filling = by_key(config, hosts);
        let places = fill(size, &mut filling);
        let entries = || filling.iter().map(|host| host.entries);
        let counts = Counts {
            size,
            min_per_host: entries().min().unwrap_or(0).min(size),
            max_per_host: entries().max().unwrap_or(0),
        };
        Self { hosts: Indexes::new(&places, hosts.len()), counts: Some(counts) }
    }

    /// The index of the host that a hash belongs to; beyond the hosts if there is none.
    pub(super) fn at(&self, hash: u64) -> usize {
        let place = hash.checked_rem(self.hosts.len() as u64).unwrap_or(0);
        self.hosts.at(place as usize).unwrap_or(usize::MAX)
    }

    pub(super) fn hosts(&self) -> &Indexes {
        &self.hosts
    }

    pub(super) fn counts(&self) -> Option<Counts> {
        self.counts
    }
}

/// The hosts in the order in which they take turns: not the one in which they are configured, which may change.
fn by_key(config: &cluster::Maglev, hosts: &[Weighted]) -> Vec<Filling> {
    let size = config.table_size;
    let mut keys: Vec<(Box<str>, u32)> = hosts
        .iter()
        .enumerate()
        .map(|(index, host)| (key(&host.endpoint, &config.hashing), index as u32))
        .collect();
    keys.sort_unstable();
    keys.iter()
        .map(|(key, host)| Filling {
            host: *host,
            share: hosts[*host as usize].share,
            due: 0.0,
            next: xxh64(key.as_bytes(), 0) % size,
            // A table of two places leaves no choice.
            step: xxh64(key.as_bytes(), 1) % (size - 1) + 1,
            entries: 0,
        })
        .collect()
}

/// Who has which place. The host of the largest share has a turn in every round, others by their share of that.
fn fill(size: u64, hosts: &mut [Filling]) -> Vec<u32> {
    let largest = hosts.iter().map(|host| host.share).fold(0.0, f64::max);
    let mut places = vec![NOBODY; size as usize];
    let mut left = size;
    for round in 1_u32.. {
        for host in &mut *hosts {
            if left == 0 {
                return places;
            }
            if f64::from(round) * host.share < host.due {
                continue;
            }
            host.due += largest;
            while places[host.next as usize] != NOBODY {
                host.next = (host.next + host.step) % size;
            }
            places[host.next as usize] = host.host;
            host.next = (host.next + host.step) % size;
            host.entries += 1;
            left -= 1;
        }
    }
    places
}
