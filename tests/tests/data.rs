//! Bytes, FIN and RST through the whole proxy, from a captured pod.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use tidegate_tests::config::{Config, tcp_proxy};
use tidegate_tests::far::FarLine;
use tidegate_tests::netns::Netns;
use tidegate_tests::network::Network;
use tidegate_tests::node::{Node, Service, field};
use tidegate_tests::proxy::Setup;
use tidegate_tests::script::{
    End, GUARD, Pattern,
    Step::{Echo, Pause, Read, ReadSlowly, ReadToEnd, Reset, ShutdownWrite, WriteBytewise, WritePattern},
    Transcript, run, spawn, write,
};
use tidegate_tests::upstream::Upstream;

const MIB: u64 = 1 << 20;

/// Sends `length` pattern bytes and a FIN while reading everything; the reader starts late.
fn both_ways(stream: TcpStream, length: u64, late: u64) -> Transcript {
    let Ok(other) = stream.try_clone() else { return run(stream, &[]) };
    let writer = spawn(other, vec![WritePattern(length), ShutdownWrite]);
    let mut seen = run(stream, &[Pause(late), ReadToEnd]);
    if let Ok(sent) = writer.join() {
        seen.sent = sent.sent;
    }
    seen
}

#[test]
fn a_gibibyte_each_way_at_once_with_slow_readers() -> Result<()> {
    let length = 1024 * MIB;
    let service = Service::serving(json!({}), move |stream| both_ways(stream, length, 300))?;
    let seen = both_ways(service.client.connect(Service::ADDRESS)?, length, 600);
    let served = service.upstream.served()?.transcript;
    let expected = (length, length, Pattern::sha256(length), End::Fin);
    assert_eq!((seen.received, seen.sent, seen.sha256, seen.end), expected, "client");
    assert_eq!((served.received, served.sent, served.sha256, served.end), expected, "upstream");
    let line = service.log_line()?;
    assert_eq!((field(&line, "rx"), field(&line, "tx")), ("1073741824", "1073741824"), "{line}");
    Ok(())
}

#[test]
fn a_reader_that_stalls_does_not_cost_memory() -> Result<()> {
    let go_on = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&go_on);
    let service = Service::serving(json!({}), move |stream| {
        while !told.load(Ordering::Acquire) {
            std::thread::sleep(Duration::from_millis(10));
        }
        run(stream, &[ReadToEnd])
    })?;
    let before = rss_kib(service.proxy.pid())?;
    let stream = service.client.connect(Service::ADDRESS)?;
    stream.set_write_timeout(Some(Duration::from_secs(1)))?;
    let accepted = fill(&stream);
    let grown = rss_kib(service.proxy.pid())?.saturating_sub(before);
    go_on.store(true, Ordering::Release);
    assert!(accepted < FILL, "the proxy takes everything from a client whose upstream does not read");
    assert!(grown < 8 * 1024, "the proxy grew by {grown} KiB while {accepted} bytes were accepted");
    drop(stream);
    assert_eq!(service.upstream.served()?.transcript.received, accepted);
    Ok(())
}

/// More than all buffers between a client and an upstream hold.
const FILL: u64 = 64 * MIB;

/// Writes until nothing is taken any more, or until too much was; returns how much was taken.
fn fill(mut stream: &TcpStream) -> u64 {
    let chunk = vec![b'x'; 64 << 10];
    let mut accepted = 0;
    while accepted < FILL {
        match stream.write(&chunk) {
            Ok(written) => accepted += written as u64,
            Err(_) => break,
        }
    }
    accepted
}

