//! Filter chains by source address: both paths lead the same source to the same cluster.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tidegate_tests::config::{self, Config, access_log, merge, tcp_proxy};
use tidegate_tests::node::{Node, address_field, field};
use tidegate_tests::pod::Pod;
use tidegate_tests::proxy::Proxy;
use tidegate_tests::script::{self, End, Step, write};
use tidegate_tests::upstream::Upstream;
use tidegate_tests::workload::Connect;

use crate::data_path;

const KERNEL: &str = "172.16.0.1:50001";
const PROXY: &str = "172.16.0.2:50001";
/// The endpoint of `red`, and that of `blue`.
const ENDPOINTS: [&str; 2] = ["10.9.0.1:80", "10.9.0.1:81"];

/// Red for 10.9.0.16/28, but blue for two addresses of it; none for others.
fn chains(mode: &str) -> Value {
    let chain = |color: &str, sources: &[(&str, u8)]| {
        let ranges: Vec<Value> = sources
            .iter()
            .map(|(prefix, len)| json!({"address_prefix": prefix, "prefix_len": len}))
            .collect();
        json!({
            "name": color,
            "filter_chain_match": {"source_prefix_ranges": ranges},
            "filters": [tcp_proxy(&format!("{color} {mode}"), json!({"idle_timeout": "0s"}))],
        })
    };
    json!([chain("red", &[("10.9.0.16", 28)]), chain("blue", &[("10.9.0.18", 31)])])
}

fn config() -> Config {
    [(KERNEL, "KERNEL"), (PROXY, "PROXY")].into_iter().fold(Config::new(), |config, (service, mode)| {
        // Connections without a chain are in the listener's log only.
        let mut log = access_log();
        log["typed_config"]["path"] = json!("@DIR@/listener.log");
        let fields = json!({"bind_to_port": false, "filter_chains": chains(mode), "access_log": [log]});
        let config = config.listener(service, fields, &json!({}));
        ["red", "blue"].into_iter().zip(ENDPOINTS).fold(config, |config, (color, endpoint)| {
            config.cluster(&format!("{color} {mode}"), &[endpoint], data_path(mode))
        })
    })
}

/// Connects from an address, if there is one. The app's own socket, and who has answered; nobody if it was closed.
fn talk(pod: &Pod, service: &str, from: Option<&str>) -> Result<(SocketAddr, Option<String>)> {
    let mut connect = Connect::to(service);
    if let Some(from) = from {
        connect = connect.from(&format!("{from}:0"));
    }
    let stream = pod.connect_with(&connect).with_context(|| format!("{service} from {from:?}"))?;
    let local = stream.local_addr()?;
    let seen = script::run(stream, &[write("hello"), Step::ShutdownWrite, Step::ReadToEnd]);
    let text = seen.text();
    let color = text.lines().next().map(str::to_owned);
    ensure!(color.is_none() || seen.end == End::Fin, "{seen:?}");
    Ok((local, color))
}

struct Lab {
    proxy: Proxy,
    upstreams: [Upstream; 2],
    _node: Node,
}

impl Lab {
    /// Whether no proxy was in between.
    fn arrived(&self, local: SocketAddr) -> bool {
        self.upstreams.iter().any(|upstream| upstream.accepted().contains(&local))
    }

    /// The line of a log for this socket.
    fn line(&self, log: &str, local: SocketAddr) -> Result<String> {
        let line = self.proxy.lines(log, &format!("dremote={local} "), 1)?.remove(0);
        ensure!(address_field(&line, "dremote")? == local, "{line}");
        Ok(line)
    }
}

