//! Wiring: from the command line to a running proxy and back to nothing.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::Socket;
use tokio::sync::mpsc;

use crate::access_log::{self, FlushSettings};
use crate::args::{Args, Command, Mode, ServeArgs};
use crate::cluster::health_check::MarkOwn;
use crate::config::bootstrap::{Bootstrap, Node};
use crate::config::{self, Loaded, Sources};
use crate::intercept::Interception;
use crate::log::Log;
use crate::signal::{Request, Signals};
use crate::snapshot::{Publisher, Snapshot};
use crate::stats::Stats;
use crate::sys;
use crate::takeover::{self, StatePaths};
use crate::uring::{self, Engine};
use crate::worker::{self, Handle, Shared, SocketId};
use crate::xds::cache::Cache;
use crate::xds::client;
use crate::xds::client::upstream::Upstream;
use crate::xds::store::{Bound, Parts, Phase, Store, UnknownFields};
use crate::xds::tables::Tables;
use crate::{check, cleanup};

mod admin_state;
mod announce;
mod changes;
mod config_dump;
mod interception;
mod kernel_path;
mod look;

use admin_state::{Answer, Running, ServerState};
use look::Looks;

/// How long connections that were told to end may take to do so, before the process ends without them.
const KILL_GRACE: Duration = Duration::from_secs(2);

/// How long the end waits for access logs to reach their files.
const LOG_FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// How often `/init_dump` is brought up to date: with thousands of resources it costs more than handling one.
const UNREADY_INTERVAL: Duration = Duration::from_millis(200);

/// Runs what the command line asks for. Errors go to stderr; the exit code is 0, or 1 after an error.
pub fn run(args: Args) -> ExitCode {
    let result = match args.command {
        Some(Command::Check(state)) => return check::run(&state.into()).print(),
        Some(Command::Cleanup { state, force }) => clean_up(&state.into(), force),
        None => serve_or_validate(args.serve),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tidegate: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn clean_up(paths: &StatePaths, force: bool) -> anyhow::Result<()> {
    println!("{}", cleanup::run(paths, force)?);
    Ok(())
}

fn serve_or_validate(args: ServeArgs) -> anyhow::Result<()> {
    let log = Log::install(args.log_level, &args.component_log_level, args.log_path.as_deref())?;
    let loaded = load(&args)?;
    for warning in &loaded.warnings {
        tracing::warn!(target: "tidegate::config", "{warning}");
    }
    if args.mode == Mode::Validate {
        println!(
            "configuration '{}' OK",
            args.config_path.as_deref().unwrap_or(Path::new("--config-yaml")).display()
        );
        return Ok(());
    }
    for flag in args.inert.given() {
        tracing::warn!("{flag} has no effect here");
    }
    raise_open_files_limit();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, serve(args, loaded, log))
}

/// Reads and validates the configuration of the command line.
fn load(args: &ServeArgs) -> anyhow::Result<Loaded> {
    let config_path = match &args.config_path {
        None => None,
        Some(path) => {
            let content = std::fs::read(path)
                .with_context(|| format!("can't read --config-path {}", path.display()))?;
            Some(config::proto::Source::from_file(path.display().to_string(), content)?)
        }
    };
    let config_yaml =
        args.config_yaml.as_ref().map(|text| config::proto::Source::yaml("--config-yaml", text.as_str()));
    if config_path.is_none() && config_yaml.is_none() {
        anyhow::bail!("no configuration: give --config-path FILE, --config-yaml YAML, or both");
    }
    let mut options = config::static_options();
    if args.allow_unknown_static_fields {
        options.unknown_fields = config::proto::UnknownFields::Warn;
    }
    Ok(config::load(&Sources { config_path, config_yaml }, &options)?)
}

/// A proxied connection takes two descriptors, so the soft limit of a login shell is soon used up.
fn raise_open_files_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        if soft < hard { setrlimit(Resource::RLIMIT_NOFILE, hard, hard) } else { Ok(()) }
    });
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

