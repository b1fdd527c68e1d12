//! The kernel path: connections that no proxy stands in, with tables that the test writes by hand.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use socket2::{Domain, Socket};
use tidegate::intercept::programs::Interceptor;
use tidegate::intercept::tables::{FlowEvents, TableSizes, Tables};
use tidegate_common::balance::{
    ENDPOINT_WORDS, Endpoint, Entry, Head, List, ListKind, Member, Places, Policy, Route, ServiceHead,
};
use tidegate_common::selector::Range;
use tidegate_common::{Destination, End, FLOW_SLOTS, FlowEvent, FlowFlag, Reason, RuleValue, Tally, Verdict};

use crate::lab::*;

pub(crate) const SERVICE: &str = "172.16.0.1:50001";
const SERVICE_V6: &str = "[fd99::1]:50001";
const CLUSTER: u32 = 1;

pub(crate) const SIZES: TableSizes =
    TableSizes { services: 4, clusters: 4, hosts: 16, arena: 4_096, flow_slots: FLOW_SLOTS, events: 1 << 16 };

/// One service of one cluster, with hosts 1, 2, … in turn.
pub(crate) struct Path {
    pub(crate) interceptor: Interceptor,
    pub(crate) tables: Arc<Tables>,
    pub(crate) events: FlowEvents,
    next_block: u32,
}

impl Path {
    pub(crate) fn new(lab: &Lab) -> Self {
        Self::with(lab, SIZES)
    }

    /// `bytes` for records that wait.
    pub(crate) fn with_room_for_events(lab: &Lab, bytes: u32) -> Self {
        Self::with(lab, TableSizes { events: bytes, ..SIZES })
    }

    /// The records of connections are in the sockets' storage. (One in 16,384 has a slot.)
    pub(crate) fn without_slots(lab: &Lab) -> Self {
        Self::with(lab, TableSizes { flow_slots: 1, ..SIZES })
    }

    fn with(lab: &Lab, sizes: TableSizes) -> Self {
        let mut options = lab.options();
        options.sizes.tables = sizes;
        let mut interceptor =
            Interceptor::load(&options).unwrap_or_else(|error| panic!("{error}: {error:?}"));
        let tables = interceptor.tables();
        let events = interceptor.take_flow_events().unwrap();
        let mut this = Self { interceptor, tables, events, next_block: 8 };
        let head = ServiceHead { clusters: 1, total: 1 }.encode();
        this.tables.write_block(4, &[head, Entry { bound: 1, offset: CLUSTER }.encode()]);
        this.tables.set_service(1, 11, 4);
        this.rule(SERVICE, 1);
        this
    }

    fn rule(&mut self, service: &str, index: u32) {
        self.rules(&[service], index);
    }

    fn rules(&mut self, services: &[&str], index: u32) {
        let key = |service: &&str| Destination::from(service.parse::<SocketAddr>().unwrap());
        let value = RuleValue { verdict: Verdict::Balance, service: index };
        let rules: HashMap<_, _> = services.iter().map(|service| (key(service), value)).collect();
        self.interceptor.set_destinations(&rules).unwrap();
    }

    /// Hosts 1, 2, … are these.
    pub(crate) fn endpoints(&mut self, endpoints: &[SocketAddr], max_connections: u32, timeout_ms: u32) {
        let hosts_at = 3 + endpoints.len() as u32;
        let list = List { kind: ListKind::Even as u8, len: endpoints.len() as u32, total: 0 };
        let mut words = vec![0, Route { below: 100, panic: false, list: 2 }.encode(), list.encode()];
        for i in 0..endpoints.len() as u32 {
            words.push(Entry { bound: 0, offset: hosts_at + i * ENDPOINT_WORDS }.encode());
        }
        for (i, endpoint) in endpoints.iter().enumerate() {
            let host = i as u32 + 1;
            let addr = endpoint.ip().into();
            self.tables.set_host(host, addr, endpoint.port(), CLUSTER);
            words.extend(Endpoint { addr, port: endpoint.port(), host }.encode());
        }
        words[0] =
            Head { policy: Policy::RoundRobin as u8, choices: 0, routes: 1, words: words.len() as u32 }
                .encode();
        self.tables.write_block(self.next_block, &words);
        self.tables.set_cluster(CLUSTER, 12, self.next_block, max_connections, timeout_ms);
        self.next_block += words.len() as u32;
    }

