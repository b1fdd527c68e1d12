//! Plays dialogues through one proxy.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use socket2::{Domain, SockRef, Socket, Type};
use tidegate_tests::dialogue::{Dialogue, Meeting, Seen, Side, play};
use tidegate_tests::proxy::{Engine, Setup};
use tidegate_tests::script::GUARD;

use super::super::case::{Case, Endpoint};
use super::super::observe::{self, Observation};

/// Dialogues that are played at the same time.
const PARALLEL: usize = 12;

/// One dialogue through one proxy.
#[derive(Debug, Default)]
pub(super) struct Played {
    /// What it broke of what is certain.
    pub(super) wrong: Vec<String>,
    /// What can be compared.
    pub(super) observation: Observation,
}

/// Plays all of them, each through a listener and a cluster of its own.
pub(super) fn all(engine: &Engine, args: &[&str], dialogues: &[Dialogue]) -> Result<Vec<Played>> {
    let cases: Vec<Case> = dialogues.iter().map(case).collect();
    let netns = observe::namespace()?;
    let setup = Setup::new(&observe::config(&cases)).engine(engine.clone()).concurrency(1).netns(&netns);
    let proxy = setup.args(args.iter().copied()).start()?;
    let seen = netns.enter(|| play_all(dialogues, &cases))?;
    observe::settle(&proxy)?;
    let stats = observe::stats(&proxy)?;
    let mut all = Vec::new();
    for (number, (dialogue, seen)) in dialogues.iter().zip(seen).enumerate() {
        let mut played = Played::default();
        let seen = seen.with_context(|| format!("{dialogue}"))?;
        for (side, seen) in Side::BOTH.into_iter().zip(seen) {
            played.wrong.extend(dialogue.judge(side, &seen));
            note(&mut played.observation, side, &seen);
        }
        let log = proxy.file(&cases[number].log_file(number));
        observe::note_log(&mut played.observation, &cases[number], "log", &log);
        observe::note_stats(&mut played.observation, &cases[number], number, &stats);
        // The only facts with ports of this run.
        played
            .observation
            .retain(|fact, _| !fact.ends_with(".upstream_host") && !fact.ends_with("_local_port"));
        all.push(played);
    }
    Ok(all)
}

/// Plays one of them several times.
pub(super) fn again(engine: &Engine, dialogue: &Dialogue, times: usize) -> Result<Vec<Played>> {
    all(engine, &[], &vec![dialogue.clone(); times])
}

fn case(dialogue: &Dialogue) -> Case {
    // The endpoint is not among the case's servers: the dialogue plays it.
    let fields =
        dialogue.buffer_limit.map_or(json!({}), |limit| json!({"per_connection_buffer_limit_bytes": limit}));
    Case::new("random scripts")
        .endpoint(Endpoint::Refuses, json!({}))
        .listener(fields.clone())
        .cluster(fields)
}

fn play_all(dialogues: &[Dialogue], cases: &[Case]) -> Vec<Result<[Seen; 2]>> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(dialogue) = dialogues.get(number) else { return done };
            let (host, port) = cases[number].endpoint_address(number, 0);
            done.push((number, one(dialogue, &Case::listener_address(number), &format!("{host}:{port}"))));
        }
    };
    let mut done: Vec<_> = std::thread::scope(|scope| {
        // Threads start in the namespace of the one that starts them.
        let workers: Vec<_> = (0..PARALLEL).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap_or_default()).collect()
    });
    done.sort_by_key(|(number, _)| *number);
    done.into_iter().map(|(_, seen)| seen).collect()
}

fn one(dialogue: &Dialogue, listener: &str, endpoint: &str) -> Result<[Seen; 2]> {
    let endpoint = listen(dialogue, endpoint)?;
    let client = connect(dialogue, listener)?;
    let server = accept(&endpoint)?;
    let meeting = Meeting::default();
    Ok(std::thread::scope(|scope| {
        let seen = scope.spawn(|| play(client, dialogue, Side::Client, &meeting));
        let server = play(server, dialogue, Side::Server, &meeting);
        [seen.join().unwrap_or_default(), server]
    }))
}

fn listen(dialogue: &Dialogue, address: &str) -> Result<TcpListener> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    dialogue.peers[Side::Server as usize].prepare(&SockRef::from(&socket))?;
    let address: SocketAddr = address.parse()?;
    socket.bind(&address.into()).with_context(|| format!("bind {address}"))?;
    socket.listen(1)?;
    Ok(socket.into())
}

fn connect(dialogue: &Dialogue, address: &str) -> Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    dialogue.peers[Side::Client as usize].prepare(&SockRef::from(&socket))?;
    let address: SocketAddr = address.parse()?;
    socket.connect(&address.into()).with_context(|| format!("connect to {address}"))?;
    Ok(socket.into())
}

/// The proxy connects as soon as it has accepted.
fn accept(listener: &TcpListener) -> Result<TcpStream> {
    listener.set_nonblocking(true)?;
    let started = Instant::now();
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                ensure!(started.elapsed() < GUARD, "the proxy does not connect");
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn note(observation: &mut Observation, side: Side, seen: &Seen) {
    let name = if side == Side::Client { "client" } else { "server" };
    if let Ok(serde_json::Value::Object(fields)) = serde_json::to_value(seen) {
        observation.extend(fields.into_iter().map(|(field, value)| (format!("{name}.{field}"), value)));
    }
}
