//! Interception of pods by the whole proxy: what is captured, what is not, and what each side sees.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{AddressFamily, setsockopt, sockopt};
use serde_json::json;
use socket2::{Domain, SockAddr, SockRef};
use tidegate_tests::client::{self, Outcome};
use tidegate_tests::config::Config;
use tidegate_tests::node::{Node, address_field, field};
use tidegate_tests::pod::Pod;
use tidegate_tests::proxy::Proxy;
use tidegate_tests::script::{
    self, End,
    Step::{Echo, Read as ReadBytes, ReadToEnd, ShutdownWrite},
    Transcript, write,
};
use tidegate_tests::upstream::Upstream;
use tidegate_tests::workload::Connect;

const FOO: &str = "outbound|50001|v1|foo-service.foo.svc.cluster.local";

/// A node with a client pod, a server pod and a service for each family.
struct Cluster {
    proxy: Proxy,
    client: Pod,
    upstream: Upstream,
    upstream_v6: Upstream,
    _server: Pod,
    node: Node,
}

impl Cluster {
    fn start() -> Result<Self> {
        Self::with(Config::new(), &[])
    }

    fn with(config: Config, args: &[&str]) -> Result<Self> {
        Self::prepared(config, args, &[])
    }

    /// `sysctls` are set in the client pod before anything listens there.
    fn prepared(config: Config, args: &[&str], sysctls: &[(&str, &str)]) -> Result<Self> {
        let node = Node::new()?;
        let client = node.pod("client", &["10.9.0.9", "fd00:9::9"])?;
        for (key, value) in sysctls {
            client.netns().sysctl(key, value)?;
        }
        let server = node.pod("server", &["10.9.0.1", "fd00:9::1"])?;
        let upstream = Upstream::identify(Some(server.netns()), "10.9.0.1:80", "four")?;
        let upstream_v6 = Upstream::identify(Some(server.netns()), "[fd00:9::1]:80", "six")?;
        let config = config
            .service("172.16.0.1:50001", FOO)
            .cluster(FOO, &["10.9.0.1:80"], json!({}))
            .service("[fd00:172::1]:50001", "six")
            .cluster("six", &["[fd00:9::1]:80"], json!({}));
        let proxy = node.proxy(&config).args(args.iter().copied()).start()?;
        Ok(Self { proxy, client, upstream, upstream_v6, _server: server, node })
    }

    fn talk(&self, address: &str) -> Outcome {
        talk(&self.client, address)
    }
}

fn talk(pod: &Pod, address: &str) -> Outcome {
    client::run(pod.connect(address), &[write("hello"), ShutdownWrite, ReadToEnd])
}

fn connected(outcome: Outcome) -> Result<Transcript> {
    match outcome {
        Outcome::Connected(transcript) => Ok(transcript),
        Outcome::NotConnected(errno) => anyhow::bail!("not connected: {errno}"),
    }
}

fn refused(errno: &str) -> Outcome {
    Outcome::NotConnected(errno.into())
}

fn counter(proxy: &Proxy, reason: &str) -> Result<u64> {
    proxy.stat(&format!("tidegate.intercept.{reason}"))
}

/// The interception's counters are read once a second.
fn wait_counter(proxy: &Proxy, reason: &str, wanted: impl Fn(u64) -> bool) -> Result<u64> {
    proxy.wait_stat(&format!("tidegate.intercept.{reason}"), wanted)
}