/// A running proxy, seen from the main thread.
struct Proxy {
    args: ServeArgs,
    log: Log,
    node: Node,
    loaded: Loaded,
    stats: Arc<Stats>,
    logs: access_log::Registry,
    shared: Arc<Shared>,
    workers: Vec<Handle>,
    engine: Engine,
    interception: Option<Interception>,
    /// Only where it is wanted.
    kernel_path: Option<kernel_path::KernelPath>,
    store: Store,
    /// What the store has accepted and refused, for the admin server.
    tables: Tables,
    /// Which way connections to each listener take, for the admin server.
    data_paths: crate::kernel_path::Board,
    /// Listening sockets of bound listeners that workers have: worker and number.
    bound: HashMap<Arc<str>, Vec<(usize, SocketId)>>,
    /// Listening sockets that wait for the end of start-up.
    waiting: Vec<Bound>,
    /// Workers accept.
    accepting: bool,
    /// The last number of a listening socket.
    sockets: u64,
    /// Says that this process serves; none when it doesn't intercept.
    record: Option<takeover::Record>,
    /// Nothing is intercepted before a kubelet has made its cgroup.
    awaits_kubepods: bool,
    /// The configuration has a cluster that refuses.
    black_hole: bool,
}

async fn serve(args: ServeArgs, loaded: Loaded, log: Log) -> anyhow::Result<()> {
    let mut signals = Signals::install().context("can't take over signals")?;
    let init_only = args.mode == Mode::InitOnly;
    let mut proxy = Proxy::build(args, loaded, log)?;
    let state = Arc::new(Running::new(&proxy));
    let mut admin = admin_state::start(&proxy, &state).await?;
    if !proxy.warm(&state, &mut signals).await || init_only {
        return proxy.end();
    }
    proxy.accept(&state);
    proxy.intercept()?;
    // Reading the configuration took many times the memory that is left of it.
    config::proto::release_descriptors();
    sys::memory::trim();
    sys::memory::release_program();
    state.set(ServerState::Live);
    proxy.announce(admin.as_ref().map(admin_state::Serving::address));
    let stopping = proxy.run(&state, &mut signals).await;
    state.set(ServerState::Draining);
    if proxy.interception.as_ref().is_some_and(Interception::is_superseded) {
        admin = None; // the successor has the address from here on
    }
    proxy.drain(stopping, &mut signals).await;
    drop(admin);
    proxy.end()
}

/// Why the main loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stopping {
    /// Connections get their drain time.
    Drain,
    /// They don't.
    Now,
}

impl Proxy {
    /// Everything that can fail before anything is visible from outside.
    fn build(args: ServeArgs, loaded: Loaded, log: Log) -> anyhow::Result<Self> {
        let stats = Stats::new(args.workers());
        let flush = FlushSettings {
            interval: Duration::from_millis(args.file_flush_interval_msec),
            min_size: usize::try_from(args.file_flush_min_size_kb * 1024).unwrap_or(usize::MAX),
        };
        let logs = access_log::Registry::start(&stats, flush).context("can't start the access log writer")?;
        let node = node(&args, &loaded.bootstrap.node);
        let publisher = Publisher::new(Snapshot::default());
        let shared = Arc::new(Shared::new(
            publisher,
            Arc::clone(&stats),
            flush.interval,
            args.pump_mode.into(),
            Duration::from_micros(args.busy_poll_us),
        ));
        let tables = Tables::default();
        let store = store(&args, &loaded.bootstrap, &shared, &logs, &tables)?;
        let engine = engine();
        let workers = (0..args.workers())
            .map(|index| Handle::spawn(index, engine, Arc::clone(&shared)))
            .collect::<Result<Vec<_>, _>>()
            .context("can't start a worker thread")?;
        let _ = shared.workers.set(workers.iter().map(Handle::sender).collect());
        let proxy = Self {
            args,
            log,
            node,
            loaded,
            stats,
            logs,
            shared,
            workers,
            engine,
            interception: None,
            kernel_path: None,
            store,
            tables,
            data_paths: crate::kernel_path::Board::default(),
            bound: HashMap::new(),
            waiting: Vec::new(),
            accepting: false,
            sockets: 0,
            record: None,
            awaits_kubepods: false,
            black_hole: false,
        };
        proxy.count_configuration();
        Ok(proxy)
    }

