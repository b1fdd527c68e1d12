use std::net::TcpListener as StdListener;
use std::sync::atomic::{AtomicUsize, Ordering};

use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{HeaderMap, Request, Response, server::conn as server};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::super::tests::config as cluster_config;
use super::*;
use crate::config::cluster::Discovery;
use crate::config::endpoint::EndpointAddress;
use crate::config::health_check::{HealthCheckRequest, HttpHealthCheck, Intervals, TcpHealthCheck};
use crate::stats::Stats;

const INTERVAL: Duration = Duration::from_millis(10);

fn config() -> HealthCheck {
    HealthCheck {
        timeout: Duration::from_secs(5),
        intervals: Intervals {
            healthy: INTERVAL,
            unhealthy: INTERVAL,
            unhealthy_edge: INTERVAL,
            healthy_edge: INTERVAL,
            no_traffic: INTERVAL,
            no_traffic_healthy: INTERVAL,
            initial_jitter: Duration::ZERO,
            jitter: Duration::ZERO,
            jitter_percent: 0,
            min: Duration::from_millis(1),
            max: Duration::MAX,
        },
        unhealthy_threshold: 2,
        healthy_threshold: 2,
        reuse_connection: true,
        event_logs: Vec::new(),
        always_log_failures: false,
        always_log_success: false,
        ignore_new_hosts: false,
        remove_healthy_hosts: false,
        check: Check::Tcp(TcpHealthCheck::default()),
    }
}

fn asking(send: &str, receive: &str) -> HealthCheck {
    let tcp = TcpHealthCheck { send: send.into(), receive: vec![receive.into()], proxy_protocol: None };
    HealthCheck { check: Check::Tcp(tcp), ..config() }
}

fn surroundings() -> Surroundings {
    Surroundings { mark_own: Arc::new(|_| Ok(())), events: Vec::new() }
}

/// Answers each request with the next of its statuses, and the last one for ever. Counts connections.
struct Web {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
    seen: Arc<Mutex<Vec<String>>>,
    _task: JoinSet<()>,
}

impl Web {
    async fn start(http2: bool, answers: &'static [(u16, &'static str)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (connections, seen) = (Arc::<AtomicUsize>::default(), Arc::<Mutex<Vec<String>>>::default());
        let (count, requests) = (Arc::clone(&connections), Arc::clone(&seen));
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut served = JoinSet::new();
            loop {
                let stream = TokioIo::new(listener.accept().await.unwrap().0);
                count.fetch_add(1, Ordering::Relaxed);
                let requests = Arc::clone(&requests);
                let service = service_fn(move |request: Request<Incoming>| {
                    let mut requests = requests.lock().unwrap();
                    let (status, header) = answers[requests.len().min(answers.len() - 1)];
                    requests.push(format!(
                        "{} {} {:?} {:?}",
                        request.method(),
                        request.uri(),
                        request.version(),
                        request.headers().get("host")
                    ));
                    let response = Response::builder().status(status).header(header, "close");
                    std::future::ready(response.body(Full::new(Bytes::from("hello"))))
                });
                served.spawn(async move {
                    // It ends when the client does.
                    if http2 {
                        let serving = server::http2::Builder::new(TokioExecutor::new());
                        let _ = serving.serve_connection(stream, service).await;
                    } else {
                        let _ = server::http1::Builder::new().serve_connection(stream, service).await;
                    }
                });
            }
        });
        Self { address, connections, seen, _task: task }
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    fn first(&self) -> String {
        self.seen.lock().unwrap()[0].clone()
    }
}

fn http(check: HttpHealthCheck) -> HealthCheck {
    HealthCheck { check: Check::Http(Box::new(check)), ..config() }
}

fn get() -> HttpHealthCheck {
    HttpHealthCheck::get("c".parse().unwrap(), "/healthz".parse().unwrap())
}

struct Checked {
    stats: Arc<Stats>,
    cluster: Arc<Cluster>,
    watch: Option<Watch>,
}

