//! The kernel path outlives the process, and follows its configuration without a gap.

use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use tidegate_tests::config::Config;
use tidegate_tests::node::Node;
use tidegate_tests::pod::Pod;
use tidegate_tests::proxy::{PATIENCE, Proxy};
use tidegate_tests::script::{self, End, Step, write};
use tidegate_tests::upstream::Upstream;

use crate::{data_path, with_on_exit};

const SERVICE: &str = "172.16.0.1:50001";

/// Connects in a loop until it is told to stop; the first failure ends it.
struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<Result<()>>>,
}

impl Load {
    fn start(client: &Arc<Pod>) -> Self {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (client, told, count) = (Arc::clone(client), Arc::clone(&stop), Arc::clone(&done));
        let thread = std::thread::spawn(move || {
            while !told.load(Ordering::Relaxed) {
                let stream = client.connect(SERVICE).with_context(|| format!("connect {count:?}"))?;
                let seen = script::run(stream, &[write("x"), Step::ShutdownWrite, Step::ReadToEnd]);
                ensure!(seen.end == End::Fin, "{seen:?}");
                count.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        Self { stop, done, thread: Some(thread) }
    }

    /// Waits for so many connections more.
    fn more(&self, count: u64) -> Result<()> {
        let (from, begin) = (self.done.load(Ordering::Relaxed), Instant::now());
        while self.done.load(Ordering::Relaxed) < from + count {
            let over = self.thread.as_ref().is_none_or(std::thread::JoinHandle::is_finished);
            ensure!(!over && begin.elapsed() < PATIENCE, "the load has stopped after {:?}", self.done);
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// How many connections there were.
    fn end(mut self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(std::thread::JoinHandle::join);
        ended.context("no thread")?.map_err(|_| anyhow::anyhow!("the load panicked"))??;
        Ok(self.done.load(Ordering::Relaxed))
    }
}

struct Lab {
    node: Node,
    client: Arc<Pod>,
    server: Pod,
}

impl Lab {
    fn new() -> Result<Self> {
        let node = Node::new()?;
        let client = Arc::new(node.pod("client", &["10.9.0.9"])?);
        client.netns().ip("route add unreachable 172.16.0.0/12")?;
        let server = node.pod("server", &["10.9.0.1"])?;
        Ok(Self { node, client, server })
    }

    fn upstream(&self, port: u16, name: &str) -> Result<Upstream> {
        Upstream::identify(Some(self.server.netns()), &format!("10.9.0.1:{port}"), name)
    }
}

fn config(on_exit: &str) -> String {
    let config = Config::new().service(SERVICE, "foo").cluster("foo", &["10.9.0.1:80"], data_path("KERNEL"));
    with_on_exit(&config, on_exit)
}

/// What the counters of the cluster come to, once nothing is open.
fn settled(proxy: &Proxy, total: u64) -> Result<()> {
    proxy.wait_stat("cluster.foo.upstream_cx_total", |value| value == total)?;
    proxy.wait_stat("cluster.foo.upstream_cx_active", |value| value == 0)?;
    proxy.wait_stat("cluster.foo.upstream_cx_destroy", |value| value == total)?;
    Ok(())
}

#[test]
fn a_killed_process_is_not_missed_and_its_successor_goes_on_counting() -> Result<()> {
    let lab = Lab::new()?;
    let setup = lab.node.proxy(&Config::new()).config(&config("RELEASE"));
    let mut proxy = setup.start()?;
    let _upstream = lab.upstream(80, "foo")?;
    let mut long = lab.client.connect(SERVICE)?;
    long.set_read_timeout(Some(PATIENCE))?;
    long.write_all(b"a")?;
    let mut seen = [0; 5];
    long.read_exact(&mut seen)?;
    let load = Load::start(&lab.client);
    load.more(50)?;
    proxy.kill()?;
    load.more(200)?;
    let successor = setup.clone().succeed(&proxy).start()?;
    load.more(50)?;
    long.write_all(b"b")?;
    let mut seen = [0; 1];
    long.read_exact(&mut seen)?;
    ensure!(seen == *b"b", "{seen:?}");
    drop(long);
    let count = load.end()?;
    settled(&successor, count + 1)
}

#[test]
fn a_successor_takes_over_while_both_run() -> Result<()> {
    let lab = Lab::new()?;
    let setup = lab.node.proxy(&Config::new()).config(&config("RELEASE"));
    // Kept to the end: one that is dropped takes the pins with it.
    let mut proxies = vec![setup.start()?];
    let _upstream = lab.upstream(80, "foo")?;
    let load = Load::start(&lab.client);
    load.more(50)?;
    for former in 0..2 {
        let successor = setup.clone().succeed(&proxies[former]).start()?;
        load.more(50)?;
        ensure!(proxies[former].wait()?.success());
        proxies.push(successor);
    }
    settled(&proxies[2], load.end()?)
}

#[test]
fn a_stopped_process_leaves_it_or_takes_it_away() -> Result<()> {
    let lab = Lab::new()?;
    let _upstream = lab.upstream(80, "foo")?;
    let setup = lab.node.proxy(&Config::new()).config(&config("KEEP"));
    let mut proxy = setup.start()?;
    let load = Load::start(&lab.client);
    load.more(50)?;
    proxy.signal(Signal::SIGTERM)?;
    ensure!(proxy.wait()?.success());
    load.more(50)?;
    let mut last = setup.clone().config(&config("RELEASE")).succeed(&proxy).start()?;
    load.more(50)?;
    settled(&last, load.end()?)?;
    last.signal(Signal::SIGTERM)?;
    ensure!(last.wait()?.success());
    ensure!(lab.client.connect(SERVICE).is_err(), "released: nothing has the address");
    ensure!(!last.pins().exists(), "{} is left", last.pins().display());
    Ok(())
}