#[test]
fn ipv4_is_captured_and_everybody_sees_true_addresses() -> Result<()> {
    let cluster = Cluster::start()?;
    let stream = cluster.client.connect("172.16.0.1:50001")?;
    assert_eq!(stream.peer_addr()?, "172.16.0.1:50001".parse()?, "getpeername");
    let local = stream.local_addr()?;
    assert_eq!(local.ip().to_string(), "10.9.0.9", "getsockname");
    let seen = script::run(stream, &[write("hello"), ShutdownWrite, ReadToEnd]);
    assert_eq!((seen.text().as_str(), seen.end), ("four\nhello", End::Fin));
    let peer = cluster.upstream.served()?.peer;
    assert_eq!(peer.ip().to_string(), "10.9.0.9", "the upstream sees the pod, not the proxy");
    let line = cluster.proxy.lines("access.log", "", 1)?.remove(0);
    assert_eq!(address_field(&line, "dremote")?, local, "{line}");
    assert_eq!(field(&line, "dlocal"), "172.16.0.1:50001", "{line}");
    assert_eq!(address_field(&line, "uplocal")?, peer, "{line}");
    assert_eq!((field(&line, "clu"), field(&line, "up")), (FOO, "10.9.0.1:80"), "{line}");
    wait_counter(&cluster.proxy, "captured", |count| count == 1)?;
    Ok(())
}

#[test]
fn a_source_address_is_one_of_the_pod() -> Result<()> {
    let node = Node::new()?;
    let client = node.pod("client", &["10.9.0.9", "10.9.0.8"])?;
    let other = node.pod("other", &["10.9.0.7"])?;
    let server = node.pod("server", &["10.9.0.1"])?;
    let upstream = Upstream::identify(Some(server.netns()), "10.9.0.1:80", "four")?;
    let bind = json!({"upstream_bind_config": {"source_address": {"address": "10.9.0.8", "port_value": 0}}});
    let config = Config::new().service("172.16.0.1:50001", FOO).cluster(FOO, &["10.9.0.1:80"], bind);
    let proxy = node.proxy(&config).start()?;
    assert_eq!(connected(talk(&client, "172.16.0.1:50001"))?.text(), "four\nhello");
    let peer = upstream.served()?.peer;
    assert_eq!(peer.ip().to_string(), "10.9.0.8");
    let line = proxy.lines("access.log", "", 1)?.remove(0);
    assert_eq!(address_field(&line, "uplocal")?, peer, "{line}");
    // The other pod does not have it.
    assert_eq!(connected(talk(&other, "172.16.0.1:50001"))?.text(), "");
    let line = proxy.lines("access.log", "", 2)?.remove(1);
    assert!(line.contains("failed_to_bind_to_10.9.0.8:0:_Cannot_assign_requested_address"), "{line}");
    proxy.wait_stat(&format!("cluster.{FOO}.bind_errors"), |count| count == 1)?;
    Ok(())
}

#[test]
fn ipv6_is_captured() -> Result<()> {
    let cluster = Cluster::start()?;
    let stream = cluster.client.connect("[fd00:172::1]:50001")?;
    assert_eq!(stream.peer_addr()?, "[fd00:172::1]:50001".parse()?);
    assert_eq!(stream.local_addr()?.ip().to_string(), "fd00:9::9");
    let seen = script::run(stream, &[write("hello"), ShutdownWrite, ReadToEnd]);
    assert_eq!(seen.text(), "six\nhello");
    assert_eq!(cluster.upstream_v6.served()?.peer.ip().to_string(), "fd00:9::9");
    Ok(())
}

#[test]
fn a_v4_mapped_socket_is_captured() -> Result<()> {
    let cluster = Cluster::start()?;
    let stream = cluster.client.connect("[::ffff:172.16.0.1]:50001")?;
    assert_eq!(stream.peer_addr()?, "[::ffff:172.16.0.1]:50001".parse()?, "the form that the program used");
    assert_eq!(stream.local_addr()?.ip().to_string(), "::ffff:10.9.0.9");
    let seen = script::run(stream, &[write("hello"), ShutdownWrite, ReadToEnd]);
    assert_eq!(seen.text(), "four\nhello");
    let line = cluster.proxy.lines("access.log", "", 1)?.remove(0);
    assert_eq!(field(&line, "dlocal"), "172.16.0.1:50001", "{line}");
    Ok(())
}