impl Checked {
    fn start(check: Option<HealthCheck>, addresses: &[SocketAddr], previous: Option<&Self>) -> Self {
        let stats = previous.map_or_else(|| Stats::new(1), |previous| Arc::clone(&previous.stats));
        let addresses: Vec<_> = addresses.iter().copied().map(EndpointAddress::Ip).collect();
        let mut config = cluster_config("c", Discovery::Static, &addresses);
        config.health_check = check.map(Box::new);
        let former = previous.map(|previous| &*previous.cluster);
        let cluster = Cluster::build(Arc::new(config), &stats, former);
        let watch = Watch::start(&cluster, surroundings());
        Self { stats, cluster, watch }
    }

    async fn first_round(&self) {
        self.watch.as_ref().unwrap().first_round(&self.cluster).await;
    }

    fn healthy(&self) -> u64 {
        self.cluster.stats().membership_healthy().value()
    }

    fn attempts(&self) -> u64 {
        self.stats.health_check("c").attempt().value()
    }

    fn flags(&self, host: usize) -> u32 {
        let checks = HealthFlag::FailedActive as u32
            | HealthFlag::PendingActive as u32
            | HealthFlag::ActiveTimeout as u32
            | HealthFlag::PendingRemoval as u32;
        self.cluster.endpoints()[host].host.health_flags() & checks
    }
}

/// Waits for what the watch does next; it hangs when that never comes.
async fn until(condition: impl Fn() -> bool) {
    while !condition() {
        sleep(Duration::from_millis(2)).await;
    }
}

