//! Endpoints come and go as fast as a control plane can say it and the proxy acknowledges it, under all the connects that
//! two pods can make.

use std::net::Ipv4Addr;
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tidegate_api::endpoint::ClusterLoadAssignment;
use tidegate_tests::config::{Config, merge};
use tidegate_tests::control_plane::resource::{self, Transport};
use tidegate_tests::control_plane::{ControlPlane, Kind, Method, Stream, delta_response, wrapped};
use tidegate_tests::load::agent::Agent;
use tidegate_tests::load::visits::now;
use tidegate_tests::load::{Server, Visit};
use tidegate_tests::node::Node;
use tidegate_tests::proxy::{PATIENCE, Proxy};

use crate::data_path;

/// The first one is connected to, the others change with it.
const CLUSTERS: usize = 10;
/// The first of 32 addresses that endpoints have, one for each bit of a [`Set`].
const FIRST: u8 = 32;
/// A cluster has at most so many at once, so that most of them are gone most of the time.
const AT_MOST: u32 = 4;
/// Pushes that are not acknowledged yet.
const IN_FLIGHT: usize = 4;
/// Connections of each pod.
const AT_ONCE: usize = 4;
const PODS: usize = 2;

/// Endpoints of a cluster.
type Set = u32;

fn address(bit: u32) -> Ipv4Addr {
    Ipv4Addr::new(10, 9, 0, FIRST + bit as u8)
}

fn members(set: Set) -> impl Iterator<Item = u32> {
    (0..Set::BITS).filter(move |bit| set & (1 << bit) != 0)
}

fn name(cluster: usize) -> String {
    format!("c{cluster}")
}

/// What the first cluster has had.
struct Push {
    set: Set,
    /// Before it was sent.
    sent: u64,
    /// When its ACK was read.
    acked: Option<u64>,
}

/// The control plane, and everything that it has said.
struct Plane<'a> {
    stream: &'a Stream,
    rng: fastrand::Rng,
    /// Each cluster with all endpoints.
    all: Vec<ClusterLoadAssignment>,
    sets: Vec<Set>,
    pushes: Vec<Push>,
    acked: usize,
    /// Clusters that were given other endpoints.
    changes: u64,
    /// Endpoints that were added or removed.
    endpoints: u64,
}

impl<'a> Plane<'a> {
    fn new(stream: &'a Stream) -> Result<Self> {
        let addresses: Vec<String> = members(Set::MAX).map(|bit| format!("{}:80", address(bit))).collect();
        let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
        let all = (0..CLUSTERS).map(|cluster| resource::endpoints(&name(cluster), &addresses));
        Ok(Self {
            stream,
            rng: fastrand::Rng::with_seed(7),
            all: all.collect::<Result<_>>()?,
            sets: vec![0; CLUSTERS],
            pushes: Vec::new(),
            acked: 0,
            changes: 0,
            endpoints: 0,
        })
    }

    /// Waits until all clusters are asked for.
    fn asked(&self) -> Result<()> {
        let mut names = Vec::new();
        while names.len() < CLUSTERS {
            names.extend(self.stream.delta_request_for(Kind::Endpoints)?.resource_names_subscribe);
        }
        Ok(())
    }

    /// Gives these clusters other endpoints, in one response.
    fn push(&mut self, clusters: Range<usize>) -> Result<()> {
        let version = (self.pushes.len() + 1).to_string();
        let mut resources = Vec::new();
        for cluster in clusters {
            let before = self.sets[cluster];
            let set = self.other(before);
            self.sets[cluster] = set;
            self.changes += 1;
            self.endpoints += u64::from((before ^ set).count_ones());
            let mut assignment = self.all[cluster].clone();
            let mut bit = 0;
            assignment.endpoints[0].lb_endpoints.retain(|_| {
                bit += 1;
                set & (1 << (bit - 1)) != 0
            });
            resources.push(wrapped(&version, &assignment));
        }
        let response = delta_response(Kind::Endpoints, &version, resources, &[]);
        self.pushes.push(Push { set: self.sets[0], sent: now()?, acked: None });
        self.stream.send_delta(&response);
        Ok(())
    }

