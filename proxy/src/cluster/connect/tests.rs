use std::cell::Cell;
use std::collections::HashMap;
use std::net::TcpListener;

use super::super::tests::config;
use super::*;
use crate::config::cluster::{Cluster as ClusterConfig, Discovery};
use crate::config::endpoint::EndpointAddress;
use crate::config::tcp_proxy::WeightedCluster;
use crate::stats::Stats;
use crate::sys::socket::{StreamOptions, stream};
use crate::uring::Engine;

struct Fixture {
    stats: Arc<Stats>,
    clusters: HashMap<String, Arc<Cluster>>,
    balancers: RefCell<WorkerBalancers>,
    ids: Cell<u64>,
    options: StreamOptions<'static>,
}

impl Dialer for Fixture {
    fn cluster(&self, name: &str) -> Option<Arc<Cluster>> {
        self.clusters.get(name).cloned()
    }

    fn balancers(&self) -> &RefCell<WorkerBalancers> {
        &self.balancers
    }

    fn socket(&self, address: SocketAddr, _cluster: &ClusterConfig) -> Result<Socket, OpenError> {
        stream(address, &self.options)
    }

    fn next_connection_id(&self) -> u64 {
        self.ids.set(self.ids.get() + 1);
        self.ids.get()
    }
}

impl Fixture {
    fn new() -> Self {
        Self {
            stats: Stats::new(1),
            clusters: HashMap::new(),
            balancers: RefCell::new(WorkerBalancers::with_seed(1)),
            ids: Cell::new(0),
            options: StreamOptions::default(),
        }
    }

    fn with(self, name: &str, endpoints: &[EndpointAddress]) -> Self {
        self.with_config(config(name, Discovery::Static, endpoints))
    }

    fn with_config(mut self, config: ClusterConfig) -> Self {
        let name = config.name.to_string();
        self.clusters.insert(name, Cluster::build(Arc::new(config), &self.stats, None));
        self
    }

    fn of(&self, name: &str) -> &Arc<Cluster> {
        &self.clusters[name]
    }

    fn connect(&self, proxy: &TcpProxy) -> (Result<Connected, Failure>, Record) {
        let mut record = record();
        let result = run(connect(self, proxy, None, &mut record));
        (result, record)
    }
}

fn run<F: Future>(future: F) -> F::Output {
    let bounded = async { time::timeout(Duration::from_mins(1), future).await.expect("not within a minute") };
    uring::start(Engine::IoUring, bounded).expect("io_uring is available")
}

fn proxy(clusters: ClusterChoice, max_connect_attempts: u32) -> TcpProxy {
    TcpProxy {
        stat_prefix: "t".into(),
        clusters,
        idle_timeout: None,
        max_connect_attempts,
        backoff: None,
        max_downstream_connection_duration: None,
        max_downstream_connection_duration_jitter_percentage: None,
        access_log: Vec::new(),
        access_log_flush_interval: None,
        flush_access_log_on_connected: false,
        flush_access_log_on_start: false,
        hash_policy: None,
    }
}

fn single(name: &str, attempts: u32) -> TcpProxy {
    proxy(ClusterChoice::Single(name.into()), attempts)
}

fn record() -> Record {
    let peer = "127.0.0.1:1".parse().unwrap();
    Record::new(1, peer, peer, None, "l".into())
}

/// What the golden outcomes list: flags, failure reason, close reason, attempts.
fn outcome(record: &Record) -> String {
    let flags: Vec<_> = record.flags.iter().map(|(_, short, _)| short).collect();
    let or_dash = |text: &Option<Box<str>>| text.as_deref().unwrap_or("-").to_owned();
    format!(
        "{} {} {} {}",
        if flags.is_empty() { "-".to_owned() } else { flags.join(",") },
        or_dash(&record.details().upstream_transport_failure),
        or_dash(&record.details().downstream_local_close_reason),
        record.attempts
    )
}

fn listener() -> (TcpListener, EndpointAddress) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, EndpointAddress::Ip(address))
}

/// A port that refuses: bound by a socket that doesn't listen.
fn refusing() -> (Socket, EndpointAddress) {
    let socket = stream("127.0.0.1:1".parse().unwrap(), &StreamOptions::default()).unwrap();
    socket.bind(&SockAddr::from(SocketAddr::from(([127, 0, 0, 1], 0)))).unwrap();
    let address = socket::local_addr(&socket).unwrap();
    (socket, EndpointAddress::Ip(address))
}

/// A port that doesn't answer: a listener whose accept queue is full. Its sockets keep it so.
fn silent() -> (Vec<Socket>, EndpointAddress) {
    let listener = Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    listener.bind(&SockAddr::from(SocketAddr::from(([127, 0, 0, 1], 0)))).unwrap();
    listener.listen(0).unwrap();
    let address = socket::local_addr(&listener).unwrap();
    let mut sockets = vec![listener];
    for _ in 0..4 {
        let client = stream(address, &StreamOptions::default()).unwrap();
        socket::connect(&client, &SockAddr::from(address)).unwrap();
        sockets.push(client);
    }
    (sockets, EndpointAddress::Ip(address))
}

