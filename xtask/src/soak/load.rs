//! One round of load: everything that connections, control planes, operators and pods do, at once.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread::{ScopedJoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use socket2::SockRef;
use std::sync::atomic::Ordering;
use tidegate_tests::dialogue::{Dialogue, Meeting, Side, play};
use tidegate_tests::load::Direction;
use tidegate_tests::load::agent::Agent;
use tidegate_tests::load::job::{Job, Work};
use tidegate_tests::load::server::Process;
use tidegate_tests::script::GUARD;

use super::world::{BULK, ECHO, EMPTY, NOBODY, REFUSED, SCRIPTS, SCRIPTS_SERVER, World};

/// What was done: how often, by kind.
type Done = BTreeMap<&'static str, u64>;

/// Connections of all kinds, in [`Done`].
pub(super) const CONNECTIONS: &str = "connections";

/// Connections that are quiet while the others work.
const IDLE: usize = 200;

/// Connections at once whose client does not read.
const STALLED: usize = 20;

/// What the generators do in turn, beside the short connections of the first.
const WORK: [[Work; 2]; 3] = [
    [Work::Requests { size: 64, connections: 32 }, Work::Bulk { streams: 4, direction: Direction::Down }],
    [
        Work::Requests { size: 16 << 10, connections: 16 },
        Work::Bulk { streams: 4, direction: Direction::Both },
    ],
    [Work::Mixed { streams: 2, connections: 8 }, Work::Bulk { streams: 2, direction: Direction::Up }],
];

/// Runs all of it for so long. Afterwards no connection of its making is left.
pub(super) fn round(world: &mut World, length: Duration) -> Result<Done> {
    let mut agents = std::mem::take(&mut world.agents);
    let outcome = all(world, &mut agents, length);
    world.agents = agents;
    outcome
}

fn all(world: &World, agents: &mut [Agent], length: Duration) -> Result<Done> {
    let until = Instant::now() + length;
    let turn = world.seed.load(Ordering::Relaxed) as usize % WORK.len();
    let works = [Work::Short { at_once: 8 }, WORK[turn][0], WORK[turn][1]];
    let [workers @ .., idle] = agents else { bail!("no load generator") };
    idle.hold(World::address(ECHO)?, IDLE).context("idle connections")?;
    let mut done = Done::from([("idle", IDLE as u64), (CONNECTIONS, IDLE as u64)]);
    let outcome = std::thread::scope(|scope| {
        let mut threads: Vec<ScopedJoinHandle<'_, Result<Done>>> = Vec::new();
        for (agent, work) in workers.iter_mut().zip(works) {
            threads.push(scope.spawn(move || generate(agent, &world.servers, work, length)));
        }
        threads
            .push(scope.spawn(|| mischief(world, until).context("resets, stalled readers, half-open ones")));
        threads.push(scope.spawn(|| scripts(world, until).context("random scripts")));
        threads.push(scope.spawn(|| operators(world, until).context("updates and the admin server")));
        threads.push(scope.spawn(|| pods(world, until).context("pods that come and go")));
        for thread in threads {
            let Ok(part) = thread.join() else { bail!("a thread of the load panicked") };
            for (kind, count) in part? {
                *done.entry(kind).or_default() += count;
            }
        }
        Ok(())
    });
    idle.release()?;
    outcome.map(|()| done)
}

fn generate(agent: &mut Agent, servers: &Process, work: Work, length: Duration) -> Result<Done> {
    let job = Job {
        work,
        echo: World::address(ECHO)?,
        bulk: World::address(BULK)?,
        warm_up: Duration::ZERO,
        measure: length,
        proxy: Vec::new(),
        server: servers.pid(),
        control: servers.control().to_owned(),
    };
    let measured = agent.run(&job).with_context(|| format!("{work:?}"))?;
    let connections = match work {
        Work::Short { .. } => measured.requests,
        Work::Bulk { streams, .. } => streams as u64,
        Work::Requests { connections, .. } => connections as u64,
        Work::Mixed { streams, connections } => (streams + connections) as u64,
    };
    Ok(Done::from([
        ("requests", measured.requests),
        ("bulk MiB", measured.bytes >> 20),
        (CONNECTIONS, connections),
    ]))
}

/// A connection from the client pod.
fn connect(world: &World, to: &str) -> Result<TcpStream> {
    let stream = world.client.connect(to).with_context(|| format!("connect to {to}"))?;
    stream.set_read_timeout(Some(GUARD))?;
    stream.set_write_timeout(Some(GUARD))?;
    Ok(stream)
}

fn reset(stream: &TcpStream) -> Result<()> {
    Ok(SockRef::from(stream).set_linger(Some(Duration::ZERO))?)
}

