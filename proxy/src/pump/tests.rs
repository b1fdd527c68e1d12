//! Real sockets on loopback: a client, the pump between, a server. Everything runs in each mode.

mod bulk;
mod ends;
mod limits;
mod scripts;

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use socket2::Socket;

use super::*;
use crate::drain::Connections;
use crate::sys::forbid::forbid;
use crate::uring::{self, Engine};

const MODES: [Mode; 3] = [Mode::CopyOnly, Mode::SpliceOnly, Mode::Adaptive];
/// Guards against hanging; no test is meant to come near it.
const LONG: Duration = Duration::from_mins(1);

/// How a pump is run.
#[derive(Clone)]
struct Spec {
    mode: Mode,
    engine: Engine,
    idle_timeout: Option<Duration>,
    max_duration: Option<Duration>,
    buffer_limit: u32,
    kill_after: Option<Duration>,
    pipes: PipeBudget,
    /// splice(2) fails with this errno; with a side, only when it is into that side's socket.
    forbid_splice: Option<(i32, Option<Side>)>,
    /// SO_SNDBUF of the pump's sockets, so that a stalled peer is noticed early.
    send_buffer: Option<usize>,
}

impl Spec {
    fn new(mode: Mode) -> Self {
        Self {
            mode,
            engine: Engine::IoUring,
            idle_timeout: None,
            max_duration: None,
            buffer_limit: 0,
            kill_after: None,
            pipes: PipeBudget::default(),
            forbid_splice: None,
            send_buffer: None,
        }
    }

    /// Each mode, and the other engines once.
    fn all() -> Vec<Self> {
        let mut all: Vec<_> = MODES.into_iter().map(Self::new).collect();
        for engine in [Engine::TokioUring, Engine::Epoll] {
            all.push(Self { engine, ..Self::new(Mode::Adaptive) });
        }
        all
    }

    fn name(&self) -> String {
        format!("{:?} on {}", self.mode, self.engine)
    }

    fn start(self) -> Rig {
        let (client, downstream) = pair();
        let (server, upstream) = pair();
        let buffered = Arc::new(AtomicU64::new(0));
        let watched = Arc::clone(&buffered);
        let pump = std::thread::spawn(move || serve(&self, downstream, upstream, &watched));
        Rig { client, server, pump, buffered }
    }
}

/// A pump between two peers that block.
struct Rig {
    client: TcpStream,
    server: TcpStream,
    pump: JoinHandle<Report>,
    /// The most that was held at once.
    buffered: Arc<AtomicU64>,
}

/// What a pump did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Report {
    outcome: Outcome,
    down: Moved,
    up: Moved,
    copied: u64,
    spliced: u64,
    flushed: Option<Side>,
    pipes: usize,
    spare_pipes: usize,
    refused_pipes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Moved {
    received: u64,
    sent: u64,
    discarded: u64,
    paused: u32,
    resumed: u32,
    to_splice: u32,
    to_copy: u32,
}

impl Moved {
    fn of(direction: &counters::Direction) -> Self {
        let events = |count: fn(&counters::Events) -> u32| direction.events().map_or(0, count);
        Self {
            received: direction.received.get(),
            sent: direction.sent.get(),
            discarded: direction.discarded(),
            paused: events(|events| events.paused.get()),
            resumed: events(|events| events.resumed.get()),
            to_splice: events(|events| events.to_splice.get()),
            to_copy: events(|events| events.to_copy.get()),
        }
    }
}

/// A blocking peer, and its nonblocking other end.
fn pair() -> (TcpStream, Socket) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    peer.set_read_timeout(Some(LONG)).unwrap();
    peer.set_write_timeout(Some(LONG)).unwrap();
    peer.set_nodelay(true).unwrap();
    let ours: Socket = listener.accept().unwrap().0.into();
    ours.set_nonblocking(true).unwrap();
    ours.set_tcp_nodelay(true).unwrap();
    (peer, ours)
}

