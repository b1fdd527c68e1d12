//! Who is captured, what is refused, and what each reason looks like from outside.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;

use socket2::{Domain, SockAddr, SockFilter, Socket};
use tidegate::config::listener::Cidr;
use tidegate::intercept::error::InterceptError;
use tidegate::intercept::programs::Interceptor;
use tidegate_common::{Destination, Enrolment, FailMode, Reason, RuleValue, Verdict};

use crate::lab::*;

/// What a connect that isn't captured gets in a pod (`prohibit` routes).
const PASSED: i32 = libc::EACCES;

fn rules(list: &[(&str, Verdict)]) -> HashMap<Destination, RuleValue> {
    list.iter()
        .map(|(addr, verdict)| (addr.parse::<SocketAddr>().unwrap().into(), (*verdict).into()))
        .collect()
}

#[test]
fn exact_rule_then_port_rule_then_default() {
    let lab = Lab::new();
    let mut interceptor = lab.load();
    let pod = lab.pod();
    let listener = pod.capture(&mut interceptor);
    assert_eq!(pod.connect("172.16.0.1:80").unwrap_err(), PASSED, "without rules nothing is captured");
    let set = [
        ("172.16.0.1:80", Verdict::Capture),
        ("172.16.0.2:80", Verdict::Refuse),
        ("[fd99::2]:80", Verdict::Refuse),
        ("172.16.0.3:80", Verdict::Leave),
        ("0.0.0.0:80", Verdict::Capture),
        ("0.0.0.0:81", Verdict::Refuse),
        ("0.0.0.0:82", Verdict::Leave),
        ("[::]:81", Verdict::Capture),
    ];
    interceptor.set_destinations(&rules(&set)).unwrap();
    for (default, to, outcome) in [
        (Verdict::Leave, "172.16.0.1:80", Ok(())),
        (Verdict::Leave, "172.16.0.2:80", Err(libc::ECONNREFUSED)),
        (Verdict::Leave, "[fd99::2]:80", Err(libc::ECONNREFUSED)),
        (Verdict::Leave, "172.16.0.3:80", Err(PASSED)),
        (Verdict::Leave, "172.16.0.4:80", Ok(())),
        (Verdict::Leave, "[fd99::4]:80", Err(PASSED)), // 0.0.0.0 is no IPv6 address
        (Verdict::Leave, "172.16.0.4:81", Err(libc::ECONNREFUSED)),
        (Verdict::Leave, "[fd99::4]:81", Ok(())),
        (Verdict::Leave, "172.16.0.4:83", Err(PASSED)),
        (Verdict::Capture, "172.16.0.4:83", Ok(())),
        (Verdict::Capture, "172.16.0.4:82", Err(PASSED)),
        (Verdict::Refuse, "172.16.0.4:83", Err(libc::ECONNREFUSED)),
        (Verdict::Refuse, "172.16.0.1:80", Ok(())),
    ] {
        interceptor.set_default_verdict(default).unwrap();
        let result = pod.connect(to);
        if result.is_ok() {
            assert_eq!(original_dst(&interceptor, &accept(&listener)), Some(to.parse().unwrap()));
        }
        assert_eq!(result.map(drop), outcome, "{to} with default {default:?}");
    }
    assert_eq!(interceptor.in_flight_len().unwrap(), 0);
}