#[test]
fn clusters_of_control_planes_are_not_for_clients() {
    let mut config = config("xds", Discovery::Static, &[EndpointAddress::Ip(([127, 0, 0, 1], 1).into())]);
    config.tls = Some(Arc::new(crate::config::tls::UpstreamTls {
        sni: None,
        auto_sni_san_validation: false,
        certificate: None,
        validation: crate::config::tls::Validation::default(),
        validation_secret: None,
        alpn_protocols: vec![],
        tls12: true,
        tls13: true,
    }));
    let fixture = Fixture::new().with_config(config);
    let (result, record) = fixture.connect(&proxy(ClusterChoice::Single("xds".into()), 1));
    assert_eq!(result.unwrap_err(), Failure::NoRoute);
    assert!(record.flags.has(ResponseFlag::NoClusterFound));
    assert_eq!(fixture.of("xds").stats().upstream_cx_total().value(), 0, "nothing left in plaintext");
}

#[test]
fn an_established_connection_is_counted_until_it_ends() {
    let (server, address) = listener();
    let fixture = Fixture::new().with("c", &[address]);
    let (connected, record) = fixture.connect(&single("c", 1));
    let connected = connected.unwrap();
    let (_accepted, peer) = server.accept().unwrap();
    assert_eq!(outcome(&record), "- - - 1");
    let upstream = record.upstream.unwrap();
    assert_eq!(upstream.connection_id, Some(1));
    assert_eq!(connected.socket().local_addr().unwrap().as_socket(), Some(peer));
    assert_eq!(record.cluster.as_deref(), Some("c"));

    let stats = fixture.of("c").stats();
    let host = Arc::clone(&connected.endpoint().host);
    let gauges = || {
        (
            stats.upstream_cx_active().value(),
            stats.upstream_rq_active().value(),
            stats.upstream_rq_pending_active().value(),
            host.cx_active(),
            host.rq_active(),
            fixture.of("c").breaker().connections(),
        )
    };
    assert_eq!(gauges(), (1, 1, 0, 1, 1, 1));
    assert_eq!(stats.upstream_cx_connect_ms().value().count(), 1);
    let (socket, mut guard) = connected.into_parts();
    drop(socket);
    guard.closed_by(ClosedBy::Remote);
    drop(guard);
    assert_eq!(gauges(), (0, 0, 0, 0, 0, 0));
    assert_eq!(stats.upstream_cx_destroy_remote_with_active_rq().value(), 1);
    assert_eq!((stats.upstream_cx_destroy_local().value(), stats.upstream_cx_connect_fail().value()), (0, 0));
    assert_eq!(stats.upstream_cx_length_ms().value().count(), 1);
}

#[test]
fn every_attempt_is_refused() {
    let (_bound, address) = refusing();
    let fixture = Fixture::new().with("c", &[address]);
    let (result, record) = fixture.connect(&single("c", 3));
    assert_eq!(result.unwrap_err(), Failure::ConnectFailed);
    assert_eq!(
        outcome(&record),
        "UF,URX delayed_connect_error:_Connection_refused tcp_initializion_failure:0 3"
    );
    assert!(record.upstream.is_some() && record.connect_end.is_none());
    assert_eq!(record.details().earlier_attempts.len(), 2);
    let stats = fixture.of("c").stats();
    for (name, value) in [
        ("upstream_cx_total", 3),
        ("upstream_cx_connect_fail", 3),
        ("upstream_cx_destroy", 3),
        ("upstream_cx_destroy_remote", 3),
        ("upstream_cx_destroy_with_active_rq", 0),
        ("upstream_cx_connect_attempts_exceeded", 1),
        ("upstream_rq_pending_total", 3),
        ("upstream_rq_pending_failure_eject", 3),
        ("upstream_rq_cancelled", 0),
        ("upstream_rq_total", 0),
        ("upstream_cx_active", 0),
        ("upstream_rq_pending_active", 0),
    ] {
        let stat = stats.block().layout().stats.iter().find(|stat| stat.name == name).unwrap();
        assert_eq!(stats.block().value(stat), value, "{name}");
    }
    let host = &fixture.of("c").endpoints()[0].host;
    assert_eq!((host.cx_total(), host.cx_connect_fail(), host.cx_active(), host.rq_total()), (3, 3, 0, 0));
}

