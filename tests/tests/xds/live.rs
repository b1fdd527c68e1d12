//! What an update does to connections that stand: every row of Envoy's table.
//!
//! A second listener is the clock: it is removed after the change that a test is about, so when its connection ends, at
//! the end of the drain time, everything that the change had to end has ended before.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tidegate_tests::config::{socket_address, tcp_proxy};
use tidegate_tests::control_plane::resource::{self, Transport};
use tidegate_tests::control_plane::{Kind, Snapshot};
use tidegate_tests::proxy::{Proxy, Setup};

use crate::world::{LISTENER, Live, State, World, with_log};

const CLOCK: &str = "127.0.0.1:10009";

/// A proxy with a listener to the cluster `c`, which has `a` and nothing else, and a connection through it.
pub(crate) struct Standing {
    pub(crate) world: World,
    pub(crate) plane: Snapshot,
    pub(crate) proxy: Proxy,
    pub(crate) live: Live,
    clock: Live,
}

impl Standing {
    fn start() -> Result<Self> {
        Self::with(json!({}))
    }

    /// With these fields of the cluster.
    pub(crate) fn with(fields: Value) -> Result<Self> {
        let world = World::new()?;
        let plane = Snapshot::start(Some(&world.netns))?;
        let cluster = resource::eds_cluster("c", &resource::ads(), fields)?;
        let other = resource::cluster("other", &[World::B], json!({}))?;
        let endpoints = resource::endpoints("c", &[World::A])?;
        let listener = resource::listener(LISTENER, json!({}), &tcp_proxy("c", json!({})))?;
        let clock = resource::listener(CLOCK, json!({}), &tcp_proxy("other", json!({})))?;
        plane.update(|changes| {
            changes.set(&cluster);
            changes.set(&other);
            changes.set(&endpoints);
            changes.set(&listener);
            changes.set(&clock);
        });
        let bootstrap = format!("{:#}", Transport::Ads.bootstrap(plane.address()));
        let setup = Setup::new(&bootstrap).netns(&world.netns);
        let proxy = setup.args(["--drain-time-s", "2", "--drain-strategy", "immediate"]).start()?;
        with_log(world.reaches(LISTENER, "a"), &proxy)?;
        let mut live = world.connect(LISTENER)?;
        ensure!(live.name()? == "a");
        let mut clock = world.connect(CLOCK)?;
        ensure!(clock.name()? == "b");
        Ok(Self { world, plane, proxy, live, clock })
    }

    /// Makes a change that is accepted; the connection stands right afterwards.
    pub(crate) fn change(&mut self, kind: Kind, change: impl FnOnce(&Snapshot)) -> Result<()> {
        change(&self.plane);
        with_log(self.plane.accepted(kind), &self.proxy)?;
        ensure!(self.live.state()? == State::Open, "the change itself ended the connection");
        Ok(())
    }

    /// Waits for the end of the drain time of everything that has begun to drain by now.
    fn drain_time(&mut self) -> Result<()> {
        self.plane.remove(Kind::Listener, &CLOCK.replace(':', "_"));
        with_log(self.plane.accepted(Kind::Listener), &self.proxy)?;
        ensure!(self.clock.state()? == State::Open, "the drain time is over at once");
        ensure!(self.clock.end()? == State::Fin);
        Ok(())
    }

    /// The connection outlives the drain time.
    pub(crate) fn stays(&mut self) -> Result<()> {
        self.drain_time()?;
        let state = self.live.state()?;
        ensure!(state == State::Open, "the connection ended: {state:?}\n{}", self.proxy.log_tail());
        Ok(())
    }

    /// The connection ends with the drain time: by a FIN.
    fn ends(&mut self) -> Result<()> {
        self.drain_time()?;
        // The clock started later, so this is over or about to be.
        let state = self.live.end()?;
        ensure!(state == State::Fin, "{state:?}");
        Ok(())
    }

    /// A new connection finds nobody: it ends at once, and the log has this flag.
    fn nobody(&self, flag: &str) -> Result<()> {
        self.world.connect(LISTENER)?.end()?;
        self.proxy.lines("proxy.log", &format!("flags={flag}"), 1).map(drop)
    }
}

pub(crate) fn endpoint(address: &str, health: &str) -> Value {
    json!({"endpoint": {"address": socket_address(address)}, "health_status": health})
}

pub(crate) fn endpoints(endpoints: &[Value]) -> Result<tidegate_api::endpoint::ClusterLoadAssignment> {
    resource::from_json(&json!({"cluster_name": "c", "endpoints": [{"lb_endpoints": endpoints}]}))
}

