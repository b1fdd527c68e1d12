//! A captured connection, in every way that TCP can make one.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd as _};

use socket2::{Domain, SockAddr};
use tidegate::intercept::programs::Interceptor;
use tidegate_common::{Carrier, Destination, Enrolment, Reason, RuleValue, Verdict};

use crate::lab::*;

fn rules(list: &[(&str, Verdict)]) -> HashMap<Destination, RuleValue> {
    list.iter()
        .map(|(addr, verdict)| (addr.parse::<SocketAddr>().unwrap().into(), (*verdict).into()))
        .collect()
}

/// Captures these service addresses.
fn capture_only(interceptor: &mut Interceptor, services: &[&str]) {
    let list: Vec<_> = services.iter().map(|service| (*service, Verdict::Capture)).collect();
    interceptor.set_destinations(&rules(&list)).unwrap();
}

/// Both ends of a connection to `service` know what they should.
fn check(interceptor: &Interceptor, client: &socket2::Socket, accepted: &socket2::Socket, service: &str) {
    let service: SocketAddr = service.parse().unwrap();
    assert_eq!(original_dst(interceptor, accepted), Some(service));
    assert_eq!(canonical(peer(client)), service, "getpeername of the application");
    let own = canonical(local(client));
    assert_eq!(own.ip(), pod_ip(service.is_ipv6()), "getsockname of the application");
    assert_eq!(canonical(peer(accepted)), own, "the proxy sees the application's own address");
}

#[test]
fn ipv4_and_ipv6() {
    let services = ["172.16.0.1:50001", "[fd99::1]:50001"];
    for (service, (enrolment, carried)) in services.into_iter().flat_map(|it| carriers().map(|by| (it, by))) {
        let lab = Lab::new();
        let mut interceptor = lab.load();
        let pod = lab.pod();
        let listener = pod.capture_by(&mut interceptor, enrolment);
        capture_only(&mut interceptor, &[service]);
        let mut client = pod.connect(service).unwrap();
        let mut accepted = accept(&listener);
        check(&interceptor, &client, &accepted, service);
        client.write_all(b"ping").unwrap();
        let mut got = [0; 4];
        accepted.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"ping");
        assert_eq!(counts(&interceptor), [("captured", 1), (carried, 1), ("handed_over", 1)]);
        assert_eq!(interceptor.in_flight_len().unwrap(), 0);
    }
}

#[test]
fn ipv4_on_an_ipv6_socket_and_on_an_ipv4_listener() {
    let lab = Lab::new();
    let mut interceptor = lab.load();
    let pod = lab.pod();
    capture_only(&mut interceptor, &["172.16.0.1:50001"]);
    let v4_listener = pod.agent_socket(Domain::IPV4);
    v4_listener.bind(&SockAddr::from("0.0.0.0:15002".parse::<SocketAddr>().unwrap())).unwrap();
    v4_listener.listen(16).unwrap();
    interceptor.own_socket_marker().mark_listener(v4_listener.as_fd()).unwrap();
    let dual = pod.capture_listener(&interceptor, CAPTURE_PORT, 16);
    for (listener, port) in [(&dual, CAPTURE_PORT), (&v4_listener, 15002)] {
        let enrolment = Enrolment { capture_port: port, ..enrolment() };
        interceptor.enrol(pod.cookie, enrolment).unwrap();
        let mapped = pod.app_socket(Domain::IPV6);
        connect(&mapped, "[::ffff:172.16.0.1]:50001".parse().unwrap()).unwrap();
        check(&interceptor, &mapped, &accept(listener), "172.16.0.1:50001");
        assert_eq!(peer(&mapped), "[::ffff:172.16.0.1]:50001".parse().unwrap());
        let plain = pod.connect("172.16.0.1:50001").unwrap();
        check(&interceptor, &plain, &accept(listener), "172.16.0.1:50001");
    }
    assert_eq!(counts(&interceptor), [("captured", 4), ("in_syn", 4), ("handed_over", 4)]);
}

