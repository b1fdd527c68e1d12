//! What it costs to find who owns an original destination: `cargo bench -p tidegate-benches --bench original_dst`.

use divan::Bencher;
use divan::counter::ItemsCount;
use tidegate_benches::Owners;

fn main() {
    divan::main();
}

const LOOKUPS: u32 = 1000;

#[divan::bench(args = [1, 100, 10_000])]
fn own_address(bencher: Bencher, count: u32) {
    let owners = Owners::new(count);
    bencher.counter(ItemsCount::new(LOOKUPS)).bench_local(|| {
        for lookup in 0..LOOKUPS {
            assert!(divan::black_box(owners.exact(lookup)).is_some());
        }
    });
}

#[divan::bench(args = [1, 100, 10_000])]
fn wildcard_address(bencher: Bencher, count: u32) {
    let owners = Owners::new(count);
    bencher.counter(ItemsCount::new(LOOKUPS)).bench_local(|| {
        for lookup in 0..LOOKUPS {
            assert!(divan::black_box(owners.wildcard(lookup)).is_some());
        }
    });
}
