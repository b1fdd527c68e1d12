//! Longest prefix match.

use std::net::IpAddr;

use crate::config::listener::Cidr;

/// Longest prefix match as sorted intervals: each address belongs to the interval that starts at or before it.
#[derive(Debug, Default)]
pub(super) struct Prefixes {
    v4: Vec<Interval>,
    v6: Vec<Interval>,
}

#[derive(Clone, Copy, Debug)]
struct Interval {
    start: u128,
    child: Option<u32>,
}

impl Prefixes {
    pub(super) fn new(prefixes: impl Iterator<Item = (Cidr, u32)>) -> Self {
        let (v4, v6): (Vec<_>, Vec<_>) = prefixes.partition(|(cidr, _)| cidr.address.is_ipv4());
        Self { v4: intervals(v4, 32), v6: intervals(v6, 128) }
    }

    /// Where the intervals of IPv4 or of IPv6 start: between two of these addresses the same prefix is found for all.
    pub(super) fn starts(&self, v4: bool) -> impl Iterator<Item = IpAddr> {
        let of_v4 = |bits: u128| IpAddr::V4((bits as u32).into());
        let of_v6 = |bits: u128| IpAddr::V6(bits.into());
        let table = if v4 { &self.v4 } else { &self.v6 };
        table.iter().map(move |interval| if v4 { of_v4(interval.start) } else { of_v6(interval.start) })
    }

    pub(super) fn find(&self, ip: IpAddr) -> Option<u32> {
        let (table, bits) = match ip.to_canonical() {
            IpAddr::V4(ip) => (&self.v4, u128::from(ip.to_bits())),
            IpAddr::V6(ip) => (&self.v6, ip.to_bits()),
        };
        let after = table.partition_point(|interval| interval.start <= bits);
        table.get(after.checked_sub(1)?)?.child
    }
}

/// Cuts nested prefixes into disjoint intervals, each owned by its most specific prefix.
fn intervals(prefixes: Vec<(Cidr, u32)>, width: u32) -> Vec<Interval> {
    let max = u128::MAX >> (128 - width);
    let mut ranges: Vec<(u128, u8, u32)> = prefixes
        .into_iter()
        .map(|(cidr, child)| {
            let bits = match cidr.address {
                IpAddr::V4(ip) => u128::from(ip.to_bits()),
                IpAddr::V6(ip) => ip.to_bits(),
            };
            (bits, cidr.prefix_len, child)
        })
        .collect();
    ranges.sort_unstable();

    let mut out: Vec<Interval> = Vec::with_capacity(ranges.len() * 2);
    let mut emit = |start: u128, child: Option<u32>| match out.last_mut() {
        Some(last) if last.start == start => last.child = child,
        _ => out.push(Interval { start, child }),
    };
    // Prefixes that contain the current position, outermost first, with their last address.
    let mut open: Vec<(u128, u32)> = Vec::new();
    let close_before =
        |open: &mut Vec<(u128, u32)>, start: Option<u128>, emit: &mut dyn FnMut(u128, Option<u32>)| {
            while let Some((end, _)) = open.pop_if(|(end, _)| start.is_none_or(|start| *end < start)) {
                if end < max {
                    emit(end + 1, open.last().map(|(_, child)| *child));
                }
            }
        };
    for (start, len, child) in ranges {
        close_before(&mut open, Some(start), &mut emit);
        emit(start, Some(child));
        let host_bits = max.checked_shr(u32::from(len)).unwrap_or(0);
        open.push((start | host_bits, child));
    }
    close_before(&mut open, None, &mut emit);
    out
}