/// What clients do that behave badly, or are unlucky.
fn mischief(world: &World, until: Instant) -> Result<Done> {
    let mut stalled = Vec::new();
    let mut half_open = Vec::new();
    let mut rounds = 0;
    while Instant::now() < until {
        if stalled.len() < STALLED {
            let mut stream = connect(world, BULK)?;
            stream.write_all(b"d")?;
            stalled.push(stream);
        }
        let mut resetting = connect(world, ECHO)?;
        resetting.write_all(&vec![7; 100_000])?;
        if rounds % 2 == 0 {
            resetting.read_exact(&mut [0; 1000])?;
        }
        reset(&resetting)?;
        if half_open.len() < STALLED {
            let mut stream = connect(world, ECHO)?;
            stream.write_all(b"last words")?;
            stream.shutdown(Shutdown::Write)?;
            half_open.push(stream);
        }
        for to in [REFUSED, EMPTY] {
            let mut stream = connect(world, to)?;
            let outcome = stream.read(&mut [0]);
            ensure!(!matches!(outcome, Ok(1..)), "{to} has no endpoint that would say anything");
        }
        ensure!(world.client.connect(NOBODY).is_err(), "nobody listens at {NOBODY}");
        rounds += 1;
        sleep(Duration::from_millis(5));
    }
    for (index, stream) in stalled.iter().enumerate().filter(|(index, _)| index % 2 == 0) {
        reset(stream).with_context(|| format!("stalled connection {index}"))?;
    }
    let connections = 3 * rounds + (stalled.len() + half_open.len()) as u64;
    Ok(Done::from([("resets", rounds), ("stalled", stalled.len() as u64), (CONNECTIONS, connections)]))
}

/// Random scripts of both ends, which must see what is certain.
fn scripts(world: &World, until: Instant) -> Result<Done> {
    let listener = world.server.netns().enter(|| TcpListener::bind(SCRIPTS_SERVER))??;
    let mut played = 0;
    while Instant::now() < until {
        let dialogue = Dialogue::random(world.seed.fetch_add(1, Ordering::Relaxed));
        let client = connect(world, SCRIPTS)?;
        let (server, _) = listener.accept()?;
        for (peer, stream) in dialogue.peers.iter().zip([&client, &server]) {
            peer.prepare(&SockRef::from(stream))?;
        }
        let meeting = Meeting::default();
        let seen = std::thread::scope(|scope| {
            let client = scope.spawn(|| play(client, &dialogue, Side::Client, &meeting));
            let server = play(server, &dialogue, Side::Server, &meeting);
            [client.join().unwrap_or_default(), server]
        });
        for (side, seen) in Side::BOTH.into_iter().zip(&seen) {
            if let Some(wrong) = dialogue.judge(side, seen) {
                bail!("{dialogue}: {wrong}");
            }
        }
        played += 1;
    }
    Ok(Done::from([("scripts", played), (CONNECTIONS, played)]))
}

/// A control plane that keeps changing its mind, and somebody who looks at everything.
fn operators(world: &World, until: Instant) -> Result<Done> {
    let admin = world.proxy.admin();
    let mut updates = 0;
    while Instant::now() < until {
        world.update()?;
        updates += 1;
        for path in
            ["/stats", "/stats/prometheus", "/config_dump", "/clusters", "/listeners", "/ready", "/nothing"]
        {
            let status = admin.read(path)?.status;
            ensure!(status == if path == "/nothing" { 404 } else { 200 }, "{path} says {status}");
        }
        sleep(Duration::from_millis(50));
    }
    Ok(Done::from([("updates", updates)]))
}

/// Pods that live for a moment, and leave with a connection open.
fn pods(world: &World, until: Instant) -> Result<Done> {
    let mut pods = 0;
    while Instant::now() < until {
        // The kernel takes a moment to remove what the last ones had: no address comes back soon.
        let number = world.pods.fetch_add(1, Ordering::Relaxed);
        let pod = world.node.pod("goes", &[&format!("10.10.{}.{}", number / 250 % 250, number % 250)])?;
        let echoed = captured(world, &pod)?;
        drop(pod);
        drop(echoed);
        pods += 1;
    }
    Ok(Done::from([("pods", pods), (CONNECTIONS, pods)]))
}

/// A connection of a new pod, which is captured as soon as the agent knows the pod.
fn captured(world: &World, pod: &tidegate_tests::pod::Pod) -> Result<TcpStream> {
    let deadline = Instant::now() + GUARD;
    loop {
        let outcome = pod.connect(ECHO);
        match outcome {
            Ok(mut stream) => {
                stream.set_read_timeout(Some(GUARD))?;
                stream.write_all(b"hello")?;
                let mut echo = [0; 5];
                stream.read_exact(&mut echo)?;
                ensure!(&echo == b"hello", "the echo says {echo:?}");
                return Ok(stream);
            }
            Err(error) => ensure!(
                Instant::now() < deadline,
                "a new pod is not captured: {error}\n{}",
                world.proxy.log_tail()
            ),
        }
        sleep(Duration::from_millis(10));
    }
}
