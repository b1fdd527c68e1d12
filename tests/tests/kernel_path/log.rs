//! The same traffic over both paths leaves the same log and the same stats, but for what docs/kernel-path.md names.

use std::io::{Read as _, Write as _};

use anyhow::{Context as _, Result};
use serde_json::json;
use tidegate_tests::config::Config;
use tidegate_tests::node::{address_field, field};
use tidegate_tests::script::{self, Step, write};
use tidegate_tests::upstream::Upstream;

use crate::{Lab, data_path};

/// What a client does, and what its endpoint does.
struct Case {
    name: &'static str,
    client: Vec<Step>,
    endpoint: Vec<Step>,
    /// Flags, and how each side was seen to end, downstream first.
    end: [&'static str; 3],
    /// Not all that the client has sent was acknowledged.
    loses: bool,
}

impl Case {
    fn of(name: &'static str, client: Vec<Step>, endpoint: Vec<Step>, end: [&'static str; 3]) -> Self {
        Self { name, client, endpoint, end, loses: false }
    }

    fn loses(self) -> Self {
        Self { loses: true, ..self }
    }
}

const NORMAL: [&str; 3] = ["-", "Normal", "Normal"];
const BY_CLIENT: [&str; 3] = ["-", "RemoteReset", "Normal"];
const BY_ENDPOINT: [&str; 3] = ["UR", "LocalReset", "RemoteReset"];

/// By then what was sent is acknowledged.
const PAUSE: Step = Step::Pause(60);

fn fins() -> Vec<Case> {
    use Step::{Echo, Read, ReadToEnd, ShutdownWrite, WritePattern};
    vec![
        Case::of("an echo", vec![write("hello"), ShutdownWrite, ReadToEnd], vec![Echo], NORMAL),
        Case::of("the endpoint ends first", vec![ReadToEnd], vec![write("bye")], NORMAL),
        Case::of("nothing is said", vec![], vec![ReadToEnd], NORMAL),
        Case::of(
            "bulk both ways",
            vec![WritePattern(300_000), ShutdownWrite, ReadToEnd],
            vec![Read(300_000), WritePattern(200_000), ReadToEnd],
            NORMAL,
        ),
        Case::of(
            "the endpoint half-closes",
            vec![ReadToEnd, write("late")],
            vec![ShutdownWrite, ReadToEnd],
            NORMAL,
        ),
    ]
}

fn resets() -> Vec<Case> {
    use Step::{Read, ReadToEnd, Reset, ShutdownWrite};
    vec![
        Case::of(
            "the client resets",
            vec![write("x"), Read(1), PAUSE, Reset],
            vec![Read(1), write("y"), ReadToEnd],
            BY_CLIENT,
        ),
        Case::of(
            "the client closes with something unread",
            vec![write("x"), PAUSE],
            vec![Read(1), write("y"), ReadToEnd],
            BY_CLIENT,
        ),
        Case::of(
            "the endpoint half-closes, and the client resets",
            vec![ReadToEnd, write("x"), PAUSE, Reset],
            vec![ShutdownWrite, ReadToEnd],
            BY_CLIENT,
        ),
        Case::of(
            "the client half-closes, and resets",
            vec![write("x"), ShutdownWrite, PAUSE, Reset],
            vec![ReadToEnd, Step::Pause(150)],
            NORMAL,
        ),
        Case::of(
            "the endpoint resets",
            vec![write("x"), ReadToEnd],
            vec![Read(1), write("y"), PAUSE, Reset],
            BY_ENDPOINT,
        )
        .loses(),
        Case::of(
            "the endpoint closes with something unread",
            vec![write("xx"), ReadToEnd],
            vec![Read(1), PAUSE],
            BY_ENDPOINT,
        )
        .loses(),
        Case::of(
            "the client half-closes, and the endpoint resets",
            vec![write("x"), ShutdownWrite, ReadToEnd],
            vec![ReadToEnd, write("y"), PAUSE, Reset],
            BY_ENDPOINT,
        ),
        Case::of(
            "the endpoint is gone, and is written to",
            vec![ReadToEnd, write("x"), PAUSE, write("y"), PAUSE],
            vec![],
            NORMAL,
        )
        .loses(),
    ]
}

/// Counters of a cluster that say who ended its connections.
const COUNTERS: [&str; 6] = [
    "upstream_cx_destroy",
    "upstream_cx_destroy_local",
    "upstream_cx_destroy_remote",
    "upstream_cx_destroy_with_active_rq",
    "upstream_cx_destroy_local_with_active_rq",
    "upstream_cx_destroy_remote_with_active_rq",
];