#[test]
fn a_pod_without_an_address_of_the_family_uses_the_loopback() {
    let lab = Lab::new();
    let mut interceptor = lab.load();
    let pod = lab.pod();
    let listener = pod.capture_listener(&interceptor, CAPTURE_PORT, 16);
    interceptor.enrol(pod.cookie, Enrolment::captured(CAPTURE_PORT, None, None)).unwrap();
    for service in ["172.16.0.1:50001", "[fd99::1]:50001"] {
        capture_only(&mut interceptor, &[service]);
        let client = pod.connect(service).unwrap();
        assert_eq!(original_dst(&interceptor, &accept(&listener)), Some(service.parse().unwrap()));
        assert!(local(&client).ip().is_loopback());
    }
}

#[test]
fn a_refused_connect_leaves_nothing_and_its_socket_can_be_used_again() {
    for (enrolment, carried) in carriers() {
        let lab = Lab::new();
        let mut interceptor = lab.load();
        let pod = lab.pod();
        capture_only(&mut interceptor, &["172.16.0.1:50001", "172.16.0.2:50002"]);
        // A listener waits, but its packets are answered with a RST.
        let listener = pod.capture_by(&mut interceptor, enrolment);
        pod.run(&format!(
            "nft add table inet t; nft add chain inet t input '{{ type filter hook input priority 0; }}'; \
             nft add rule inet t input tcp dport {CAPTURE_PORT} reject with tcp reset"
        ));
        let client = pod.app_socket(Domain::IPV4);
        assert_eq!(connect(&client, "172.16.0.1:50001".parse().unwrap()), Err(libc::ECONNREFUSED));
        assert_eq!(interceptor.in_flight_len().unwrap(), 0);
        let mut expected = vec![("captured", 1), (carried, 1)];
        if enrolment.carrier == Carrier::Map as u32 {
            expected.push(("handshake_abandoned", 1));
        }
        assert_eq!(counts(&interceptor), expected);
        pod.run("nft delete table inet t");
        connect(&client, "172.16.0.2:50002".parse().unwrap()).unwrap();
        check(&interceptor, &client, &accept(&listener), "172.16.0.2:50002");
    }
}