    /// Hosts 1, 2, … are these, and a hash chooses among them: places of a table whose indexes are these. `by_source`:
    /// the hash is that of the source.
    fn table(&mut self, endpoints: &[SocketAddr], indexes: [u8; 8], by_source: bool) {
        let len = endpoints.len() as u32;
        let list = 2 + len * ENDPOINT_WORDS;
        let mut words = vec![0, Route { below: 100, panic: false, list }.encode()];
        for (endpoint, host) in endpoints.iter().zip(1..) {
            let addr = endpoint.ip().into();
            self.tables.set_host(host, addr, endpoint.port(), CLUSTER);
            words.extend(Endpoint { addr, port: endpoint.port(), host }.encode());
        }
        words.push(List { kind: ListKind::Table as u8, len, total: 8 }.encode());
        words.push(Places { endpoints: 2, wide: false }.encode());
        words.push(u64::from_le_bytes(indexes));
        let len = words.len() as u32;
        words[0] = Head { policy: Policy::Hash as u8, choices: 0, routes: 1, words: len }.encode();
        self.tables.write_block(self.next_block, &words);
        self.tables.set_cluster(CLUSTER, 12, self.next_block, 1024, 5_000);
        self.next_block += len;
        let head = ServiceHead { clusters: 1, total: 1 }.encode();
        let member = Member { cluster: CLUSTER, by_source };
        self.tables
            .write_block(self.next_block, &[head, Entry { bound: 1, offset: member.encode() }.encode()]);
        self.tables.set_service(1, 11, self.next_block);
        self.next_block += 2;
    }

    /// Service 1 leads sources from these addresses on to these services, which have the cluster.
    fn selector(&mut self, ranges: &[(&str, u32)]) {
        let mut words = vec![ServiceHead { clusters: 0, total: ranges.len() as u32 }.encode()];
        for (first, service) in ranges {
            let first = first.parse::<IpAddr>().unwrap().into();
            words.extend(Range { first, service: *service }.encode());
            if *service != 0 {
                self.tables.set_service(*service, u64::from(*service), 4);
            }
        }
        self.tables.write_block(self.next_block, &words);
        self.tables.set_service(1, 11, self.next_block);
        self.next_block += words.len() as u32;
    }