#[test]
fn both_paths_leave_the_same_log() -> Result<()> {
    let cases: Vec<_> = fins().into_iter().chain(resets()).collect();
    let service = |path: u8, case: usize| format!("172.16.{path}.{case}:50001");
    let endpoint = |case: usize| format!("10.9.0.1:{}", 100 + case);
    let mut config = Config::new();
    for (path, mode) in [(1, "KERNEL"), (2, "PROXY")] {
        for case in 0..cases.len() {
            let cluster = format!("c{path}-{case}");
            let mut fields = data_path(mode);
            fields["alt_stat_name"] = json!(format!("it{path}-{case}"));
            config =
                config.service(&service(path, case), &cluster).cluster(&cluster, &[&endpoint(case)], fields);
        }
    }
    let lab = Lab::start(&config)?;
    for (index, Case { name, client, endpoint: server, end, loses }) in cases.iter().enumerate() {
        let upstream = Upstream::start(Some(lab.server.netns()), &endpoint(index), server.clone())?;
        let mut lines = Vec::new();
        for path in [1, 2] {
            let service = service(path, index);
            let stream = lab.client.connect(&service).with_context(|| format!("{name}: {service}"))?;
            let local = stream.local_addr()?;
            script::run(stream, client);
            let served = upstream.served()?;
            assert_eq!(served.peer == local, path == 1, "{name}: which way it took");
            let line = lab.line(&service)?;
            assert_eq!(address_field(&line, "dremote")?, local, "{name}: {line}");
            assert_eq!(
                ["flags", "dnclose", "upclose"].map(|name| field(&line, name)),
                *end,
                "{name}: {line}"
            );
            lines.push(line.replace("it2-", "it1-"));
        }
        let same = ["details", "fail", "tx", "up", "clu", "chain", "route", "attempts", "closed", "upclosed"];
        for field_name in same.into_iter().chain((!loses).then_some("rx")) {
            let [kernel, proxied] = [&lines[0], &lines[1]].map(|line| field(line, field_name));
            assert_eq!(kernel, proxied, "{name}: {field_name}\n{lines:#?}");
        }
        let counted = |path: u8| {
            let stat = |counter: &str| format!("cluster.it{path}-{index}.{counter}");
            lab.proxy.wait_stat(&stat("upstream_cx_destroy"), |value| value == 1)?;
            COUNTERS.iter().map(|counter| lab.proxy.stat(&stat(counter))).collect::<Result<Vec<_>>>()
        };
        assert_eq!(counted(1)?, counted(2)?, "{name}: {COUNTERS:?}");
    }
    Ok(())
}

/// What has happened before they are asked for is in them, whichever way it went.
#[test]
fn stats_are_of_the_moment() -> Result<()> {
    let services = [("172.16.0.1:50001", "foo", "KERNEL"), ("172.16.0.2:50001", "bar", "PROXY")];
    let config = services.iter().fold(Config::new(), |config, (service, cluster, mode)| {
        config.service(service, cluster).cluster(cluster, &["10.9.0.1:80"], data_path(mode))
    });
    let lab = Lab::start(&config)?;
    let _upstream = Upstream::echo(Some(lab.server.netns()), "10.9.0.1:80")?;
    let mut open = Vec::new();
    for count in 1..=3 {
        for (service, cluster, mode) in services {
            let mut stream = lab.client.connect(service)?;
            stream.write_all(b"hello")?;
            stream.read_exact(&mut [0; 5])?;
            open.push(stream);
            let stats = lab.proxy.admin().read("/stats")?.body;
            let bytes = if mode == "PROXY" { 5 * count } else { 0 };
            for (name, value) in [
                ("upstream_cx_total", count),
                ("upstream_cx_active", count),
                ("upstream_cx_tx_bytes_total", bytes),
                ("upstream_cx_rx_bytes_total", bytes),
            ] {
                let line = format!("cluster.{cluster}.{name}: {value}");
                assert!(stats.lines().any(|it| it == line), "no {line}\n{stats}");
            }
            let clusters = lab.proxy.admin().read("/clusters")?.body;
            let line = format!("{cluster}::10.9.0.1:80::cx_active::{count}");
            assert!(clusters.lines().any(|it| it == line), "no {line}\n{clusters}");
        }
    }
    Ok(())
}