#[test]
fn an_excluded_network_is_a_hole_in_general_rules() {
    let cidr = |address: &str, prefix_len| Cidr { address: address.parse().unwrap(), prefix_len };
    let lab = Lab::new();
    let mut options = lab.options();
    options.excluded = vec![cidr("172.16.4.0", 23), cidr("fd99::", 16), cidr("172.16.9.9", 32)];
    let mut interceptor = Interceptor::load(&options).unwrap();
    let pod = lab.pod();
    let listener = pod.capture(&mut interceptor);
    let set = [
        ("172.16.4.1:80", Verdict::Capture),
        ("0.0.0.0:81", Verdict::Capture),
        ("[::]:81", Verdict::Capture),
    ];
    interceptor.set_destinations(&rules(&set)).unwrap();
    for (default, to, outcome) in [
        (Verdict::Leave, "172.16.4.1:80", Ok(())), // named
        (Verdict::Leave, "172.16.4.1:81", Err(PASSED)),
        (Verdict::Leave, "172.16.5.255:81", Err(PASSED)),
        (Verdict::Leave, "172.16.6.0:81", Ok(())),
        (Verdict::Leave, "172.16.9.9:81", Err(PASSED)),
        (Verdict::Leave, "172.16.9.8:81", Ok(())),
        (Verdict::Leave, "[fd99:1::1]:81", Err(PASSED)),
        (Verdict::Leave, "[fd98::1]:81", Ok(())),
        (Verdict::Capture, "172.16.4.1:82", Err(PASSED)),
        (Verdict::Refuse, "172.16.4.1:82", Err(PASSED)),
        (Verdict::Capture, "172.16.3.1:82", Ok(())),
        (Verdict::Capture, "[fd99::1]:82", Err(PASSED)),
    ] {
        interceptor.set_default_verdict(default).unwrap();
        let result = pod.connect(to);
        if result.is_ok() {
            assert_eq!(original_dst(&interceptor, &accept(&listener)), Some(to.parse().unwrap()));
        }
        assert_eq!(result.map(drop), outcome, "{to} with default {default:?}");
    }
    // All of IPv6 is nothing of IPv4.
    options.excluded = vec![cidr("::", 0)];
    drop(interceptor);
    let mut interceptor = Interceptor::load(&options).unwrap();
    interceptor.set_default_verdict(Verdict::Capture).unwrap();
    assert_eq!(pod.connect("[fd98::1]:82").map(drop), Err(PASSED));
    assert_eq!(pod.connect("172.16.3.1:82").map(drop), Ok(()));
}

#[test]
fn only_the_difference_is_written() {
    let lab = Lab::new();
    let mut interceptor = lab.load();
    let first = rules(&[("10.0.0.1:1", Verdict::Capture), ("10.0.0.2:2", Verdict::Refuse)]);
    assert_eq!(interceptor.set_destinations(&first).unwrap(), 2);
    assert_eq!(interceptor.set_destinations(&first).unwrap(), 0);
    let second = rules(&[("10.0.0.1:1", Verdict::Leave), ("10.0.0.3:3", Verdict::Refuse)]);
    assert_eq!(interceptor.set_destinations(&second).unwrap(), 3, "one changed, one new, one gone");
}

#[test]
fn a_general_rule_leaves_what_is_meant_for_the_host_itself() {
    let lab = Lab::new();
    let mut interceptor = lab.load();
    let pod = lab.pod();
    let listener = pod.capture(&mut interceptor);
    interceptor.set_default_verdict(Verdict::Capture).unwrap();
    let own_v4 = format!("{POD_V4}:80");
    let own_v6 = format!("[{POD_V6}]:80");
    for to in ["127.0.0.1:80", "127.9.9.9:80", "0.0.0.0:80", "[::1]:80", "[::]:80", &own_v4, &own_v6] {
        // Nobody listens there: the kernel's refusal shows that it was not captured.
        assert_eq!(pod.connect(to).map(drop), Err(libc::ECONNREFUSED), "{to}");
    }
    assert_eq!(counts(&interceptor), [("passed_loopback", 5), ("passed_own_address", 2)]);
    let link_local = pod.app_socket(Domain::IPV6);
    link_local.set_nonblocking(true).unwrap();
    let _ = connect(&link_local, "[fe80::1]:80".parse().unwrap());
    assert_eq!(count(&interceptor, Reason::PassedLinkLocal), 1);
    // A rule that names the address means it.
    for to in ["127.0.0.1:80", &own_v4] {
        interceptor.set_destinations(&rules(&[(to, Verdict::Capture)])).unwrap();
        let _client = pod.connect(to).unwrap();
        assert_eq!(original_dst(&interceptor, &accept(&listener)), Some(to.parse().unwrap()));
    }
}

