//! Consistent hashing: both paths bring the same source to the same endpoint.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tidegate_tests::config::{Config, tcp_proxy};
use tidegate_tests::node::Node;
use tidegate_tests::script::{self, End, Step, write};
use tidegate_tests::upstream::Upstream;
use tidegate_tests::workload::Connect;

use crate::data_path;

/// Service addresses of a policy.
struct Services {
    policy: &'static str,
    kernel: &'static str,
    proxy: &'static str,
}

const SERVICES: [Services; 2] = [
    Services { policy: "MAGLEV", kernel: "172.16.0.1:50001", proxy: "172.16.0.2:50001" },
    Services { policy: "RING_HASH", kernel: "172.16.0.3:50001", proxy: "172.16.0.4:50001" },
];
const ENDPOINTS: [&str; 3] = ["10.9.0.1:80", "10.9.0.1:81", "10.9.0.1:82"];

fn config() -> Config {
    let by_source = json!({"hash_policy": [{"source_ip": {}}], "idle_timeout": "0s"});
    let path = |config: Config, service, policy, mode| {
        let cluster = format!("{policy} {mode}");
        let mut fields = data_path(mode);
        fields["lb_policy"] = json!(policy);
        config
            .listener(service, json!({"bind_to_port": false}), &tcp_proxy(&cluster, by_source.clone()))
            .cluster(&cluster, &ENDPOINTS, fields)
    };
    SERVICES.iter().fold(Config::new(), |config, Services { policy, kernel, proxy }| {
        path(path(config, kernel, policy, "KERNEL"), proxy, policy, "PROXY")
    })
}

#[test]
fn the_same_source_arrives_at_the_same_endpoint_on_both_paths() -> Result<()> {
    let node = Node::new()?;
    let others: Vec<String> = (20..32).map(|host| format!("10.9.0.{host}")).collect();
    let addresses: Vec<&str> = std::iter::once("10.9.0.9").chain(others.iter().map(String::as_str)).collect();
    let pods = [node.pod("first", &addresses)?, node.pod("second", &["10.9.0.10"])?];
    let server = node.pod("server", &["10.9.0.1"])?;
    let proxy = node.proxy(&config()).start()?;
    let upstreams: Vec<Upstream> = ENDPOINTS
        .iter()
        .map(|address| Upstream::identify(Some(server.netns()), address, address))
        .collect::<Result<_>>()?;
    let listeners = proxy.admin().read("/listeners")?.body;
    for listener in ["172.16.0.1_50001", "172.16.0.3_50001"] {
        ensure!(listeners.contains(&format!("{listener}::data_path::kernel")), "{listeners}");
    }
    // The app's own socket, and where it arrived.
    let talk = |pod: usize, service: &str, from: Option<&str>| -> Result<(SocketAddr, String)> {
        let mut connect = Connect::to(service);
        if let Some(from) = from {
            connect = connect.from(&format!("{from}:0"));
        }
        let stream = pods[pod].connect_with(&connect).with_context(|| format!("{service} from {from:?}"))?;
        let local = stream.local_addr()?;
        let seen = script::run(stream, &[write("hello"), Step::ShutdownWrite, Step::ReadToEnd]);
        ensure!(seen.end == End::Fin, "{seen:?}");
        Ok((local, seen.text().lines().next().unwrap_or_default().to_owned()))
    };
    let arrived = |local: SocketAddr| upstreams.iter().any(|upstream| upstream.accepted().contains(&local));
    let on_both = |services: &Services, pod: usize, from: Option<&str>| -> Result<(SocketAddr, String)> {
        let (_, proxied) = talk(pod, services.proxy, from)?;
        let (local, endpoint) = talk(pod, services.kernel, from)?;
        ensure!(
            endpoint == proxied,
            "{} of pod {pod} from {from:?}: {endpoint} and {proxied}",
            services.policy
        );
        Ok((local, endpoint))
    };
    for services in &SERVICES {
        // A pod's own address is known in the kernel, whether an app has bound it or not.
        for (pod, from) in [(0, None), (0, None), (1, None), (0, Some("10.9.0.9"))] {
            let (local, _) = on_both(services, pod, from)?;
            ensure!(arrived(local), "{local}: no proxy in between");
        }
        // Others only the proxy knows.
        let mut seen = Vec::new();
        for from in &others {
            let (local, endpoint) = on_both(services, 0, Some(from))?;
            ensure!(!arrived(local), "{local}: a socket of the proxy");
            seen.push(endpoint);
        }
        seen.sort();
        seen.dedup();
        ensure!(seen.len() == ENDPOINTS.len(), "twelve sources, and only {seen:?}");
    }
    Ok(())
}
