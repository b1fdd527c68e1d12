//! Who ended a connection of the kernel path, and why a handshake failed: what the kernel tells in each case.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use socket2::{Domain, Socket};
use tidegate::intercept::programs::Cleaned;
use tidegate_common::{End, FlowEvent, FlowFlag};

use crate::kernel_path::{Path, SERVICE, end, listen};
use crate::lab::*;

/// A pod with one endpoint.
struct Scene {
    pod: Pod,
    path: Path,
    server: Socket,
    // The last: its pins are those of the others.
    _lab: Lab,
}

impl Scene {
    fn new() -> Self {
        let lab = Lab::new();
        let pod = lab.pod();
        let path = Path::new(&lab);
        Self::of(lab, pod, path)
    }

    fn without_slots() -> Self {
        let lab = Lab::new();
        let pod = lab.pod();
        let path = Path::without_slots(&lab);
        Self::of(lab, pod, path)
    }

    fn of(lab: Lab, pod: Pod, mut path: Path) -> Self {
        path.interceptor.enrol(pod.cookie, enrolment()).unwrap();
        let (server, address) = listen(&pod, 9_001);
        path.endpoints(&[address], 1024, 60_000);
        Self { pod, path, server, _lab: lab }
    }

    /// Both ends of a connection; five bytes have gone each way.
    fn connection(&self) -> (Socket, Socket) {
        let mut client = self.pod.connect(SERVICE).unwrap();
        let mut accepted = accept(&self.server);
        client.write_all(b"hello").unwrap();
        accepted.read_exact(&mut [0; 5]).unwrap();
        accepted.write_all(b"world").unwrap();
        client.read_exact(&mut [0; 5]).unwrap();
        (client, accepted)
    }

    /// Nothing that is sent to endpoints arrives any more.
    fn cut(&self) {
        self.pod.run(
            "nft 'add table inet cut; add chain inet cut in { type filter hook input priority 0; }; \
             add rule inet cut in tcp dport 9001 drop'",
        );
    }

    fn mend(&self) {
        self.pod.run("nft delete table inet cut");
    }

    /// The record, and whose end was counted: the client's, the endpoint's.
    fn ended(&mut self) -> (FlowEvent, End, [u64; 2]) {
        let event = self.path.event();
        let [service, cluster, host] = self.path.tallies();
        assert_eq!((service, cluster, host.active), (cluster, host, 0));
        let failed = service.failed;
        assert_eq!(service.established + failed, service.attempts);
        (event, end(&event), [service.closed_by_client, service.closed_by_endpoint])
    }
}

const CLIENT: [u64; 2] = [1, 0];
const ENDPOINT: [u64; 2] = [0, 1];

/// What is left for a moment before something else happens: what was sent has arrived by then.
fn pause() {
    std::thread::sleep(Duration::from_millis(20));
}