#[test]
fn what_no_listener_names_is_left_alone() -> Result<()> {
    let cluster = Cluster::start()?;
    assert_eq!(connected(cluster.talk("10.9.0.1:80"))?.text(), "four\nhello");
    assert_eq!(cluster.talk("10.9.0.1:81"), refused("ECONNREFUSED"));
    assert_eq!(cluster.talk("172.16.0.2:50001"), refused("ETIMEDOUT"));
    wait_counter(&cluster.proxy, "passed_no_rule", |count| count >= 3)?;
    assert_eq!(counter(&cluster.proxy, "captured")?, 0);
    assert_eq!(cluster.proxy.file("access.log"), "");
    Ok(())
}

#[test]
fn what_is_excluded_is_left_alone_although_a_listener_takes_everything() -> Result<()> {
    let node = Node::new()?;
    let client = node.pod("client", &["10.9.0.9"])?;
    let server = node.pod("server", &["10.9.0.1", "10.9.0.2"])?;
    // The proxy sends all of it to "four"; who is not captured gets to where it wanted to go.
    let _four = Upstream::identify(Some(server.netns()), "10.9.0.1:80", "four")?;
    let _direct: Vec<_> = [("10.9.0.2:81", "network"), ("10.9.0.1:82", "port"), ("10.9.0.1:83", "own")]
        .map(|(address, name)| Upstream::identify(Some(server.netns()), address, name))
        .into_iter()
        .collect::<Result<_>>()?;
    let config = Config::new().pass_through().service("0.0.0.0:81", FOO).service("10.9.0.1:83", FOO);
    let config = config.cluster(FOO, &["10.9.0.1:80"], json!({}));
    let mut config: serde_json::Value = serde_json::from_str(&config.to_string())?;
    config["bootstrap_extensions"] = json!([{
        "name": "tidegate.bootstrap.interception",
        "typed_config": {
            "@type": "type.googleapis.com/tidegate.bootstrap.v1.Interception",
            "exclude": {"cidrs": [{"address_prefix": "10.9.0.2", "prefix_len": 32}], "ports": [82]},
        },
    }]);
    let proxy = node.proxy(&Config::new()).config(&format!("{config:#}")).start()?;
    for (address, name) in [
        ("10.9.0.1:81", "four"),
        ("10.9.0.2:81", "network"),
        ("10.9.0.1:82", "port"),
        ("10.9.0.1:83", "four"),
    ] {
        assert_eq!(connected(talk(&client, address))?.text(), format!("{name}\nhello"), "{address}");
    }
    wait_counter(&proxy, "captured", |count| count == 2)?;
    assert_eq!(counter(&proxy, "passed_no_rule")?, 2);
    Ok(())
}

#[test]
fn an_explicit_bind_is_kept() -> Result<()> {
    let cluster = Cluster::start()?;
    let connect = Connect::to("172.16.0.1:50001").from("10.9.0.9:4444");
    let stream = cluster.client.connect_with(&connect)?;
    assert_eq!(stream.local_addr()?, "10.9.0.9:4444".parse()?);
    assert_eq!(script::run(stream, &[ReadBytes(5)]).text(), "four\n");
    Ok(())
}

#[test]
fn a_nonblocking_connect_is_captured() -> Result<()> {
    let cluster = Cluster::start()?;
    let socket = cluster.client.socket(Domain::IPV4)?;
    socket.set_nonblocking(true)?;
    let address: SocketAddr = "172.16.0.1:50001".parse()?;
    let outcome = socket.connect(&address.into());
    ensure!(
        outcome.is_ok() || outcome.is_err_and(|e| e.raw_os_error() == Some(115)),
        "EINPROGRESS is expected"
    );
    socket.set_nonblocking(false)?;
    assert_eq!(script::run(socket.into(), &[ReadBytes(5)]).text(), "four\n");
    Ok(())
}