/// An address that refuses.
fn refusing() -> SocketAddr {
    StdListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// Sends back what it gets, with `prefix` before it. Counts connections.
struct Echo {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Echo {
    async fn start(prefix: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&connections);
        let task = tokio::spawn(async move {
            let mut served = JoinSet::new();
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                count.fetch_add(1, Ordering::Relaxed);
                served.spawn(async move {
                    let mut buffer = [0; 64];
                    while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                        let answer = [prefix.as_bytes(), &buffer[..count]].concat();
                        if stream.write_all(&answer).await.is_err() {
                            break;
                        }
                    }
                });
            }
        });
        Self { address, connections, task }
    }

    /// Listens no more, and closes its connections.
    async fn stop(self) {
        self.task.abort();
        let _ = self.task.await;
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

#[tokio::test]
async fn hosts_begin_as_failed_and_the_first_round_tells() {
    let echo = Echo::start("").await;
    let checked = Checked::start(Some(config()), &[echo.address, refusing()], None);
    assert_eq!((checked.healthy(), checked.flags(0)), (0, HealthFlag::FailedActive as u32));
    checked.first_round().await;
    assert_eq!((checked.healthy(), checked.flags(0)), (1, 0));
    assert_eq!(checked.flags(1), HealthFlag::FailedActive as u32);
    let stats = checked.stats.health_check("c");
    until(|| stats.success().value() > 2 && stats.network_failure().value() > 2).await;
    assert_eq!(stats.healthy().value(), 1);
    assert_eq!(stats.failure().value(), stats.network_failure().value());
    assert!(echo.connections() > 2, "each check without anything to send has a connection of its own");
}

#[tokio::test]
async fn a_host_that_goes_away_fails_and_is_used_again_when_it_is_back() {
    let echo = Echo::start("").await;
    let address = echo.address;
    let checked = Checked::start(Some(config()), &[address], None);
    checked.first_round().await;
    assert_eq!(checked.healthy(), 1);
    echo.stop().await;
    until(|| checked.healthy() == 0).await;
    assert_eq!(checked.flags(0), HealthFlag::FailedActive as u32);
    let back = TcpListener::bind(address).await.unwrap();
    until(|| checked.healthy() == 1).await;
    drop(back);
}

#[tokio::test]
async fn an_answer_is_expected_and_the_connection_is_kept() {
    let echo = Echo::start("say ").await;
    let checked = Checked::start(Some(asking("AB", "y AB")), &[echo.address], None);
    checked.first_round().await;
    assert_eq!(checked.healthy(), 1);
    until(|| checked.attempts() > 5).await;
    assert_eq!((echo.connections(), checked.healthy()), (1, 1));
    // A kept connection that ends is a failure.
    let before = checked.stats.health_check("c").failure().value();
    assert_eq!(before, 0);
    echo.stop().await;
    until(|| checked.healthy() == 0).await;
}

#[tokio::test]
async fn connections_are_not_kept_if_they_are_not_to_be() {
    let echo = Echo::start("").await;
    let check = HealthCheck { reuse_connection: false, ..asking("AB", "AB") };
    let checked = Checked::start(Some(check), &[echo.address], None);
    until(|| checked.attempts() > 5).await;
    assert!(echo.connections() >= 5);
}

#[tokio::test]
async fn a_status_tells_and_the_connection_is_kept() {
    let web = Web::start(false, &[(200, "x-a")]).await;
    let body = HttpHealthCheck { receive: vec![b"el".to_vec()], ..get() };
    let checked = Checked::start(Some(http(body)), &[web.address], None);
    checked.first_round().await;
    assert_eq!(checked.healthy(), 1);
    until(|| checked.attempts() > 5).await;
    assert_eq!((web.connections(), checked.healthy()), (1, 1));
    assert_eq!(web.first(), "GET /healthz HTTP/1.1 Some(\"c\")");
}

#[tokio::test]
async fn http2_is_spoken_where_that_is_wanted() {
    let web = Web::start(true, &[(200, "x-a")]).await;
    let check = HttpHealthCheck { http2: true, host: "h.example".parse().unwrap(), ..get() };
    let checked = Checked::start(Some(http(check)), &[web.address], None);
    checked.first_round().await;
    assert_eq!(checked.healthy(), 1);
    until(|| checked.attempts() > 5).await;
    assert_eq!(web.connections(), 1);
    assert_eq!(web.first(), "GET http://h.example/healthz HTTP/2.0 None");
}

/// A server of `grpc.health.v1.Health`: what it says of itself changes with each call, and stays at the last one.
#[tokio::test]
async fn a_grpc_server_says_whether_it_serves() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let seen = Arc::<Mutex<Vec<String>>>::default();
    let requests = Arc::clone(&seen);
    let mut task = JoinSet::new();
    task.spawn(async move {
        let mut served = JoinSet::new();
        loop {
            let stream = TokioIo::new(listener.accept().await.unwrap().0);
            let requests = Arc::clone(&requests);
            let service = service_fn(move |request: Request<Incoming>| {
                let mut requests = requests.lock().unwrap();
                let status = if requests.len() < 3 { 1 } else { 2 };
                requests.push(format!("{} {}", request.method(), request.uri()));
                let trailers = HeaderMap::from_iter([("grpc-status".parse().unwrap(), "0".parse().unwrap())]);
                let message = Full::new(Bytes::from(vec![0, 0, 0, 0, 2, 8, status]));
                let body = message.with_trailers(std::future::ready(Some(Ok(trailers))));
                std::future::ready(Ok::<_, std::convert::Infallible>(Response::new(body)))
            });
            let serving = server::http2::Builder::new(TokioExecutor::new()).serve_connection(stream, service);
            served.spawn(async { drop(serving.await) });
        }
    });
    let call = HttpHealthCheck {
        http2: true,
        method: "POST".parse().unwrap(),
        path: "/grpc.health.v1.Health/Check".parse().unwrap(),
        send: HealthCheckRequest { service: "a".into() }.framed(),
        ..get()
    };
    let check =
        HealthCheck { check: Check::Grpc(Box::new(call)), unhealthy_threshold: 1_000_000, ..config() };
    let checked = Checked::start(Some(check), &[address], None);
    checked.first_round().await;
    assert_eq!(checked.healthy(), 1);
    until(|| checked.healthy() == 0).await;
    let stats = checked.stats.health_check("c");
    assert_eq!((stats.success().value(), stats.network_failure().value()), (3, 0));
    assert_eq!(seen.lock().unwrap()[0], "POST http://c/grpc.health.v1.Health/Check");
}

#[tokio::test]
async fn a_closed_connection_is_opened_again_and_is_no_failure() {
    let web = Web::start(false, &[(200, "x-a")]).await;
    let check = HealthCheck { reuse_connection: false, ..http(get()) };
    let checked = Checked::start(Some(check), &[web.address], None);
    until(|| checked.attempts() > 5).await;
    assert!(web.connections() >= 5);
    let closing = Web::start(false, &[(200, "connection")]).await;
    let checked = Checked::start(Some(http(get())), &[closing.address], None);
    until(|| checked.attempts() > 5).await;
    assert_eq!((checked.healthy(), checked.stats.health_check("c").failure().value()), (1, 0));
}