    /// The next record.
    pub(crate) fn event(&mut self) -> FlowEvent {
        let deadline = Instant::now() + LONG;
        loop {
            if let Some(event) = self.events.pop() {
                return event;
            }
            assert!(
                Instant::now() < deadline,
                "no record: {:?} {:?}",
                counts(&self.interceptor),
                self.tallies()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until so many slots are somebody's.
    pub(crate) fn slots_in_use(&self, count: usize) {
        let deadline = Instant::now() + LONG;
        while self.tables.flow_slots_in_use() != count {
            assert!(Instant::now() < deadline, "{}, not {count}", self.tables.flow_slots_in_use());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Of the service, the cluster, and host 1.
    pub(crate) fn tallies(&self) -> [Tally; 3] {
        [self.tables.service(1).tally, self.tables.cluster(CLUSTER).tally, self.tables.host(1).tally]
    }
}

pub(crate) fn listen(pod: &Pod, port: u16) -> (Socket, SocketAddr) {
    let address = SocketAddr::new(pod_ip(false), port);
    let socket = pod.agent_socket(Domain::IPV4);
    socket.bind(&address.into()).unwrap();
    socket.listen(128).unwrap();
    (socket, address)
}

pub(crate) fn end(event: &FlowEvent) -> End {
    End::from_raw(event.end).unwrap()
}

#[test]
fn the_application_is_connected_straight_to_endpoints_in_turn() {
    let lab = Lab::new();
    let mut path = Path::new(&lab);
    let pod = lab.pod();
    path.interceptor.enrol(pod.cookie, enrolment()).unwrap();
    let (servers, addresses): (Vec<_>, Vec<_>) = (0..3).map(|i| listen(&pod, 9_001 + i)).unzip();
    path.endpoints(&addresses, 1024, 5_000);
    let mut seen = Vec::new();
    for _ in 0..6 {
        let mut client = pod.connect(SERVICE).unwrap();
        assert_eq!(peer(&client).to_string(), SERVICE);
        let index = servers
            .iter()
            .position(|server| {
                server.set_nonblocking(true).unwrap();
                let accepted = server.accept();
                let Ok((mut accepted, from)) = accepted else { return false };
                accepted.set_nonblocking(false).unwrap();
                assert_eq!(from.as_socket(), Some(local(&client)), "the application's own socket");
                client.write_all(b"hello").unwrap();
                let mut bytes = [0; 5];
                accepted.read_exact(&mut bytes).unwrap();
                accepted.write_all(b"and back").unwrap();
                let mut bytes = [0; 8];
                client.read_exact(&mut bytes).unwrap();
                // The server ends it.
                drop(accepted);
                assert_eq!(client.read(&mut bytes).unwrap(), 0);
                true
            })
            .expect("one of them was chosen");
        seen.push(index);
        drop(client);
        let event = path.event();
        assert_eq!(end(&event), End::Closed);
        assert_eq!((event.sent, event.received), (5, 8));
        assert_ne!(event.flags & FlowFlag::EndpointFirst as u32, 0);
        assert_eq!((event.service, event.cluster, event.host as usize), (1, CLUSTER, index + 1));
        assert_eq!(event.endpoint.to_ip(), addresses[index].ip());
        assert_eq!(event.endpoint_port, addresses[index].port());
        assert_eq!((event.addr.to_ip().to_string(), event.port), ("172.16.0.1".to_owned(), 50_001));
        assert_eq!(event.client.to_ip(), pod_ip(false));
        assert_eq!(event.netns_cookie, pod.cookie);
        assert!(event.started_ns < event.connected_ns && event.connected_ns < event.ended_ns);
    }
    assert_eq!(seen[..3], seen[3..]);
    let mut sorted = seen[..3].to_vec();
    sorted.sort_unstable();
    assert_eq!(sorted, [0, 1, 2]);
    let [service, cluster, host] = path.tallies();
    assert_eq!(service, cluster);
    assert_eq!(
        service,
        Tally {
            attempts: 6,
            established: 6,
            closed_by_endpoint: 6,
            sent: 30,
            received: 48,
            ..Tally::default()
        }
    );
    assert_eq!(host.attempts, 2);
    assert_eq!(counts(&path.interceptor), [("balanced", 6)]);
}

#[test]
fn bytes_are_exact_whoever_ends_it_and_however() {
    let lab = Lab::new();
    let mut path = Path::new(&lab);
    let pod = lab.pod();
    path.interceptor.enrol(pod.cookie, enrolment()).unwrap();
    let (server, address) = listen(&pod, 9_001);
    path.endpoints(&[address], 1024, 5_000);
    for (up, down) in [(0_usize, 0_usize), (1, 0), (0, 1), (1_000, 70_000), (200_000, 3)] {
        for client_first in [true, false] {
            for half_close in [true, false] {
                let mut client = pod.connect(SERVICE).unwrap();
                let mut accepted = accept(&server);
                std::thread::scope(|scope| {
                    scope.spawn(|| {
                        let mut bytes = vec![0; up];
                        accepted.read_exact(&mut bytes).unwrap();
                        accepted.write_all(&vec![1; down]).unwrap();
                    });
                    client.write_all(&vec![1; up]).unwrap();
                    let mut bytes = vec![0; down];
                    client.read_exact(&mut bytes).unwrap();
                });
                let (mut first, mut last) =
                    if client_first { (client, accepted) } else { (accepted, client) };
                if half_close {
                    first.shutdown(std::net::Shutdown::Write).unwrap();
                    assert_eq!(last.read(&mut [0; 8]).unwrap(), 0);
                    drop(last);
                    assert_eq!(first.read(&mut [0; 8]).unwrap(), 0);
                    drop(first);
                } else {
                    drop(first);
                    assert_eq!(last.read(&mut [0; 8]).unwrap(), 0);
                    drop(last);
                }
                let event = path.event();
                let case = format!("{up} up, {down} down, {client_first}, {half_close}");
                assert_eq!(end(&event), End::Closed, "{case}");
                assert_eq!((event.sent, event.received), (up as u64, down as u64), "{case}");
                let first = if client_first { FlowFlag::ClientFirst } else { FlowFlag::EndpointFirst };
                let both = FlowFlag::ClientFirst as u32 | FlowFlag::EndpointFirst as u32;
                assert_eq!(event.flags & both, first as u32, "{case}");
            }
        }
    }
}

#[test]
fn a_refused_connect_fails_with_its_errno_and_is_reported() {
    let lab = Lab::new();
    let mut path = Path::new(&lab);
    let pod = lab.pod();
    path.interceptor.enrol(pod.cookie, enrolment()).unwrap();
    // Nobody listens.
    path.endpoints(&[SocketAddr::new(pod_ip(false), 9_009)], 1024, 5_000);
    assert_eq!(pod.connect(SERVICE).map(drop), Err(libc::ECONNREFUSED));
    let event = path.event();
    assert_eq!((end(&event), event.host, event.sent, event.received), (End::Refused, 1, 0, 0));
    // No host.
    path.endpoints(&[], 1024, 5_000);
    assert_eq!(pod.connect(SERVICE).map(drop), Err(libc::EHOSTUNREACH));
    let event = path.event();
    assert_eq!((end(&event), event.host, event.port), (End::NoHost, 0, 50_001));
    // Too many.
    let (server, address) = listen(&pod, 9_001);
    path.endpoints(&[address], 1, 5_000);
    let first = pod.connect(SERVICE).unwrap();
    assert_eq!(pod.connect(SERVICE).map(drop), Err(libc::ECONNREFUSED));
    assert_eq!(end(&path.event()), End::Overflow);
    drop((first, accept(&server)));
    assert_eq!(end(&path.event()), End::Closed);
    let again = pod.connect(SERVICE).unwrap();
    drop((again, accept(&server)));
    assert_eq!(end(&path.event()), End::Closed);
    let tally = path.tallies()[1];
    assert_eq!((tally.failed, tally.no_host, tally.overflow, tally.active), (1, 1, 1, 0));
}

#[test]
fn who_does_not_answer_is_given_up_after_the_connect_timeout() {
    let lab = Lab::new();
    let mut path = Path::new(&lab);
    let pod = lab.pod();
    path.interceptor.enrol(pod.cookie, enrolment()).unwrap();
    // Nobody has this address; its link is up, and nothing answers for it.
    pod.run("ip neigh add 10.77.0.9 lladdr 02:00:00:00:00:09 dev eth0");
    path.endpoints(&["10.77.0.9:80".parse().unwrap()], 1024, 300);
    assert_eq!(pod.connect(SERVICE).map(drop), Err(libc::ETIMEDOUT));
    let event = path.event();
    assert_eq!(end(&event), End::TimedOut);
    assert!(event.ended_ns - event.started_ns >= 300_000_000);
    let tally = path.tallies()[2];
    assert_eq!((tally.attempts, tally.failed, tally.timed_out, tally.active), (1, 1, 1, 0));
}

#[test]
fn the_applications_own_timeout_is_left_alone() {
    let lab = Lab::new();
    let mut path = Path::new(&lab);
    let pod = lab.pod();
    path.interceptor.enrol(pod.cookie, enrolment()).unwrap();
    let (server, address) = listen(&pod, 9_001);
    path.endpoints(&[address], 1024, 5_000);
    for own in [None, Some(Duration::from_millis(1_234)), Some(Duration::from_mins(1))] {
        let client = pod.app_socket(Domain::IPV4);
        client.set_tcp_user_timeout(own).unwrap();
        connect(&client, SERVICE.parse().unwrap()).unwrap();
        assert_eq!(client.tcp_user_timeout().unwrap(), own);
        drop(accept(&server));
    }
}

#[test]
fn ipv6_and_mapped_addresses() {
    let lab = Lab::new();
    let mut path = Path::new(&lab);
    let pod = lab.pod();
    path.interceptor.enrol(pod.cookie, enrolment()).unwrap();
    let (server, address) = listen(&pod, 9_001);
    path.endpoints(&[address], 1024, 5_000);
    // IPv4 on an IPv6 socket.
    let client = pod.connect("[::ffff:172.16.0.1]:50001").unwrap();
    assert_eq!(canonical(peer(&client)).to_string(), SERVICE);
    drop((client, accept(&server)));
    let event = path.event();
    assert_eq!((event.endpoint.to_ip(), event.client.to_ip()), (pod_ip(false), pod_ip(false)));

    path.rule(SERVICE_V6, 1);
    assert_eq!(
        pod.connect(SERVICE_V6).map(drop),
        Err(libc::EACCES),
        "an IPv4 endpoint: no table, fails open"
    );
    let server = pod.agent_socket(Domain::IPV6);
    let address = SocketAddr::new(pod_ip(true), 9_002);
    server.bind(&address.into()).unwrap();
    server.listen(8).unwrap();
    path.endpoints(&[address], 1024, 5_000);
    let client = pod.connect(SERVICE_V6).unwrap();
    assert_eq!(peer(&client).to_string(), SERVICE_V6);
    drop((client, accept(&server)));
    assert_eq!(path.event().endpoint.to_ip(), pod_ip(true));
    assert_eq!(count(&path.interceptor, Reason::NoTablePassed), 1);
}

#[test]
fn a_source_that_is_known_is_hashed_and_others_are_left_to_the_proxy() {
    let lab = Lab::new();
    let mut path = Path::new(&lab);
    let pod = lab.pod();
    pod.run("ip addr add 10.77.0.3/24 dev eth0");
    let listener = pod.capture(&mut path.interceptor);
    path.rules(&[SERVICE, SERVICE_V6], 1);
    let (servers, addresses): (Vec<_>, Vec<_>) = (0..3).map(|i| listen(&pod, 9_001 + i)).unzip();
    path.table(&addresses, [0, 1, 2, 2, 1, 0, 0, 1], true);
    let host_at = [1_u32, 2, 3, 3, 2, 1, 1, 2];
    let bound = |to, address| bound(&pod, to, address);
    for (hash, host) in [0xffff_ffff_0000_0008_u64, 1, 2, 3, 4, 5, 6, 7].into_iter().zip(host_at) {
        let record = enrolment().hashed(|ip| if ip.is_ipv4() { hash } else { 77 });
        path.interceptor.enrol(pod.cookie, record).unwrap();
        for client in [
            pod.connect(SERVICE),
            bound(SERVICE, POD_V4),
            bound(SERVICE, "0.0.0.0"),
            bound("[::ffff:172.16.0.1]:50001", "::ffff:10.77.0.2"),
        ] {
            drop((client.unwrap(), accept(&servers[host as usize - 1])));
            assert_eq!(path.event().host, host, "{hash:#x}");
        }
    }
    // Another address, or nobody has said what its hash is: as if there were no kernel path.
    let captured = |path: &Path, client: Result<Socket, i32>, service: &str| {
        let client = client.unwrap();
        assert_eq!(original_dst(&path.interceptor, &accept(&listener)), Some(service.parse().unwrap()));
        assert_eq!(canonical(peer(&client)).to_string(), service);
    };
    captured(&path, bound(SERVICE, "10.77.0.3"), SERVICE);
    captured(&path, bound("[::ffff:172.16.0.1]:50001", "::ffff:10.77.0.3"), SERVICE);
    path.interceptor.enrol(pod.cookie, enrolment()).unwrap();
    captured(&path, pod.connect(SERVICE), SERVICE);
    captured(&path, pod.connect(SERVICE_V6), SERVICE_V6);
    let of = |reason| count(&path.interceptor, reason);
    assert_eq!((of(Reason::Captured), of(Reason::Balanced)), (4, 32));
    // Nothing is hashed: anybody.
    path.table(&addresses, [0, 1, 2, 2, 1, 0, 0, 1], false);
    drop(pod.connect(SERVICE).unwrap());
    assert!((1..=3).contains(&path.event().host));
}

/// `to` from a socket that is bound to this address.
fn bound(pod: &Pod, to: &str, address: &str) -> Result<Socket, i32> {
    let to: SocketAddr = to.parse().unwrap();
    let client = pod.app_socket(Domain::for_address(to));
    client.bind(&SocketAddr::new(address.parse().unwrap(), 0).into()).unwrap();
    connect(&client, to).map(|()| client)
}

#[test]
fn the_source_chooses_the_service() {
    let lab = Lab::new();
    let mut path = Path::new(&lab);
    let pod = lab.pod();
    pod.run("ip addr add 10.77.0.3/24 dev eth0; ip addr add 10.77.0.4/24 dev eth0");
    let (server, address) = listen(&pod, 9_001);
    path.endpoints(&[address], 1024, 5_000);
    path.selector(&[("::", 3), ("10.77.0.2", 2), ("10.77.0.3", 3), ("10.77.0.4", 0), ("10.77.0.5", 3)]);
    const MAPPED: &str = "[::ffff:172.16.0.1]:50001";

    // Nobody has said who the pod is: its app may.
    assert_eq!(pod.connect(SERVICE).map(drop), Err(libc::EACCES), "it passes, and has no way");
    drop((bound(&pod, SERVICE, "10.77.0.3").unwrap(), accept(&server)));
    assert_eq!(path.event().service, 3);
    let of = |path: &Path, reason| count(&path.interceptor, reason);
    assert_eq!((of(&path, Reason::Balanced), of(&path, Reason::NotEnrolledPassed)), (1, 1));

    let listener = pod.capture(&mut path.interceptor);
    path.rule(SERVICE, 1);
    for (client, service, source) in [
        (pod.connect(SERVICE), 2, POD_V4),
        (pod.connect(MAPPED), 2, POD_V4),
        (bound(&pod, SERVICE, POD_V4), 2, POD_V4),
        (bound(&pod, SERVICE, "0.0.0.0"), 2, POD_V4),
        (bound(&pod, SERVICE, "10.77.0.3"), 3, "10.77.0.3"),
        (bound(&pod, MAPPED, "::ffff:10.77.0.3"), 3, "10.77.0.3"),
    ] {
        let client = client.unwrap();
        assert_eq!(canonical(peer(&client)).to_string(), SERVICE);
        drop((client, accept(&server)));
        let event = path.event();
        assert_eq!((event.service, event.client.to_ip().to_string()), (service, source.to_owned()));
    }
    // Without a chain.
    for (to, from) in [(SERVICE, "10.77.0.4"), (MAPPED, "::ffff:10.77.0.4")] {
        let client = bound(&pod, to, from).unwrap();
        assert_eq!(original_dst(&path.interceptor, &accept(&listener)), Some(SERVICE.parse().unwrap()));
        drop(client);
    }
    let attempts = [1, 2, 3].map(|service| path.tables.service(service).tally.attempts);
    assert_eq!(attempts, [0, 4, 3], "the selector counts nothing");
    assert_eq!((of(&path, Reason::Balanced), of(&path, Reason::Captured)), (7, 2));

    // What is refused is told of the chain, too.
    path.endpoints(&[], 1024, 5_000);
    assert_eq!(pod.connect(SERVICE).map(drop), Err(libc::EHOSTUNREACH));
    let event = path.event();
    assert_eq!((end(&event), event.service), (End::NoHost, 2));
    assert_eq!(path.tables.service(2).tally.no_host, 1);
}

#[test]
fn a_pod_that_is_not_enrolled_yet_has_no_source_to_hash() {
    let lab = Lab::new();
    let mut path = Path::new(&lab);
    let pod = lab.pod();
    let (_server, address) = listen(&pod, 9_001);
    path.table(&[address], [0; 8], true);
    assert_eq!(pod.connect(SERVICE).map(drop), Err(libc::EACCES), "it passes, and has no way");
    assert_eq!(counts(&path.interceptor), [("not_enrolled_passed", 1), ("announced", 1)]);
}

#[test]
fn a_pod_that_is_not_enrolled_yet_is_balanced_and_the_excluded_are_not() {
    let lab = Lab::new();
    let mut path = Path::new(&lab);
    let pod = lab.pod();
    let (server, address) = listen(&pod, 9_001);
    path.endpoints(&[address], 1024, 5_000);
    drop((pod.connect(SERVICE).unwrap(), accept(&server)));
    assert_eq!(counts(&path.interceptor), [("balanced", 1), ("announced", 1)]);
    path.interceptor.enrol(pod.cookie, tidegate_common::Enrolment::excluded()).unwrap();
    assert_eq!(pod.connect(SERVICE).map(drop), Err(libc::EACCES));
}

#[test]
fn the_dead_agent_balances_on_and_its_successor_goes_on_counting() {
    let lab = Lab::new();
    let mut path = Path::new(&lab);
    let pod = lab.pod();
    path.interceptor.enrol(pod.cookie, enrolment()).unwrap();
    let (server, address) = listen(&pod, 9_001);
    path.endpoints(&[address], 1024, 5_000);
    let before = pod.connect(SERVICE).unwrap();
    let accepted = accept(&server);
    // As kill -9 leaves it: nothing is detached.
    drop(path);
    drop((pod.connect(SERVICE).unwrap(), accept(&server)));
    let mut options = lab.options();
    options.sizes.tables = SIZES;
    let new = Interceptor::load(&options).unwrap();
    let tables = new.tables();
    let tally = tables.host(1).tally;
    assert_eq!((tally.attempts, tally.active), (2, 1));
    assert_eq!(tables.host(1).addr.to_ip(), address.ip());
    drop((before, accepted));
    let deadline = Instant::now() + LONG;
    while tables.host(1).tally.active > 0 {
        assert!(Instant::now() < deadline, "{:?}", tables.host(1).tally);
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(peer(&pod.connect(SERVICE).unwrap()).to_string(), SERVICE);
}

/// A successor whose tables have other sizes, or that has none: until it has rules of its own, the proxy serves.
#[test]
fn without_its_tables_a_service_is_captured() {
    let lab = Lab::new();
    let mut path = Path::new(&lab);
    let pod = lab.pod();
    let listener = pod.capture(&mut path.interceptor);
    let (_server, address) = listen(&pod, 9_001);
    path.endpoints(&[address], 1024, 5_000);
    drop(pod.connect(SERVICE).unwrap());
    drop(path);
    let new = lab.load();
    let client = pod.connect(SERVICE).unwrap();
    assert_eq!(original_dst(&new, &accept(&listener)), Some(SERVICE.parse().unwrap()));
    assert_eq!(peer(&client).to_string(), SERVICE);
}
