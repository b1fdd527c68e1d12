//! A worker: one thread with its own runtime, listening sockets, connections, buffers and stats shard.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use socket2::Socket;
use tokio::sync::{Notify, mpsc, oneshot};

use crate::access_log;
use crate::cluster::WorkerBalancers;
use crate::cluster::endpoint::Host;
use crate::cluster::removal::Loss;
use crate::connection::{self, Accepted, Arrived};
use crate::drain::Connections;
use crate::intercept::{Capture, OwnSockets};
use crate::listener::balance::Balance;
use crate::listener::{ChainId, Listener};
use crate::pump;
use crate::snapshot::{Publisher, Snapshot, WorkerView};
use crate::stats::{self, Gauge, Stats};
use crate::sys::netns;
use crate::sys::socket;
use crate::uring::{self, Engine, Source, StartError, spawn, time};

/// How long a worker that ran out of file descriptors waits before it accepts again. Long enough for some
/// connection to end, short enough to go unnoticed.
const OUT_OF_DESCRIPTORS_PAUSE: Duration = Duration::from_millis(50);

/// How long connections of a pod that is gone may take to deliver what they hold.
const GONE_GRACE: Duration = Duration::from_secs(5);

/// What every worker shares. Nothing in it is locked.
#[derive(Debug)]
pub struct Shared {
    /// Where snapshots come from.
    pub publisher: Publisher,
    /// The process's stats.
    pub stats: Arc<Stats>,
    /// How own upstream sockets are kept from being captured; set before anything is.
    pub own_sockets: OnceLock<OwnSockets>,
    /// Captured connections that nobody serves, each reset: the capture port is not an open relay.
    pub not_served: AtomicU64,
    /// Access logs are flushed so often.
    pub log_flush_interval: Duration,
    /// How bytes are moved.
    pub pump_mode: pump::Mode,
    /// How long workers look for the next message before they sleep ([`uring::set_busy_poll`]).
    pub busy_poll: Duration,
    /// Connections by worker, of listeners that hand them on and have `exact_balance`.
    pub handed_on: Arc<Balance>,
    /// Every worker, for connections that another one accepts; set once all run. One that is alone has no use for it.
    pub workers: OnceLock<Box<[Sender]>>,
    pub(crate) connection_ids: AtomicU64,
    pub(crate) upstream_connection_ids: AtomicU64,
}

impl Shared {
    /// Puts together what workers share.
    pub fn new(
        publisher: Publisher,
        stats: Arc<Stats>,
        log_flush_interval: Duration,
        pump_mode: pump::Mode,
        busy_poll: Duration,
    ) -> Self {
        Self {
            publisher,
            handed_on: Arc::new(Balance::new(stats.workers())),
            workers: OnceLock::new(),
            stats,
            own_sockets: OnceLock::new(),
            not_served: AtomicU64::new(0),
            log_flush_interval,
            pump_mode,
            busy_poll,
            connection_ids: AtomicU64::new(1),
            upstream_connection_ids: AtomicU64::new(1),
        }
    }
}

/// Names a listening socket of a worker, so that it can be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SocketId {
    /// A socket of a bound listener; numbered by the main thread.
    Bound(u64),
    /// The capture socket of the pod whose network namespace has this cookie.
    Pod(u64),
}

/// What a listening socket is for.
#[derive(Clone, Debug)]
pub enum Role {
    /// It serves the listener with this name.
    Bound(Arc<str>),
    /// It receives what was captured in a pod.
    Capture(Arc<Capture>),
}

/// What the main thread tells a worker.
#[derive(Debug)]
pub enum Command {
    /// Accept on this socket from now on.
    Listen(SocketId, Socket, Role),
    /// Serve a connection that another worker has accepted.
    Serve(Box<Arrived>),
    /// Take what is in this socket's accept queue, then close it.
    Close(SocketId),
    /// The same for every socket.
    CloseAll,
    /// Bring the stats that count bytes up to date, then answer.
    FlushStats(oneshot::Sender<()>),
    /// Answer when no connection is open.
    Drained(oneshot::Sender<()>),
    /// End every open connection now.
    Kill,
    /// End the connections of these filter chains now.
    EndChains(Arc<HashSet<ChainId>>),
    /// End the connections to these endpoints now.
    EndHosts(Arc<[Arc<Host>]>, Loss),
    /// Clusters are gone: forget the balancers of those that the snapshot doesn't have.
    ForgetClusters,
    /// A pod is gone: close its sockets now, and end its connections soon, which keep its network alive.
    Gone(Arc<Capture>),
    /// Flush the access logs and end the thread.
    Exit,
}

