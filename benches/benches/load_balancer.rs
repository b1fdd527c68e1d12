//! What a pick costs: `cargo bench -p tidegate-benches --bench load_balancer`.

use std::sync::Arc;
use std::time::Duration;

use divan::Bencher;
use divan::counter::ItemsCount;
use tidegate::addr::OriginalDst;
use tidegate::cluster::{Cluster, WorkerBalancers};
use tidegate::config::cluster::{Cluster as Config, Discovery, Dns, LbPolicy, LookupFamily, Thresholds};
use tidegate::config::endpoint::{
    ClusterLoadAssignment, EndpointAddress, HealthStatus, LbEndpoint, Locality, LocalityLbEndpoints,
};
use tidegate::config::transport_socket::TransportSocketMatches;
use tidegate::stats::Stats;

fn main() {
    divan::main();
}

const LEAST_REQUEST: LbPolicy = LbPolicy::LeastRequest { choice_count: 2, active_request_bias: 1.0 };
const PICKS: usize = 1000;

fn cluster(
    discovery: Discovery,
    lb_policy: LbPolicy,
    hosts: u16,
    weight: impl Fn(u16) -> u32,
) -> Arc<Cluster> {
    let endpoint = |port: u16| LbEndpoint {
        address: EndpointAddress::Ip(([10, 0, 0, 1], port).into()),
        hostname: "".into(),
        load_balancing_weight: weight(port),
        health_status: HealthStatus::Healthy,
    };
    let config = Config {
        name: "bench".into(),
        alt_stat_name: None,
        discovery,
        eds: None,
        lb_policy,
        connect_timeout: Duration::from_secs(5),
        per_connection_buffer_limit_bytes: 1 << 20,
        load_assignment: ClusterLoadAssignment {
            localities: vec![LocalityLbEndpoints {
                locality: Locality::default(),
                priority: 0,
                load_balancing_weight: None,
                endpoints: (1..=hosts).map(endpoint).collect(),
            }],
            overprovisioning_factor: 140,
        },
        transport_sockets: TransportSocketMatches::default(),
        circuit_breakers: Thresholds::default(),
        healthy_panic_threshold: 50.0,
        upstream_keepalive: None,
        dns: Dns {
            refresh_rate: Duration::from_secs(5),
            respect_ttl: false,
            lookup_family: LookupFamily::Auto,
        },
        cleanup_interval: Duration::from_secs(5),
        tls: None,
        endpoint_removal: None,
        close_connections_on_host_health_failure: false,
    };
    Cluster::build(Arc::new(config), &Stats::new(1), None)
}

fn picks(bencher: Bencher, cluster: &Cluster, destination: Option<OriginalDst>) {
    let mut balancers = WorkerBalancers::with_seed(1);
    bencher.counter(ItemsCount::new(PICKS)).bench_local(|| {
        for _ in 0..PICKS {
            divan::black_box(balancers.pick(cluster, destination));
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
