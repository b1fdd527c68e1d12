//! What a pick costs: `cargo bench -p tidegate-benches --bench load_balancer`.

use divan::Bencher;
use divan::counter::ItemsCount;
use tidegate::addr::OriginalDst;
use tidegate::cluster::{Cluster, WorkerBalancers};
use tidegate::config::cluster::{Discovery, LbPolicy};
use tidegate_benches::cluster;

fn main() {
    divan::main();
}

const LEAST_REQUEST: LbPolicy = LbPolicy::LeastRequest { choice_count: 2, active_request_bias: 1.0 };
const PICKS: usize = 1000;

fn picks(bencher: Bencher, cluster: &Cluster, destination: Option<OriginalDst>) {
    let mut balancers = WorkerBalancers::with_seed(1);
    bencher.counter(ItemsCount::new(PICKS)).bench_local(|| {
        for _ in 0..PICKS {
            divan::black_box(balancers.pick(cluster, destination, None));
        }
    });
}

#[divan::bench(args = [2, 100, 10_000])]
fn round_robin(bencher: Bencher, hosts: u16) {
    picks(bencher, &cluster(Discovery::Static, LbPolicy::RoundRobin, hosts, |_| 1), None);
}

#[divan::bench(args = [2, 100, 10_000])]
fn round_robin_weighted(bencher: Bencher, hosts: u16) {
    picks(
        bencher,
        &cluster(Discovery::Static, LbPolicy::RoundRobin, hosts, |port| u32::from(port % 100) + 1),
        None,
    );
}

#[divan::bench(args = [2, 100, 10_000])]
fn least_request(bencher: Bencher, hosts: u16) {
    picks(bencher, &cluster(Discovery::Static, LEAST_REQUEST, hosts, |_| 1), None);
}

#[divan::bench(args = [2, 100, 10_000])]
fn least_request_weighted(bencher: Bencher, hosts: u16) {
    picks(bencher, &cluster(Discovery::Static, LEAST_REQUEST, hosts, |port| u32::from(port % 100) + 1), None);
}

#[divan::bench(args = [2, 100, 10_000])]
fn random(bencher: Bencher, hosts: u16) {
    picks(bencher, &cluster(Discovery::Static, LbPolicy::Random, hosts, |_| 1), None);
}

#[divan::bench]
fn original_dst(bencher: Bencher) {
    let destination = Some(OriginalDst(([10, 0, 0, 1], 80).into()));
    picks(bencher, &cluster(Discovery::OriginalDst, LbPolicy::ClusterProvided, 0, |_| 1), destination);
}
