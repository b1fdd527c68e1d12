//! Wiring: from the command line to a running proxy and back to nothing.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context as _;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::Socket;
use tokio::sync::mpsc;

use crate::access_log::{self, FlushSettings};
use crate::args::{Args, Command, FailModeArg, Mode, ServeArgs};
use crate::cluster::removal::Lost;
use crate::config::bootstrap::{Bootstrap, FailMode, Interception as Wanted, Node};
use crate::config::{self, Loaded, Sources};
use crate::intercept::audit::{Audit, Health};
use crate::intercept::destinations::{BLACK_HOLE, is_black_hole};
use crate::intercept::{self, Destinations, EbpfLog, InterceptError, Interception, OnPod, PodEvent};
use crate::log::Log;
use crate::signal::{Request, Signals};
use crate::snapshot::{Publisher, Snapshot};
use crate::stats::{SharedGauge, Stats};
use crate::sys;
use crate::takeover::{self, Starting, StatePaths};
use crate::uring::{self, Engine};
use crate::worker::{self, Handle, Role, Shared, SocketId};
use crate::xds::cache::Cache;
use crate::xds::client;
use crate::xds::client::upstream::Upstream;
use crate::xds::store::{Bound, Changes, Draining, Happened, Parts, Phase, Store, UnknownFields};
use crate::xds::tables::Tables;
use crate::{check, cleanup};

mod admin_state;
mod announce;
mod config_dump;

use admin_state::{Running, ServerState};

/// How long connections that were told to end may take to do so, before the process ends without them.
const KILL_GRACE: Duration = Duration::from_secs(2);

/// How long the end waits for access logs to reach their files.
const LOG_FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// How often the eBPF programs' debug lines are printed, when they are asked for.
const EBPF_LOG_INTERVAL: Duration = Duration::from_millis(100);

/// Events of control planes that are handled before what they change is published. Enough that the work for each
/// publication is small beside them, few enough that signals are heard.
const EVENTS_AT_ONCE: usize = 256;

/// How often `/init_dump` is brought up to date: with thousands of resources it costs more than handling one.
const UNREADY_INTERVAL: Duration = Duration::from_millis(200);