#[test]
fn a_refused_upstream_closes_the_connection_and_is_logged() -> Result<()> {
    let node = Node::new()?;
    let client = node.pod("client", &["10.9.0.9"])?;
    let _server = node.pod("server", &["10.9.0.1"])?;
    let config = Config::new().service("172.16.0.1:50001", FOO).cluster(FOO, &["10.9.0.1:81"], json!({}));
    let proxy = node.proxy(&config).start()?;
    let seen = connected(client::run(client.connect("172.16.0.1:50001"), &[ReadToEnd]))?;
    assert_eq!(seen.received, 0);
    let line = proxy.lines("access.log", "", 1)?.remove(0);
    assert_eq!(field(&line, "flags"), "UF,URX", "{line}");
    assert_eq!(field(&line, "fail"), "delayed_connect_error:_Connection_refused", "{line}");
    Ok(())
}

#[test]
fn a_socket_that_is_used_again_has_only_its_last_destination() -> Result<()> {
    let cluster = Cluster::start()?;
    let socket = cluster.client.socket(Domain::IPV4)?;
    let captured: SocketAddr = "172.16.0.1:50001".parse()?;
    let direct: SocketAddr = "10.9.0.1:80".parse()?;
    for destination in [captured, direct, captured] {
        socket.connect(&destination.into())?;
        let stream = TcpStream::from(socket.try_clone()?);
        assert_eq!(stream.peer_addr()?, destination);
        let mut banner = [0; 5];
        (&stream).read_exact(&mut banner)?;
        assert_eq!(&banner, b"four\n");
        disconnect(&socket)?;
    }
    wait_counter(&cluster.proxy, "captured", |count| count == 2)?;
    cluster.proxy.lines("access.log", "dlocal=172.16.0.1:50001", 2)?;
    Ok(())
}

/// connect(AF_UNSPEC)
fn disconnect(socket: &socket2::Socket) -> Result<()> {
    // SAFETY: the closure writes nothing; an all-zero sockaddr_storage is AF_UNSPEC, and the length covers it.
    let ((), unspecified) = unsafe {
        SockAddr::try_init(|_, length| {
            *length = 16;
            Ok(())
        })?
    };
    assert_eq!(i32::from(unspecified.family()), AddressFamily::Unspec as i32);
    Ok(socket.connect(&unspecified)?)
}

#[test]
fn syn_cookies_lose_nothing() -> Result<()> {
    // 2: every SYN is answered with a cookie.
    let cluster = Cluster::prepared(Config::new(), &[], &[("net.ipv4.tcp_syncookies", "2")])?;
    for _ in 0..50 {
        assert_eq!(connected(cluster.talk("172.16.0.1:50001"))?.text(), "four\nhello");
    }
    wait_counter(&cluster.proxy, "handed_over", |count| count == 50)?;
    assert_eq!(counter(&cluster.proxy, "in_flight")?, 50);
    assert_eq!(counter(&cluster.proxy, "no_original_destination")?, 0);
    Ok(())
}

#[test]
fn syn_cookies_that_are_turned_on_later_are_noticed() -> Result<()> {
    let cluster = Cluster::start()?;
    let says = |outcome: Outcome| Ok::<_, anyhow::Error>(connected(outcome)?.text() == "four\nhello");
    assert!(says(cluster.talk("172.16.0.1:50001"))?);
    cluster.client.netns().sysctl("net.ipv4.tcp_syncookies", "2")?;
    assert!(!says(cluster.talk("172.16.0.1:50001"))?, "the test tests nothing: there was no cookie");
    wait_counter(&cluster.proxy, "no_original_destination", |count| count == 1)?;
    let deadline = Instant::now() + script::GUARD;
    while !says(cluster.talk("172.16.0.1:50001"))? {
        assert!(Instant::now() < deadline, "not noticed:\n{}", cluster.proxy.log_tail());
    }
    for _ in 0..20 {
        assert!(says(cluster.talk("172.16.0.1:50001"))?);
    }
    // And off again: by the next walk.
    cluster.client.netns().sysctl("net.ipv4.tcp_syncookies", "1")?;
    for _ in 0..20 {
        assert!(says(cluster.talk("172.16.0.1:50001"))?);
    }
    Ok(())
}