#[test]
fn a_second_host_serves_and_the_flag_of_the_first_stays() {
    let (_bound, bad) = refusing();
    let (_server, good) = listener();
    let fixture = Fixture::new().with("c", &[bad, good]);
    // Round robin starts somewhere, so the first connection or the second meets the bad host first.
    let outcomes: Vec<_> = (0..2)
        .map(|_| {
            let (result, record) = fixture.connect(&single("c", 2));
            assert!(result.is_ok());
            outcome(&record)
        })
        .collect();
    assert!(
        outcomes.contains(&"UF delayed_connect_error:_Connection_refused - 2".to_owned()),
        "{outcomes:?}"
    );
}

#[test]
fn a_silent_host_costs_the_connect_timeout() {
    let (_full, address) = silent();
    let mut config = config("c", Discovery::Static, &[address]);
    config.connect_timeout = Duration::from_millis(60);
    let fixture = Fixture::new().with_config(config);
    let (result, record) = fixture.connect(&single("c", 2));
    assert_eq!(result.unwrap_err(), Failure::ConnectFailed);
    assert_eq!(outcome(&record), "UF,URX - tcp_initializion_failure:0 2");
    let stats = fixture.of("c").stats();
    assert_eq!(
        (stats.upstream_cx_connect_timeout().value(), stats.upstream_cx_connect_fail().value()),
        (2, 2)
    );
    assert_eq!(stats.upstream_cx_destroy_local().value(), 2);
    assert_eq!(stats.upstream_cx_connect_ms().value().count(), 0);
}

#[test]
fn an_error_of_connect_itself_is_told_apart() {
    // TCP to a broadcast address never leaves the machine.
    let address = "255.255.255.255:80".parse().unwrap();
    let fixture = Fixture::new().with("c", &[EndpointAddress::Ip(address)]);
    let (result, record) = fixture.connect(&single("c", 1));
    assert_eq!(result.unwrap_err(), Failure::ConnectFailed);
    assert_eq!(
        outcome(&record),
        "UF,URX immediate_connect_error:_Network_is_unreachable|remote_address:255.255.255.255:80 \
         tcp_initializion_failure:0 1"
    );
}

#[test]
fn without_a_socket_nobody_upstream_is_to_blame() {
    let (_server, address) = listener();
    let mut fixture = Fixture::new().with("c", &[address]);
    fixture.options.source = Some("203.0.113.1:0".parse().unwrap());
    let (_, record) = fixture.connect(&single("c", 1));
    assert_eq!(
        outcome(&record),
        "URX failed_to_bind_to_203.0.113.1:0:_Cannot_assign_requested_address tcp_initializion_failure:0 1"
    );
    assert_eq!(fixture.of("c").stats().bind_errors().value(), 1);
}

#[test]
fn errors_are_named_as_in_envoy() {
    for (code, text) in [
        (libc::ECONNREFUSED, "Connection_refused"),
        (libc::ETIMEDOUT, "Connection_timed_out"),
        (libc::EHOSTUNREACH, "No_route_to_host"),
        (libc::ENETUNREACH, "Network_is_unreachable"),
        (libc::EACCES, "Permission_denied"),
        (libc::EINVAL, "Invalid_argument"),
        (libc::ECONNRESET, "Connection_reset_by_peer"),
    ] {
        assert_eq!(errno_text(&io::Error::from_raw_os_error(code)), text);
    }
}

#[test]
fn no_cluster_and_no_host() {
    let fixture = Fixture::new().with("empty", &[]).with_config(config("dst", Discovery::OriginalDst, &[]));
    let (result, record) = fixture.connect(&single("none", 3));
    assert_eq!(result.unwrap_err(), Failure::NoRoute);
    assert_eq!(outcome(&record), "NC - tcp_initializion_failure:3 0");
    assert_eq!(record.cluster, None);
    for name in ["empty", "dst"] {
        let (result, record) = fixture.connect(&single(name, 3));
        assert_eq!(result.unwrap_err(), Failure::NoHealthyUpstream);
        assert_eq!(outcome(&record), "UH - tcp_initializion_failure:1 0");
        assert_eq!(record.cluster.as_deref(), Some(name));
        assert_eq!(fixture.of(name).stats().upstream_cx_none_healthy().value(), 1);
    }
}

#[test]
fn original_destinations_are_connected_to() {
    let (server, _) = listener();
    let destination = OriginalDst(server.local_addr().unwrap());
    let fixture = Fixture::new().with_config(config("dst", Discovery::OriginalDst, &[]));
    let mut record = record();
    let connected = run(connect(&fixture, &single("dst", 1), Some(destination), &mut record)).unwrap();
    assert_eq!(connected.endpoint().address().ip(), Some(destination.0));
    assert_eq!(&*record.upstream.unwrap().hostname, format!("dst{destination}"));
}