/// How often unused hosts of ORIGINAL_DST clusters are looked for; each cluster's `cleanup_interval` decides.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);

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
    store: Store,
    /// What the store has accepted and refused, for the admin server.
    tables: Tables,
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
        let shared = Arc::new(Shared::new(publisher, Arc::clone(&stats), flush.interval));
        let tables = Tables::default();
        let store = store(&args, &loaded.bootstrap, &shared, &logs, &tables)?;
        let engine = engine();
        let workers = (0..args.workers())
            .map(|index| Handle::spawn(index, engine, Arc::clone(&shared)))
            .collect::<Result<Vec<_>, _>>()
            .context("can't start a worker thread")?;
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
            store,
            tables,
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

    /// Lets the workers accept.
    fn accept(&mut self, state: &Running) {
        self.accepting = true;
        for bound in std::mem::take(&mut self.waiting) {
            self.listen(bound, state);
        }
        self.stats.listener_manager().workers_started().set(1);
    }

    fn listen(&mut self, bound: Bound, state: &Running) {
        if !self.accepting {
            self.waiting.push(bound);
            return;
        }
        let Bound { listener, direction, sockets } = bound;
        for (index, (worker, sockets)) in self.workers.iter().zip(sockets).enumerate() {
            for socket in sockets {
                self.sockets += 1;
                let id = SocketId::Bound(self.sockets);
                state.bound(index, id, direction);
                self.bound.entry(Arc::clone(&listener)).or_default().push((index, id));
                worker.send(worker::Command::Listen(id, socket, Role::Bound(Arc::clone(&listener))));
            }
        }
    }

    fn close(&mut self, listener: &str, state: &Running) {
        self.waiting.retain(|bound| *bound.listener != *listener);
        for (worker, id) in self.bound.remove(listener).unwrap_or_default() {
            state.unbound(id);
            self.workers[worker].send(worker::Command::Close(id));
        }
    }

    /// The configuration changes, perhaps.
    fn take(&mut self, happened: Happened, state: &Running) {
        let mut changes = self.store.handle(happened);
        // A control plane that sends thousands of resources one by one does not make us publish as often.
        for _ in 0..EVENTS_AT_ONCE {
            let Some(happened) = self.store.try_next() else { break };
            changes.absorb(self.store.handle(happened));
        }
        self.apply(changes, state);
    }

    /// Puts a change of the configuration in force. A destination is captured when there is somebody who serves it,
    /// and served until it is captured no longer.
    fn apply(&mut self, changes: Changes, state: &Running) {
        if changes.is_empty() {
            return;
        }
        let Changes { clusters, clusters_gone, listeners, close, listen, released, draining, lost } = changes;
        if clusters || listeners {
            self.shared.publisher.publish(self.store.snapshot(&released));
        }
        for listener in close {
            self.close(&listener, state);
        }
        for bound in listen {
            self.listen(bound, state);
        }
        let refuses =
            self.snapshot().cluster(BLACK_HOLE).is_some_and(|cluster| is_black_hole(cluster.config()));
        let refused_before = std::mem::replace(&mut self.black_hole, refuses);
        if (listeners || refuses != refused_before)
            && let Some(interception) = &self.interception
            && let Err(error) = interception.apply(&self.destinations())
        {
            tracing::error!(%error, "the kernel's rules can't follow the configuration");
        }
        if !released.is_empty() {
            self.shared.publisher.publish(self.store.snapshot(&[]));
        }
        if clusters_gone {
            self.tell(|| worker::Command::ForgetClusters);
        }
        for draining in draining {
            self.end_later(draining);
        }
        for lost in lost {
            self.end_hosts(lost);
        }
    }

    /// Connections to endpoints that are gone end, by the policy of their cluster.
    fn end_hosts(&self, lost: Lost) {
        let workers: Vec<_> = self.workers.iter().map(Handle::sender).collect();
        tracing::debug!(
            cluster = %lost.cluster,
            reason = lost.loss.reason.name(),
            "connections to {} endpoints end in {:?}", lost.len(), lost.deadline
        );
        tokio::task::spawn_local(async move {
            tokio::time::sleep(lost.deadline).await;
            let loss = lost.loss;
            let hosts: Arc<[_]> = lost.take().into();
            for worker in workers.iter().filter(|_| !hosts.is_empty()) {
                worker.send(worker::Command::EndHosts(Arc::clone(&hosts), loss));
            }
        });
    }

    /// Connections of chains that are gone end when the drain time has passed.
    fn end_later(&self, draining: Draining) {
        let Draining { listener, whole, chains } = draining;
        let (workers, stats) =
            (self.workers.iter().map(Handle::sender).collect::<Vec<_>>(), Arc::clone(&self.stats));
        let drain_time = self.args.drain_time();
        // Only this thread changes these gauges.
        fn gauge(stats: &Stats, whole: bool) -> SharedGauge<'_> {
            let stats = stats.listener_manager();
            if whole { stats.total_listeners_draining() } else { stats.total_filter_chains_draining() }
        }
        gauge(&stats, whole).set(gauge(&stats, whole).value() + 1);
        tracing::debug!(%listener, "{} filter chains drain for {} s", chains.len(), drain_time.as_secs());
        tokio::task::spawn_local(async move {
            tokio::time::sleep(drain_time).await;
            for chain in &chains {
                chain.end();
            }
            let ids = Arc::new(chains.iter().map(|chain| chain.id).collect::<HashSet<_>>());
            for worker in &workers {
                worker.send(worker::Command::EndChains(Arc::clone(&ids)));
            }
            gauge(&stats, whole).set(gauge(&stats, whole).value().saturating_sub(1));
        });
    }

    /// Starts intercepting, if that is wanted and possible.
    fn intercept(&mut self) -> anyhow::Result<()> {
        if self.args.no_interception {
            tracing::info!("interception is off: bound listeners, iptables REDIRECT and TPROXY are served");
            return Ok(());
        }
        let wanted = wanted(&self.args, self.loaded.bootstrap.interception.as_ref());
        let paths = StatePaths::from(self.args.state.clone());
        let named = !wanted.cgroups.is_empty() || !wanted.host_cgroups.is_empty();
        let asked_for = self.args.require_interception || named;
        let settings = intercept::Settings { wanted, workers: self.workers.len(), debug: self.args.ebpf_log };
        let started = Starting::claim(&paths.state_dir)
            .map_err(anyhow::Error::from)
            .and_then(|starting| Ok((starting, Interception::start(&settings, self.on_pod())?)));
        match started {
            Ok((starting, interception)) => {
                // Before anything is captured: what the proxy itself connects to must pass.
                let _ = self.shared.own_sockets.set(interception.own_sockets());
                if let Some(log) = interception.take_log() {
                    tokio::task::spawn_local(print_ebpf_log(log));
                }
                interception.apply(&self.destinations())?;
                self.interception = Some(interception);
                self.record = Some(starting.finish()?);
            }
            Err(error) if asked_for => {
                return Err(error).context("interception was asked for, but can't be set up");
            }
            Err(error) if matches!(error.downcast_ref(), Some(InterceptError::NoCgroup)) => {
                self.awaits_kubepods = true;
                tracing::info!(
                    "nothing is intercepted: there is no kubepods cgroup here (pods will be intercepted when one \
                     appears), and none was given (--pod-cgroup, --intercept-cgroup); bound listeners, iptables \
                     REDIRECT and TPROXY are served"
                );
            }
            Err(error) => {
                tracing::warn!(
                    "{error:#}; bound listeners, iptables REDIRECT and TPROXY are served without interception"
                );
            }
        }
        Ok(())
    }

    /// Begins to intercept as soon as there is a kubepods cgroup.
    fn look_for_kubepods(&mut self) {
        if !self.awaits_kubepods || !intercept::has_kubepods() {
            return;
        }
        self.awaits_kubepods = false;
        match self.intercept() {
            Ok(()) => self.announce_interception(),
            Err(error) => tracing::error!("{error:#}; pods are not intercepted"),
        }
    }

    fn destinations(&self) -> Destinations {
        let listeners: Vec<_> =
            self.store.listeners().iter().map(|listener| Arc::clone(&listener.config)).collect();
        Destinations::of(&listeners, self.snapshot().cluster(BLACK_HOLE).map(|cluster| &**cluster.config()))
    }

    /// Gives the capture sockets of pods to the workers. Runs on the pods thread.
    fn on_pod(&self) -> OnPod {
        let workers: Vec<_> = self.workers.iter().map(Handle::sender).collect();
        Box::new(move |event| match event {
            PodEvent::Enrolled { capture, sockets } => {
                let id = SocketId::Pod(capture.pod.netns().cookie());
                for (worker, socket) in workers.iter().zip(sockets) {
                    worker.send(worker::Command::Listen(id, socket, Role::Capture(Arc::clone(&capture))));
                }
            }
            PodEvent::Gone { capture } => {
                for worker in &workers {
                    worker.send(worker::Command::Gone(Arc::clone(&capture)));
                }
            }
        })
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

    /// Says what is intercepted.
    fn announce_interception(&self) {
        let Some(interception) = &self.interception else { return };
        for attach_point in interception.attach_points() {
            tracing::info!("intercepting connects from cgroup {}", attach_point.display());
        }
        let destinations = self.destinations().to_string();
        for line in announce::lines(&destinations) {
            tracing::info!("{line}");
        }
        for pod in interception.status().map(|status| status.pods).unwrap_or_default() {
            tracing::info!("pod {}: {:?}", pod.name, pod.state);
        }
    }

    /// The main loop, until it is time to stop.
    async fn run(&mut self, state: &Running, signals: &mut Signals) -> Stopping {
        let mut audit = Audit::default();
        let mut second = tokio::time::interval(Duration::from_secs(1));
        let mut sweep = tokio::time::interval(SWEEP_INTERVAL);
        loop {
            tokio::select! {
                request = signals.next() => match request {
                    Request::Stop => return Stopping::Drain,
                    Request::ReopenLogs => self.reopen_logs(),
                },
                stopping = state.stop_requested() => return stopping,
                happened = self.store.next() => self.take(happened, state),
                _ = sweep.tick() => {
                    self.shared.publisher.sweep();
                    self.snapshot().clusters().for_each(|cluster| cluster.sweep());
                }
                _ = second.tick() => {
                    state.tick();
                    self.store.save();
                    let not_served = self.shared.not_served.load(Ordering::Relaxed);
                    self.stats.set_intercept_counter("not_served_reset", not_served);
                    self.look_for_kubepods();
                    if let Some(interception) = &self.interception
                        && audit.look(interception, &self.stats) == Health::Superseded
                    {
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
        if let Some(interception) = self.interception.take()
            && let Err(error) = interception.stop()
        {
            tracing::error!(%error, "the interception can't be removed; `tidegate cleanup` will");
        }
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

    async fn drained(&self) {
        for worker in &self.workers {
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

/// Passes the eBPF programs' debug lines on to the process log (`--ebpf-log`), soon enough for whoever reads along.
async fn print_ebpf_log(mut log: EbpfLog) {
    let mut tick = tokio::time::interval(EBPF_LOG_INTERVAL);
    loop {
        tick.tick().await;
        log.flush();
    }
}

/// What to intercept: the configuration, overridden by the command line.
fn wanted(args: &ServeArgs, configured: Option<&Wanted>) -> Wanted {
    let mut wanted = configured.cloned().unwrap_or_default();
    if !args.pod_cgroup.is_empty() {
        wanted.cgroups.clone_from(&args.pod_cgroup);
    }
    if !args.intercept_cgroup.is_empty() {
        wanted.host_cgroups.clone_from(&args.intercept_cgroup);
    }
    match args.fail_mode {
        Some(FailModeArg::Open) => wanted.fail_mode = FailMode::Open,
        Some(FailModeArg::Closed) => wanted.fail_mode = FailMode::Closed,
        None => {}
    }
    wanted.capture_port = args.capture_port.or(wanted.capture_port);
    wanted.pin_path = args.state.pin_path.clone().or(wanted.pin_path);
    wanted
}

/// What the workers wait with.
fn engine() -> Engine {
    match uring::probe() {
        Ok(()) => Engine::IoUring,
        Err(error) => {
            tracing::warn!("{error}; using epoll instead, at more memory per idle connection");
            Engine::Epoll
        }
    }
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
    let upstream = Upstream::new(shared.publisher.clone(), Box::new(mark));
    let client = client::Client::new(settings, Rc::new(upstream), sender);
    let parts = Parts {
        stats: Arc::clone(&shared.stats),
        logs: logs.clone(),
        workers: args.workers(),
        client,
        events,
        tables: tables.clone(),
        unknown_fields: match (args.reject_unknown_dynamic_fields, args.ignore_unknown_dynamic_fields) {
            (true, _) => UnknownFields::Reject,
            (false, true) => UnknownFields::Ignore,
            (false, false) => UnknownFields::Warn,
        },
        cache: args.xds_cache.as_deref().map(|dir| Cache::open(dir, tables)).transpose()?,
    };
    Store::new(bootstrap, parts)
}
