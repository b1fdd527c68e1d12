//! Pods and proxies that come and go: enrolment, fail modes, takeover, stop, crash, cleanup, signals.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::json;
use tidegate_tests::cgroup::Cgroup;
use tidegate_tests::client::{self, Outcome};
use tidegate_tests::config::{Config, tcp_proxy};
use tidegate_tests::netns::Netns;
use tidegate_tests::network::Network;
use tidegate_tests::node::Node;
use tidegate_tests::pod::Pod;
use tidegate_tests::program;
use tidegate_tests::proxy::{PATIENCE, Proxy, Setup};
use tidegate_tests::script::{
    self,
    Step::{ReadToEnd, ShutdownWrite},
    write,
};
use tidegate_tests::upstream::Upstream;

const SERVICE: &str = "172.16.0.1:50001";
const ENDPOINT: &str = "10.9.0.1:80";

/// A node with a client pod and a server pod; everything that has no listener is refused, so a connection that
/// by-passes the proxy is told from one that does not.
struct Scene {
    client: Pod,
    upstream: Upstream,
    _server: Pod,
    node: Node,
}

impl Scene {
    fn new() -> Result<Self> {
        let node = Node::new()?;
        let client = node.pod("client", &["10.9.0.9"])?;
        let server = node.pod("server", &["10.9.0.1"])?;
        let upstream = Upstream::identify(Some(server.netns()), ENDPOINT, "foo")?;
        Ok(Self { client, upstream, _server: server, node })
    }

    fn setup(&self) -> Setup {
        let config = Config::new().service(SERVICE, "foo").cluster("foo", &[ENDPOINT], json!({}));
        self.node.proxy(&config.registry_only()).args(["--drain-time-s", "5"])
    }

    /// Whether a direct connection to the endpoint is possible: only without interception.
    fn passes(&self) -> bool {
        matches!(client::run(self.client.connect(ENDPOINT), &[]), Outcome::Connected(_))
    }
}

fn served(pod: &Pod) -> Result<()> {
    match client::run(pod.connect(SERVICE), &[write("hello"), ShutdownWrite, ReadToEnd]) {
        Outcome::Connected(seen) => ensure!(seen.text() == "foo\nhello", "{seen:?}"),
        Outcome::NotConnected(errno) => anyhow::bail!("not connected: {errno}"),
    }
    Ok(())
}

fn wait_pods(proxy: &Proxy, count: u64) -> Result<()> {
    proxy.wait_stat("tidegate.intercept.pods_enrolled", |pods| pods == count).map(|_| ())
}

/// What the proxy's descriptors are, without numbers: `socket`, `pipe`, `anon_inode:[eventpoll]`, …
fn open_files(proxy: &Proxy) -> Result<BTreeMap<String, usize>> {
    let mut kinds = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{}/fd", proxy.pid()))?.flatten() {
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        let target = target.to_string_lossy();
        *kinds.entry(target.split(":[").next().unwrap_or_default().to_owned()).or_default() += 1;
    }
    Ok(kinds)
}

/// Uses every worker, so that each has opened what it keeps (its own namespace, pipes, its ring).
fn warm_up(pod: &Pod) -> Result<()> {
    (0..40).try_for_each(|_| served(pod))
}

/// Waits until the proxy has no more descriptors than before.
fn wait_closed(proxy: &Proxy, before: &BTreeMap<String, usize>) -> Result<()> {
    let total = |kinds: &BTreeMap<String, usize>| kinds.values().sum::<usize>();
    let closed = eventually("", || open_files(proxy).is_ok_and(|now| total(&now) <= total(before)));
    closed.with_context(|| format!("descriptors are left: {:?}, before {before:?}", open_files(proxy).ok()))
}

fn echo(stream: &mut TcpStream, text: &str) -> Result<()> {
    stream.set_read_timeout(Some(script::GUARD))?;
    stream.write_all(text.as_bytes())?;
    let mut answer = vec![0; text.len()];
    stream.read_exact(&mut answer)?;
    ensure!(answer == text.as_bytes(), "{text:?} came back as {answer:?}");
    Ok(())
}

/// A connection whose banner has been read, so that it is certainly proxied.
fn open(pod: &Pod) -> Result<TcpStream> {
    let mut stream = pod.connect(SERVICE)?;
    stream.set_read_timeout(Some(script::GUARD))?;
    let mut banner = [0; 4];
    stream.read_exact(&mut banner)?;
    ensure!(&banner == b"foo\n", "{banner:?}");
    Ok(stream)
}

