//! Handshakes that fail, and clients that are killed: what the log says of them is what it says of the same through the proxy.

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use socket2::Domain;
use tidegate_tests::client;
use tidegate_tests::config::Config;
use tidegate_tests::node::field;
use tidegate_tests::program;
use tidegate_tests::script::Step;
use tidegate_tests::upstream::Upstream;

use crate::{Lab, data_path};

/// Services of a cluster on the kernel path, and of one that the proxy serves, with the same endpoint.
const KERNEL: &str = "172.16.0.1:50001";
const PROXIED: &str = "172.16.0.2:50001";
/// The router knows nobody of this address, and drops what is sent there.
const NOBODY: &str = "10.9.0.99:80";

fn lab(endpoint: &str) -> Result<Lab> {
    let with_outliers = |mode| {
        let mut fields = data_path(mode);
        fields["outlier_detection"] = json!({"consecutive_5xx": 1, "enforcing_consecutive_5xx": 100,
            "interval": "3600s", "base_ejection_time": "3600s", "max_ejection_percent": 100});
        fields["connect_timeout"] = json!("20s");
        fields
    };
    let config = Config::new()
        .service(KERNEL, "kernel")
        .cluster("kernel", &[endpoint], with_outliers("KERNEL"))
        .service(PROXIED, "proxied")
        .cluster("proxied", &[endpoint], with_outliers("PROXY"));
    let lab = Lab::start(&config)?;
    assert_eq!(lab.data_path("172.16.0.1_50001")?, ["kernel"]);
    Ok(lab)
}

/// The lines and counters of both paths are these.
fn expect(lab: &Lab, end: [&str; 4], counters: &[(&str, u64)]) -> Result<()> {
    let lines = [lab.line(KERNEL)?, lab.line(PROXIED)?.replace("proxied", "kernel")];
    for line in &lines {
        assert_eq!(["flags", "fail", "dnclose", "upclose"].map(|name| field(line, name)), end, "{lines:#?}");
    }
    for name in ["details", "rx", "tx", "up", "clu", "uplocal", "attempts", "closed", "upclosed"] {
        if name != "uplocal" || field(&lines[1], name) == "-" {
            assert_eq!(field(&lines[0], name), field(&lines[1], name), "{name}: {lines:#?}");
        }
    }
    for cluster in ["kernel", "proxied"] {
        for (counter, expected) in counters {
            let name = format!("cluster.{cluster}.{counter}");
            lab.proxy.wait_stat(&name, |value| value == *expected).with_context(|| name.clone())?;
        }
    }
    Ok(())
}

#[test]
fn who_gives_up_a_connect_is_no_failure_of_the_endpoint() -> Result<()> {
    // Before the SYN is sent again, and after.
    for after in [100, 1_300].map(Duration::from_millis) {
        let lab = lab(NOBODY)?;
        let socket = lab.client.socket(Domain::IPV4)?;
        socket.set_nonblocking(true)?;
        let connected = socket.connect(&KERNEL.parse::<SocketAddr>()?.into());
        ensure!(connected.is_err_and(|error| error.raw_os_error() == Some(nix::libc::EINPROGRESS)));
        sleep(after);
        drop(socket);
        // Through the proxy it is connected, and leaves.
        client::run(lab.client.connect(PROXIED), &[Step::Pause(after.as_millis() as u64), Step::Reset]);
        let counters = [
            ("upstream_cx_connect_fail", 1),
            ("upstream_cx_destroy_local", 1),
            ("upstream_cx_destroy_remote", 0),
            ("upstream_rq_cancelled", 1),
            ("upstream_rq_pending_failure_eject", 0),
            ("outlier_detection.ejections_active", 0),
        ];
        expect(&lab, ["-", "-", "RemoteReset", "Normal"], &counters)?;
    }
    Ok(())
}