#[test]
fn tcp_fast_open_carries_data_in_the_syn() -> Result<()> {
    // 0x1: client, 0x2: server, 0x4: data in a SYN without a cookie, 0x200: likewise accepted, 0x400: by whatever
    // listens from then on.
    let cluster = Cluster::prepared(Config::new(), &[], &[("net.ipv4.tcp_fastopen", "1543")])?;
    for _ in 0..20 {
        let socket = cluster.client.socket(Domain::IPV4)?;
        setsockopt(&socket, sockopt::TcpFastOpenConnect, &true).context("TCP_FASTOPEN_CONNECT")?;
        let address: SocketAddr = "172.16.0.1:50001".parse()?;
        socket.connect(&address.into())?;
        let mut stream = TcpStream::from(socket);
        stream.write_all(b"early")?;
        let seen = script::run(stream, &[ShutdownWrite, ReadToEnd]);
        assert_eq!(seen.text(), "four\nearly");
    }
    wait_counter(&cluster.proxy, "handed_over", |count| count == 20)?;
    let netstat =
        cluster.client.netns().enter(|| std::fs::read_to_string("/proc/thread-self/net/netstat"))??;
    assert!(
        netstat_value(&netstat, "TCPFastOpenActive")? > 0,
        "no SYN carried data: the test tested nothing"
    );
    Ok(())
}

/// A value of /proc/net/netstat: names in one line, values in the next.
fn netstat_value(netstat: &str, name: &str) -> Result<u64> {
    let lines: Vec<&str> = netstat.lines().collect();
    let pair = lines.chunks(2).find(|pair| pair[0].contains(name)).context("no such counter")?;
    let index = pair[0].split(' ').position(|found| found == name).context("no such name")?;
    Ok(pair[1].split(' ').nth(index).context("no value")?.parse()?)
}

#[test]
fn three_thousand_resets_leave_nothing_behind() -> Result<()> {
    let destinations = 20;
    let node = Node::new()?;
    let client = node.pod("client", &["10.9.0.9"])?;
    let server = node.pod("server", &["10.9.0.1"])?;
    let mut config = Config::new();
    let mut upstreams = Vec::new();
    for number in 1..=destinations {
        let (cluster, endpoint) = (format!("cluster-{number}"), format!("10.9.0.1:{}", 8000 + number));
        upstreams.push(Upstream::start(
            Some(server.netns()),
            &endpoint,
            vec![write(&format!("{number}\n")), ReadToEnd],
        )?);
        config = config.service(&format!("172.16.0.{number}:50001"), &cluster).cluster(
            &cluster,
            &[endpoint.as_str()],
            json!({}),
        );
    }
    let proxy = node.proxy(&config).start()?;
    let mut mismatches = 0;
    for round in 0..3000 {
        let number = round % destinations + 1;
        let stream = client.connect(&format!("172.16.0.{number}:50001"))?;
        // Every third one is reset at once: often before the proxy has accepted it.
        if round % 3 != 0 {
            let mut line = vec![0; number.to_string().len() + 1];
            stream.set_read_timeout(Some(script::GUARD))?;
            (&stream).read_exact(&mut line)?;
            mismatches += u32::from(line != format!("{number}\n").as_bytes());
        }
        SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    }
    assert_eq!(mismatches, 0);
    wait_counter(&proxy, "captured", |count| count == 3000)?;
    wait_counter(&proxy, "in_flight_handshakes", |count| count == 0)?;
    wait_drained(&proxy)?;
    assert_eq!(counter(&proxy, "no_original_destination")?, 0);
    Ok(())
}