/// Polls until the condition holds.
fn eventually(what: &str, mut condition: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        ensure!(Instant::now() < deadline, "waited {PATIENCE:?} in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[test]
fn a_pod_that_starts_later_is_enrolled() -> Result<()> {
    let scene = Scene::new()?;
    let proxy = scene.setup().start()?;
    wait_pods(&proxy, 2)?;
    let late = scene.node.pod("late", &["10.9.0.10"])?;
    wait_pods(&proxy, 3)?;
    served(&late)?;
    assert_eq!(scene.upstream.served()?.peer.ip().to_string(), "10.9.0.10");
    Ok(())
}

#[test]
fn a_pod_that_ends_is_forgotten() -> Result<()> {
    let scene = Scene::new()?;
    let proxy = scene.setup().start()?;
    wait_pods(&proxy, 2)?;
    warm_up(&scene.client)?;
    let before = open_files(&proxy)?;
    for round in 0..3 {
        let pods = (0..4)
            .map(|number| scene.node.pod("short", &[&format!("10.9.{}.{}", round + 1, number + 1)]))
            .collect::<Result<Vec<_>>>()?;
        wait_pods(&proxy, 6)?;
        for pod in &pods {
            served(pod)?;
        }
        drop(pods);
        wait_pods(&proxy, 2)?;
    }
    wait_closed(&proxy, &before)?;
    served(&scene.client)
}

#[test]
fn a_pod_that_ends_with_open_connections_is_forgotten_too() -> Result<()> {
    let scene = Scene::new()?;
    let proxy = scene.setup().start()?;
    wait_pods(&proxy, 2)?;
    warm_up(&scene.client)?;
    let before = open_files(&proxy)?;
    let pod = scene.node.pod("short", &["10.9.1.1"])?;
    wait_pods(&proxy, 3)?;
    let streams = (0..10).map(|_| open(&pod)).collect::<Result<Vec<_>>>()?;
    drop(streams);
    drop(pod);
    wait_pods(&proxy, 2)?;
    wait_closed(&proxy, &before)
}

/// Starts a pod while the proxy can't see it, and connects from there.
fn connect_before_enrolment(fail_mode: &str) -> Result<(Scene, Proxy, Pod, Outcome)> {
    let scene = Scene::new()?;
    let proxy = scene.setup().args(["--fail-mode", fail_mode]).start()?;
    proxy.signal(Signal::SIGSTOP)?;
    let pod = scene.node.pod("new", &["10.9.0.10"])?;
    let outcome = client::run(pod.connect(ENDPOINT), &[ShutdownWrite, ReadToEnd]);
    proxy.signal(Signal::SIGCONT)?;
    Ok((scene, proxy, pod, outcome))
}

#[test]
fn fail_open_lets_a_pod_pass_that_is_not_enrolled_yet() -> Result<()> {
    let (scene, proxy, pod, outcome) = connect_before_enrolment("open")?;
    assert!(matches!(&outcome, Outcome::Connected(seen) if seen.text() == "foo\n"), "{outcome:?}");
    proxy.wait_stat("tidegate.intercept.not_enrolled_passed", |count| count == 1)?;
    wait_pods(&proxy, 3)?;
    served(&pod)?;
    drop(scene);
    Ok(())
}

#[test]
fn fail_closed_refuses_a_pod_that_is_not_enrolled_yet() -> Result<()> {
    let (scene, proxy, pod, outcome) = connect_before_enrolment("closed")?;
    assert_eq!(outcome, Outcome::NotConnected("EHOSTUNREACH".into()));
    proxy.wait_stat("tidegate.intercept.not_enrolled_refused", |count| count == 1)?;
    wait_pods(&proxy, 3)?;
    served(&pod)?;
    assert_eq!(scene.upstream.accepted().len(), 1);
    Ok(())
}

#[test]
fn a_stop_removes_everything() -> Result<()> {
    let scene = Scene::new()?;
    let mut proxy = scene.setup().start()?;
    served(&scene.client)?;
    assert!(!scene.passes());
    assert!(proxy.stop()?.success());
    assert!(scene.passes(), "connections pass as if there had never been a proxy");
    assert!(is_empty(proxy.pins()), "pins are left");
    Ok(())
}

fn is_empty(dir: &Path) -> bool {
    fs::read_dir(dir).map_or(true, |mut entries| entries.next().is_none())
}

#[test]
fn cleanup_removes_what_a_kill_leaves() -> Result<()> {
    let scene = Scene::new()?;
    let mut proxy = scene.setup().start()?;
    served(&scene.client)?;
    proxy.kill()?;
    assert!(!scene.passes(), "the programs outlive the process: nothing by-passes a proxy that crashed");
    assert!(!is_empty(proxy.pins()));
    let output = Command::new(program::built("tidegate")?)
        .arg("cleanup")
        .arg("--pin-path")
        .arg(proxy.pins())
        .arg("--state-dir")
        .arg(proxy.path("state"))
        .output()?;
    ensure!(output.status.success(), "{output:?}");
    assert!(is_empty(proxy.pins()), "{output:?}");
    assert!(scene.passes());
    Ok(())
}

#[test]
fn a_restart_after_a_kill_takes_over() -> Result<()> {
    let scene = Scene::new()?;
    let mut first = scene.setup().start()?;
    served(&scene.client)?;
    first.kill()?;
    let second = scene.setup().succeed(&first).start()?;
    served(&scene.client)?;
    second.lines("access.log", "clu=foo", 1)?;
    Ok(())
}

#[test]
fn a_second_process_takes_over_and_nothing_is_lost() -> Result<()> {
    let scene = Scene::new()?;
    let mut first = scene.setup().start()?;
    let mut old = open(&scene.client)?;
    echo(&mut old, "before")?;
    let successor = scene.setup().succeed(&first);
    // Connections go on while the second process starts.
    let second = std::thread::scope(|scope| -> Result<Proxy> {
        let starting = scope.spawn(|| successor.start());
        let mut connections = 0;
        while !starting.is_finished() {
            served(&scene.client).with_context(|| format!("connection {connections} during the takeover"))?;
            connections += 1;
        }
        starting.join().map_err(|_| anyhow::anyhow!("the start panicked"))?
    })?;
    for _ in 0..20 {
        served(&scene.client)?;
    }
    second.lines("access.log", "clu=foo", 20)?;
    // Never a moment in which a live listener was taken for a dead one, or a connection was lost on its way.
    for reason in ["listener_gone_passed", "not_enrolled_passed", "no_original_destination"] {
        assert_eq!(second.stat(&format!("tidegate.intercept.{reason}"))?, 0, "{reason}");
    }
    echo(&mut old, "after")?;
    drop(old);
    assert!(first.wait()?.success(), "the first process ends once its connections have");
    served(&scene.client)?;
    assert!(!scene.passes(), "the first process has not removed the programs of the second");
    Ok(())
}

/// Clients that connect to the endpoint's own address, which is the service too: what passes is answered as well.
struct Traffic<'a> {
    scene: &'a Scene,
    outcomes: std::sync::Mutex<Vec<Outcome>>,
    done: std::sync::atomic::AtomicBool,
}

impl<'a> Traffic<'a> {
    fn new(scene: &'a Scene) -> Self {
        Self { scene, outcomes: Vec::new().into(), done: false.into() }
    }

    fn setup(scene: &Scene, fail_mode: &str) -> Setup {
        let config = Config::new().service(ENDPOINT, "foo").cluster("foo", &[ENDPOINT], json!({}));
        scene.node.proxy(&config).args(["--fail-mode", fail_mode])
    }

    /// One connection after the other, until `done`.
    fn run(&self) {
        while !self.done.load(std::sync::atomic::Ordering::Relaxed) {
            let outcome = client::run(self.scene.client.connect(ENDPOINT), &[ShutdownWrite, ReadToEnd]);
            self.outcomes.lock().unwrap().push(outcome);
        }
    }

    /// Waits for so many connections more; how many there are.
    fn wait_more(&self, count: usize) -> Result<usize> {
        let wanted = self.count() + count;
        eventually("connections", || self.count() >= wanted)?;
        Ok(self.count())
    }

    fn count(&self) -> usize {
        self.outcomes.lock().unwrap().len()
    }

    fn finish(&self) -> Vec<Outcome> {
        self.done.store(true, std::sync::atomic::Ordering::Relaxed);
        self.outcomes.lock().unwrap().clone()
    }
}

fn is_answered(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Connected(seen) if seen.text() == "foo\n")
}