fn rss_kib(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

#[test]
fn one_byte_writes_arrive_in_order() -> Result<()> {
    let text = b"the quick brown fox jumps over the lazy dog".repeat(20);
    let service = Service::start(&[Echo])?;
    let seen = service.talk(&[WriteBytewise(text.clone()), ShutdownWrite, ReadToEnd])?;
    assert_eq!((seen.head, seen.end), (text, End::Fin));
    Ok(())
}

#[test]
fn the_client_s_half_close_reaches_the_upstream() -> Result<()> {
    let service = Service::start(&[ReadToEnd, write("got your FIN"), Pause(50)])?;
    let seen = service.talk(&[write("hello"), ShutdownWrite, ReadToEnd])?;
    assert_eq!((seen.text().as_str(), seen.end), ("got your FIN", End::Fin));
    let served = service.upstream.served()?.transcript;
    assert_eq!((served.text().as_str(), served.end), ("hello", End::Fin));
    Ok(())
}

#[test]
fn the_upstream_s_half_close_reaches_the_client() -> Result<()> {
    let service = Service::start(&[write("bye"), ShutdownWrite, ReadToEnd])?;
    let seen = service.talk(&[ReadToEnd, Pause(100), WritePattern(2000), ShutdownWrite])?;
    assert_eq!((seen.text().as_str(), seen.end), ("bye", End::Fin));
    assert_eq!(service.upstream.served()?.transcript.received, 2000);
    let line = service.log_line()?;
    assert_eq!((field(&line, "rx"), field(&line, "tx"), field(&line, "flags")), ("2000", "3", "-"), "{line}");
    Ok(())
}

#[test]
fn the_client_s_reset_reaches_the_upstream() -> Result<()> {
    let service = Service::start(&[ReadToEnd])?;
    service.talk(&[write("hello"), Pause(200), Reset])?;
    let served = service.upstream.served()?.transcript;
    assert_eq!((served.text().as_str(), served.end), ("hello", End::Reset));
    Ok(())
}

#[test]
fn the_upstream_s_reset_reaches_the_client() -> Result<()> {
    let service = Service::start(&[Read(5), Pause(100), Reset])?;
    let seen = service.talk(&[write("hello"), ReadToEnd])?;
    assert_eq!(seen.end, End::Reset);
    assert_eq!(field(&service.log_line()?, "flags"), "UR");
    Ok(())
}

#[test]
fn a_reset_during_a_bulk_transfer_reaches_the_other_side() -> Result<()> {
    let service = Service::start(&[WritePattern(512 * MIB)])?;
    service.talk(&[Read(64 * MIB), Reset])?;
    let served = service.upstream.served()?.transcript;
    assert_eq!(served.end, End::Reset, "the upstream must not think that all was delivered");
    Ok(())
}

#[test]
fn what_was_accepted_arrives_after_the_client_has_gone() -> Result<()> {
    let length = 50 * MIB;
    let service = Service::start(&[Pause(500), ReadToEnd])?;
    service.talk(&[WritePattern(length)])?;
    let served = service.upstream.served()?.transcript;
    assert_eq!((served.received, served.sha256, served.end), (length, Pattern::sha256(length), End::Fin));
    Ok(())
}

#[test]
fn a_slow_client_gets_everything() -> Result<()> {
    let length = 20 * MIB;
    let service = Service::start(&[WritePattern(length), ShutdownWrite, ReadToEnd])?;
    let seen = service.talk(&[ReadSlowly(1 << 20), ShutdownWrite])?;
    assert_eq!((seen.received, seen.sha256, seen.end), (length, Pattern::sha256(length), End::Fin));
    Ok(())
}

#[test]
fn the_idle_timer_closes_both_sides() -> Result<()> {
    let service = Service::with_tcp_proxy(&[ReadToEnd], json!({"idle_timeout": "0.4s"}))?;
    let seen = service.talk(&[write("hello"), ReadToEnd])?;
    assert_eq!(seen.end, End::Fin);
    assert_eq!(service.upstream.served()?.transcript.end, End::Fin);
    let line = service.log_line()?;
    assert_eq!(field(&line, "closed"), "tcp_session_idle_timeout", "{line}");
    assert_eq!(service.proxy.stat(&format!("tcp.{}.idle_timeout", Service::CLUSTER))?, 1);
    Ok(())
}

#[test]
fn bytes_in_either_direction_restart_the_idle_timer() -> Result<()> {
    let ticks = |n: usize| (0..n).flat_map(|_| [write("tick"), Pause(150)]).collect::<Vec<_>>();
    let fields = json!({"idle_timeout": "0.6s"});
    let service = Service::with_tcp_proxy(&[ticks(8), vec![ReadToEnd]].concat(), fields.clone())?;
    assert_eq!(service.talk(&[ReadToEnd])?.received, 32);
    let service = Service::with_tcp_proxy(&[ReadToEnd], fields)?;
    service.talk(&[ticks(8), vec![ReadToEnd]].concat())?;
    assert_eq!(service.upstream.served()?.transcript.received, 32);
    Ok(())
}

#[test]
fn the_duration_timer_closes_a_busy_connection() -> Result<()> {
    let fields = json!({"max_downstream_connection_duration": "0.5s"});
    let ticks: Vec<_> = (0..200).flat_map(|_| [write("tick"), Pause(50)]).collect();
    let service = Service::with_tcp_proxy(&ticks, fields)?;
    let seen = service.talk(&[ReadToEnd])?;
    assert!(seen.received < 200 * 4, "{seen:?}");
    let line = service.log_line()?;
    assert_eq!(
        (field(&line, "flags"), field(&line, "closed")),
        ("DT", "max_connection_duration_reached"),
        "{line}"
    );
    Ok(())
}

#[test]
fn the_server_may_speak_first() -> Result<()> {
    let service = Service::start(&[write("220 ready\r\n"), Echo])?;
    let seen = service.talk(&[Read(11), write("QUIT"), ShutdownWrite, ReadToEnd])?;
    assert_eq!((seen.text().as_str(), seen.end), ("220 ready\r\nQUIT", End::Fin));
    Ok(())
}

/// An upstream that has gone without a word: Envoy's "remote close", which it has the client take for the end of the stream.
/// Here the client learns that something is missing.
#[test]
fn an_upstream_that_goes_silent_is_no_end_of_the_stream() -> Result<()> {
    let keepalive = json!({"keepalive_probes": 1, "keepalive_time": 1, "keepalive_interval": 1});
    let fields = json!({"upstream_connection_options": {"tcp_keepalive": keepalive}});
    let config = Config::new().service(Service::ADDRESS, "foo").cluster("foo", &[Service::ENDPOINT], fields);
    let node = Node::new()?;
    let client = node.pod("client", &["10.9.0.9"])?;
    let server = node.pod("server", &["10.9.0.1"])?;
    let _upstream = Upstream::identify(Some(server.netns()), Service::ENDPOINT, "a")?;
    let proxy = node.proxy(&config).start()?;
    let mut stream = client.connect(Service::ADDRESS)?;
    stream.set_read_timeout(Some(GUARD))?;
    stream.read_exact(&mut [0; 2])?;
    server
        .netns()
        .nft("table inet gone { chain in { type filter hook input priority 0; policy drop; }\n}")?;
    let error = stream.read(&mut [0]).expect_err("not the end");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let line = proxy.lines("access.log", "", 1)?.remove(0);
    let closes = (field(&line, "flags"), field(&line, "dnclose"), field(&line, "upclose"));
    assert_eq!(closes, ("-", "LocalReset", "Normal"), "{line}");
    for (name, expected) in
        [("destroy_remote_with_active_rq", 1), ("destroy_remote", 1), ("destroy_local", 0), ("destroy", 1)]
    {
        proxy.wait_stat(&format!("cluster.foo.upstream_cx_{name}"), |value| value == expected)?;
    }
    Ok(())
}

/// A client that has gone without a word is no end of the stream for the upstream either.
#[test]
fn a_client_that_goes_silent_is_no_end_of_the_stream() -> Result<()> {
    const ADDRESS: &str = "10.9.0.2:9000";
    let keepalive = json!({"keepalive_probes": 1, "keepalive_time": 1, "keepalive_interval": 1});
    let config = Config::new()
        .listener(ADDRESS, json!({"tcp_keepalive": keepalive}), &tcp_proxy("foo", json!({})))
        .cluster("foo", &[Service::ENDPOINT], json!({}));
    let network = Network::new()?;
    let client = network.pod("client", &["10.9.0.9"])?;
    let gateway = network.pod("gateway", &["10.9.0.2"])?;
    let server = network.pod("server", &["10.9.0.1"])?;
    let upstream = Upstream::start(Some(server.netns()), Service::ENDPOINT, vec![Echo])?;
    let proxy = Setup::new(&config.to_string()).netns(gateway.netns()).start()?;
    let mut stream = client.connect(ADDRESS)?;
    stream.set_read_timeout(Some(GUARD))?;
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0])?;
    client
        .netns()
        .nft("table inet gone { chain in { type filter hook input priority 0; policy drop; }\n}")?;
    let served = upstream.served()?.transcript;
    assert_eq!((served.received, served.end), (1, End::Reset));
    let line = proxy.lines("access.log", "", 1)?.remove(0);
    let closes = (field(&line, "flags"), field(&line, "dnclose"), field(&line, "upclose"));
    assert_eq!(closes, ("-", "Normal", "Normal"), "{line}");
    for (name, expected) in [("destroy_local", 1), ("destroy_remote", 0), ("destroy", 1)] {
        proxy.wait_stat(&format!("cluster.foo.upstream_cx_{name}"), |value| value == expected)?;
    }
    Ok(())
}