/// The main thread's end of a worker.
#[derive(Debug)]
pub struct Handle {
    commands: mpsc::UnboundedSender<Command>,
    thread: JoinHandle<Result<(), StartError>>,
}

/// Tells a worker something, from any thread.
#[derive(Clone, Debug)]
pub struct Sender(mpsc::UnboundedSender<Command>);

impl Sender {
    /// Tells the worker something. A worker that has ended doesn't hear it.
    pub fn send(&self, command: Command) {
        let _ = self.0.send(command);
    }

    /// Has the stats that count bytes brought up to date. The result tells when they are.
    pub fn flush_stats(&self) -> oneshot::Receiver<()> {
        let (done, flushed) = oneshot::channel();
        self.send(Command::FlushStats(done));
        flushed
    }

    /// Sends a command that is answered, and waits for that. A worker that has ended counts as an answer.
    pub async fn ask(&self, command: impl FnOnce(oneshot::Sender<()>) -> Command) {
        let (done, answer) = oneshot::channel();
        self.send(command(done));
        let _ = answer.await;
    }
}

impl Handle {
    /// Starts a worker. It accepts nothing until it is told to listen.
    pub fn spawn(index: usize, engine: Engine, shared: Arc<Shared>) -> io::Result<Self> {
        let (commands, receiver) = mpsc::unbounded_channel();
        let thread = std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
            stats::set_shard(index);
            uring::start(engine, async move {
                uring::set_busy_poll(shared.busy_poll);
                // Workers may have all CPUs; then clients and servers run where one of them lets them. One that is alone would
                // only do in its own time what is otherwise done in its peers': `docs/performance.md`.
                uring::offer_cpu_always(shared.stats.workers() > 1);
                Worker::new(index, shared).run(receiver).await;
            })
        })?;
        Ok(Self { commands, thread })
    }

    /// For whoever has to tell this worker something.
    pub fn sender(&self) -> Sender {
        Sender(self.commands.clone())
    }

    /// Tells the worker something. A worker that has ended doesn't hear it.
    pub fn send(&self, command: Command) {
        let _ = self.commands.send(command);
    }

    /// Completes when the worker has no open connection.
    pub async fn drained(&self) {
        self.sender().ask(Command::Drained).await;
    }

    /// Ends the worker and waits for its thread.
    pub fn join(self) -> anyhow::Result<()> {
        self.send(Command::Exit);
        match self.thread.join() {
            Ok(result) => Ok(result?),
            Err(_) => anyhow::bail!("a worker panicked; its message is in the log"),
        }
    }
}

/// The worker itself, shared by the tasks on its thread.
#[derive(Debug)]
pub struct Worker {
    /// 0-based.
    pub index: usize,
    /// What all workers share.
    pub shared: Arc<Shared>,
    /// Balancer state of each cluster.
    pub balancers: RefCell<WorkerBalancers>,
    /// Scratch buffer and pipes.
    pub pump: Rc<pump::Resources>,
    /// Open connections.
    pub connections: Rc<Connections>,
    view: RefCell<WorkerView>,
    seen_pipes: SeenPipes,
    listening: RefCell<HashMap<SocketId, Rc<Listening>>>,
}

/// What this worker has told the stats of its pipes.
#[derive(Debug, Default)]
struct SeenPipes {
    in_use: Cell<u64>,
    pooled: Cell<u64>,
    created: Cell<u64>,
    refused: Cell<u64>,
}

/// Moves this worker's share of a gauge to where it is now.
fn set(gauge: Gauge<'_>, now: u64, seen: &Cell<u64>) {
    let before = seen.replace(now);
    if now >= before { gauge.add(now - before) } else { gauge.sub(before - now) }
}