/// Kills the proxy under traffic and starts another one, also under traffic. What was seen from the first connection
/// that got `expected` after the kill, until the second start began; and the second proxy. All that came before the
/// kill and after the second start is checked here.
fn kill_under_traffic(
    scene: &Scene,
    fail_mode: &str,
    expected: impl Fn(&Outcome) -> bool,
) -> Result<(Vec<Outcome>, Proxy)> {
    let mut first = Traffic::setup(scene, fail_mode).start()?;
    let traffic = Traffic::new(scene);
    std::thread::scope(|scope| {
        scope.spawn(|| traffic.run());
        let mut steps = || -> Result<_> {
            let alive = traffic.wait_more(20)?;
            first.kill()?;
            let killed = traffic.count();
            eventually("the kill to be noticed", || {
                traffic.outcomes.lock().unwrap().iter().skip(killed).any(&expected)
            })?;
            let starting = traffic.wait_more(50)?;
            let second = Traffic::setup(scene, fail_mode).succeed(&first).start()?;
            let started = traffic.count();
            traffic.wait_more(20)?;
            Ok((alive, killed, starting, started, second))
        };
        let steps = steps();
        let mut outcomes = traffic.finish();
        let (alive, killed, starting, started, second) = steps?;
        ensure!(outcomes[..alive].iter().all(is_answered), "before the kill: {outcomes:?}");
        // The one that was under way when the start was done may have begun before.
        ensure!(outcomes[started + 1..].iter().all(is_answered), "after the second start: {outcomes:?}");
        outcomes.truncate(starting);
        let noticed = outcomes.iter().skip(killed).position(expected).context("never noticed")? + killed;
        Ok((outcomes.split_off(noticed), second))
    })
}