#[test]
fn a_socket_reused_after_af_unspec_has_no_stale_destination() {
    let lab = Lab::new();
    let mut interceptor = lab.load();
    let pod = lab.pod();
    let listener = pod.capture(&mut interceptor);
    capture_only(&mut interceptor, &["172.16.0.1:50001", "172.16.0.2:50002"]);
    let plain = pod.agent_socket(Domain::IPV4);
    plain.bind(&SockAddr::from("0.0.0.0:7000".parse::<SocketAddr>().unwrap())).unwrap();
    plain.listen(16).unwrap();

    let client = pod.app_socket(Domain::IPV4);
    connect(&client, "172.16.0.1:50001".parse().unwrap()).unwrap();
    check(&interceptor, &client, &accept(&listener), "172.16.0.1:50001");
    disconnect(&client);
    assert_eq!(client.peer_addr().unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
    connect(&client, "172.16.0.2:50002".parse().unwrap()).unwrap();
    check(&interceptor, &client, &accept(&listener), "172.16.0.2:50002");
    disconnect(&client);
    // Uncaptured, then straight to the capture listener: what was stored is gone, from getpeername and from sockops.
    let own: SocketAddr = format!("{POD_V4}:7000").parse().unwrap();
    connect(&client, own).unwrap();
    assert_eq!(peer(&client), own);
    drop(accept(&plain));
    disconnect(&client);
    let capture: SocketAddr = format!("{POD_V4}:{CAPTURE_PORT}").parse().unwrap();
    connect(&client, capture).unwrap();
    assert_eq!(original_dst(&interceptor, &accept(&listener)), None);
    assert_eq!(peer(&client), capture);
    assert_eq!(count(&interceptor, Reason::NoOriginalDestination), 1);
    assert_eq!(interceptor.in_flight_len().unwrap(), 0);
}

#[test]
fn syn_cookies() {
    let lab = Lab::new();
    let mut interceptor = lab.load();
    let pod = lab.pod();
    pod.run("echo 2 > /proc/sys/net/ipv4/tcp_syncookies");
    let listener = pod.capture_by(&mut interceptor, enrolment().carried_by_map());
    for service in ["172.16.0.1:50001", "[fd99::1]:50001"] {
        capture_only(&mut interceptor, &[service]);
        let client = pod.connect(service).unwrap();
        check(&interceptor, &client, &accept(&listener), service);
    }
    assert_eq!(tcp_ext(&pod, "SyncookiesRecv"), 2, "cookies were in use");
    // Where nobody has noticed, the SYN is lost, and that is counted.
    interceptor.enrol(pod.cookie, enrolment()).unwrap();
    let _client = pod.connect("[fd99::1]:50001").unwrap();
    assert_eq!(original_dst(&interceptor, &accept(&listener)), None);
    assert_eq!(count(&interceptor, Reason::NoOriginalDestination), 1);
}

#[test]
fn a_syn_without_room() {
    let lab = Lab::new();
    let mut interceptor = lab.load();
    let pod = lab.pod();
    let listener = pod.capture(&mut interceptor);
    // Asking for Fast Open's cookie takes four bytes: too much beside an IPv6 address, and only there.
    pod.run("echo 1 > /proc/sys/net/ipv4/tcp_fastopen");
    for (service, carried) in [("172.16.0.1:50001", Reason::InSyn), ("[fd99::1]:50001", Reason::InFlight)] {
        capture_only(&mut interceptor, &[service]);
        let to: SocketAddr = service.parse().unwrap();
        let client = pod.app_socket(Domain::for_address(to));
        assert_eq!(client.send_to_with_flags(b"later", &to.into(), libc::MSG_FASTOPEN).unwrap(), 5);
        check(&interceptor, &client, &accept(&listener), service);
        assert_eq!(count(&interceptor, carried), 1, "{service}");
    }
    assert_eq!(counts(&interceptor), [("captured", 2), ("in_syn", 1), ("in_flight", 1), ("handed_over", 2)]);
    assert_eq!(interceptor.in_flight_len().unwrap(), 0);
}

#[test]
fn the_option_is_in_the_syn_alone_and_the_application_keeps_its_options() {
    let lab = Lab::new();
    let mut interceptor = lab.load();
    let pod = lab.pod();
    let listener = pod.capture(&mut interceptor);
    capture_only(&mut interceptor, &["172.16.0.1:50001", "[fd99::1]:50001"]);
    for service in ["172.16.0.1:50001", "[fd99::1]:50001"] {
        let mut client = pod.connect(service).unwrap();
        let accepted = accept(&listener);
        // TCP_INFO: timestamps, SACK and window scaling are agreed, as without us.
        const AGREED: u8 = 1 | 2 | 4;
        assert_eq!(tcp_info(&client).tcpi_options & AGREED, AGREED);
        check(&interceptor, &client, &accepted, service);
        // No room is lost later: a segment has as many bytes as on a connection that was not captured.
        let plain = pod.agent_socket(Domain::for_address(service.parse().unwrap()));
        connect(&plain, SocketAddr::new(pod_ip(service.starts_with('[')), CAPTURE_PORT)).unwrap();
        drop(accept(&listener));
        client.write_all(b"x").unwrap();
        assert_eq!(tcp_info(&client).tcpi_snd_mss, tcp_info(&plain).tcpi_snd_mss);
    }
}

#[test]
fn tcp_fast_open() {
    let lab = Lab::new();
    let mut interceptor = lab.load();
    let pod = lab.pod();
    // Client and server on, and both without a cookie, so that the first SYN carries data.
    pod.run("echo $((0x1 | 0x2 | 0x4 | 0x200)) > /proc/sys/net/ipv4/tcp_fastopen");
    let listener = pod.capture(&mut interceptor);
    let backlog = 16_i32;
    // SAFETY: an int option.
    let result = unsafe {
        libc::setsockopt(
            listener.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_FASTOPEN,
            (&raw const backlog).cast(),
            4,
        )
    };
    assert_eq!(result, 0);
    for service in ["172.16.0.1:50001", "[fd99::1]:50001"] {
        capture_only(&mut interceptor, &[service]);
        let to: SocketAddr = service.parse().unwrap();
        let client = pod.app_socket(Domain::for_address(to));
        let sent = client.send_to_with_flags(b"early", &to.into(), libc::MSG_FASTOPEN).unwrap();
        assert_eq!(sent, 5);
        let mut accepted = accept(&listener);
        let mut got = [0; 5];
        accepted.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"early");
        check(&interceptor, &client, &accepted, service);
    }
    assert_eq!(tcp_ext(&pod, "TCPFastOpenPassive"), 2, "the data came with the SYN");
    assert_eq!(interceptor.in_flight_len().unwrap(), 0);
}

