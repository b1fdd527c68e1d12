//! Where the record of a connection is: whose a slot is, and for how long.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr};

use socket2::{Domain, Socket};
use tidegate_common::{End, FLOW_SLOTS};

use crate::kernel_path::{Path, SERVICE, end, listen};
use crate::lab::*;

/// A pod with one endpoint, and programs that have slots.
struct Scene {
    path: Path,
    pod: Pod,
    server: Socket,
    endpoint: SocketAddr,
    // The last: its pins are those of the others.
    _lab: Lab,
}

impl Scene {
    fn new() -> Self {
        let lab = Lab::new();
        let mut path = Path::new(&lab);
        let pod = lab.pod();
        path.interceptor.enrol(pod.cookie, enrolment()).unwrap();
        let (server, endpoint) = listen(&pod, 9_001);
        path.endpoints(&[endpoint], 1024, 60_000);
        Self { path, pod, server, endpoint, _lab: lab }
    }

    fn connection(&self) -> (Socket, Socket) {
        (self.pod.connect(SERVICE).unwrap(), accept(&self.server))
    }

    /// The endpoint is this.
    fn endpoint(&mut self, address: &str) {
        self.path.endpoints(&[address.parse().unwrap()], 1024, 60_000);
    }

    /// A new socket that may have the same slot only.
    fn rival(&self, of: &Socket) -> Socket {
        let slot = |socket: &Socket| socket.cookie().unwrap() % u64::from(FLOW_SLOTS);
        let wanted = slot(of);
        // The kernel counts them, a few thousand at a time for each CPU.
        (0..40 * FLOW_SLOTS)
            .map(|_| self.pod.app_socket(Domain::IPV4))
            .find(|socket| slot(socket) == wanted)
            .expect("one in 16,384")
    }
}

/// Sends and receives that much.
fn exchange(client: &mut Socket, accepted: &mut Socket, bytes: usize) {
    client.write_all(&vec![1; bytes]).unwrap();
    accepted.read_exact(&mut vec![0; bytes]).unwrap();
}

fn service() -> SocketAddr {
    SERVICE.parse().unwrap()
}

#[test]
fn a_connection_has_a_slot_until_it_has_ended() {
    let scene = Scene::new();
    let _alone = alone();
    let ends: [fn(Socket, Socket) -> Option<Socket>; 5] = [
        |client, accepted| {
            drop(client);
            drop(accepted);
            None
        },
        |client, mut accepted| {
            client.shutdown(Shutdown::Write).unwrap();
            assert_eq!(accepted.read(&mut [0]).unwrap(), 0);
            drop(accepted);
            Some(client)
        },
        |client, accepted| {
            drop(accepted);
            drop(client);
            None
        },
        |client, accepted| {
            reset(accepted);
            Some(client)
        },
        |client, accepted| {
            reset(client);
            Some(accepted)
        },
    ];
    for end in ends {
        let (client, accepted) = scene.connection();
        scene.path.slots_in_use(1);
        // The application may have its socket still.
        let _kept = end(client, accepted);
        scene.path.slots_in_use(0);
    }
    // Of all who have the socket, the last one.
    let (client, accepted) = scene.connection();
    let holder = Holder::of(&client);
    drop(client);
    scene.path.slots_in_use(1);
    drop((holder, accepted));
    scene.path.slots_in_use(0);
}