    fn count_configuration(&self) {
        let count = |items: usize| items as u64;
        self.stats.runtime().load_success().set(1);
        self.stats.config().warnings().set(count(self.loaded.warnings.len()));
        self.stats.config().ignored_filters().set(count(self.loaded.ignored_filters.values().sum()));
        self.stats.server().concurrency().set(count(self.workers.len()));
    }

    fn snapshot(&self) -> Arc<Snapshot> {
        self.shared.publisher.current()
    }

    /// Waits until everything that the configuration names was looked up or fetched once, or won't come in time.
    /// False: it is time to stop instead.
    async fn warm(&mut self, state: &Running, signals: &mut Signals) -> bool {
        let changes = self.store.start(&self.loaded.bootstrap);
        self.apply(changes, state);
        let mut unready = tokio::time::interval(UNREADY_INTERVAL);
        while self.store.phase() != Phase::Done {
            tokio::select! {
                happened = self.store.next() => self.take(happened, state),
                _ = unready.tick() => state.set_unready(self.store.unready()),
                request = signals.next() => match request {
                    Request::Stop => return false,
                    Request::ReopenLogs => self.reopen_logs(),
                },
                _ = state.stop_requested() => return false,
            }
        }
        state.set_unready(Vec::new());
        true
    }

    /// Says what runs where.
    fn announce(&self, admin: Option<SocketAddr>) {
        for (listener, address) in self.store.bound_addresses() {
            tracing::info!("listening on {address} for listener '{listener}'");
        }
        self.announce_interception();
        match admin {
            Some(address) => tracing::info!("admin server: http://{address}/"),
            None => tracing::info!("no admin server: the configuration has no `admin`"),
        }
        tracing::info!(
            "serving with {} workers on {}; node id '{}', cluster '{}'",
            self.workers.len(),
            self.engine,
            self.node.id,
            self.node.cluster
        );
    }

    /// The main loop, until it is time to stop.
    async fn run(&mut self, state: &Running, signals: &mut Signals) -> Stopping {
        let mut looks = Looks::default();
        let mut asked = state.take_asked();
        loop {
            tokio::select! {
                request = signals.next() => match request {
                    Request::Stop => return Stopping::Drain,
                    Request::ReopenLogs => self.reopen_logs(),
                },
                stopping = state.stop_requested() => return stopping,
                happened = self.store.next() => {
                    self.take(happened, state);
                    looks.soon();
                }
                event = kernel_path::next(&mut self.kernel_path) => self.serve_kernel_path(event),
                answers = looks.wanted(&mut asked) => {
                    let superseded = self.look(&mut looks, state);
                    answers.into_iter().for_each(Answer::send);
                    if superseded {
                        tracing::info!("another process has taken over; draining");
                        return Stopping::Drain;
                    }
                }
            }
        }
    }

    /// Opens log files again that were moved away.
    fn reopen_logs(&self) {
        self.logs.reopen();
        match self.log.reopen() {
            Ok(()) => tracing::info!("log files were opened again"),
            Err(error) => tracing::error!("{error}; the old file stays in use"),
        }
    }

    /// Stops accepting, then waits for the connections that are open: until they have ended, time is up, or a
    /// second signal comes. What is left then is ended.
    async fn drain(&mut self, stopping: Stopping, signals: &mut Signals) {
        self.end_interception();
        self.tell(|| worker::Command::CloseAll);
        let patience = if stopping == Stopping::Now { Duration::ZERO } else { self.args.drain_time() };
        tracing::info!("draining for up to {} s", patience.as_secs());
        let second_signal = async { while signals.next().await != Request::Stop {} };
        tokio::select! {
            () = self.drained() => return,
            () = tokio::time::sleep(patience) => {}
            () = second_signal => tracing::info!("second signal: ending at once"),
        }
        self.tell(|| worker::Command::Kill);
        let _ = tokio::time::timeout(KILL_GRACE, self.drained()).await;
    }