#[test]
fn circuit_breakers() {
    let (_server, address) = listener();
    let mut limited = config("cx", Discovery::Static, std::slice::from_ref(&address));
    limited.circuit_breakers.max_connections = 1;
    let mut pending = config("pending", Discovery::Static, &[address]);
    pending.circuit_breakers.max_pending_requests = 0;
    let fixture = Fixture::new().with_config(limited).with_config(pending);

    let (first, _) = fixture.connect(&single("cx", 3));
    let first = first.unwrap();
    let (result, record) = fixture.connect(&single("cx", 3));
    assert_eq!(result.unwrap_err(), Failure::ResourceLimitExceeded);
    assert_eq!(outcome(&record), "UO - tcp_initializion_failure:2 0");
    assert_eq!(fixture.of("cx").stats().upstream_cx_overflow().value(), 1);
    drop(first);
    assert!(fixture.connect(&single("cx", 3)).0.is_ok());

    let (result, record) = fixture.connect(&single("pending", 3));
    assert_eq!(result.unwrap_err(), Failure::ConnectFailed);
    assert_eq!(outcome(&record), "URX - tcp_initializion_failure:0 3");
    assert!(record.upstream.is_none());
    let stats = fixture.of("pending").stats();
    assert_eq!((stats.upstream_rq_pending_overflow().value(), stats.upstream_cx_total().value()), (3, 0));
}

#[test]
fn a_dropped_attempt_is_given_up() {
    let (_full, address) = silent();
    let fixture = Fixture::new().with("c", &[address]);
    let mut record = record();
    run(async {
        let proxy = single("c", 1);
        let connecting = connect(&fixture, &proxy, None, &mut record);
        let gone = async {
            while fixture.of("c").stats().upstream_rq_pending_active().value() == 0 {
                time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::select! {
            _ = connecting => panic!("nobody answers"),
            () = gone => {}
        }
    });
    let cluster = fixture.of("c");
    let stats = cluster.stats();
    assert_eq!((stats.upstream_rq_cancelled().value(), stats.upstream_cx_destroy_local().value()), (1, 1));
    assert_eq!((stats.upstream_cx_active().value(), stats.upstream_rq_pending_active().value()), (0, 0));
    assert_eq!((cluster.breaker().connections(), cluster.endpoints()[0].host.cx_active()), (0, 0));
    assert_eq!((record.attempts, record.cluster.as_deref()), (1, Some("c")));
}

#[test]
fn every_attempt_draws_the_cluster_again() {
    let (_bound, bad) = refusing();
    let (_server, good) = listener();
    let fixture = Fixture::new().with("bad", &[bad]).with("good", &[good]);
    let weighted = |name: &str, weight| WeightedCluster { name: name.into(), weight };
    let proxy = proxy(ClusterChoice::Weighted(vec![weighted("bad", 3), weighted("good", 1)]), 200);
    let (result, record) = fixture.connect(&proxy);
    let connected = result.unwrap();
    assert_eq!(&**connected.cluster().name(), "good");
    assert_eq!(record.cluster.as_deref(), Some("good"));
    assert_eq!(fixture.of("bad").stats().upstream_cx_total().value(), u64::from(record.attempts - 1));
}

#[test]
fn weights_are_shares() {
    let balancers = RefCell::new(WorkerBalancers::with_seed(1));
    let weighted = |name: &str, weight| WeightedCluster { name: name.into(), weight };
    let choice = ClusterChoice::Weighted(vec![weighted("a", 1), weighted("b", 3)]);
    let drawn = (0..4000).filter(|_| draw(&choice, &balancers) == "a").count();
    assert!((850..1150).contains(&drawn), "{drawn}");
}

#[test]
fn delays_double_up_to_the_maximum() {
    let backoff =
        Backoff { base_interval: Duration::from_millis(10), max_interval: Duration::from_millis(25) };
    let mut delays = Delays::new(backoff);
    for limit in [10, 20, 25, 25] {
        assert_eq!(delays.interval, Duration::from_millis(limit));
        assert!(delays.next() < Duration::from_millis(limit));
    }
}

#[test]
fn attempts_wait_for_each_other_as_the_backoff_says() {
    let (_bound, address) = refusing();
    let fixture = Fixture::new().with("c", &[address]);
    let interval = Duration::from_hours(1);
    let backoff = Backoff { base_interval: interval, max_interval: interval };
    // No wait follows the last attempt.
    let (result, record) = fixture.connect(&TcpProxy { backoff: Some(backoff), ..single("c", 1) });
    assert!(result.is_err() && record.attempts == 1);
    // And a wait as long as this one never ends here.
    let mut record = self::record();
    run(async {
        let proxy = TcpProxy { backoff: Some(backoff), ..single("c", 2) };
        let connecting = connect(&fixture, &proxy, None, &mut record);
        assert!(time::timeout(Duration::from_millis(50), connecting).await.is_err());
    });
    assert_eq!(record.attempts, 1);
}