#[test]
fn not_enrolled_passes_or_fails_by_mode_and_is_announced_once() {
    for (mode, errno, reason) in [
        (FailMode::Open, PASSED, Reason::NotEnrolledPassed),
        (FailMode::Closed, libc::EHOSTUNREACH, Reason::NotEnrolledRefused),
    ] {
        let lab = Lab::new();
        let mut options = lab.options();
        options.fail_mode = mode;
        let mut interceptor = Interceptor::load(&options).unwrap();
        let mut events = interceptor.take_events().unwrap();
        let pod = lab.pod();
        interceptor.set_destinations(&rules(&[("172.16.0.1:80", Verdict::Capture)])).unwrap();
        assert_eq!(pod.connect("172.16.0.9:80").unwrap_err(), PASSED, "no rule: no business of ours");
        assert!(events.pop().is_none());
        for _ in 0..3 {
            assert_eq!(pod.connect("172.16.0.1:80").unwrap_err(), errno);
        }
        assert_eq!(count(&interceptor, reason), 3);
        let event = events.pop().expect("announced");
        assert_eq!((event.netns_cookie, event.tgid), (pod.cookie, std::process::id()));
        let announced = count(&interceptor, Reason::Announced);
        assert_eq!(std::iter::from_fn(|| events.pop()).count() as u64 + 1, announced);
        // It is enrolled, and captured from the next connect on.
        let listener = pod.capture(&mut interceptor);
        let _client = pod.connect("172.16.0.1:80").unwrap();
        assert!(original_dst(&interceptor, &accept(&listener)).is_some());
        assert!(interceptor.forget(pod.cookie).unwrap());
        assert!(!interceptor.forget(pod.cookie).unwrap());
        assert_eq!(pod.connect("172.16.0.1:80").unwrap_err(), errno);
    }
}

#[test]
fn without_a_capture_listener_the_fail_mode_decides_at_once() {
    for (mode, errno, reason) in [
        (FailMode::Open, PASSED, Reason::ListenerGonePassed),
        (FailMode::Closed, libc::ENETDOWN, Reason::ListenerGoneRefused),
    ] {
        let lab = Lab::new();
        let mut options = lab.options();
        options.fail_mode = mode;
        let mut interceptor = Interceptor::load(&options).unwrap();
        let pod = lab.pod();
        let services = ["172.16.0.1:80", "[fd99::1]:80", "[::ffff:172.16.0.1]:80"];
        interceptor.set_destinations(&rules(&services.map(|service| (service, Verdict::Capture)))).unwrap();
        let captured = |interceptor: &Interceptor, listener: &Socket| {
            for service in services {
                let client = pod.connect(service).unwrap();
                assert!(original_dst(interceptor, &accept(listener)).is_some(), "{service}");
                reset(client);
            }
        };
        let left_alone = |interceptor: &Interceptor| {
            let before = count(interceptor, reason);
            for service in services {
                assert_eq!(pod.connect(service).unwrap_err(), errno, "{service}");
            }
            assert_eq!(count(interceptor, reason) - before, 3);
        };
        let listener = pod.capture(&mut interceptor);
        captured(&interceptor, &listener);
        // Not only closed: another test's helper, just forked, may have it open for a moment.
        listener.shutdown(std::net::Shutdown::Both).unwrap();
        drop(listener);
        left_alone(&interceptor);
        // Whoever takes the port (the pod, or a server of somebody else) gets nothing that was meant for us.
        let stranger = pod.app_socket(Domain::IPV4);
        stranger.set_reuse_address(true).unwrap();
        stranger.bind(&SockAddr::from(SocketAddr::new("0.0.0.0".parse().unwrap(), CAPTURE_PORT))).unwrap();
        stranger.listen(16).unwrap();
        left_alone(&interceptor);
        stranger.set_nonblocking(true).unwrap();
        assert!(stranger.accept().is_err());
        stranger.shutdown(std::net::Shutdown::Both).unwrap();
        drop(stranger);
        // A socket that was passed on is captured when it connects again, as soon as somebody is there.
        let listener = pod.capture_listener(&interceptor, CAPTURE_PORT, 16);
        captured(&interceptor, &listener);
    }
}

#[test]
fn announcements_are_lost_while_nobody_reads_them_and_made_again() {
    let lab = Lab::new();
    let mut options = lab.options();
    // Room for 128.
    options.sizes.events = 4_096;
    let mut interceptor = Interceptor::load(&options).unwrap();
    let mut events = interceptor.take_events().unwrap();
    interceptor.set_default_verdict(Verdict::Capture).unwrap();
    let pods: Vec<_> = (0..6).map(|_| lab.pod()).collect();
    let connect_all =
        || pods.iter().for_each(|pod| assert_eq!(pod.connect("172.16.0.1:80").unwrap_err(), PASSED));
    let deadline = std::time::Instant::now() + LONG;
    while count(&interceptor, Reason::AnnouncementLost) == 0 {
        assert!(std::time::Instant::now() < deadline, "{:?}", counts(&interceptor));
        connect_all();
    }
    let waiting = std::iter::from_fn(|| events.pop()).count() as u64;
    assert_eq!(waiting, count(&interceptor, Reason::Announced));
    // What was lost is not held back as if it had been said.
    std::thread::sleep(std::time::Duration::from_nanos(tidegate_common::ANNOUNCE_INTERVAL_NS));
    connect_all();
    let said: std::collections::HashSet<_> =
        std::iter::from_fn(|| events.pop()).map(|event| event.netns_cookie).collect();
    assert_eq!(said, pods.iter().map(|pod| pod.cookie).collect());
}