#[tokio::test]
async fn another_status_is_enough_unless_it_may_pass() {
    let web = Web::start(false, &[(200, "x-a"), (503, "x-a")]).await;
    let check = HealthCheck { unhealthy_threshold: 1_000_000, ..http(get()) };
    let checked = Checked::start(Some(check.clone()), &[web.address], None);
    checked.first_round().await;
    until(|| checked.healthy() == 0).await;
    let stats = checked.stats.health_check("c");
    assert_eq!((stats.network_failure().value(), checked.flags(0)), (0, HealthFlag::FailedActive as u32));

    let web = Web::start(false, &[(200, "x-a"), (503, "x-a")]).await;
    let retriable = HttpHealthCheck { retriable: vec![500..502, 503..504], ..get() };
    let check = HealthCheck { check: Check::Http(Box::new(retriable)), ..check };
    let checked = Checked::start(Some(check), &[web.address], None);
    let stats = checked.stats.health_check("c");
    until(|| stats.failure().value() > 5).await;
    assert_eq!(checked.healthy(), 1);
}

#[tokio::test]
async fn a_degraded_host_is_one_until_it_says_nothing_of_it() {
    const DEGRADED: (u16, &str) = (200, "x-envoy-degraded");
    let web = Web::start(false, &[DEGRADED, DEGRADED, DEGRADED, (200, "x-a")]).await;
    let checked = Checked::start(Some(http(get())), &[web.address], None);
    checked.first_round().await;
    let stats = checked.stats.health_check("c");
    let members = checked.cluster.stats().membership_degraded();
    until(|| (stats.degraded().value(), members.value(), checked.healthy()) == (1, 1, 0)).await;
    until(|| (stats.degraded().value(), members.value(), checked.healthy()) == (0, 0, 1)).await;
}

#[tokio::test]
async fn what_is_no_http_is_no_answer() {
    let echo = Echo::start("").await;
    let checked = Checked::start(Some(http(get())), &[echo.address, refusing()], None);
    checked.first_round().await;
    let stats = checked.stats.health_check("c");
    until(|| stats.network_failure().value() > 3).await;
    assert_eq!((checked.healthy(), stats.success().value()), (0, 0));
}

#[tokio::test]
async fn another_answer_runs_out_of_time() {
    let echo = Echo::start("").await;
    let check = HealthCheck { timeout: Duration::from_millis(30), ..asking("AB", "BA") };
    let checked = Checked::start(Some(check), &[echo.address], None);
    checked.first_round().await;
    assert_eq!(checked.flags(0), HealthFlag::FailedActive as u32 | HealthFlag::ActiveTimeout as u32);
    assert_eq!(checked.healthy(), 0);
}

#[tokio::test]
async fn hosts_that_are_not_checked_are_healthy_and_not_waited_for() {
    let stats = Stats::new(1);
    let mut config_of = cluster_config("c", Discovery::Static, &[EndpointAddress::Ip(refusing())]);
    config_of.health_check = Some(Box::new(config()));
    config_of.load_assignment.localities[0].endpoints[0].health_check =
        Some(Arc::new(EndpointHealthCheck { disabled: true, ..EndpointHealthCheck::default() }));
    let cluster = Cluster::build(Arc::new(config_of), &stats, None);
    let watch = Watch::start(&cluster, surroundings()).unwrap();
    watch.first_round(&cluster).await;
    assert_eq!(cluster.stats().membership_healthy().value(), 1);
    assert_eq!(stats.health_check("c").attempt().value(), 0);
}

#[tokio::test]
async fn new_hosts_do_not_count_before_their_first_check_if_the_cluster_wants_that() {
    let echo = Echo::start("").await;
    let check = HealthCheck { ignore_new_hosts: true, ..config() };
    let checked = Checked::start(Some(check), &[echo.address], None);
    assert_eq!(checked.cluster.stats().membership_excluded().value(), 1);
    checked.first_round().await;
    assert_eq!(checked.cluster.stats().membership_excluded().value(), 0);
}