fn serve(spec: &Spec, downstream: Socket, upstream: Socket, buffered: &Arc<AtomicU64>) -> Report {
    if let Some(bytes) = spec.send_buffer {
        downstream.set_send_buffer_size(bytes).unwrap();
        upstream.set_send_buffer_size(bytes).unwrap();
    }
    if let Some((errno, into)) = spec.forbid_splice {
        let into = into.map(|side| match side {
            Side::Downstream => downstream.as_raw_fd(),
            Side::Upstream => upstream.as_raw_fd(),
        });
        forbid(libc::SYS_splice, errno, into);
    }
    let future = async {
        let resources = Resources::new(spec.pipes);
        let counters = Rc::new(Counters::default());
        let connections = Rc::new(Connections::default());
        let open = connections.open(0);
        let watched = Rc::clone(&counters);
        let most = Arc::clone(buffered);
        uring::spawn(async move {
            loop {
                let held = watched.downstream.buffered().max(watched.upstream.buffered());
                most.fetch_max(held, Ordering::Relaxed);
                time::sleep(Duration::from_millis(1)).await;
            }
        });
        if let Some(after) = spec.kill_after {
            let connections = Rc::clone(&connections);
            uring::spawn(async move {
                time::sleep(after).await;
                connections.kill_all();
            });
        }
        let options = Options {
            mode: spec.mode,
            idle_timeout: spec.idle_timeout,
            deadline: spec.max_duration.map(|after| Instant::now() + after),
            downstream_buffer_limit: spec.buffer_limit,
            upstream_buffer_limit: spec.buffer_limit,
            killed: Some(&open),
        };
        let outcome = run(&resources, [&downstream, &upstream], None, &options, &counters).await;
        drop((downstream, upstream));
        report(outcome, &counters, &resources)
    };
    uring::start(spec.engine, future).unwrap()
}

fn report(outcome: Outcome, counters: &Counters, resources: &Resources) -> Report {
    let report = Report {
        outcome,
        down: Moved::of(&counters.downstream),
        up: Moved::of(&counters.upstream),
        copied: counters.copied.get(),
        spliced: counters.spliced.get(),
        flushed: counters.flushed.get(),
        pipes: resources.pipes(),
        spare_pipes: resources.spare_pipes(),
        refused_pipes: resources.refused_pipes(),
    };
    for moved in [report.down, report.up] {
        assert_eq!(moved.received, moved.sent + moved.discarded, "{report:?}");
    }
    assert_eq!(report.copied + report.spliced, report.down.sent + report.up.sent, "{report:?}");
    assert_eq!(report.pipes, report.spare_pipes, "no pipe is left in use");
    report
}

impl Rig {
    fn finish(self) -> Report {
        drop((self.client, self.server));
        join(self.pump)
    }
}

fn join<T>(thread: JoinHandle<T>) -> T {
    let started = Instant::now();
    while !thread.is_finished() {
        assert!(started.elapsed() < LONG, "hangs");
        std::thread::sleep(Duration::from_millis(1));
    }
    thread.join().unwrap()
}

/// Closes with a RST.
fn abort(stream: TcpStream) {
    let socket = Socket::from(stream);
    socket.set_linger(Some(Duration::ZERO)).unwrap();
}

/// Reads to the end, which is a FIN or an error.
fn read_all(stream: &mut TcpStream) -> (Vec<u8>, io::Result<()>) {
    let mut bytes = Vec::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return (bytes, Ok(())),
            Ok(n) => bytes.extend_from_slice(&buffer[..n]),
            Err(e) => return (bytes, Err(e)),
        }
    }
}

fn assert_reset(stream: &mut TcpStream, name: &str) {
    let (_, end) = read_all(stream);
    assert_eq!(end.expect_err(name).kind(), io::ErrorKind::ConnectionReset, "{name}");
}

fn assert_fin(stream: &mut TcpStream, name: &str) {
    let (_, end) = read_all(stream);
    assert!(end.is_ok(), "{name}: {end:?}");
}

/// Bytes that show when one is missing, doubled or moved.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; len];
    rng.fill(&mut bytes);
    bytes
}

fn finished(first: Side) -> Outcome {
    Outcome { cause: Cause::Finished { first }, downstream: CloseType::Normal, upstream: CloseType::Normal }
}