/// Waits until the proxy holds no connection.
fn wait_drained(proxy: &Proxy) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let stats = proxy.admin().read("/stats")?.body;
        let active: Vec<&str> = stats
            .lines()
            .filter(|line| line.contains(".downstream_cx_active: ") || line.contains(".upstream_cx_active: "))
            .filter(|line| !line.ends_with(": 0"))
            // The question itself comes over one.
            .filter(|line| !line.starts_with("http.admin.") && !line.starts_with("listener.admin."))
            .collect();
        if active.is_empty() {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "connections are still open: {active:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_full_accept_queue_delays_and_loses_nothing() -> Result<()> {
    let cluster = Cluster::start()?;
    // Every worker stops accepting while the process is stopped; more connections than the backlog pile up.
    cluster.client.netns().sysctl("net.core.somaxconn", "64")?;
    cluster.proxy.signal(nix::sys::signal::Signal::SIGSTOP)?;
    let outcomes: Vec<Outcome> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..200)
            .map(|_| {
                // Sockets of the pod, connected by threads: a workload connects one after the other.
                scope.spawn(|| {
                    let connect = || -> std::io::Result<TcpStream> {
                        let socket = cluster.client.socket(Domain::IPV4)?;
                        socket.connect(&SocketAddr::from(([172, 16, 0, 1], 50001)).into())?;
                        Ok(socket.into())
                    };
                    client::run(connect(), &[write("hello"), ShutdownWrite, ReadToEnd])
                })
            })
            .collect();
        std::thread::sleep(Duration::from_millis(300));
        let _ = cluster.proxy.signal(nix::sys::signal::Signal::SIGCONT);
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| refused("panic"))).collect()
    });
    for outcome in outcomes {
        assert_eq!(connected(outcome)?.text(), "four\nhello");
    }
    wait_counter(&cluster.proxy, "in_flight_handshakes", |count| count == 0)?;
    Ok(())
}

#[test]
fn a_direct_connection_to_the_capture_port_is_reset() -> Result<()> {
    let cluster = Cluster::start()?;
    connected(cluster.talk("172.16.0.1:50001"))?;
    for address in ["127.0.0.1:15001", "10.9.0.9:15001", "[::1]:15001"] {
        match client::run(cluster.client.connect(address), &[ReadToEnd]) {
            Outcome::Connected(seen) => assert_eq!((seen.received, seen.end), (0, End::Reset), "{address}"),
            Outcome::NotConnected(errno) => assert_eq!(errno, "ECONNREFUSED", "{address}"),
        }
    }
    wait_counter(&cluster.proxy, "no_original_destination", |count| count > 0)?;
    assert_eq!(cluster.upstream.accepted().len(), 1);
    Ok(())
}

#[test]
fn another_pod_can_t_reach_the_capture_port() -> Result<()> {
    let cluster = Cluster::start()?;
    let stranger = cluster.node.pod("stranger", &["10.9.0.66"])?;
    let outcome = client::run(stranger.connect("10.9.0.9:15001"), &[ReadToEnd]);
    match outcome {
        Outcome::NotConnected(_) => {}
        Outcome::Connected(seen) => assert_eq!((seen.received, seen.end), (0, End::Reset)),
    }
    Ok(())
}

#[test]
fn pass_through_keeps_the_source_and_shows_in_the_log() -> Result<()> {
    let cluster = Cluster::with(Config::new().pass_through(), &[])?;
    assert_eq!(connected(cluster.talk("10.9.0.1:80"))?.text(), "four\nhello");
    assert_eq!(cluster.upstream.served()?.peer.ip().to_string(), "10.9.0.9");
    let line = cluster.proxy.lines("access.log", "clu=PassthroughCluster", 1)?.remove(0);
    assert_eq!((field(&line, "up"), field(&line, "dlocal")), ("10.9.0.1:80", "10.9.0.1:80"), "{line}");
    assert_eq!(connected(cluster.talk("172.16.0.1:50001"))?.text(), "four\nhello");
    cluster.proxy.lines("access.log", FOO, 1)?;
    Ok(())
}