#[test]
fn a_connect_that_fails_leaves_no_slot() {
    let mut scene = Scene::new();
    let _alone = alone();
    // Refused, with the application's socket still open; which connects again.
    scene.endpoint("10.77.0.2:9");
    let client = scene.pod.app_socket(Domain::IPV4);
    assert_eq!(connect(&client, service()), Err(libc::ECONNREFUSED));
    assert_eq!(end(&scene.path.event()), End::Refused);
    scene.path.slots_in_use(0);
    scene.endpoint(&scene.endpoint.to_string());
    connect(&client, service()).unwrap();
    scene.path.slots_in_use(1);
    // To nowhere, and again.
    disconnect(&client);
    scene.path.slots_in_use(0);
    connect(&client, service()).unwrap();
    assert_eq!(peer(&client), service());
    drop(client);
    drop([accept(&scene.server), accept(&scene.server)]);
    scene.path.slots_in_use(0);

    // No SYN is sent: the routing table has nothing. Then the slot is the socket's until it is closed.
    scene.endpoint("192.0.2.1:80");
    let [client, other] = [(); 2].map(|()| scene.pod.app_socket(Domain::IPV4));
    for socket in [&client, &client, &other] {
        assert_eq!(connect(socket, service()), Err(libc::EACCES));
    }
    scene.path.slots_in_use(2);
    drop(other);
    scene.path.slots_in_use(1);
    // Or connects to something else.
    assert_eq!(connect(&client, "192.0.2.1:80".parse().unwrap()), Err(libc::EACCES));
    scene.path.slots_in_use(0);

    // Closed before there is an answer.
    scene.pod.run("ip neigh replace 10.77.0.9 lladdr 02:00:00:00:00:09 dev eth0");
    scene.endpoint("10.77.0.9:80");
    let client = scene.pod.app_socket(Domain::IPV4);
    client.set_nonblocking(true).unwrap();
    assert_eq!(connect(&client, service()), Err(libc::EINPROGRESS));
    scene.path.slots_in_use(1);
    drop(client);
    scene.path.slots_in_use(0);
    assert_eq!(scene.path.tallies()[0].active, 0);
}

#[test]
fn whose_slot_is_another_s_has_a_storage() {
    let mut scene = Scene::new();
    let _alone = alone();
    for first_ends_first in [true, false] {
        let mut first = scene.connection();
        let rival = scene.rival(&first.0);
        connect(&rival, service()).unwrap();
        let mut second = (rival, accept(&scene.server));
        scene.path.slots_in_use(1);
        for ((client, accepted), bytes) in [(&mut first, 1), (&mut second, 20)] {
            assert_eq!(peer(client), service());
            exchange(client, accepted, bytes);
        }
        let order = if first_ends_first { [(first, 1), (second, 20)] } else { [(second, 20), (first, 1)] };
        for (nth, ((client, accepted), bytes)) in order.into_iter().enumerate() {
            assert_eq!(peer(&client), service());
            let from = local(&client);
            // Whose it is, is known of both: what the application leaves unread is its own reset.
            reset(client);
            let event = scene.path.event();
            assert_eq!(
                (end(&event), event.sent, event.client_port),
                (End::ResetByClient, bytes, from.port())
            );
            drop(accepted);
            scene.path.slots_in_use(usize::from(nth == 0 && !first_ends_first));
        }
    }
    assert_eq!(scene.path.tallies()[0].active, 0);
    assert_eq!(scene.path.tallies()[0].closed_by_client, 4);
}

/// A socket has its record in either place, one connection after the other.
#[test]
fn a_storage_of_an_earlier_connection_is_not_taken_for_the_record() {
    let mut scene = Scene::new();
    let _alone = alone();
    let first = scene.connection();
    let client = scene.rival(&first.0);
    // In its storage, and nothing is sent.
    scene.endpoint("192.0.2.1:80");
    assert_eq!(connect(&client, service()), Err(libc::EACCES));
    reset(first.0);
    assert_eq!(end(&scene.path.event()), End::ResetByClient);
    scene.path.slots_in_use(0);
    scene.endpoint(&scene.endpoint.to_string());
    connect(&client, service()).unwrap();
    let accepted = accept(&scene.server);
    scene.path.slots_in_use(1);
    reset(accepted);
    let event = scene.path.event();
    assert_eq!((end(&event), event.endpoint_port), (End::ResetByEndpoint, 9_001));
    scene.path.slots_in_use(0);
    drop(client);
    let [service, ..] = scene.path.tallies();
    assert_eq!((service.attempts, service.established, service.active), (2, 2, 0));
}

#[test]
fn slots_do_not_run_out() {
    let mut scene = Scene::new();
    for _ in 0..FLOW_SLOTS + FLOW_SLOTS / 4 {
        let (client, accepted) = scene.connection();
        reset(client);
        drop(accepted);
        assert_eq!(end(&scene.path.event()), End::ResetByClient);
    }
    scene.path.slots_in_use(0);
    assert_eq!(scene.path.tallies()[0].active, 0);
}
