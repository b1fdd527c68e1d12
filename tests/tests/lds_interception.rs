//! What is captured follows the listeners that a control plane sends: no connect to a configured address is ever left
//! alone, and none to a removed one is held.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tidegate_tests::config::{self, Config, tcp_proxy};
use tidegate_tests::node::Node;
use tidegate_tests::pod::Pod;
use tidegate_tests::proxy::{Proxy, Setup};
use tidegate_tests::script::{End, Step::Read, Step::ReadToEnd, run, write};
use tidegate_tests::upstream::Upstream;

const SERVICE: &str = "172.16.0.1:50001";
const OTHER: &str = "172.16.0.2:50002";

/// Only there so that a broken test ends.
const PATIENCE: Duration = Duration::from_secs(20);

struct Mesh {
    proxy: Proxy,
    client: Pod,
    version: AtomicU32,
    _upstream: Upstream,
    _server: Pod,
    _node: Node,
}

impl Mesh {
    /// With an endpoint that says its name.
    fn start() -> Result<Self> {
        Self::start_with(|server| Upstream::identify(Some(server.netns()), "10.9.0.1:80", "foo"))
    }

    fn start_with(upstream: impl FnOnce(&Pod) -> Result<Upstream>) -> Result<Self> {
        let node = Node::new()?;
        let client = node.pod("client", &["10.9.0.9"])?;
        client.netns().ip("route add unreachable 172.16.0.0/12")?;
        let server = node.pod("server", &["10.9.0.1"])?;
        let upstream = upstream(&server)?;
        let config = Config::new().cluster("foo", &["10.9.0.1:80"], json!({}));
        let mut config: Value = serde_json::from_str(&config.to_string())?;
        config["dynamic_resources"] = json!({"lds_config": {
            "path_config_source": {"path": "@DIR@/lds.json"}, "resource_api_version": "V3",
            // The file comes later.
            "initial_fetch_timeout": "0.1s",
        }});
        let proxy = Setup::new(&format!("{config:#}"))
            .netns(&node.netns)
            .pods(node.network.cgroup().path())
            .args(["--drain-time-s", "2"])
            .start()?;
        Ok(Self {
            proxy,
            client,
            version: AtomicU32::new(0),
            _upstream: upstream,
            _server: server,
            _node: node,
        })
    }

    /// The control plane has these listeners now.
    fn push(&self, listeners: &[Value]) -> Result<()> {
        let version = self.version.fetch_add(1, Ordering::Relaxed) + 1;
        let typed = |listener: &Value| {
            let mut typed = json!({"@type": "type.googleapis.com/envoy.config.listener.v3.Listener"});
            config::merge(&mut typed, listener.clone());
            typed
        };
        let resources: Vec<_> = listeners.iter().map(typed).collect();
        let response = json!({"version_info": version.to_string(), "resources": resources}).to_string();
        let path = self.proxy.path("lds.json");
        let dir = path.parent().unwrap_or(Path::new("/")).display().to_string();
        std::fs::write(path.with_extension("new"), response.replace("@DIR@", &dir))?;
        std::fs::rename(path.with_extension("new"), &path)?;
        let accepted = u64::from(version);
        self.proxy.wait_stat("listener_manager.lds.update_success", |count| count >= accepted)?;
        Ok(())
    }

    /// Who answers at an address.
    fn ask(&self, address: &str) -> io::Result<String> {
        Ok(run(self.client.connect(address)?, &[Read(4)]).text().trim_end().to_owned())
    }
}

fn service(address: &str, stat_prefix: &str) -> Value {
    let filter = tcp_proxy("foo", json!({"stat_prefix": stat_prefix}));
    config::listener(address, json!({"bind_to_port": false}), &filter)
}

/// There is no way to the services' addresses. Captured and not served would be a reset.
fn left_alone(answer: &io::Result<String>) -> bool {
    use io::ErrorKind::{HostUnreachable, NetworkUnreachable};
    answer.as_ref().is_err_and(|error| matches!(error.kind(), NetworkUnreachable | HostUnreachable))
}

#[test]
fn a_listener_is_captured_when_it_comes_and_released_when_it_goes() -> Result<()> {
    let mesh = Mesh::start()?;
    let before = mesh.ask(SERVICE);
    ensure!(left_alone(&before), "{before:?}");
    mesh.push(&[service(SERVICE, "a")])?;
    assert_eq!(mesh.ask(SERVICE)?, "foo");
    ensure!(left_alone(&mesh.ask(OTHER)), "only what is configured is captured");
    mesh.push(&[service(SERVICE, "a"), service(OTHER, "b")])?;
    assert_eq!((mesh.ask(SERVICE)?, mesh.ask(OTHER)?), ("foo".to_owned(), "foo".to_owned()));
    mesh.push(&[service(OTHER, "b")])?;
    ensure!(left_alone(&mesh.ask(SERVICE)));
    assert_eq!(mesh.ask(OTHER)?, "foo");
    Ok(())
}

#[test]
fn an_update_misses_no_connect() -> Result<()> {
    let mesh = Arc::new(Mesh::start()?);
    mesh.push(&[service(SERVICE, "v0")])?;
    let (stop, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
    let asking = {
        let (mesh, stop, asked) = (Arc::clone(&mesh), Arc::clone(&stop), Arc::clone(&asked));
        std::thread::spawn(move || -> Result<()> {
            while !stop.load(Ordering::Relaxed) {
                let answer = mesh.ask(SERVICE);
                ensure!(matches!(&answer, Ok(text) if text == "foo"), "after {asked:?} connects: {answer:?}");
                asked.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        })
    };
    for version in 1..=20 {
        // The chain changes each time, the listener as a whole every second time, and another one comes and goes.
        let mut listeners = vec![service(SERVICE, &format!("v{version}"))];
        if version % 2 == 0 {
            config::merge(&mut listeners[0], json!({"stat_prefix": format!("s{version}")}));
            listeners.push(service(OTHER, "b"));
        }
        mesh.push(&listeners)?;
    }
    let (seen, deadline) = (asked.load(Ordering::Relaxed), Instant::now() + PATIENCE);
    while asked.load(Ordering::Relaxed) < seen + 5 && Instant::now() < deadline && !asking.is_finished() {
        std::thread::sleep(Duration::from_millis(5));
    }
    stop.store(true, Ordering::Relaxed);
    asking.join().expect("no panic")?;
    assert_eq!(mesh.proxy.stat("listener_manager.listener_modified")?, 20);
    Ok(())
}

#[test]
fn an_established_connection_outlives_its_listener_for_the_drain_time() -> Result<()> {
    let mesh = Mesh::start_with(|server| Upstream::echo(Some(server.netns()), "10.9.0.1:80"))?;
    mesh.push(&[service(SERVICE, "a")])?;
    let stream = mesh.client.connect(SERVICE)?;
    let seen = run(stream.try_clone()?, &[write("one"), Read(3)]);
    assert_eq!(seen.text(), "one");
    mesh.push(&[])?;
    let seen = run(stream.try_clone()?, &[write("two"), Read(3)]);
    assert_eq!(seen.text(), "two");
    ensure!(left_alone(&mesh.ask(SERVICE)), "new connects are released at once");
    assert_eq!(run(stream, &[ReadToEnd]).end, End::Fin);
    Ok(())
}
