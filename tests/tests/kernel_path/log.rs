//! The same traffic over both paths leaves the same log, but for what docs/kernel-path.md names.

use anyhow::{Context as _, Result};
use serde_json::json;
use tidegate_tests::config::Config;
use tidegate_tests::node::{address_field, field};
use tidegate_tests::script::{self, Step, write};
use tidegate_tests::upstream::Upstream;

use crate::{Lab, data_path};

/// What a client does, and what its endpoint does.
type Case = (&'static str, Vec<Step>, Vec<Step>);

fn cases() -> Vec<Case> {
    use Step::{Echo, Pause, Read, ReadToEnd, Reset, ShutdownWrite, WritePattern};
    vec![
        ("an echo", vec![write("hello"), ShutdownWrite, ReadToEnd], vec![Echo]),
        ("the endpoint ends first", vec![ReadToEnd], vec![write("bye")]),
        ("nothing is said", vec![], vec![ReadToEnd]),
        (
            "bulk both ways",
            vec![WritePattern(300_000), ShutdownWrite, ReadToEnd],
            vec![Read(300_000), WritePattern(200_000), ReadToEnd],
        ),
        ("the endpoint half-closes", vec![ReadToEnd, write("late")], vec![ShutdownWrite, ReadToEnd]),
        (
            "the client resets",
            // The pause: what is sent is acknowledged by then.
            vec![write("x"), Read(1), Pause(60), Reset],
            vec![Read(1), write("y"), ReadToEnd],
        ),
    ]
}

fn reset_by_endpoint() -> Case {
    use Step::{Pause, Read, ReadToEnd, Reset};
    ("the endpoint resets", vec![write("x"), ReadToEnd], vec![Read(1), write("y"), Pause(60), Reset])
}

#[test]
fn both_paths_leave_the_same_log() -> Result<()> {
    let mut cases = cases();
    let alike = cases.len();
    cases.push(reset_by_endpoint());
    let service = |path: u8, case: usize| format!("172.16.{path}.{case}:50001");
    let endpoint = |case: usize| format!("10.9.0.1:{}", 100 + case);
    let mut config = Config::new();
    for (path, mode) in [(1, "KERNEL"), (2, "PROXY")] {
        for case in 0..cases.len() {
            let cluster = format!("c{path}-{case}");
            let mut fields = data_path(mode);
            fields["alt_stat_name"] = json!("it");
            config =
                config.service(&service(path, case), &cluster).cluster(&cluster, &[&endpoint(case)], fields);
        }
    }
    let lab = Lab::start(&config)?;
    for (index, (name, client, server)) in cases.iter().enumerate() {
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
            lines.push(line);
        }
        let of = |name: &str| [&lines[0], &lines[1]].map(|line| field(line, name).to_owned());
        let mut same = vec!["details", "fail", "tx", "up", "clu", "chain", "route", "attempts"];
        if index < alike {
            same.extend(["flags", "rx"]);
        } else {
            assert_eq!(of("flags"), ["-", "UR"], "{name}: {lines:#?}");
        }
        for field in same {
            let [kernel, proxied] = of(field);
            assert_eq!(kernel, proxied, "{name}: {field}\n{lines:#?}");
        }
    }
    Ok(())
}
