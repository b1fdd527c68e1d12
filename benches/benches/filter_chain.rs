//! What it costs to find a filter chain among many: `cargo bench -p tidegate-benches --bench filter_chain`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use divan::Bencher;
use divan::counter::ItemsCount;
use tidegate::config::filter_chain::{FilterChain, FilterChainMatch};
use tidegate::config::listener::Cidr;
use tidegate::listener::filter_chain::{MatchInput, Matcher};

fn main() {
    divan::main();
}

const LOOKUPS: u32 = 1000;

fn chains(count: u32, matches: impl Fn(u32) -> FilterChainMatch) -> Vec<Arc<FilterChain>> {
    (0..count)
        .map(|index| {
            Arc::new(FilterChain {
                name: format!("chain-{index}").into(),
                matches: matches(index),
                terminal: None,
                content: 0,
                ignored_filters: Vec::new(),
            })
        })
        .collect()
}

fn by_prefix(index: u32) -> FilterChainMatch {
    let address = IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + (index << 8)));
    FilterChainMatch { prefix_ranges: vec![Cidr { address, prefix_len: 24 }], ..FilterChainMatch::default() }
}

fn by_name(index: u32) -> FilterChainMatch {
    FilterChainMatch {
        server_names: vec![format!("*.s{index}.example.com").into()],
        transport_protocol: "tls".into(),
        ..FilterChainMatch::default()
    }
}

/// As Istio's inbound listener: by port, then by transport protocol and application protocol.
fn by_port(index: u32) -> FilterChainMatch {
    FilterChainMatch {
        destination_port: Some((index / 2) as u16),
        transport_protocol: if index.is_multiple_of(2) { "tls" } else { "raw_buffer" }.into(),
        ..FilterChainMatch::default()
    }
}

fn lookups(bencher: Bencher, chains: &[Arc<FilterChain>], names: &[String]) {
    let matcher = Matcher::build(chains, None).expect("the chains differ");
    let count = chains.len() as u32;
    bencher.counter(ItemsCount::new(LOOKUPS)).bench_local(|| {
        for lookup in 0..LOOKUPS {
            // Spread over all chains, in no order that a cache would like.
            let index = lookup.wrapping_mul(2_654_435_761) % count;
            let destination = Ipv4Addr::from(0x0a00_0007 + (index << 8));
            let source = SocketAddr::from(([10, 9, 8, 7], 4321));
            let found = matcher.find(&MatchInput {
                destination: SocketAddr::new(destination.into(), (index / 2) as u16),
                source,
                direct_source: source.ip(),
                transport_protocol: "tls",
                server_name: names.get(index as usize).map_or("", String::as_str),
                application_protocols: &[],
            });
            assert!(divan::black_box(found).is_some());
        }
    });
}

#[divan::bench(args = [1, 100, 10_000])]
fn destination_prefix(bencher: Bencher, count: u32) {
    lookups(bencher, &chains(count, by_prefix), &[]);
}

#[divan::bench(args = [1, 100, 10_000])]
fn server_name_suffix(bencher: Bencher, count: u32) {
    let names: Vec<_> = (0..count).map(|index| format!("a.b.s{index}.example.com")).collect();
    lookups(bencher, &chains(count, by_name), &names);
}

#[divan::bench(args = [2, 100, 10_000])]
fn port_and_transport(bencher: Bencher, count: u32) {
    lookups(bencher, &chains(count, by_port), &[]);
}