#[tokio::test]
async fn a_healthy_host_that_is_removed_stays_until_it_fails() {
    let (stays, goes) = (Echo::start("").await, refusing());
    let checked = Checked::start(Some(config()), &[stays.address, goes], None);
    checked.first_round().await;
    checked.cluster.replace_endpoints(Vec::new());
    assert_eq!(checked.cluster.endpoints().len(), 1);
    assert_eq!(checked.flags(0), HealthFlag::PendingRemoval as u32);
    // It may come back.
    checked.cluster.set_resolved(|_, _| Vec::new());
    assert_eq!((checked.cluster.endpoints().len(), checked.flags(0)), (2, 0));
    checked.cluster.replace_endpoints(Vec::new());
    stays.stop().await;
    until(|| checked.cluster.endpoints().is_empty()).await;
    assert_eq!(checked.cluster.stats().membership_total().value(), 0);

    let echo = Echo::start("").await;
    let check = HealthCheck { remove_healthy_hosts: true, ..config() };
    let checked = Checked::start(Some(check), &[echo.address], None);
    checked.first_round().await;
    checked.cluster.replace_endpoints(Vec::new());
    assert!(checked.cluster.endpoints().is_empty());
}

#[tokio::test]
async fn checks_stop_with_their_host_and_with_the_watch() {
    let echo = Echo::start("").await;
    let check = HealthCheck { remove_healthy_hosts: true, ..config() };
    let mut checked = Checked::start(Some(check), &[echo.address], None);
    checked.first_round().await;
    let with_session = Arc::strong_count(&checked.cluster);
    checked.cluster.replace_endpoints(Vec::new());
    until(|| Arc::strong_count(&checked.cluster) < with_session).await;
    assert_eq!(checked.stats.health_check("c").healthy().value(), 0);
    checked.cluster.set_resolved(|_, _| Vec::new());
    assert_eq!(checked.flags(0), HealthFlag::FailedActive as u32, "it has to prove itself again");
    until(|| checked.healthy() == 1).await;
    checked.watch = None;
    until(|| Arc::strong_count(&checked.cluster) == 1).await;
    assert_eq!(checked.stats.health_check("c").healthy().value(), 0);
}

#[tokio::test]
async fn a_new_version_does_not_take_hosts_out_of_use_until_they_fail() {
    let (echo, gone) = (Echo::start("").await, refusing());
    let unchecked = Checked::start(None, &[echo.address, gone], None);
    assert_eq!(unchecked.healthy(), 2);
    let checked = Checked::start(Some(config()), &[echo.address, gone], Some(&unchecked));
    assert_eq!(checked.healthy(), 2, "both were in use");
    checked.first_round().await;
    assert_eq!((checked.healthy(), checked.flags(1)), (1, HealthFlag::FailedActive as u32));
    // The next one goes on with what is known.
    let next = Checked::start(Some(config()), &[echo.address, gone], Some(&checked));
    assert_eq!(next.healthy(), 1);
    // And without checks nobody would take it back.
    let unchecked = Checked::start(None, &[echo.address, gone], Some(&next));
    assert_eq!(unchecked.healthy(), 2);
}

#[tokio::test]
async fn a_success_ends_an_ejection() {
    let echo = Echo::start("").await;
    let stats = Stats::new(1);
    let mut config_of = cluster_config("c", Discovery::Static, &[EndpointAddress::Ip(echo.address)]);
    config_of.health_check = Some(Box::new(config()));
    let detection =
        crate::config::outlier::OutlierDetection { max_ejection_percent: 100, ..Default::default() };
    config_of.outlier_detection = Some(Box::new(detection));
    let cluster = Cluster::build(Arc::new(config_of), &stats, None);
    let _outliers = super::super::outlier::Watch::start(&cluster, None);
    let host = Arc::clone(&cluster.endpoints()[0].host);
    let detector = cluster.outlier().unwrap();
    (0..5).for_each(|_| detector.note(&host, super::super::outlier::Outcome::Failed));
    until(|| host.has(HealthFlag::FailedOutlier)).await;
    let _checks = Watch::start(&cluster, surroundings());
    until(|| !host.has(HealthFlag::FailedOutlier)).await;
}