    /// Some endpoints, not these.
    fn other(&mut self, set: Set) -> Set {
        loop {
            let other =
                (0..self.rng.u32(1..=AT_MOST)).fold(0, |set, _| set | 1 << self.rng.u32(0..Set::BITS));
            if other != set {
                return other;
            }
        }
    }

    /// Waits for the ACK of the oldest push that has none.
    fn take_ack(&mut self) -> Result<()> {
        let answer = self.stream.delta_request_for(Kind::Endpoints)?;
        ensure!(answer.error_detail.is_none(), "rejected: {answer:?}");
        let expected = (self.acked + 1).to_string();
        ensure!(answer.response_nonce == expected, "{expected} is to be acknowledged next: {answer:?}");
        self.pushes[self.acked].acked = Some(now()?);
        self.acked += 1;
        Ok(())
    }

    /// Until all is acknowledged.
    fn settle(&mut self) -> Result<()> {
        while self.acked < self.pushes.len() {
            self.take_ack()?;
        }
        Ok(())
    }

    /// Pushes as fast as they are acknowledged.
    fn churn(&mut self, clusters: Range<usize>, is_enough: impl Fn() -> bool) -> Result<()> {
        let begin = Instant::now();
        while !is_enough() {
            ensure!(begin.elapsed() < PATIENCE, "{} connections are not made", AT_ONCE * PODS);
            while self.pushes.len() < self.acked + IN_FLIGHT {
                self.push(clusters.clone())?;
            }
            self.take_ack()?;
        }
        self.settle()
    }

    /// Until when connects may have used what a push said: the kernel's tables have followed the next one when it is
    /// acknowledged.
    fn over(&self, push: usize) -> u64 {
        self.pushes.get(push + 1).and_then(|next| next.acked).unwrap_or(u64::MAX)
    }

    /// What was in force at some time of a connect.
    fn reachable(&self, visit: &Visit) -> Set {
        let until = self.pushes.partition_point(|push| push.sent <= visit.ended);
        self.pushes[..until]
            .iter()
            .enumerate()
            .rev()
            .take_while(|(index, _)| self.over(*index) >= visit.begun)
            .fold(0, |set, (_, push)| set | push.set)
    }
}

/// While the first cluster stays as it is: its set, and when.
struct Rest {
    set: Set,
    begun: u64,
    ended: u64,
}

impl Rest {
    /// As many connects to one endpoint as to the other. Of those that were under way when it began and when it ended it is
    /// not known when they chose.
    fn is_even(&self, visits: &[Visit]) -> Result<()> {
        let inside = |visit: &&Visit| self.begun < visit.begun && visit.ended < self.ended;
        let to = |bit| visits.iter().filter(inside).filter(|visit| visit.at == address(bit)).count();
        let counts: Vec<_> = members(self.set).map(to).collect();
        let (least, most) =
            (counts.iter().min().copied().unwrap_or(0), counts.iter().max().copied().unwrap_or(0));
        ensure!(least > 0 && most - least <= 1 + 2 * PODS * AT_ONCE, "connects by endpoint: {counts:?}");
        Ok(())
    }
}

fn config(plane: &ControlPlane) -> Result<String> {
    let config = (0..CLUSTERS).fold(Config::new(), |config, cluster| {
        let mut fields = data_path("KERNEL");
        let eds = json!({"type": "EDS", "load_assignment": null,
            "eds_cluster_config": {"eds_config": resource::ads()}});
        merge(&mut fields, eds);
        let service = format!("172.16.0.{}:50001", cluster + 1);
        config.service(&service, &name(cluster)).cluster(&name(cluster), &[], fields)
    });
    let mut config: Value = serde_json::from_str(&config.to_string())?;
    let ads = Transport::DeltaAds.bootstrap(plane.address());
    config["node"] = ads["node"].clone();
    config["dynamic_resources"] = json!({"ads_config": ads["dynamic_resources"]["ads_config"]});
    let clusters = config["static_resources"]["clusters"].as_array_mut().context("no clusters")?;
    clusters.push(ads["static_resources"]["clusters"][0].clone());
    Ok(format!("{config:#}"))
}