#[test]
fn the_source_chooses_the_filter_chain_on_both_paths() -> Result<()> {
    let node = Node::new()?;
    let first = node.pod("first", &["10.9.0.17", "10.9.0.19", "10.9.0.40"])?;
    let second = node.pod("second", &["10.9.0.18"])?;
    let third = node.pod("third", &["10.9.0.41"])?;
    let server = node.pod("server", &["10.9.0.1"])?;
    let proxy = node.proxy(&config()).start()?;
    let [red, blue] = ENDPOINTS.map(|address| {
        let color = if address == ENDPOINTS[0] { "red" } else { "blue" };
        Upstream::identify(Some(server.netns()), address, color)
    });
    let lab = Lab { proxy, upstreams: [red?, blue?], _node: node };
    let listeners = lab.proxy.admin().read("/listeners")?.body;
    ensure!(listeners.contains("172.16.0.1_50001::data_path::kernel"), "{listeners}");

    let mut expected = [0, 0];
    for (pod, from, color) in [
        (&first, None, Some("red")),
        (&second, None, Some("blue")),
        (&third, None, None),
        // The app has bound the pod's own address, or another one of the pod.
        (&first, Some("10.9.0.17"), Some("red")),
        (&first, Some("10.9.0.19"), Some("blue")),
        (&first, Some("10.9.0.40"), None),
    ] {
        let proxied = talk(pod, PROXY, from)?;
        let (local, answer) = talk(pod, KERNEL, from)?;
        ensure!(proxied.1.as_deref() == color, "through the proxy from {from:?}: {proxied:?}");
        ensure!(answer.as_deref() == color, "from {from:?}: {answer:?}, not {color:?}");
        ensure!(!lab.arrived(proxied.0), "{}: a socket of the proxy", proxied.0);
        let log = if color.is_some() { "access.log" } else { "listener.log" };
        let lines = [lab.line(log, local)?, lab.line(log, proxied.0)?];
        let fields = |name: &str| lines.each_ref().map(|line| field(line, name).to_owned());
        let Some(color) = color else {
            // Without a chain it is the proxy that says so.
            ensure!(!lab.arrived(local), "{local}: a socket of the proxy");
            ensure!(fields("flags") == ["NR", "NR"] && fields("chain") == ["-", "-"], "{lines:#?}");
            continue;
        };
        ensure!(lab.arrived(local), "{local}: no proxy in between");
        for name in ["flags", "details", "rx", "tx", "up", "chain", "attempts"] {
            let [kernel, proxied] = fields(name);
            ensure!(kernel == proxied, "{name}: {lines:#?}");
        }
        ensure!(fields("chain") == [color, color], "{lines:#?}");
        expected[usize::from(color == "blue")] += 1;
    }
    for mode in ["KERNEL", "PROXY"] {
        for (color, expected) in ["red", "blue"].into_iter().zip(expected) {
            let name = format!("tcp.{color} {mode}.downstream_cx_total");
            lab.proxy.wait_stat(&name, |value| value == expected).context(name)?;
            let name = format!("cluster.{color} {mode}.upstream_cx_total");
            lab.proxy.wait_stat(&name, |value| value == expected).context(name)?;
        }
    }
    for listener in ["172.16.0.1_50001", "172.16.0.2_50001"] {
        for (stat, expected) in [("downstream_cx_total", 4), ("no_filter_chain_match", 2)] {
            let name = format!("listener.{listener}.{stat}");
            lab.proxy.wait_stat(&name, |value| value == expected).context(name)?;
        }
    }
    Ok(())
}

/// Red for all, or red and blue by source, or blue for all.
fn versions() -> [Value; 3] {
    let all = |color: &str| json!([{"name": color, "filters": [tcp_proxy(&format!("{color} KERNEL"), json!({"idle_timeout": "0s"}))]}]);
    [all("red"), chains("KERNEL"), all("blue")]
}