#[test]
fn who_can_t_be_reached_is_unreachable() -> Result<()> {
    // The answer comes at once, or when the SYN is sent again.
    for late in [false, true] {
        let lab = lab(NOBODY)?;
        let router = lab.node.network.router();
        let unreachable = "route add unreachable 10.9.0.99/32";
        if !late {
            router.ip(unreachable)?;
        }
        let connected = std::thread::scope(|scope| {
            let connecting = scope.spawn(|| client::run(lab.client.connect(KERNEL), &[]));
            sleep(Duration::from_millis(200));
            if late {
                router.ip(unreachable)?;
            }
            connecting.join().map_err(|_| anyhow::anyhow!("connecting panicked"))
        })?;
        assert_eq!(connected, client::Outcome::NotConnected("EHOSTUNREACH".into()));
        client::run(lab.client.connect(PROXIED), &[Step::ReadToEnd]);
        let counters = [
            ("upstream_cx_connect_fail", 1),
            ("upstream_cx_connect_timeout", 0),
            ("upstream_cx_destroy_local", 0),
            ("upstream_cx_destroy_remote", 1),
            ("upstream_rq_pending_failure_eject", 1),
            ("outlier_detection.ejections_active", 1),
        ];
        let end = ["UF,URX", "delayed_connect_error:_No_route_to_host", "Normal", "Normal"];
        expect(&lab, end, &counters)?;
    }
    Ok(())
}

#[test]
fn who_is_killed_with_something_unread_has_reset() -> Result<()> {
    const ENDPOINT: &str = "10.9.0.1:80";
    let lab = lab(ENDPOINT)?;
    let steps = vec![Step::Read(1), tidegate_tests::script::write("unread"), Step::ReadToEnd];
    let upstream = Upstream::start(Some(lab.server.netns()), ENDPOINT, steps)?;
    for service in [KERNEL, PROXIED] {
        let mut client = lab.client.command(program::built("workload")?.to_str().context("no UTF-8")?);
        let mut client = client.args(["stall", service, "x"]).spawn()?;
        while upstream.accepted().len() < if service == KERNEL { 1 } else { 2 } {
            ensure!(client.try_wait()?.is_none(), "it has ended");
            sleep(Duration::from_millis(5));
        }
        // The endpoint's answer is there by then.
        sleep(Duration::from_millis(150));
        client.kill()?;
        client.wait()?;
    }
    let counters = [
        ("upstream_cx_connect_fail", 0),
        ("upstream_cx_destroy_local", 1),
        ("upstream_cx_destroy_remote", 0),
        ("upstream_cx_destroy_local_with_active_rq", 1),
    ];
    expect(&lab, ["-", "-", "RemoteReset", "Normal"], &counters)
}

/// What the kernel knows of the app's own socket: its round-trip time, and segments that were sent again.
#[test]
fn round_trips_and_retransmissions_are_counted() -> Result<()> {
    let config = Config::new().service(KERNEL, "foo").cluster("foo", &["10.9.0.1:80"], data_path("KERNEL"));
    let lab = Lab::start(&config)?;
    let server = lab.server.netns();
    let _upstream = Upstream::echo(Some(server), "10.9.0.1:80")?;
    let mut stream = lab.client.connect(KERNEL)?;
    stream.write_all(b"here")?;
    stream.read_exact(&mut [0; 4])?;
    // What is sent meanwhile is lost.
    server.nft("table inet gone { chain in { type filter hook input priority 0; policy drop; }\n}")?;
    stream.write_all(b"lost")?;
    sleep(Duration::from_millis(50));
    server.nft("delete table inet gone")?;
    stream.read_exact(&mut [0; 4])?;
    drop(stream);
    lab.proxy.lines("access.log", "", 1)?;
    let metrics = lab.proxy.admin().read("/stats/prometheus")?.body;
    let metric = |name: &str| -> Result<u64> {
        let start = format!("envoy_cluster_tcp_stats_{name}{{envoy_cluster_name=\"foo\"}} ");
        let value = metrics.lines().find_map(|line| line.strip_prefix(&start)).context(start.clone())?;
        Ok(value.parse()?)
    };
    ensure!(metric("cx_tx_retransmitted_segments")? >= 1, "{metrics}");
    assert_eq!(metric("cx_rtt_us_count")?, 1);
    ensure!((1..1_000_000).contains(&metric("cx_rtt_us_sum")?), "{metrics}");
    Ok(())
}