#[test]
fn its_endpoint_is_removed() -> Result<()> {
    let mut standing = Standing::start()?;
    let others = resource::endpoints("c", &[World::B])?;
    standing.change(Kind::Endpoints, |plane| plane.set(&others))?;
    standing.world.reaches(LISTENER, "b")?;
    standing.stays()
}

#[test]
fn its_endpoint_is_unhealthy_or_draining() -> Result<()> {
    let mut standing = Standing::start()?;
    for health in ["UNHEALTHY", "DRAINING"] {
        let changed = endpoints(&[endpoint(World::A, health), endpoint(World::B, "HEALTHY")])?;
        standing.change(Kind::Endpoints, |plane| plane.set(&changed))?;
        standing.world.reaches(LISTENER, "b")?;
        for _ in 0..4 {
            assert_eq!(standing.world.ask(LISTENER)?, "b", "{health}");
        }
    }
    standing.stays()
}

#[test]
fn all_endpoints_are_unhealthy() -> Result<()> {
    let mut standing = Standing::start()?;
    let changed = endpoints(&[endpoint(World::A, "UNHEALTHY")])?;
    standing.change(Kind::Endpoints, |plane| plane.set(&changed))?;
    // Panic: an unhealthy endpoint is better than none.
    assert_eq!(standing.world.ask(LISTENER)?, "a");
    standing.stays()
}

#[test]
fn no_endpoint_is_left() -> Result<()> {
    let mut standing = Standing::start()?;
    let none = endpoints(&[])?;
    standing.change(Kind::Endpoints, |plane| plane.set(&none))?;
    standing.nobody("UH")?;
    standing.stays()
}

#[test]
fn its_filter_changes() -> Result<()> {
    let mut standing = Standing::start()?;
    let changed = resource::listener(LISTENER, json!({}), &tcp_proxy("other", json!({})))?;
    standing.change(Kind::Listener, |plane| plane.set(&changed))?;
    standing.world.reaches(LISTENER, "b")?;
    standing.ends()
}

#[test]
fn a_chain_is_added() -> Result<()> {
    let mut standing = Standing::start()?;
    let chains = json!({"filter_chains": [
        {"filters": [tcp_proxy("c", json!({}))]},
        {"filter_chain_match": {"source_ports": [10_777]}, "filters": [tcp_proxy("other", json!({}))]},
    ]});
    let changed = resource::listener(LISTENER, chains, &json!({}))?;
    standing.change(Kind::Listener, |plane| plane.set(&changed))?;
    let mut other = standing.world.connect_from(10_777, LISTENER)?;
    assert_eq!(other.name()?, "b");
    assert_eq!(standing.world.ask(LISTENER)?, "a");
    standing.stays()
}

#[test]
fn a_chain_is_removed() -> Result<()> {
    let mut standing = Standing::start()?;
    let chain = |port: u16| json!({"filter_chain_match": {"source_ports": [port]}, "filters": [tcp_proxy("other", json!({}))]});
    let stays = json!({"filters": [tcp_proxy("c", json!({}))]});
    let both = json!({"filter_chains": [&stays, chain(10_777)]});
    let both = resource::listener(LISTENER, both, &json!({}))?;
    standing.change(Kind::Listener, |plane| plane.set(&both))?;
    let mut doomed = standing.world.connect_from(10_777, LISTENER)?;
    assert_eq!(doomed.name()?, "b");
    let one = resource::listener(LISTENER, json!({"filter_chains": [&stays]}), &json!({}))?;
    standing.change(Kind::Listener, |plane| plane.set(&one))?;
    assert_eq!(doomed.state()?, State::Open);
    standing.stays()?;
    assert_eq!(doomed.end()?, State::Fin);
    Ok(())
}

#[test]
fn an_attribute_of_the_listener_changes() -> Result<()> {
    let mut standing = Standing::start()?;
    let fields = json!({"per_connection_buffer_limit_bytes": 65_536});
    let changed = resource::listener(LISTENER, fields, &tcp_proxy("c", json!({})))?;
    standing.change(Kind::Listener, |plane| plane.set(&changed))?;
    assert_eq!(standing.world.ask(LISTENER)?, "a");
    standing.ends()
}

#[test]
fn its_cluster_changes() -> Result<()> {
    let mut standing = Standing::start()?;
    let changed = resource::cluster("c", &[World::B], json!({"connect_timeout": "3s"}))?;
    standing.change(Kind::Cluster, |plane| plane.set(&changed))?;
    standing.world.reaches(LISTENER, "b")?;
    standing.stays()
}