#[test]
fn pass_through_works_for_ipv6() -> Result<()> {
    let cluster = Cluster::with(Config::new().pass_through(), &[])?;
    assert_eq!(connected(cluster.talk("[fd00:9::1]:80"))?.text(), "six\nhello");
    let line = cluster.proxy.lines("access.log", "clu=PassthroughCluster", 1)?.remove(0);
    assert_eq!(field(&line, "up"), "[fd00:9::1]:80", "{line}");
    Ok(())
}

#[test]
fn the_black_hole_refuses_at_connect() -> Result<()> {
    let cluster = Cluster::with(Config::new().registry_only(), &[])?;
    assert_eq!(cluster.talk("10.9.0.1:80"), refused("ECONNREFUSED"));
    assert_eq!(connected(cluster.talk("172.16.0.1:50001"))?.text(), "four\nhello");
    wait_counter(&cluster.proxy, "refused_by_rule", |count| count == 1)?;
    assert_eq!(cluster.upstream.accepted().len(), 1);
    Ok(())
}

#[test]
fn a_wildcard_listener_takes_every_address_of_its_port() -> Result<()> {
    let config = Config::new().service("0.0.0.0:50002", "wild").cluster("wild", &["10.9.0.1:80"], json!({}));
    let cluster = Cluster::with(config, &[])?;
    for address in ["172.16.0.2:50002", "172.16.99.3:50002"] {
        assert_eq!(connected(cluster.talk(address))?.text(), "four\nhello");
        cluster.proxy.lines("access.log", &format!("dlocal={address}"), 1)?;
    }
    Ok(())
}

#[test]
fn a_pod_with_cap_net_raw_can_t_leave_by_a_mark() -> Result<()> {
    let cluster = Cluster::with(Config::new().registry_only(), &[])?;
    let caps = ["setpriv", "--bounding-set=-all,+net_raw,+net_admin", "--inh-caps=-all"];
    let workload = cluster.client.workload_under(&caps)?;
    // Any mark could be the one that a proxy trusts: small numbers, powers of two, Istio's and Cilium's.
    let marks =
        (0..64).chain((0..32).map(|bit| 1 << bit)).chain([1337, 15001, 0xa00, 0xe00, 0x539, u32::MAX]);
    for mark in marks {
        let connect = Connect::to("10.9.0.1:80").mark(mark);
        let outcome = client::run(workload.connect(&connect), &[ReadToEnd]);
        assert_eq!(outcome, refused("ECONNREFUSED"), "mark {mark:#x} gets out");
    }
    assert!(cluster.upstream.accepted().is_empty());
    Ok(())
}

#[test]
fn two_pods_may_use_the_same_four_tuple() -> Result<()> {
    let node = Node::new()?;
    let other = node.network.beside()?;
    let pods = [node.pod("one", &["10.9.0.9"])?, other.pod("two", &["10.9.0.9"])?];
    let servers = [node.pod("server", &["10.9.0.1"])?, other.pod("server", &["10.9.0.1"])?];
    let upstreams = [
        Upstream::identify(Some(servers[0].netns()), "10.9.0.1:80", "one")?,
        Upstream::identify(Some(servers[1].netns()), "10.9.0.1:80", "two")?,
    ];
    let config = Config::new().service("172.16.0.1:50001", FOO).cluster(FOO, &["10.9.0.1:80"], json!({}));
    let proxy = node.proxy(&config).start()?;
    let connect = Connect::to("172.16.0.1:50001").from("10.9.0.9:40000");
    let streams = [pods[0].connect_with(&connect)?, pods[1].connect_with(&connect)?];
    for (stream, name) in streams.into_iter().zip(["one", "two"]) {
        let seen = script::run(stream, &[ShutdownWrite, ReadToEnd]);
        assert_eq!(seen.text().trim_end(), name, "each pod reaches the server of its own network");
    }
    proxy.lines("access.log", "dremote=10.9.0.9:40000", 2)?;
    assert_eq!((upstreams[0].accepted().len(), upstreams[1].accepted().len()), (1, 1));
    Ok(())
}