#[test]
fn a_direct_connection_to_the_capture_port_has_no_original_destination() {
    let lab = Lab::new();
    let mut interceptor = lab.load();
    let pod = lab.pod();
    let listener = pod.capture(&mut interceptor);
    interceptor.set_default_verdict(Verdict::Capture).unwrap();
    // An exact rule for it is no way round the guard.
    capture_only(&mut interceptor, &[&format!("{POD_V4}:{CAPTURE_PORT}")]);
    for to in [POD_V4, "127.0.0.1", "0.0.0.0"] {
        let client = pod.connect(&format!("{to}:{CAPTURE_PORT}")).unwrap();
        assert_eq!(original_dst(&interceptor, &accept(&listener)), None, "{to}");
        drop(client);
    }
    let mut counts = counts(&interceptor);
    // Once in a while: the agent is to look whether the namespace has changed.
    counts.retain(|(reason, _)| *reason != Reason::Announced.label());
    assert_eq!(
        counts,
        [("passed_loopback", 2), ("passed_capture_listener", 1), ("no_original_destination", 3)]
    );
    assert!(count(&interceptor, Reason::Announced) > 0);
}

#[test]
fn two_pods_with_the_same_four_tuple_in_flight_at_once() {
    for (enrolment, _) in carriers() {
        two_pods_with_the_same_four_tuple(enrolment);
    }
}

fn two_pods_with_the_same_four_tuple(enrolment: Enrolment) {
    let by_map = usize::from(enrolment.carrier == Carrier::Map as u32);
    let lab = Lab::new();
    let mut interceptor = lab.load();
    let services = ["172.16.0.1:50001", "172.16.0.2:50002"];
    capture_only(&mut interceptor, &services);
    let pods = [lab.pod(), lab.pod()];
    // The first pod's accept queue is full, so that its handshake waits while the second pod's goes through.
    let listeners = [
        pods[0].capture_listener(&interceptor, CAPTURE_PORT, 0),
        pods[1].capture_listener(&interceptor, CAPTURE_PORT, 16),
    ];
    for pod in &pods {
        interceptor.enrol(pod.cookie, enrolment).unwrap();
    }
    let _filler = pods[0].connect(&format!("127.0.0.1:{CAPTURE_PORT}")).unwrap();
    let clients = [0, 1].map(|i| {
        let client = pods[i].app_socket(Domain::IPV4);
        client.bind(&SockAddr::from("0.0.0.0:40000".parse::<SocketAddr>().unwrap())).unwrap();
        client.set_nonblocking(i == 0).unwrap();
        let result = connect(&client, services[i].parse().unwrap());
        assert_eq!(result, if i == 0 { Err(libc::EINPROGRESS) } else { Ok(()) });
        client
    });
    assert_eq!(interceptor.in_flight_len().unwrap(), by_map, "the first is still waiting");
    assert_eq!(local(&clients[0]), local(&clients[1]));
    check(&interceptor, &clients[1], &accept(&listeners[1]), services[1]);
    // Room in the queue: the next SYN of the first pod's client gets in.
    assert_eq!(original_dst(&interceptor, &accept(&listeners[0])), None);
    check(&interceptor, &clients[0], &accept(&listeners[0]), services[0]);
    assert_eq!(interceptor.in_flight_len().unwrap(), 0);
}

#[test]
fn a_thousand_times_three_connects_and_resets_never_mix_up() {
    for (enrolment, carried) in carriers() {
        a_thousand_times_three(enrolment, carried);
    }
}