/// A listening socket of this worker.
#[derive(Debug)]
struct Listening {
    socket: Socket,
    role: Role,
    close: Notify,
}

impl Worker {
    fn new(index: usize, shared: Arc<Shared>) -> Rc<Self> {
        let view = shared.publisher.view();
        let pump = Rc::new(pump::Resources::default());
        let connections = Connections::new(Arc::clone(&shared.handed_on), index);
        Rc::new(Self {
            index,
            shared,
            balancers: RefCell::default(),
            pump,
            connections: Rc::new(connections),
            view: RefCell::new(view),
            seen_pipes: SeenPipes::default(),
            listening: RefCell::default(),
        })
    }

    /// The snapshot in force.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(self.view.borrow_mut().snapshot())
    }

    /// The next `%CONNECTION_ID%`.
    pub fn next_connection_id(&self) -> u64 {
        self.shared.connection_ids.fetch_add(1, Ordering::Relaxed)
    }

    /// The next `%UPSTREAM_CONNECTION_ID%`.
    pub fn next_upstream_connection_id(&self) -> u64 {
        self.shared.upstream_connection_ids.fetch_add(1, Ordering::Relaxed)
    }

    async fn run(self: Rc<Self>, mut commands: mpsc::UnboundedReceiver<Command>) {
        // The flush interval is never zero: the command line refuses it.
        let mut flush = time::interval(self.shared.log_flush_interval);
        loop {
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::Exit) | None => break,
                    Some(command) => self.obey(command),
                },
                () = flush.tick() => access_log::flush_worker(),
            }
        }
        access_log::flush_worker();
    }

    /// Pipes are counted when somebody looks, not when one is taken.
    fn observe_pipes(&self) {
        let stats = self.shared.stats.pump();
        let (all, spare) = (self.pump.pipes() as u64, self.pump.spare_pipes() as u64);
        let refused = self.pump.refused_pipes();
        set(stats.pipes_in_use(), all - spare, &self.seen_pipes.in_use);
        set(stats.pipes_pooled(), spare, &self.seen_pipes.pooled);
        let created = self.pump.created_pipes();
        stats.pipes_created().add(created - self.seen_pipes.created.replace(created));
        stats.pipe_budget_exhausted().add(refused - self.seen_pipes.refused.replace(refused));
    }

    fn obey(self: &Rc<Self>, command: Command) {
        match command {
            Command::Listen(id, socket, role) => {
                let listening = Rc::new(Listening { socket, role, close: Notify::new() });
                self.listening.borrow_mut().insert(id, Rc::clone(&listening));
                spawn(accept(Rc::clone(self), listening));
            }
            Command::Serve(arrived) => spawn(connection::serve(Rc::clone(self), *arrived)),
            Command::Close(id) => self.close(id),
            Command::CloseAll => {
                let all: Vec<_> = self.listening.borrow().keys().copied().collect();
                for id in all {
                    self.close(id);
                }
            }
            Command::FlushStats(done) => {
                self.connections.flush_meters();
                self.observe_pipes();
                let _ = done.send(());
            }
            Command::Drained(done) => {
                let connections = Rc::clone(&self.connections);
                spawn(async move {
                    connections.drained().await;
                    let _ = done.send(());
                });
            }
            Command::Kill => self.connections.kill_all(),
            Command::EndChains(chains) => self.connections.kill_chains(&chains),
            Command::EndHosts(hosts, loss) => self.connections.end_hosts(&hosts, loss),
            Command::ForgetClusters => {
                let snapshot = self.snapshot();
                let known: HashSet<_> = snapshot.clusters().map(|cluster| cluster.id()).collect();
                self.balancers.borrow_mut().retain(|id| known.contains(&id));
            }
            Command::Gone(capture) => self.gone(capture),
            Command::Exit => {}
        }
    }

    /// Takes what is queued on a listening socket, then closes it: the kernel resets what is queued on one that
    /// closes.
    fn close(self: &Rc<Self>, id: SocketId) {
        let Some(listening) = self.listening.borrow_mut().remove(&id) else { return };
        if let Err(error) = accept_some(self, &listening, u32::MAX) {
            tracing::warn!(%error, role = ?listening.role, "accept failed while closing; what is queued is reset");
        }
        listening.close.notify_one();
    }

    fn gone(self: &Rc<Self>, capture: Arc<Capture>) {
        self.close(SocketId::Pod(capture.pod.netns().cookie()));
        let worker = Rc::clone(self);
        spawn(async move {
            let namespace = capture.pod.netns();
            if let Err(error) = netns::leave(namespace) {
                tracing::warn!(%error, pod = %capture.pod, "can't leave the namespace of a pod that is gone");
            }
            time::sleep(GONE_GRACE).await;
            worker.connections.kill(namespace.cookie());
            if let Err(error) = netns::leave(namespace) {
                tracing::warn!(%error, pod = %capture.pod, "can't leave the namespace of a pod that is gone");
            }
        });
    }
}