#[test]
fn a_killed_proxy_under_traffic_lets_connections_pass_when_fail_mode_is_open() -> Result<()> {
    let scene = Scene::new()?;
    let (dead, second) = kill_under_traffic(&scene, "open", is_answered)?;
    assert!(dead.len() >= 50 && dead.iter().all(is_answered), "{dead:?}");
    // The kernel's counters outlive the process.
    let passed = second.wait_stat("tidegate.intercept.listener_gone_passed", |count| count >= 50)?;
    served_directly(&scene)?;
    second.lines("access.log", "clu=foo", 1)?;
    let refused = second.stat("tidegate.intercept.listener_gone_refused")?;
    assert_eq!((second.stat("tidegate.intercept.listener_gone_passed")?, refused), (passed, 0));
    Ok(())
}

fn served_directly(scene: &Scene) -> Result<()> {
    let outcome = client::run(scene.client.connect(ENDPOINT), &[ShutdownWrite, ReadToEnd]);
    ensure!(is_answered(&outcome), "{outcome:?}");
    Ok(())
}

#[test]
fn a_killed_proxy_under_traffic_refuses_connections_when_fail_mode_is_closed() -> Result<()> {
    let scene = Scene::new()?;
    let refused = Outcome::NotConnected("ENETDOWN".into());
    let (dead, second) = kill_under_traffic(&scene, "closed", |outcome| *outcome == refused)?;
    assert!(dead.len() >= 50 && dead.iter().all(|outcome| *outcome == refused), "{dead:?}");
    second.wait_stat("tidegate.intercept.listener_gone_refused", |count| count >= 50)?;
    assert_eq!(second.stat("tidegate.intercept.listener_gone_passed")?, 0);
    Ok(())
}

