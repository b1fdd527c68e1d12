use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use proptest::prelude::*;
use tokio::time::{advance, sleep};

use super::super::tests::{config as cluster_config, ip};
use super::*;
use crate::config::cluster::Discovery;
use crate::config::endpoint::EndpointAddress;
use crate::stats::Stats;

const SECOND: Duration = Duration::from_secs(1);
const NOBODY: [usize; 0] = [];

fn addresses(count: u16) -> Vec<EndpointAddress> {
    (1..=count).map(ip).collect()
}

fn detection(change: impl FnOnce(&mut OutlierDetection)) -> OutlierDetection {
    let mut config = OutlierDetection {
        interval: SECOND,
        base_ejection_time: 2 * SECOND,
        max_ejection_percent: 100,
        ..OutlierDetection::default()
    };
    change(&mut config);
    config
}

fn cluster(stats: &Stats, hosts: u16, config: OutlierDetection) -> Arc<Cluster> {
    successor(stats, hosts, Some(config), None)
}

fn successor(
    stats: &Stats,
    hosts: u16,
    config: Option<OutlierDetection>,
    previous: Option<&Cluster>,
) -> Arc<Cluster> {
    let mut built = cluster_config("c", Discovery::Static, &addresses(hosts));
    built.outlier_detection = config.map(Box::new);
    Cluster::build(Arc::new(built), stats, previous)
}

fn note(cluster: &Cluster, host: usize, outcome: Outcome, times: usize) {
    let host = Arc::clone(&cluster.endpoints()[host].host);
    (0..times).for_each(|_| cluster.outlier().unwrap().note(&host, outcome));
}

fn ejected(cluster: &Cluster) -> Vec<usize> {
    let hosts = cluster.endpoints();
    (0..hosts.len()).filter(|at| hosts[*at].host.has(HealthFlag::FailedOutlier)).collect()
}

/// Lets the watch look at what happened.
async fn turn() {
    sleep(Duration::from_micros(1)).await;
}

#[tokio::test(start_paused = true)]
async fn failures_in_a_row_eject_and_time_takes_back() {
    let stats = Stats::new(1);
    let cluster = cluster(&stats, 2, detection(|_| ()));
    let watch = Watch::start(&cluster, None).unwrap();
    sleep(SECOND / 2).await;
    note(&cluster, 0, Outcome::Failed, 4);
    note(&cluster, 0, Outcome::Connected, 1);
    note(&cluster, 0, Outcome::Failed, 4);
    turn().await;
    assert_eq!(ejected(&cluster), NOBODY);
    note(&cluster, 0, Outcome::TimedOut, 1);
    turn().await;
    assert_eq!(ejected(&cluster), [0]);
    let outlier = stats.outlier("c");
    assert_eq!(outlier.ejections_active().value(), 1);
    assert_eq!(outlier.ejections_enforced_total().value(), 1);
    assert_eq!(outlier.ejections_detected_consecutive_gateway_failure().value(), 1);
    assert_eq!(outlier.ejections_enforced_consecutive_gateway_failure().value(), 0);
    assert_eq!(cluster.stats().membership_healthy().value(), 1);
    // Taken back when an interval ends and the time is over: at 3 s.
    let tenth = SECOND / 10;
    sleep(24 * tenth).await;
    assert_eq!(ejected(&cluster), [0]);
    sleep(2 * tenth).await;
    assert_eq!(ejected(&cluster), NOBODY);
    assert_eq!((outlier.ejections_active().value(), cluster.stats().membership_healthy().value()), (0, 2));
    // The second time takes twice as long: from 3.1 s until after 7.1 s.
    note(&cluster, 0, Outcome::Failed, 5);
    sleep(48 * tenth).await;
    assert_eq!(ejected(&cluster), [0]);
    sleep(2 * tenth).await;
    assert_eq!(ejected(&cluster), NOBODY);
    // Each interval of good health makes up for one ejection: from 11.1 s until after 13.1 s.
    sleep(3 * SECOND).await;
    note(&cluster, 0, Outcome::Failed, 5);
    sleep(28 * tenth).await;
    assert_eq!(ejected(&cluster), [0]);
    sleep(2 * tenth).await;
    assert_eq!(ejected(&cluster), NOBODY);
    assert_eq!(outlier.ejections_enforced_total().value(), 3);
    drop(watch);
}

