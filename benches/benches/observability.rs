//! What it costs to count and to log: `cargo bench -p tidegate-benches --bench observability`.

use divan::counter::ItemsCount;
use divan::{Bencher, black_box};
use tidegate::access_log::{Formatter, Now};
use tidegate::config::access_log::Format;
use tidegate::connection::record::LogType;
use tidegate::stats::{self, Format as StatsFormat, Query, Stats};
use tidegate_benches::{ISTIO, record};

fn main() {
    divan::main();
}

const TIMES: u32 = 1000;

#[divan::bench]
fn counter_inc(bencher: Bencher) {
    stats::set_shard(0);
    let stats = Stats::new(2);
    let cluster = stats.cluster("foo");
    bencher.counter(ItemsCount::new(TIMES)).bench_local(|| {
        for _ in 0..TIMES {
            black_box(&cluster).upstream_cx_total().inc();
        }
    });
}

#[divan::bench]
fn gauge_guard(bencher: Bencher) {
    stats::set_shard(0);
    let stats = Stats::new(2);
    let cluster = stats.cluster("foo");
    bencher.counter(ItemsCount::new(TIMES)).bench_local(|| {
        for _ in 0..TIMES {
            drop(black_box(&cluster).upstream_cx_active().guard());
        }
    });
}

#[divan::bench]
fn histogram_record(bencher: Bencher) {
    stats::set_shard(0);
    let stats = Stats::new(2);
    let cluster = stats.cluster("foo");
    bencher.counter(ItemsCount::new(TIMES)).bench_local(|| {
        for value in 0..TIMES {
            black_box(&cluster).upstream_cx_length_ms().record(u64::from(value));
        }
    });
}

#[divan::bench]
fn access_log_entry_in_istios_format(bencher: Bencher) {
    let format = Format::Text { format: ISTIO.into(), omit_empty_values: false };
    let formatter = Formatter::parse(&format).expect("a valid format");
    let record = record();
    let mut out = Vec::new();
    bencher.counter(ItemsCount::new(TIMES)).bench_local(|| {
        out.clear();
        for _ in 0..TIMES {
            formatter.format(black_box(&record), LogType::TcpConnectionEnd, Now::read(), &mut out);
        }
        out.len()
    });
}

/// A scrape with so many clusters, of which one in ten was used.
#[divan::bench(args = [100, 10_000], sample_count = 3, sample_size = 1)]
fn scrape_used(bencher: Bencher, clusters: usize) {
    scrape(bencher, clusters, &[("usedonly", "")]);
}

#[divan::bench(args = [100, 10_000], sample_count = 3, sample_size = 1)]
fn scrape_all(bencher: Bencher, clusters: usize) {
    scrape(bencher, clusters, &[]);
}

fn scrape(bencher: Bencher, clusters: usize, parameters: &[(&str, &str)]) {
    stats::set_shard(0);
    let stats = Stats::new(2);
    let before = resident();
    let clusters: Vec<_> = (0..clusters)
        .map(|index| {
            let cluster =
                stats.cluster(&format!("outbound|80||service-{index:05}.default.svc.cluster.local"));
            cluster.membership_total().set(2);
            if index % 10 == 0 {
                cluster.upstream_cx_total().inc();
            }
            cluster
        })
        .collect();
    eprintln!("{} clusters: {} KiB", clusters.len(), (resident().saturating_sub(before)) >> 10);
    let query = Query::parse(StatsFormat::Prometheus, parameters.iter().copied()).expect("a valid query");
    bencher.bench_local(|| {
        let mut out = std::io::sink();
        stats.write(&query, &mut out).expect("a sink takes everything");
    });
}

/// Resident bytes of this process.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    statm.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok()).unwrap_or(0) * 4096
}