/// Waits until nothing that was sent is under way.
fn acknowledged(socket: &Socket) {
    let deadline = Instant::now() + LONG;
    while tidegate::sys::socket::unacknowledged(socket.as_fd()).unwrap() > 0 {
        assert!(Instant::now() < deadline, "nothing is acknowledged");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn fin(socket: &Socket) {
    socket.shutdown(Shutdown::Write).unwrap();
}

fn at_end(mut socket: &Socket) {
    assert_eq!(socket.read(&mut [0; 8]).unwrap(), 0);
}

/// What is left open until the record has come.
type Kept = Option<Socket>;

/// A name, what happens, what is said of it, who is counted, which FINs were seen, bytes each way.
type Case = (&'static str, fn(&Scene, Socket, Socket) -> Kept, End, [u64; 2], &'static [FlowFlag], [u64; 2]);

fn resets() -> Vec<Case> {
    use FlowFlag::{ClientFin, EndpointFin};
    vec![
        (
            "the endpoint resets",
            |_, client, accepted| {
                reset(accepted);
                Some(client)
            },
            End::ResetByEndpoint,
            ENDPOINT,
            &[],
            [5, 5],
        ),
        (
            "the endpoint closes with something unread",
            |_, mut client, accepted| {
                client.write_all(b"unread").unwrap();
                acknowledged(&client);
                drop(accepted);
                Some(client)
            },
            End::ResetByEndpoint,
            ENDPOINT,
            &[],
            [11, 5],
        ),
        (
            "the endpoint resets what has been sent to it and not acknowledged",
            |scene, mut client, accepted| {
                scene.cut();
                client.write_all(b"lost").unwrap();
                reset(accepted);
                scene.mend();
                Some(client)
            },
            End::ResetByEndpoint,
            ENDPOINT,
            &[],
            [5, 5],
        ),
        (
            "the client resets",
            |_, client, accepted| {
                reset(client);
                Some(accepted)
            },
            End::ResetByClient,
            CLIENT,
            &[],
            [5, 5],
        ),
        (
            "the client closes with something unread",
            |_, client, mut accepted| {
                accepted.write_all(b"unread").unwrap();
                pause();
                drop(client);
                Some(accepted)
            },
            End::ResetByClient,
            CLIENT,
            &[],
            [5, 11],
        ),
        (
            "the client is killed with something unread, by whom it was left to",
            |_, client, mut accepted| {
                let holder = Holder::of(&client);
                drop(client);
                accepted.write_all(b"unread").unwrap();
                pause();
                drop(holder);
                Some(accepted)
            },
            End::ResetByClient,
            CLIENT,
            &[],
            [5, 11],
        ),
        (
            "the client closes, and somebody else has it still, when the endpoint resets",
            |_, client, accepted| {
                let _holder = Holder::of(&client);
                drop(client);
                reset(accepted);
                pause();
                None
            },
            End::ResetByEndpoint,
            ENDPOINT,
            &[],
            [5, 5],
        ),
        (
            "the client connects to nowhere with something in flight",
            |scene, mut client, accepted| {
                scene.cut();
                client.write_all(b"lost").unwrap();
                disconnect(&client);
                scene.mend();
                Some(accepted)
            },
            End::ResetByClient,
            CLIENT,
            &[],
            [5, 5],
        ),
        (
            "the endpoint ends, and the client closes with something unread",
            |_, client, mut accepted| {
                accepted.write_all(b"unread").unwrap();
                fin(&accepted);
                pause();
                drop(client);
                Some(accepted)
            },
            End::ResetByClient,
            CLIENT,
            &[EndpointFin],
            [5, 11],
        ),
        (
            "the endpoint is gone, and is written to",
            |_, mut client, accepted| {
                drop(accepted);
                at_end(&client);
                client.write_all(b"late").unwrap();
                pause();
                Some(client)
            },
            End::ResetByEndpoint,
            ENDPOINT,
            &[EndpointFin],
            [5, 5],
        ),
        (
            "the client half-closes, and the endpoint answers and resets",
            |_, mut client, mut accepted| {
                fin(&client);
                at_end(&accepted);
                accepted.write_all(b"answer").unwrap();
                client.read_exact(&mut [0; 6]).unwrap();
                reset(accepted);
                Some(client)
            },
            End::ResetByEndpoint,
            ENDPOINT,
            &[ClientFin],
            [5, 11],
        ),
        (
            "the client closes, and the endpoint has reset before it heard of that",
            |scene, client, accepted| {
                scene.cut();
                drop(client);
                reset(accepted);
                scene.mend();
                None
            },
            End::ResetByEndpoint,
            ENDPOINT,
            &[ClientFin],
            [5, 5],
        ),
        (
            "the client closes, and the endpoint has written before it heard of that",
            |scene, client, mut accepted| {
                scene.cut();
                drop(client);
                accepted.write_all(b"more").unwrap();
                pause();
                scene.mend();
                Some(accepted)
            },
            End::ResetByClient,
            CLIENT,
            &[ClientFin],
            [5, 5],
        ),
        (
            "the client half-closes, and closes with something unread before that is acknowledged",
            |scene, client, mut accepted| {
                accepted.write_all(b"unread").unwrap();
                pause();
                scene.cut();
                fin(&client);
                drop(client);
                scene.mend();
                Some(accepted)
            },
            End::ResetByClient,
            CLIENT,
            &[ClientFin],
            [5, 11],
        ),
    ]
}

fn no_resets() -> Vec<Case> {
    use FlowFlag::{ClientFin, EndpointFin};
    vec![
        (
            "the client half-closes, and the endpoint answers and ends",
            |_, mut client, mut accepted| {
                fin(&client);
                at_end(&accepted);
                accepted.write_all(b"answer").unwrap();
                client.read_exact(&mut [0; 6]).unwrap();
                drop(accepted);
                at_end(&client);
                Some(client)
            },
            End::Closed,
            CLIENT,
            &[ClientFin, EndpointFin],
            [5, 11],
        ),
        (
            "the client half-closes, and closes with something unread",
            |_, client, mut accepted| {
                fin(&client);
                at_end(&accepted);
                accepted.write_all(b"answer").unwrap();
                pause();
                drop(client);
                Some(accepted)
            },
            End::Closed,
            CLIENT,
            &[ClientFin],
            [5, 11],
        ),
        (
            "the client closes, and the endpoint goes on",
            |_, client, mut accepted| {
                drop(client);
                pause();
                accepted.write_all(b"more").unwrap();
                pause();
                Some(accepted)
            },
            End::Closed,
            CLIENT,
            &[ClientFin],
            [5, 5],
        ),
        (
            "the endpoint is gone, and the client writes and closes at once",
            |_, mut client, accepted| {
                drop(accepted);
                at_end(&client);
                // Both in one packet.
                client.set_tcp_cork(true).unwrap();
                client.write_all(b"late").unwrap();
                drop(client);
                None
            },
            End::Closed,
            ENDPOINT,
            &[ClientFin, EndpointFin],
            [5, 5],
        ),
        (
            "the endpoint stops to answer",
            |scene, mut client, accepted| {
                client.set_tcp_user_timeout(Some(Duration::from_millis(300))).unwrap();
                scene.cut();
                client.write_all(b"lost").unwrap();
                assert_eq!(client.read(&mut [0]).unwrap_err().raw_os_error(), Some(libc::ETIMEDOUT));
                scene.mend();
                Some(accepted)
            },
            End::Silent,
            ENDPOINT,
            &[],
            [5, 5],
        ),
    ]
}

fn check(cases: Vec<Case>) {
    let scenes: [fn() -> Scene; 2] = [Scene::new, Scene::without_slots];
    for (case, scene) in cases.into_iter().flat_map(|case| scenes.map(|scene| (case, scene))) {
        let (name, act, expected, by, fins, bytes) = case;
        let mut scene = scene();
        let (client, accepted) = scene.connection();
        let alone = alone();
        let kept = act(&scene, client, accepted);
        let (event, end, counted) = scene.ended();
        scene.path.slots_in_use(0);
        drop((kept, alone));
        assert_eq!((end, counted), (expected, by), "{name}: {event:?}");
        for fin in [FlowFlag::ClientFin, FlowFlag::EndpointFin] {
            assert_eq!(event.flags & fin as u32 != 0, fins.contains(&fin), "{name}: {fin:?}, {event:?}");
        }
        assert_eq!([event.sent, event.received], bytes, "{name}");
    }
}

#[test]
fn it_is_known_who_resets() {
    check(resets());
}

#[test]
fn what_is_no_reset_is_not_called_one() {
    check(no_resets());
}

/// The socket is made below the cgroup that the programs are attached to, and closed by a process elsewhere.
#[test]
fn a_socket_has_the_cgroup_of_its_maker() {
    let lab = Lab::new();
    let pod = lab.pod_below();
    let path = Path::new(&lab);
    let mut scene = Scene::of(lab, pod, path);
    let (client, _accepted) = scene.connection();
    reset(client);
    assert_eq!(scene.ended().1, End::ResetByClient);
}

/// Closed sockets are heard of where connects are decided, while there is a kernel path.
#[test]
fn without_a_kernel_path_nobody_listens() {
    let lab = Lab::new();
    drop(Path::new(&lab));
    assert_eq!(lab.clean_up().unwrap(), Cleaned { links: 7, map_dirs: 1 });
    drop(Path::new(&lab));
    drop(lab.load());
    assert_eq!(lab.clean_up().unwrap(), Cleaned { links: 6, map_dirs: 1 });
}

/// The endpoint is an address that nothing answers for.
fn silent_endpoint(scene: &mut Scene) {
    let address: SocketAddr = "10.77.0.9:80".parse().unwrap();
    scene.pod.run("ip neigh replace 10.77.0.9 lladdr 02:00:00:00:00:09 dev eth0");
    scene.path.endpoints(&[address], 1024, 60_000);
}

/// A socket whose SYN is under way.
fn connecting(scene: &Scene) -> Socket {
    let client = scene.pod.app_socket(Domain::IPV4);
    client.set_nonblocking(true).unwrap();
    assert_eq!(connect(&client, SERVICE.parse().unwrap()), Err(libc::EINPROGRESS));
    client
}

/// A name, how long it waits (milliseconds), and what it does then.
type GivesUp = (&'static str, u64, fn(Socket));

#[test]
fn who_gives_up_is_no_failure_of_the_endpoints() {
    let mut scene = Scene::new();
    silent_endpoint(&mut scene);
    let cases: [GivesUp; 5] = [
        ("closed at once", 0, drop),
        ("closed after the SYN was sent again", 1_300, drop),
        ("killed", 0, |client| {
            let holder = Holder::of(&client);
            drop(client);
            drop(holder);
        }),
        ("shut down", 0, |client| {
            let _ = client.shutdown(Shutdown::Both);
            pause();
        }),
        ("connected to nowhere", 0, |client| disconnect(&client)),
    ];
    let _alone = alone();
    for (count, (name, after, act)) in (1..).zip(cases) {
        let client = connecting(&scene);
        std::thread::sleep(Duration::from_millis(after));
        act(client);
        let (event, end, _) = scene.ended();
        assert_eq!(end, End::Abandoned, "{name}");
        assert_eq!(event.retransmits != 0, after != 0, "{name}");
        let tally = scene.path.tallies()[2];
        assert_eq!((tally.attempts, tally.failed, tally.abandoned), (count, count, count), "{name}");
    }
}

#[test]
fn a_time_limit_of_the_application_s_own_is_one() {
    let mut scene = Scene::new();
    silent_endpoint(&mut scene);
    let client = scene.pod.app_socket(Domain::IPV4);
    client.set_tcp_user_timeout(Some(Duration::from_millis(200))).unwrap();
    assert_eq!(connect(&client, SERVICE.parse().unwrap()), Err(libc::ETIMEDOUT));
    assert_eq!(scene.ended().1, End::TimedOut);
    let tally = scene.path.tallies()[2];
    assert_eq!((tally.failed, tally.timed_out, tally.abandoned), (1, 1, 0));
}

/// The SYN has to be sent again: then the cluster's `connect_timeout` is in force, until it is answered.
#[test]
fn a_slow_handshake_gives_the_application_s_own_limit_back() {
    let scene = Scene::new();
    let connect_timeout = Some(Duration::from_mins(1));
    let shorter = Some(Duration::from_secs(50));
    let cases =
        [(None, connect_timeout), (Some(Duration::from_mins(5)), connect_timeout), (shorter, shorter)];
    scene.cut();
    let clients = cases.map(|(own, limit)| {
        let client = scene.pod.app_socket(Domain::IPV4);
        client.set_tcp_user_timeout(own).unwrap();
        client.set_nonblocking(true).unwrap();
        assert_eq!(connect(&client, SERVICE.parse().unwrap()), Err(libc::EINPROGRESS));
        (client, own, limit)
    });
    let until = Instant::now() + Duration::from_secs(20);
    while clients.iter().any(|(client, _, limit)| client.tcp_user_timeout().unwrap() != *limit) {
        assert!(Instant::now() < until, "the first SYN is sent again after a second");
        std::thread::sleep(Duration::from_millis(20));
    }
    scene.mend();
    let _accepted = [(); 3].map(|()| accept(&scene.server));
    for (client, own, _) in &clients {
        assert_eq!(client.tcp_user_timeout().unwrap(), *own);
    }
}

/// The neighbour does not answer: the kernel itself says that the host is unreachable.
#[test]
fn who_can_t_be_reached_is_unreachable() {
    let mut scene = Scene::new();
    silent_endpoint(&mut scene);
    scene.pod.run("ip neigh del 10.77.0.9 dev eth0; echo 20 > /proc/sys/net/ipv4/neigh/eth0/retrans_time_ms");
    assert_eq!(scene.pod.connect(SERVICE).map(drop), Err(libc::EHOSTUNREACH));
    assert_eq!(scene.ended().1, End::Unreachable);
    let tally = scene.path.tallies()[2];
    assert_eq!((tally.failed, tally.timed_out, tally.abandoned), (1, 0, 0));
}