/// Accepts on one listening socket until it is closed.
async fn accept(worker: Rc<Worker>, listening: Rc<Listening>) {
    let mut source = Source::new(&listening.socket);
    loop {
        tokio::select! {
            biased;
            () = listening.close.notified() => return,
            ready = poll_fn(|cx| source.poll_readable(cx)) => if let Err(error) = ready {
                tracing::error!(%error, role = ?listening.role, "can't wait for connections; the socket is closed");
                return;
            }
        }
        if let Err(error) = accept_some(&worker, &listening, batch(&worker, &listening)) {
            tracing::warn!(%error, role = ?listening.role, "accept failed; trying again shortly");
            time::sleep(OUT_OF_DESCRIPTORS_PAUSE).await;
        }
    }
}

/// How many connections to take per wakeup.
fn batch(worker: &Worker, listening: &Listening) -> u32 {
    let snapshot = worker.snapshot();
    let listener = listening.role.listener(&snapshot);
    listener
        .and_then(|listener| listener.config.max_connections_to_accept_per_socket_event)
        .unwrap_or(u32::MAX)
}

impl Role {
    /// The listener that this socket belongs to, in a snapshot.
    fn listener<'s>(&self, snapshot: &'s Snapshot) -> Option<&'s Arc<Listener>> {
        match self {
            Self::Bound(name) => snapshot.listener(name),
            Self::Capture(_) => snapshot.capture(),
        }
    }

    fn capture(&self) -> Option<&Arc<Capture>> {
        match self {
            Self::Bound(_) => None,
            Self::Capture(capture) => Some(capture),
        }
    }
}

