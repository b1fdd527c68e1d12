//! Which filter chains the connections to a listener choose: what is known of them at connect(2) is where they go and where
//! they come from.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use tidegate_common::selector::MAX_RANGES;

use super::{Obstacle, Obstacles, canonical};
use crate::listener::filter_chain::SourceRange;
use crate::listener::{Chain, Listener};

/// The first and the last address of `::ffff:0:0/96`, where IPv4 is in the kernel.
const MAPPED: (Ipv6Addr, Ipv6Addr) =
    (Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0xffff, 0xffff));

/// Source addresses whose connections have the same chain. It ends where the next one starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sources {
    /// The first of them; IPv4 is mapped. Of the first range: `::`.
    pub first: Ipv6Addr,
    /// Position of the chain among those of the plan. None: nothing matches, which the proxy tells them.
    pub chain: Option<usize>,
}

/// The chains that are chosen, each of them once, and by whom.
pub(super) struct Chosen<'a> {
    pub(super) chains: Vec<&'a Arc<Chain>>,
    /// In ascending order, at least one, two in a row differ. Addresses of a family that the listener has no address of
    /// don't occur, and are anywhere.
    pub(super) sources: Vec<Sources>,
}

type Ranges<'a> = Vec<SourceRange<&'a Arc<Chain>>>;

/// None: obstacles were found.
pub(super) fn of<'a>(listener: &'a Listener, found: &mut Obstacles) -> Option<Chosen<'a>> {
    let (mut v4, mut v6): (Option<Ranges<'_>>, Option<Ranges<'_>>) = (None, None);
    let mut is_decided = true;
    let mut undecided = |obstacle| {
        is_decided = false;
        found.add(obstacle);
    };
    for address in listener.config.addresses.iter().map(|address| canonical(*address)) {
        let of_family = if address.is_ipv4() { &mut v4 } else { &mut v6 };
        match listener.chains_by_source(address) {
            Err(field) => undecided(Obstacle::ChainMatch(field)),
            Ok(ranges) if ranges.iter().all(|range| range.chain.is_none()) => {
                undecided(Obstacle::NoChain(address));
            }
            Ok(ranges) if of_family.as_ref().is_some_and(|others| !are_same(others, &ranges)) => {
                undecided(Obstacle::DifferentChains);
            }
            Ok(ranges) => *of_family = Some(ranges),
        }
    }
    for address in listener.config.addresses.iter().map(|address| canonical(*address)) {
        if address.port() == 0 {
            found.add(Obstacle::NoPort(address));
        }
    }
    if !is_decided {
        return None;
    }
    let chosen = Chosen::of(&v4.unwrap_or_default(), &v6.unwrap_or_default());
    if chosen.sources.len() > MAX_RANGES as usize {
        found.add(Obstacle::TooManySources(chosen.sources.len()));
        return None;
    }
    Some(chosen)
}

fn are_same(some: &Ranges<'_>, others: &Ranges<'_>) -> bool {
    let id = |range: &SourceRange<&Arc<Chain>>| (range.first, range.chain.map(|chain| chain.id));
    some.iter().map(id).eq(others.iter().map(id))
}

impl<'a> Chosen<'a> {
    /// Both families in one order.
    fn of(v4: &Ranges<'a>, v6: &Ranges<'a>) -> Self {
        let mut this = Self { chains: Vec::new(), sources: Vec::new() };
        let (first_mapped, last_mapped) = MAPPED;
        let after_mapped = Ipv6Addr::from_bits(last_mapped.to_bits() + 1);
        let mapped = |ip: IpAddr| match ip {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        };
        let mut across = None;
        for range in v6 {
            let first = mapped(range.first);
            if first <= after_mapped {
                across = Some(range.chain);
            }
            if first < first_mapped {
                this.add(first, range.chain);
            }
        }
        for range in v4 {
            this.add(mapped(range.first), range.chain);
        }
        if let Some(chain) = across {
            this.add(after_mapped, chain);
        }
        for range in v6.iter().filter(|range| mapped(range.first) > after_mapped) {
            this.add(mapped(range.first), range.chain);
        }
        if let Some(first) = this.sources.first_mut() {
            first.first = Ipv6Addr::UNSPECIFIED;
        }
        this
    }

    fn add(&mut self, first: Ipv6Addr, chain: Option<&'a Arc<Chain>>) {
        let chain = chain.map(|chain| {
            self.chains.iter().position(|other| other.id == chain.id).unwrap_or_else(|| {
                self.chains.push(chain);
                self.chains.len() - 1
            })
        });
        if self.sources.last().is_none_or(|last| last.chain != chain) {
            self.sources.push(Sources { first, chain });
        }
    }
}

#[cfg(test)]
mod tests;