#[test]
fn sockets_that_have_no_room_for_storage() {
    for (mode, errno, reason) in [
        (FailMode::Open, PASSED, Reason::StorageFailedPassed),
        (FailMode::Closed, libc::ENOBUFS, Reason::StorageFailedRefused),
    ] {
        let lab = Lab::new();
        let mut options = lab.options();
        options.fail_mode = mode;
        let mut interceptor = Interceptor::load(&options).unwrap();
        let pod = lab.pod();
        let listener = pod.capture_by(&mut interceptor, enrolment().carried_by_map());
        // As the real ones have: it is charged to each accepted socket, which so has less room than the client's.
        let take_all = |_| SockFilter::new((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, u32::MAX);
        listener.attach_filter(&std::array::from_fn::<_, 4, _>(take_all)).unwrap();
        interceptor.set_destinations(&rules(&[("172.16.0.1:80", Verdict::Capture)])).unwrap();
        // What a socket of the pod may hold beside its buffers, from nothing to enough for both ends.
        let mut failed = 0;
        for limit in (0..8_192).step_by(16) {
            pod.run(&format!("echo {limit} > /proc/sys/net/core/optmem_max"));
            match pod.connect("172.16.0.1:80") {
                Err(error) => {
                    assert_eq!(error, errno, "at {limit}");
                    failed += 1;
                    assert_eq!(count(&interceptor, reason), failed);
                }
                Ok(_client) => {
                    let found = original_dst(&interceptor, &accept(&listener));
                    if found.is_some() {
                        break;
                    }
                    assert!(count(&interceptor, Reason::AcceptedStorageFailed) > 0);
                }
            }
        }
        settled(&interceptor);
        assert!(count(&interceptor, reason) > 0);
        assert!(count(&interceptor, Reason::AcceptedStorageFailed) > 0, "{:?}", counts(&interceptor));
        assert_eq!(count(&interceptor, Reason::HandedOver), 1, "{:?}", counts(&interceptor));
    }
}

#[test]
fn a_process_of_the_host_is_captured_in_a_cgroup_of_the_host_only() {
    let lab = Lab::new();
    let pod = lab.pod();
    for (host, captured) in [(false, false), (true, true)] {
        let mut options = lab.options();
        if host {
            options.host_cgroups = std::mem::take(&mut options.cgroups);
        }
        let mut interceptor = Interceptor::load(&options).unwrap();
        let listener = pod.capture_listener(&interceptor, CAPTURE_PORT, 16);
        interceptor.enrol(pod.cookie, enrolment().of_host()).unwrap();
        for service in ["172.16.0.1:80", "[fd99::1]:80"] {
            interceptor.set_destinations(&rules(&[(service, Verdict::Capture)])).unwrap();
            match pod.connect(service) {
                Ok(_client) => {
                    assert!(captured && original_dst(&interceptor, &accept(&listener)).is_some());
                }
                Err(error) => assert!(!captured && error == PASSED, "{error}"),
            }
        }
        let excluded = if captured { 0 } else { 2 };
        assert_eq!(count(&interceptor, Reason::PassedExcluded), excluded, "{:?}", counts(&interceptor));
        listener.shutdown(std::net::Shutdown::Both).unwrap();
        interceptor.detach().unwrap();
    }
}

#[test]
fn an_excluded_namespace_is_left_alone() {
    let lab = Lab::new();
    let mut interceptor = lab.load();
    let pod = lab.pod();
    interceptor.enrol(pod.cookie, Enrolment::excluded()).unwrap();
    let set = rules(&[("172.16.0.1:80", Verdict::Capture), ("172.16.0.2:80", Verdict::Refuse)]);
    interceptor.set_destinations(&set).unwrap();
    assert_eq!(pod.connect("172.16.0.1:80").unwrap_err(), PASSED);
    assert_eq!(pod.connect("172.16.0.2:80").unwrap_err(), PASSED);
    assert_eq!(counts(&interceptor), [("passed_excluded", 2)]);
}

#[test]
fn own_sockets_pass_and_a_mark_is_no_proof() {
    let lab = Lab::new();
    let mut interceptor = lab.load();
    assert!(!interceptor.covers_own_cgroup());
    let pod = lab.pod();
    let listener = pod.capture(&mut interceptor);
    interceptor.set_destinations(&rules(&[("172.16.0.1:80", Verdict::Capture)])).unwrap();
    let to: SocketAddr = "172.16.0.1:80".parse().unwrap();
    // A socket of the agent's cgroup meets no hook at all.
    assert_eq!(connect(&pod.agent_socket(Domain::IPV4), to), Err(PASSED));
    assert_eq!(counts(&interceptor), []);
    // In a covered cgroup, one that the agent wrote to passes.
    let own = pod.app_socket(Domain::IPV4);
    interceptor.mark_own(own.as_fd()).unwrap();
    assert_eq!(connect(&own, to), Err(PASSED));
    assert_eq!(counts(&interceptor), [("passed_own_socket", 1)]);
    // Marks don't help, whichever.
    for mark in [1, 0x539, 1337, u32::MAX] {
        let forged = pod.app_socket(Domain::IPV4);
        forged.set_mark(mark).unwrap();
        connect(&forged, to).unwrap();
        assert_eq!(original_dst(&interceptor, &accept(&listener)), Some(to));
    }
}

#[test]
fn an_agent_inside_an_attach_point_knows_it() {
    let lab = Lab::new();
    let mut options = lab.options();
    options.cgroups = vec![lab.pods.parent().unwrap().into()];
    assert!(Interceptor::load(&options).unwrap().covers_own_cgroup());
}

#[test]
fn a_socket_bound_to_a_device_cannot_be_captured_and_says_so() {
    for (mode, errno, reason) in [
        // Open: on its way to nowhere, with a route that the device alone makes.
        (FailMode::Open, libc::EINPROGRESS, Reason::BoundToDevicePassed),
        (FailMode::Closed, libc::ENETUNREACH, Reason::BoundToDeviceRefused),
    ] {
        let lab = Lab::new();
        let mut options = lab.options();
        options.fail_mode = mode;
        let mut interceptor = Interceptor::load(&options).unwrap();
        let pod = lab.pod();
        let _listener = pod.capture(&mut interceptor);
        interceptor.set_destinations(&rules(&[("172.16.0.1:80", Verdict::Capture)])).unwrap();
        let bound = pod.app_socket(Domain::IPV4);
        bound.bind_device(Some(b"eth0")).unwrap();
        bound.set_nonblocking(true).unwrap();
        assert_eq!(connect(&bound, "172.16.0.1:80".parse().unwrap()), Err(errno));
        assert_eq!(counts(&interceptor), [(reason.label(), 1)]);
    }
}

#[test]
fn udp_and_port_zero_are_none_of_its_business() {
    let lab = Lab::new();
    let mut interceptor = lab.load();
    let pod = lab.pod();
    let _listener = pod.capture(&mut interceptor);
    interceptor.set_default_verdict(Verdict::Capture).unwrap();
    assert_eq!(connect(&pod.app_udp(), "172.16.0.1:80".parse().unwrap()), Err(PASSED));
    assert_eq!(pod.connect("172.16.0.1:0").unwrap_err(), PASSED);
    assert_eq!(counts(&interceptor), [("passed_not_tcp", 1), ("passed_port_zero", 1)]);
}

#[test]
fn a_full_map_says_which_and_what_to_do() {
    let lab = Lab::new();
    let mut options = lab.options();
    options.sizes.destinations = 1;
    let mut interceptor = Interceptor::load(&options).unwrap();
    let many: Vec<String> = (1..=64).map(|i| format!("10.0.0.{i}:80")).collect();
    let list: Vec<_> = many.iter().map(|addr| (addr.as_str(), Verdict::Capture)).collect();
    let error = interceptor.set_destinations(&rules(&list)).unwrap_err();
    assert!(matches!(error, InterceptError::Full { .. }), "{error:?}");
    assert_eq!(error.to_string(), "map DESTINATIONS is full (1 entries); raise its size");
}