    /// Twice: a worker that has none may yet be given one by another, until that has answered.
    async fn drained(&self) {
        for worker in self.workers.iter().chain(&self.workers) {
            worker.drained().await;
        }
    }

    fn tell(&self, command: impl Fn() -> worker::Command) {
        self.workers.iter().for_each(|worker| worker.send(command()));
    }

    /// Ends the workers and writes what the access logs still hold.
    fn end(mut self) -> anyhow::Result<()> {
        self.store.finish();
        for worker in self.workers {
            worker.join()?;
        }
        if let Some(Err(error)) = self.record.map(takeover::Record::remove) {
            tracing::warn!("{error}");
        }
        if !self.logs.flush(LOG_FLUSH_TIMEOUT) {
            tracing::error!("access logs could not be written within {} s", LOG_FLUSH_TIMEOUT.as_secs());
        }
        tracing::info!("exiting");
        Ok(())
    }
}

/// What the workers wait with.
fn engine() -> Engine {
    let (engine, refused) = uring::best();
    if let Some(error) = refused {
        tracing::warn!("{error}; using {engine} instead, at more CPU and memory per connection");
    }
    engine
}

/// `node` of the bootstrap, with what the command line says instead.
fn node(args: &ServeArgs, node: &Node) -> Node {
    let pick = |flag: &str, field: &str| if flag.is_empty() { field.to_owned() } else { flag.to_owned() };
    let mut node = Node {
        id: pick(&args.service_node, &node.id),
        cluster: pick(&args.service_cluster, &node.cluster),
        zone: pick(&args.service_zone, &node.zone),
        proto: node.proto.clone(),
    };
    node.id.clone_into(&mut node.proto.id);
    node.cluster.clone_into(&mut node.proto.cluster);
    if !node.zone.is_empty() {
        node.zone.clone_into(&mut node.proto.locality.get_or_insert_default().zone);
    }
    node
}

/// What keeps the configuration up to date. Opens access logs, binds static listeners.
fn store(
    args: &ServeArgs,
    bootstrap: &Bootstrap,
    shared: &Arc<Shared>,
    logs: &access_log::Registry,
    tables: &Tables,
) -> anyhow::Result<Store> {
    let (sender, events) = mpsc::unbounded_channel();
    let node = client::node::identify(node(args, &bootstrap.node).proto);
    let settings = client::Settings { node, ads: bootstrap.dynamic.ads.clone() };
    // A stream that was opened before anything was captured needs no mark.
    let own = Arc::clone(shared);
    let mark = move |socket: &Socket| own.own_sockets.get().map_or(Ok(()), |own| own.mark(socket));
    let mark_own: MarkOwn = Arc::new(mark);
    let mark = Arc::clone(&mark_own);
    let upstream = Upstream::new(shared.publisher.clone(), Box::new(move |socket| mark(socket)));
    let client = client::Client::new(settings, Rc::new(upstream), sender);
    let parts = Parts {
        stats: Arc::clone(&shared.stats),
        logs: logs.clone(),
        workers: args.workers(),
        client,
        events,
        tables: tables.clone(),
        mark_own,
        unknown_fields: match (args.reject_unknown_dynamic_fields, args.ignore_unknown_dynamic_fields) {
            (true, _) => UnknownFields::Reject,
            (false, true) => UnknownFields::Ignore,
            (false, false) => UnknownFields::Warn,
        },
        cache: args.xds_cache.as_deref().map(|dir| Cache::open(dir, tables)).transpose()?,
    };
    Store::new(bootstrap, parts)
}