/// `SO_RCVBUF` of the established sockets that a filter of ss(8) finds.
fn receive_buffers(netns: &Netns, filter: &str) -> Result<Vec<u64>> {
    let output = netns.command("ss").args(["-Htnm", "state", "established", filter]).output()?;
    let text = String::from_utf8(output.stdout)?;
    ensure!(output.status.success(), "ss: {}", String::from_utf8_lossy(&output.stderr));
    text.split(",rb").skip(1).map(|rest| Ok(rest.split(',').next().unwrap_or_default().parse()?)).collect()
}

#[test]
fn a_near_sender_is_never_far_ahead_and_a_far_one_may_be() -> Result<()> {
    const FIXED: u64 = MIB;
    let [near, far] = ["127.0.0.1", "10.77.0.2"];
    let netns = Netns::new("far")?;
    netns.sysctl("net.ipv4.tcp_rmem", "4096 131072 6291456")?;
    let own = Ipv4Addr::new(10, 77, 0, 1);
    let _line = FarLine::new(&netns, own, far.parse()?, Duration::from_millis(1))?;
    let _upstream = Upstream::echo(Some(&netns), "0.0.0.0:7002")?;
    let mut config = Config::new();
    for (name, listener, peer) in [("near", near, near), ("far", "10.77.0.1", far)] {
        config = config.cluster(name, &[&format!("{peer}:7002")], json!({})).listener(
            &format!("{listener}:7001"),
            json!({}),
            &tcp_proxy(name, json!({})),
        );
    }
    let _proxy = Setup::new(&config.to_string()).netns(&netns).start()?;
    for (peer, is_near) in [(near, true), (far, false)] {
        let client = netns.enter(|| TcpStream::connect(format!("{peer}:7001")))??;
        client.set_read_timeout(Some(GUARD))?;
        let writer = client.try_clone()?;
        let writer = std::thread::spawn(move || (&writer).write_all(&vec![1; 16 << 20]));
        (&client).read_exact(&mut vec![0; 16 << 20])?;
        writer.join().expect("does not panic")?;
        for filter in ["sport = :7001", "dport = :7002"] {
            let sizes = receive_buffers(&netns, &format!("{filter} and dst {peer}"))?;
            assert!(
                sizes.len() == 1 && (sizes[0] == FIXED) == is_near,
                "{filter}, {peer}: receive buffers of {sizes:?} bytes"
            );
        }
    }
    Ok(())
}