/// Takes connections until the queue is empty, but no more than `most`.
fn accept_some(worker: &Rc<Worker>, listening: &Listening, most: u32) -> io::Result<()> {
    let mut taken = 0;
    let result = loop {
        if taken == most {
            break Ok(());
        }
        match socket::accept(&listening.socket) {
            Ok((socket, peer)) => {
                taken += 1;
                begin(worker, listening, socket, peer);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break Ok(()),
            // The peer gave up while it waited; the next in the queue may be fine.
            Err(error) if socket::is_transient_accept_error(&error) => {}
            Err(error) => break Err(error),
        }
    };
    if taken > 0
        && let Some(listener) = listening.role.listener(&worker.snapshot())
    {
        listener.stats.connections_accepted_per_socket_event().record(u64::from(taken));
    }
    result
}

fn begin(worker: &Rc<Worker>, listening: &Listening, socket: Socket, peer: SocketAddr) {
    let snapshot = worker.snapshot();
    let listener = listening.role.listener(&snapshot).cloned();
    if listener.is_none() && listening.role.capture().is_none() {
        return; // its listener is gone, the socket about to be closed
    }
    let capture = listening.role.capture().cloned();
    let accepted = Accepted { socket, peer, listener, capture, snapshot };
    let Some(mut arrived) = Arrived::look(worker, accepted) else { return };
    let chosen = arrived.choose_worker(worker);
    if chosen == worker.index {
        spawn(connection::serve(Rc::clone(worker), arrived));
    } else if let Some(other) = worker.shared.workers.get().and_then(|workers| workers.get(chosen)) {
        other.send(Command::Serve(Box::new(arrived)));
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use nix::sys::resource::{Resource, getrlimit, setrlimit};

    use super::*;
    use crate::access_log::{FlushSettings, Registry};
    use crate::cluster::Cluster;
    use crate::config::{self, Sources};
    use crate::sys::counting;

    /// A worker with one listener, which proxies to `upstream`, and the listener's address.
    fn worker(upstream: SocketAddr) -> (Rc<Worker>, SocketAddr) {
        let yaml = format!(
            "static_resources:
               listeners:
               - name: l
                 address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
                 filter_chains:
                 - filters:
                   - name: envoy.filters.network.tcp_proxy
                     typed_config:
                       '@type': type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
                       stat_prefix: t
                       cluster: c
               clusters:
               - name: c
                 type: STATIC
                 circuit_breakers: {{thresholds: [{{max_connections: 10000}}]}}
                 load_assignment:
                   cluster_name: c
                   endpoints:
                   - lb_endpoints:
                     - endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {}}}}}}}",
            upstream.port()
        );
        let source = config::proto::Source::yaml("worker.yaml", yaml);
        let sources = Sources { config_path: Some(source), config_yaml: None };
        let bootstrap = config::load(&sources, &config::static_options()).unwrap().bootstrap;
        let stats = Stats::new(1);
        let logs = Registry::start(&stats, FlushSettings::default()).unwrap();
        let listener = Arc::new(Listener::build(&bootstrap.listeners[0], &stats, &logs, None).unwrap());
        let cluster = Cluster::build(Arc::clone(&bootstrap.clusters[0]), &stats, None);
        let socket = crate::bound::bind(&listener.config, 1).unwrap().remove(0).remove(0);
        let address = socket.local_addr().unwrap().as_socket().unwrap();
        let name = Arc::clone(&listener.config.name);
        let publisher = Publisher::new(Snapshot::build(vec![listener], vec![cluster]));
        let shared =
            Shared::new(publisher, stats, Duration::from_secs(10), pump::Mode::Adaptive, Duration::ZERO);
        let worker = Worker::new(0, Arc::new(shared));
        worker.obey(Command::Listen(SocketId::Bound(0), socket, Role::Bound(name)));
        (worker, address)
    }

    /// What the allocator was asked for. Resident memory is that, 16 bytes for each of two pieces, and what connections
    /// share. Raise it with a reason only.
    #[test]
    fn an_idle_connection_takes_little_memory() {
        // Whole pages of what is kept in pages.
        const CONNECTIONS: usize = 512;
        // Four files each; often 1024 are allowed until somebody asks for more.
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
        let upstream = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = upstream.local_addr().unwrap();
        let (go, mut gone) = mpsc::unbounded_channel();
        let (tell, told) = std::sync::mpsc::channel();
        let client = std::thread::spawn(move || {
            let to: SocketAddr = told.recv().unwrap();
            let mut open = Vec::new();
            for count in [128, CONNECTIONS] {
                for _ in 0..count {
                    let mut client = TcpStream::connect(to).unwrap();
                    client.write_all(b"ping").unwrap();
                    let mut server = upstream.accept().unwrap().0;
                    let mut message = [0; 4];
                    server.read_exact(&mut message).unwrap();
                    server.write_all(&message).unwrap();
                    client.read_exact(&mut message).unwrap();
                    open.push((client, server));
                }
                go.send(()).unwrap();
            }
            let _ = told.recv(); // until it was measured
        });
        let taken = uring::start(Engine::IoUring, async {
            let (worker, address) = worker(address);
            tell.send(address).unwrap();
            gone.recv().await.unwrap();
            let before = counting::live();
            gone.recv().await.unwrap();
            let taken = counting::live() - before;
            assert_eq!(worker.connections.len(), 128 + CONNECTIONS);
            taken
        })
        .unwrap();
        drop(tell);
        client.join().unwrap();
        let each = taken as usize / CONNECTIONS;
        assert!(each <= 940, "{each} bytes of heap per idle connection");
    }
}