#[test]
fn the_proxy_s_own_connections_are_not_captured() -> Result<()> {
    // The proxy runs inside the cgroup that it intercepts, and so do its namespace's other processes; the endpoint
    // of the one service is the address of the other, so a connection that is captured twice would loop.
    let node = Node::new()?;
    let client = node.pod("client", &["10.9.0.9"])?;
    let server = node.pod("server", &["10.9.0.1"])?;
    let upstream = Upstream::identify(Some(server.netns()), "10.9.0.1:80", "four")?;
    let config = Config::new()
        .service("172.16.0.1:50001", "first")
        .cluster("first", &["10.9.0.1:80"], json!({}))
        .service("10.9.0.1:80", "second")
        .cluster("second", &["10.9.0.1:80"], json!({}))
        .pass_through();
    let proxy = node.proxy(&config).cgroup(node.network.cgroup()).start()?;
    assert_eq!(connected(talk(&client, "172.16.0.1:50001"))?.text(), "four\nhello");
    assert_eq!(connected(talk(&client, "10.9.0.1:80"))?.text(), "four\nhello");
    wait_counter(&proxy, "captured", |count| count == 2)?;
    assert_eq!(upstream.accepted().len(), 2);
    proxy.lines("access.log", "clu=first", 1)?;
    proxy.lines("access.log", "clu=second", 1)?;
    Ok(())
}

#[test]
fn virtual_hosts_are_chosen_by_the_original_destination() -> Result<()> {
    let node = Node::new()?;
    let client = node.pod("client", &["10.9.0.9"])?;
    let server = node.pod("server", &["10.9.0.1"])?;
    let _upstreams = ["foo", "bar", "rest"]
        .iter()
        .zip(81..)
        .map(|(name, port)| Upstream::identify(Some(server.netns()), &format!("10.9.0.1:{port}"), name))
        .collect::<Result<Vec<_>>>()?;
    let http = tidegate_tests::config::http(&[
        ("foo-host", &["foo-service", "172.16.0.1", "172.16.0.1:50001"], "foo"),
        ("bar-host", &["172.16.0.2:50001"], "bar"),
        ("allow_any", &["*"], "rest"),
    ]);
    let config = Config::new()
        .listener("0.0.0.0:50001", json!({"bind_to_port": false}), &http)
        .cluster("foo", &["10.9.0.1:81"], json!({}))
        .cluster("bar", &["10.9.0.1:82"], json!({}))
        .cluster("rest", &["10.9.0.1:83"], json!({}));
    let _proxy = node.proxy(&config).start()?;
    for (address, name) in [("172.16.0.1", "foo"), ("172.16.0.2", "bar"), ("172.16.0.3", "rest")] {
        let seen = connected(talk(&client, &format!("{address}:50001")))?;
        assert_eq!(seen.text(), format!("{name}\nhello"), "{address}");
    }
    Ok(())
}

#[test]
fn endpoints_take_turns() -> Result<()> {
    let node = Node::new()?;
    let client = node.pod("client", &["10.9.0.9"])?;
    let servers = [node.pod("server", &["10.9.0.1"])?, node.pod("server", &["10.9.0.2"])?];
    let upstreams = [
        Upstream::start(Some(servers[0].netns()), "10.9.0.1:80", vec![Echo])?,
        Upstream::start(Some(servers[1].netns()), "10.9.0.2:80", vec![Echo])?,
    ];
    let config = Config::new().service("172.16.0.1:50001", FOO).cluster(
        FOO,
        &["10.9.0.1:80", "10.9.0.2:80"],
        json!({}),
    );
    let _proxy = node.proxy(&config).concurrency(1).start()?;
    for _ in 0..10 {
        connected(talk(&client, "172.16.0.1:50001"))?;
    }
    assert_eq!((upstreams[0].accepted().len(), upstreams[1].accepted().len()), (5, 5));
    Ok(())
}