#[test]
fn processes_of_the_host_are_captured_when_asked() -> Result<()> {
    let node = Node::new()?;
    let server = node.pod("server", &["10.9.0.1"])?;
    let _upstream = Upstream::identify(Some(server.netns()), ENDPOINT, "foo")?;
    // The router's namespace stands for the host's: it has routes to the pods.
    let config = Config::new().service(SERVICE, "foo").cluster("foo", &[ENDPOINT], json!({}));
    let host = node.network.router();
    let cgroup = Cgroup::new("host")?;
    let proxy = Setup::new(&config.to_string()).netns(host).processes(cgroup.path()).start()?;
    let workload = || -> Result<Command> {
        let mut command = host.command("sh");
        command.args(["-c", r#"echo 0 > "$0" && exec "$@""#]).arg(cgroup.path().join("cgroup.procs"));
        command.arg(program::built("workload")?);
        Ok(command)
    };
    // The first process that the cgroup ever has, connecting at once.
    let output = workload()?.args(["talk", SERVICE, "hello"]).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.starts_with("foo\nhello -- peer 172.16.0.1:50001"), "{output:?}");
    proxy.lines("access.log", "clu=foo", 1)?;
    Ok(())
}

#[test]
fn a_kubelet_may_start_after_the_proxy() -> Result<()> {
    let config = Config::new().service(SERVICE, "foo").cluster("foo", &[ENDPOINT], json!({}));
    let node = Netns::new("node")?;
    let proxy = Setup::new(&config.to_string()).netns(&node).kubepods().start()?;
    // One kubelet, then another one (kind, k3d).
    let mut networks = Vec::new();
    for name in ["kubepods", "kubelet-kubepods"] {
        let network = Network::below(Cgroup::new(name)?)?;
        let client = network.pod("client", &["10.9.0.9"])?;
        let server = network.pod("server", &["10.9.0.1"])?;
        let upstream = Upstream::identify(Some(server.netns()), ENDPOINT, "foo")?;
        let is_captured = || served(&client).is_ok();
        eventually("the client to be captured", is_captured).with_context(|| proxy.log_tail())?;
        networks.push((client, server, upstream, network));
    }
    proxy.lines("access.log", "clu=foo", 2)?;
    Ok(())
}

/// A proxy without interception, on its own loopback.
fn plain(args: &[&str]) -> Result<(Netns, Upstream, Proxy)> {
    let netns = Netns::new("plain")?;
    let upstream = Upstream::echo(Some(&netns), "127.0.0.1:80")?;
    let config = Config::new().listener("127.0.0.1:10000", json!({}), &tcp_proxy("foo", json!({}))).cluster(
        "foo",
        &["127.0.0.1:80"],
        json!({}),
    );
    let proxy = Setup::new(&config.to_string()).netns(&netns).args(args.iter().copied()).start()?;
    Ok((netns, upstream, proxy))
}

fn connect(netns: &Netns) -> Result<TcpStream> {
    Ok(netns.enter(|| TcpStream::connect("127.0.0.1:10000"))??)
}

#[test]
fn sigterm_drains() -> Result<()> {
    let (netns, _upstream, mut proxy) = plain(&["--drain-time-s", "60"])?;
    let mut stream = connect(&netns)?;
    echo(&mut stream, "before")?;
    proxy.signal(Signal::SIGTERM)?;
    eventually("new connections are refused", || connect(&netns).is_err())?;
    echo(&mut stream, "after")?;
    drop(stream);
    assert!(proxy.wait()?.success(), "it ends with the last connection, long before the drain time");
    Ok(())
}

#[test]
fn the_drain_time_ends_connections_that_stay() -> Result<()> {
    let (netns, _upstream, mut proxy) = plain(&["--drain-time-s", "1"])?;
    let mut stream = connect(&netns)?;
    echo(&mut stream, "before")?;
    assert!(proxy.stop()?.success());
    let mut rest = Vec::new();
    let ended = stream.read_to_end(&mut rest);
    assert!(ended.is_err() || rest.is_empty());
    Ok(())
}

#[test]
fn a_second_signal_ends_it_at_once() -> Result<()> {
    let (netns, _upstream, mut proxy) = plain(&["--drain-time-s", "600"])?;
    let mut stream = connect(&netns)?;
    echo(&mut stream, "before")?;
    proxy.signal(Signal::SIGTERM)?;
    eventually("it drains", || connect(&netns).is_err())?;
    echo(&mut stream, "still open")?;
    proxy.signal(Signal::SIGTERM)?;
    proxy.wait()?;
    Ok(())
}

#[test]
fn sigusr1_reopens_the_access_log() -> Result<()> {
    let (netns, _upstream, proxy) = plain(&[])?;
    let visit = || -> Result<()> {
        let mut stream = connect(&netns)?;
        echo(&mut stream, "hello")
    };
    visit()?;
    proxy.lines("access.log", "clu=foo", 1)?;
    fs::rename(proxy.path("access.log"), proxy.path("access.log.1"))?;
    proxy.signal(Signal::SIGUSR1)?;
    eventually("the file is there again", || proxy.path("access.log").exists())?;
    visit()?;
    proxy.lines("access.log", "clu=foo", 1)?;
    assert_eq!(proxy.file("access.log.1").lines().count(), 1);
    Ok(())
}

#[test]
fn check_names_what_the_machine_offers() -> Result<()> {
    tidegate_tests::run::prepare()?;
    let output = Command::new(program::built("tidegate")?).arg("check").output()?;
    let text = String::from_utf8_lossy(&output.stdout).to_lowercase();
    for subject in ["kernel", "btf", "cgroup", "bpf", "io_uring", "cap"] {
        assert!(text.contains(subject), "{subject} is missing in:\n{text}");
    }
    assert!(output.status.success(), "these tests run where interception works:\n{text}");
    Ok(())
}