/// While the chains of a listener change no connect is missed, each goes where the chains of the moment lead it, and all
/// are counted.
#[test]
fn chains_change_under_load() -> Result<()> {
    const ROUNDS: u64 = 24;
    let node = Node::new()?;
    let pod = Arc::new(node.pod("pod", &["10.9.0.18"])?);
    pod.netns().ip("route add unreachable 172.16.0.0/12")?;
    let server = node.pod("server", &["10.9.0.1"])?;
    let upstream = |color, address| Upstream::identify(Some(server.netns()), address, color);
    let _upstreams = (upstream("red", ENDPOINTS[0])?, upstream("blue", ENDPOINTS[1])?);
    let config =
        ["red", "blue"].into_iter().zip(ENDPOINTS).fold(Config::new(), |config, (color, endpoint)| {
            config.cluster(&format!("{color} KERNEL"), &[endpoint], data_path("KERNEL"))
        });
    let mut config: Value = serde_json::from_str(&config.to_string())?;
    config["dynamic_resources"] = json!({"lds_config": {
        "path_config_source": {"path": "@DIR@/lds.json"}, "resource_api_version": "V3",
        "initial_fetch_timeout": "0.1s",
    }});
    let proxy = node.proxy(&Config::new()).config(&format!("{config:#}")).start()?;
    let push = |version: u64, chains: &Value| -> Result<()> {
        let mut listener = json!({"@type": "type.googleapis.com/envoy.config.listener.v3.Listener"});
        let fields = json!({"bind_to_port": false, "filter_chains": chains});
        merge(&mut listener, config::listener(KERNEL, fields, &json!({})));
        let path = proxy.path("lds.json");
        let dir = path.parent().context("no directory")?.display().to_string();
        let response = json!({"version_info": version.to_string(), "resources": [listener]}).to_string();
        std::fs::write(path.with_extension("new"), response.replace("@DIR@", &dir))?;
        std::fs::rename(path.with_extension("new"), &path)?;
        proxy.wait_stat("listener_manager.lds.update_success", |count| count >= version)?;
        Ok(())
    };
    let versions = versions();
    push(1, &versions[0])?;
    let (stop, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let load = {
        let (pod, stop, asked) = (Arc::clone(&pod), Arc::clone(&stop), Arc::clone(&asked));
        std::thread::spawn(move || -> Result<()> {
            while !stop.load(Ordering::Relaxed) {
                let (_, color) = talk(&pod, KERNEL, None)?;
                ensure!(color.is_some(), "after {asked:?}: nobody has answered");
                asked.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        })
    };
    let mut own = 0;
    for round in 2..ROUNDS {
        let version = [0, 1, 2, 1][round as usize % 4];
        push(round, &versions[version])?;
        let (_, color) = talk(&pod, KERNEL, None)?;
        own += 1;
        // The pod is 10.9.0.18.
        let expected = if version == 0 { "red" } else { "blue" };
        ensure!(color.as_deref() == Some(expected), "round {round}, version {version}: {color:?}");
    }
    stop.store(true, Ordering::Relaxed);
    load.join().map_err(|_| anyhow::anyhow!("the load panicked"))??;
    let total = asked.load(Ordering::Relaxed) + own;
    let lines = proxy.lines("access.log", "flags=-", usize::try_from(total)?)?;
    ensure!(lines.len() as u64 == total, "{} lines of {total} connections", lines.len());
    for line in &lines {
        // A field ends at a blank, and "red KERNEL" has one.
        let (chain, cluster) = (field(line, "chain"), field(line, "clu"));
        ensure!(cluster == chain, "{line}");
    }
    proxy.wait_stat("listener.172.16.0.1_50001.downstream_cx_total", |value| value == total)?;
    proxy.wait_stat("listener.172.16.0.1_50001.downstream_cx_active", |value| value == 0)?;
    for color in ["red", "blue"] {
        let of_color = lines.iter().filter(|line| field(line, "chain") == color).count() as u64;
        let name = format!("tcp.{color} KERNEL.downstream_cx_total");
        proxy.wait_stat(&name, |value| value == of_color).context(name)?;
    }
    Ok(())
}

/// The selector and the counters of each chain outlive the process.
#[test]
fn a_successor_goes_on_with_every_chain() -> Result<()> {
    let node = Node::new()?;
    let pod = node.pod("pod", &["10.9.0.17", "10.9.0.18"])?;
    pod.netns().ip("route add unreachable 172.16.0.0/12")?;
    let server = node.pod("server", &["10.9.0.1"])?;
    let upstream = |color, address| Upstream::identify(Some(server.netns()), address, color);
    let _upstreams = (upstream("red", ENDPOINTS[0])?, upstream("blue", ENDPOINTS[1])?);
    let setup = node.proxy(&config());
    let both = || -> Result<()> {
        for (from, expected) in [(None, "red"), (Some("10.9.0.18"), "blue")] {
            let (_, color) = talk(&pod, KERNEL, from)?;
            ensure!(color.as_deref() == Some(expected), "{from:?}: {color:?}");
        }
        Ok(())
    };
    let mut first = setup.start()?;
    both()?;
    first.kill()?;
    both()?;
    let second = setup.clone().succeed(&first).start()?;
    both()?;
    for color in ["red", "blue"] {
        for name in [
            format!("tcp.{color} KERNEL.downstream_cx_total"),
            format!("cluster.{color} KERNEL.upstream_cx_total"),
        ] {
            second.wait_stat(&name, |value| value == 3).context(name)?;
        }
    }
    second.wait_stat("listener.172.16.0.1_50001.downstream_cx_total", |value| value == 6)?;
    Ok(())
}