#[tokio::test(start_paused = true)]
async fn the_maximum_share_holds_unless_one_may_always_be_ejected() {
    let stats = Stats::new(1);
    let half = cluster(&stats, 4, detection(|config| config.max_ejection_percent = 50));
    let _watch = Watch::start(&half, None);
    turn().await;
    for host in 0..3 {
        note(&half, host, Outcome::Failed, 5);
        turn().await;
    }
    assert_eq!(ejected(&half), [0, 1]);
    assert_eq!(stats.outlier("c").ejections_overflow().value(), 2, "as a gateway failure, and as 5xx");
    // The count begins again, so that it is detected again.
    note(&half, 2, Outcome::Failed, 4);
    turn().await;
    assert_eq!(stats.outlier("c").ejections_overflow().value(), 2);

    for (always, expected) in [(false, 0), (true, 1)] {
        let stats = Stats::new(1);
        let config = detection(|config| {
            config.max_ejection_percent = 10;
            config.always_eject_one_host = always;
        });
        let cluster = cluster(&stats, 4, config);
        let _watch = Watch::start(&cluster, None);
        turn().await;
        for host in 0..4 {
            note(&cluster, host, Outcome::Failed, 5);
            turn().await;
        }
        assert_eq!(ejected(&cluster).len(), expected, "always: {always}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_not_enforced_is_only_counted() {
    let stats = Stats::new(1);
    let cluster = cluster(&stats, 1, detection(|config| config.enforcing.consecutive_5xx = 0));
    let _watch = Watch::start(&cluster, None);
    turn().await;
    note(&cluster, 0, Outcome::Failed, 5);
    turn().await;
    let outlier = stats.outlier("c");
    assert_eq!(ejected(&cluster), NOBODY);
    assert_eq!(outlier.ejections_detected_consecutive_5xx().value(), 1);
    assert_eq!((outlier.ejections_total().value(), outlier.ejections_enforced_total().value()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn local_origin_failures_count_apart_when_split() {
    let stats = Stats::new(1);
    let config = detection(|config| {
        config.split_external_local_origin_errors = true;
        config.consecutive_local_origin_failure = 2;
        config.consecutive_5xx = 1;
    });
    let cluster = cluster(&stats, 1, config);
    let _watch = Watch::start(&cluster, None);
    turn().await;
    note(&cluster, 0, Outcome::Failed, 1);
    turn().await;
    assert_eq!(ejected(&cluster), NOBODY);
    note(&cluster, 0, Outcome::Failed, 1);
    turn().await;
    assert_eq!(ejected(&cluster), [0]);
    let outlier = stats.outlier("c");
    assert_eq!(outlier.ejections_enforced_consecutive_local_origin_failure().value(), 1);
    assert_eq!(outlier.ejections_detected_consecutive_5xx().value(), 0);
}

#[tokio::test(start_paused = true)]
async fn hosts_that_succeed_less_often_are_ejected_after_an_interval() {
    let stats = Stats::new(1);
    let config = detection(|config| {
        config.success_rate.request_volume = 10;
        config.failure_percentage.request_volume = 10;
    });
    let cluster = cluster(&stats, 5, config);
    let _watch = Watch::start(&cluster, None);
    turn().await;
    for host in 0..5 {
        let bad = if host == 3 { 5 } else { 0 };
        for _ in 0..bad {
            note(&cluster, host, Outcome::Failed, 1);
            note(&cluster, host, Outcome::Connected, 1);
        }
        note(&cluster, host, Outcome::Connected, 10 - 2 * bad);
    }
    sleep(SECOND).await;
    assert_eq!(ejected(&cluster), [3]);
    let outlier = stats.outlier("c");
    assert_eq!(outlier.ejections_enforced_success_rate().value(), 1);
    let threshold = cluster.outlier().unwrap().threshold().unwrap();
    assert!((threshold.average - 90.0).abs() < 1e-9 && (threshold.ejection - 52.0).abs() < 1e-9);
    let rate = |host: usize| cluster.endpoints()[host].host.monitor().unwrap().history().success_rate;
    assert_eq!((rate(0), rate(3)), (Some(100.0), Some(50.0)));
    // An interval without enough traffic says nothing.
    sleep(SECOND).await;
    assert_eq!((cluster.outlier().unwrap().threshold(), rate(0)), (None, None));
}

#[tokio::test(start_paused = true)]
async fn hosts_that_fail_too_often_are_ejected_if_that_is_enforced() {
    let stats = Stats::new(1);
    let config = detection(|config| {
        config.consecutive_5xx = 1000;
        config.consecutive_gateway_failure = 1000;
        config.enforcing.success_rate = 0;
        config.enforcing.failure_percentage = 100;
        config.failure_percentage.minimum_hosts = 1;
        config.failure_percentage.request_volume = 20;
    });
    let cluster = cluster(&stats, 2, config);
    let _watch = Watch::start(&cluster, None);
    turn().await;
    note(&cluster, 0, Outcome::Connected, 4);
    note(&cluster, 0, Outcome::Failed, 16);
    note(&cluster, 1, Outcome::Connected, 3);
    note(&cluster, 1, Outcome::Failed, 17);
    sleep(SECOND).await;
    assert_eq!(ejected(&cluster), [1], "80 % are fewer than 85 %");
    assert_eq!(stats.outlier("c").ejections_enforced_failure_percentage().value(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_health_check_that_succeeds_ends_an_ejection() {
    for wanted in [true, false] {
        let stats = Stats::new(1);
        let config = detection(|config| config.successful_active_health_check_uneject_host = wanted);
        let cluster = cluster(&stats, 1, config);
        let _watch = Watch::start(&cluster, None);
        turn().await;
        note(&cluster, 0, Outcome::Failed, 5);
        turn().await;
        assert_eq!(ejected(&cluster), [0]);
        cluster.outlier().unwrap().health_check_passed(&cluster.endpoints()[0].host);
        turn().await;
        assert_eq!(ejected(&cluster).is_empty(), wanted);
    }
}

#[tokio::test(start_paused = true)]
async fn an_ejection_outlives_an_update_and_a_removal_of_the_endpoint() {
    let stats = Stats::new(1);
    let old = cluster(&stats, 2, detection(|_| ()));
    let watch = Watch::start(&old, None);
    turn().await;
    note(&old, 1, Outcome::Failed, 5);
    turn().await;
    let host = Arc::clone(&old.endpoints()[1].host);
    let new = successor(&stats, 2, Some(detection(|_| ())), Some(&old));
    drop(watch);
    let watch = Watch::start(&new, None);
    turn().await;
    assert_eq!(ejected(&new), [1]);
    assert_eq!(new.stats().membership_healthy().value(), 1);
    new.replace_endpoints(Vec::new());
    turn().await;
    assert_eq!(stats.outlier("c").ejections_active().value(), 0);
    new.set_resolved(|_, _| Vec::new());
    turn().await;
    assert_eq!(stats.outlier("c").ejections_active().value(), 1);
    sleep(3 * SECOND).await;
    assert_eq!(ejected(&new), NOBODY);
    drop(watch);

    // Without outlier detection nobody would take it back any more.
    host.set_health_flag(HealthFlag::FailedOutlier, true);
    let without = successor(&stats, 2, None, Some(&new));
    assert_eq!(ejected(&without), NOBODY);
    assert_eq!(without.stats().membership_healthy().value(), 2);
}

#[tokio::test(start_paused = true)]
async fn dropping_the_watch_ends_its_task() {
    let stats = Stats::new(1);
    let cluster = cluster(&stats, 1, detection(|_| ()));
    let watch = Watch::start(&cluster, None);
    turn().await;
    assert_eq!(Arc::strong_count(&cluster), 2);
    drop(watch);
    turn().await;
    assert_eq!(Arc::strong_count(&cluster), 1);
}

#[tokio::test(start_paused = true)]
async fn intervals_keep_their_rhythm_over_a_pause() {
    let start = Instant::now();
    advance(Duration::from_millis(4300)).await;
    let now = Instant::now();
    assert_eq!(following(start + SECOND, SECOND, now), start + 5 * SECOND);
    assert_eq!(following(start + 5 * SECOND, SECOND, now), start + 5 * SECOND);
    assert!(following(start + SECOND, Duration::from_nanos(1), now) > now);
}

#[derive(Clone, Debug)]
enum Happening {
    Fails(usize, usize),
    Succeeds(usize),
    Time,
}

fn happening(hosts: usize) -> impl Strategy<Value = Happening> {
    prop_oneof![
        3 => (0..hosts, 1..6usize).prop_map(|(host, times)| Happening::Fails(host, times)),
        1 => (0..hosts).prop_map(Happening::Succeeds),
        2 => Just(Happening::Time),
    ]
}

proptest! {
    /// Whatever happens: the share holds, gauge and flags agree, and everybody is back in the end.
    #[test]
    fn ejections_keep_to_the_rules(
        happenings in prop::collection::vec(happening(6), 1..80),
        percent in 0..=100u32,
        always in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let stats = Stats::new(1);
        let config = detection(|config| {
            config.max_ejection_percent = percent;
            config.always_eject_one_host = always;
            config.enforcing.consecutive_gateway_failure = 50;
            config.enforcing.consecutive_5xx = 70;
            config.success_rate.request_volume = 3;
        });
        let cluster = cluster(&stats, 6, config);
        let detector = cluster.outlier().unwrap();
        let (mut rng, hosts) = (Rng::with_seed(seed), members(&cluster));
        let mut now = Instant::now();
        let most = (6 * percent / 100).max(u32::from(always)) as usize;
        let time = |now: &mut Instant, rng: &mut Rng| {
            *now += SECOND;
            Round { detector, cluster: "c", hosts: &hosts, events: None, rng }.interval(*now);
        };
        for happening in happenings {
            match happening {
                Happening::Fails(host, times) => note(&cluster, host, Outcome::Failed, times),
                Happening::Succeeds(host) => note(&cluster, host, Outcome::Connected, 1),
                Happening::Time => time(&mut now, &mut rng),
            }
            Round { detector, cluster: "c", hosts: &hosts, events: None, rng: &mut rng }.look(now);
            let flagged = ejected(&cluster).len();
            prop_assert!(flagged <= most, "{flagged} of 6 with {percent} %");
            prop_assert_eq!(stats.outlier("c").ejections_active().value(), flagged as u64);
        }
        for _ in 0..=300 {
            time(&mut now, &mut rng);
        }
        prop_assert_eq!(ejected(&cluster), NOBODY);
        prop_assert!(!detector.wants_interval(&hosts) || detector.compares_rates(hosts.len()));
        prop_assert!(hosts.iter().all(|host| host.monitor().unwrap().history().multiplier == 0));
    }
}