/// What the proxy says it has changed.
fn membership_changes(proxy: &Proxy) -> Result<u64> {
    (0..CLUSTERS).map(|cluster| proxy.stat(&format!("cluster.{}.membership_change", name(cluster)))).sum()
}

/// How often all clusters change for a while, and then all but the first one.
const ROUNDS: usize = 4;
const BURST: Duration = Duration::from_millis(600);

fn rounds(plane: &mut Plane<'_>, server: &Server) -> Result<Vec<Rest>> {
    let (begin, pushes, accepted) = (Instant::now(), plane.acked, server.accepted());
    let (changes, endpoints) = (plane.changes, plane.endpoints);
    let mut rests = Vec::new();
    for _ in 0..ROUNDS {
        let (burst, before) = (Instant::now(), server.accepted());
        plane.churn(0..CLUSTERS, || burst.elapsed() > BURST && server.accepted() > before + 100)?;
        while plane.sets[0].count_ones() < 2 {
            plane.push(0..1)?;
            plane.settle()?;
        }
        let (begun, before) = (now()?, server.accepted());
        plane.churn(1..CLUSTERS, || server.accepted() > before + 1000)?;
        rests.push(Rest { set: plane.sets[0], begun, ended: now()? });
    }
    let rate = |count: u64| count as f64 / begin.elapsed().as_secs_f64();
    println!(
        "{:.0} pushes a second changed {:.0} clusters and brought or took {:.0} endpoints; {:.0} connects a second",
        rate((plane.acked - pushes) as u64),
        rate(plane.changes - changes),
        rate(plane.endpoints - endpoints),
        rate(server.accepted() - accepted),
    );
    Ok(rests)
}

/// No connect is refused. None goes to an endpoint that was gone when it began and did not come back before it ended: gone
/// from the ACK on. Load is spread evenly over those that are there, also while other clusters change.
#[test]
fn endpoints_come_and_go_under_load() -> Result<()> {
    let node = Node::new()?;
    let clients = [node.pod("one", &["10.9.0.8"])?, node.pod("two", &["10.9.0.9"])?];
    ensure!(clients.len() == PODS);
    let addresses: Vec<String> = members(Set::MAX).map(|bit| address(bit).to_string()).collect();
    let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
    let pod = node.pod("server", &addresses)?;
    let server = pod.netns().enter(|| Server::whereabouts(([0; 4], 80).into()))??;
    let control_plane = ControlPlane::start(Some(&node.netns))?;
    let mut proxy = node.proxy(&Config::new()).config(&config(&control_plane)?).spawn()?;
    let stream = control_plane.stream(Method::DELTA_ADS)?;
    let mut plane = Plane::new(&stream)?;
    plane.asked()?;
    plane.push(0..CLUSTERS)?;
    plane.settle()?;
    proxy.wait_ready()?;

    let mut agents = Vec::new();
    for client in &clients {
        let mut agent = Agent::start(client.command("env"))?;
        agent.visit("172.16.0.1:50001".parse()?, AT_ONCE)?;
        agents.push(agent);
    }
    let rests = rounds(&mut plane, &server);
    let mut visits = Vec::new();
    for mut agent in agents {
        visits.extend(agent.visits().context("a client")?);
    }
    let rests = rests?;
    let changed = membership_changes(&proxy)?;
    ensure!(changed == plane.changes, "{changed} of {} changes of clusters were applied", plane.changes);
    for visit in &visits {
        let there: Vec<_> = members(plane.reachable(visit)).map(address).collect();
        ensure!(there.contains(&visit.at), "{visit:?}, when only {there:?} were there");
    }
    rests.iter().try_for_each(|rest| rest.is_even(&visits))?;
    let total = visits.len() as u64;
    ensure!(server.accepted() == total, "{total} connects, and {} arrived", server.accepted());
    proxy.wait_stat("cluster.c0.upstream_cx_total", |value| value == total)?;
    proxy.wait_stat("cluster.c0.upstream_cx_active", |value| value == 0)?;
    Ok(())
}
