//! What it costs to find a filter chain among many: `cargo bench -p tidegate-benches --bench filter_chain`.

use divan::Bencher;
use divan::counter::ItemsCount;
use tidegate_benches::{Connections, by_name, by_port, by_prefix};

fn main() {
    divan::main();
}

const LOOKUPS: u32 = 1000;

fn lookups(bencher: Bencher, connections: &Connections) {
    bencher.counter(ItemsCount::new(LOOKUPS)).bench_local(|| {
        for lookup in 0..LOOKUPS {
            assert!(divan::black_box(connections.find(lookup)).is_some());
        }
    });
}

#[divan::bench(args = [1, 100, 10_000])]
fn destination_prefix(bencher: Bencher, count: u32) {
    lookups(bencher, &Connections::new(count, by_prefix));
}

#[divan::bench(args = [1, 100, 10_000])]
fn server_name_suffix(bencher: Bencher, count: u32) {
    lookups(bencher, &Connections::new(count, by_name));
}

#[divan::bench(args = [2, 100, 10_000])]
fn port_and_transport(bencher: Bencher, count: u32) {
    lookups(bencher, &Connections::new(count, by_port));
}