#[test]
fn its_cluster_is_removed() -> Result<()> {
    let mut standing = Standing::start()?;
    standing.change(Kind::Cluster, |plane| plane.remove(Kind::Cluster, "c"))?;
    standing.nobody("NC")?;
    standing.stays()
}

#[test]
fn p26_its_listener_is_removed() -> Result<()> {
    let mut standing = Standing::start()?;
    let name = LISTENER.replace(':', "_");
    standing.change(Kind::Listener, |plane| plane.remove(Kind::Listener, &name))?;
    standing.world.refused(LISTENER)?;
    standing.ends()
}

#[test]
fn p42_nothing_changes() -> Result<()> {
    let mut standing = Standing::start()?;
    let socket = listening_inode(&standing.world)?;
    // The same again, in another version.
    let same = resource::listener(LISTENER, json!({}), &tcp_proxy("c", json!({})))?;
    let cluster = resource::eds_cluster("c", &resource::ads(), json!({}))?;
    standing.change(Kind::Listener, |plane| plane.set(&same))?;
    standing.change(Kind::Cluster, |plane| plane.set(&cluster))?;
    assert_eq!(listening_inode(&standing.world)?, socket, "the socket was bound again");
    standing.stays()
}

/// The sockets that listen on [`LISTENER`].
fn listening_inode(world: &World) -> Result<Vec<String>> {
    let table = world.netns.enter(|| std::fs::read_to_string("/proc/thread-self/net/tcp"))??;
    let port = format!(":{:04X}", LISTENER.parse::<std::net::SocketAddr>()?.port());
    let mut inodes: Vec<String> = table
        .lines()
        .filter_map(|line| {
            let fields: Vec<_> = line.split_whitespace().collect();
            (fields.get(1)?.ends_with(&port) && *fields.get(3)? == "0A").then(|| fields[9].to_owned())
        })
        .collect();
    inodes.sort();
    ensure!(!inodes.is_empty(), "nobody listens on {port}:\n{table}");
    Ok(inodes)
}

/// A new listener on another address under the same name.
#[test]
fn p27_the_listener_moves() -> Result<()> {
    let mut standing = Standing::start()?;
    let moved = "127.0.0.1:10005";
    let fields = json!({"name": LISTENER.replace(':', "_")});
    let changed = resource::listener(moved, fields, &tcp_proxy("other", json!({})))?;
    standing.change(Kind::Listener, |plane| plane.set(&changed))?;
    standing.world.reaches(moved, "b")?;
    standing.world.refused(LISTENER)?;
    standing.ends()
}

/// From one cluster to another in one push, while clients connect: none may fail.
#[test]
fn p41_make_before_break() -> Result<()> {
    let standing = Standing::start()?;
    let stop = std::sync::atomic::AtomicBool::new(false);
    let connects = || -> Result<u32> {
        let mut count = 0;
        while !stop.load(std::sync::atomic::Ordering::Acquire) {
            let name = standing.world.ask(LISTENER)?;
            ensure!(name == "a" || name == "b");
            count += 1;
        }
        Ok(count)
    };
    let (count, pushed) = std::thread::scope(|scope| {
        let connecting = scope.spawn(connects);
        let pushed = (0..10).try_for_each(|round| push(&standing, round));
        stop.store(true, std::sync::atomic::Ordering::Release);
        (connecting.join(), pushed)
    });
    pushed?;
    let count = count.map_err(|_| anyhow::anyhow!("the client panicked"))??;
    assert!(count > 10, "only {count} connections were made meanwhile");
    Ok(())
}

/// A new cluster with its endpoints, the listener to it, then the end of the old cluster.
fn push(standing: &Standing, round: u32) -> Result<()> {
    let (old, new) = if round == 0 {
        ("c".to_owned(), "c0".to_owned())
    } else {
        (format!("c{}", round - 1), format!("c{round}"))
    };
    let address = if round.is_multiple_of(2) { World::B } else { World::A };
    let cluster = resource::eds_cluster(&new, &resource::ads(), json!({}))?;
    let endpoints = resource::endpoints(&new, &[address])?;
    let listener = resource::listener(LISTENER, json!({}), &tcp_proxy(&new, json!({})))?;
    standing.plane.update(|changes| {
        changes.set(&cluster);
        changes.set(&endpoints);
        changes.set(&listener);
    });
    with_log(standing.plane.accepted(Kind::Listener), &standing.proxy)?;
    standing.world.reaches(LISTENER, if round.is_multiple_of(2) { "b" } else { "a" })?;
    standing.plane.update(|changes| {
        changes.remove(Kind::Cluster, &old);
        changes.remove(Kind::Endpoints, &old);
    });
    with_log(standing.plane.accepted(Kind::Cluster), &standing.proxy)
}