fn a_thousand_times_three(enrolment: Enrolment, carried: &str) {
    let lab = Lab::new();
    let mut interceptor = lab.load();
    let pod = lab.pod();
    let listener = pod.capture_by(&mut interceptor, enrolment);
    let services: Vec<String> = (1..=3).map(|i| format!("172.16.0.{i}:5000{i}")).collect();
    capture_only(&mut interceptor, &services.iter().map(String::as_str).collect::<Vec<_>>());
    // Few ports: 4-tuples come round quickly.
    pod.run("echo '40000 40063' > /proc/sys/net/ipv4/ip_local_port_range");
    for round in 0..1000 {
        let clients: Vec<_> =
            services.iter().map(|service| (pod.connect(service).unwrap(), service)).collect();
        let by_port: HashMap<u16, &String> = clients.iter().map(|(c, s)| (local(c).port(), *s)).collect();
        for _ in &services {
            let accepted = accept(&listener);
            let service = by_port[&peer(&accepted).port()];
            assert_eq!(original_dst(&interceptor, &accepted).map(|a| a.to_string()).as_ref(), Some(service));
            if round % 2 == 0 {
                reset(accepted);
            }
        }
        for (client, _) in clients {
            reset(client);
        }
    }
    settled(&interceptor);
    assert_eq!(counts(&interceptor), [("captured", 3000), (carried, 3000), ("handed_over", 3000)]);
}

#[test]
fn a_full_accept_queue_and_a_full_map() {
    let lab = Lab::new();
    let mut options = lab.options();
    options.sizes.in_flight = 4;
    let mut interceptor = Interceptor::load(&options).unwrap();
    let pod = lab.pod();
    capture_only(&mut interceptor, &["172.16.0.1:50001"]);
    let listener = pod.capture_listener(&interceptor, CAPTURE_PORT, 1);
    interceptor.enrol(pod.cookie, enrolment().carried_by_map()).unwrap();
    let clients: Vec<_> = (0..40)
        .map(|_| {
            let client = pod.app_socket(Domain::IPV4);
            client.set_nonblocking(true).unwrap();
            let result = connect(&client, "172.16.0.1:50001".parse().unwrap());
            assert!(matches!(result, Ok(()) | Err(libc::EINPROGRESS)), "{result:?}");
            client
        })
        .collect();
    let (in_flight, full) =
        (count(&interceptor, Reason::InFlight), count(&interceptor, Reason::InFlightFull));
    assert_eq!(count(&interceptor, Reason::Captured), 40);
    assert_eq!(in_flight + full, 40, "each is one or the other");
    assert!(full > 0 && in_flight >= 4);
    assert!(interceptor.in_flight_len().unwrap() <= 4);
    clients.into_iter().for_each(reset);
    settled(&interceptor);
    drop(listener);
    settled(&interceptor);
    let left = in_flight - count(&interceptor, Reason::HandedOver);
    assert_eq!(count(&interceptor, Reason::HandshakeAbandoned), left, "every entry had an end");
}

#[test]
fn reading_something_that_is_no_socket_is_an_error() {
    let lab = Lab::new();
    let interceptor = lab.load();
    let file = std::fs::File::open("/dev/null").unwrap();
    let error = interceptor.original_dst_reader().read(file.as_fd()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOTSOCK));
}

fn tcp_info(socket: &socket2::Socket) -> libc::tcp_info {
    // SAFETY: integers only; all zero is a value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of_val(&info) as u32;
    let fd = socket.as_raw_fd();
    // SAFETY: room for as many bytes as said.
    let result = unsafe {
        libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, (&raw mut info).cast(), &raw mut length)
    };
    assert_eq!(result, 0);
    info
}

/// A counter of /proc/net/netstat in the pod.
fn tcp_ext(pod: &Pod, name: &str) -> u64 {
    let text = pod.run("cat /proc/thread-self/net/netstat");
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("TcpExt:"));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let found = names.split_whitespace().zip(values.split_whitespace()).find(|(n, _)| *n == name);
    found.unwrap_or_else(|| panic!("no counter {name}")).1.parse().unwrap()
}
