//! What the admin server shows of the proxy, and what it may tell it to do.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{Notify, oneshot};

use super::{Proxy, Stopping, config_dump};
use crate::access_log::{self, AccessLogs};
use crate::admin::{
    Admin, AdminError, CertificatesView, ClusterView, DataPathView, Drain, HealthView, HostView,
    ListenerView, Refresh, ServerInfo, State, ThresholdsView, command_line_options,
};
use crate::cluster::Cluster;
use crate::cluster::endpoint::{Endpoint, HealthFlag};
use crate::config::listener::TrafficDirection;
use crate::config::proto::{self, Encoded};
use crate::kernel_path;
use crate::log::Log;
use crate::snapshot::Publisher;
use crate::stats::Stats;
use crate::sys::memory;
use crate::takeover::{Recorded, StatePaths, recorded};
use crate::worker::{self, SocketId};
use crate::xds::Kind;
use crate::xds::tables::Tables;

pub(super) use crate::admin::ServerState;

/// How long the descriptors of Envoy's API are kept after somebody needed them.
const DESCRIPTORS_KEPT: Duration = Duration::from_secs(30);

/// How long the admin server waits for stats of now, before it shows those that there are: a worker may be held up.
const REFRESH_TIMEOUT: Duration = Duration::from_millis(200);

/// How often a taken admin address is tried again.
const ADMIN_RETRY: Duration = Duration::from_millis(50);

/// The state of a running proxy, shared by the main loop and the admin server.
#[derive(Debug)]
pub(super) struct Running {
    started: Instant,
    stats: Arc<Stats>,
    publisher: Publisher,
    logs: access_log::Registry,
    log: Log,
    workers: Vec<worker::Sender>,
    command_line_options: Value,
    node: Value,
    config: Encoded,
    /// Resources of control planes.
    tables: Tables,
    /// Which way connections to each listener take.
    data_paths: kernel_path::Board,
    /// When it was read.
    config_read: SystemTime,
    drain_time: Duration,
    /// Sockets of bound listeners, with the direction of each; worker by worker.
    bound: std::sync::Mutex<Vec<(usize, SocketId, TrafficDirection)>>,
    unready: std::sync::Mutex<Vec<(&'static str, Vec<String>)>>,
    state: AtomicU8,
    failing: AtomicBool,
    /// 0: go on; 1: drain; 2: end now.
    stop: AtomicU8,
    stopping: Notify,
    /// Whether there were connections at the last tick.
    was_busy: AtomicBool,
    /// Who wants stats of now. None: nobody would answer.
    asked: std::sync::Mutex<Option<UnboundedSender<Answer>>>,
}

/// Somebody waits for stats to be up to date.
#[derive(Debug)]
pub(super) struct Answer(oneshot::Sender<()>);

impl Answer {
    /// They are. (Whoever asked may have gone.)
    pub(super) fn send(self) {
        let _ = self.0.send(());
    }
}

impl Running {
    /// Of a proxy that is not serving yet.
    pub(super) fn new(proxy: &Proxy) -> Self {
        let node = &proxy.node;
        let running = Self {
            started: Instant::now(),
            stats: Arc::clone(&proxy.stats),
            publisher: proxy.shared.publisher.clone(),
            logs: proxy.logs.clone(),
            log: proxy.log.clone(),
            workers: proxy.workers.iter().map(worker::Handle::sender).collect(),
            command_line_options: command_line_options(&proxy.args),
            node: json!({
                "id": node.id,
                "cluster": node.cluster,
                "locality": { "zone": node.zone },
                "user_agent_name": "tidegate",
                "user_agent_version": env!("CARGO_PKG_VERSION"),
            }),
            config: proxy.loaded.proto.clone(),
            tables: proxy.tables.clone(),
            data_paths: proxy.data_paths.clone(),
            config_read: SystemTime::now(),
            drain_time: proxy.args.drain_time(),
            bound: std::sync::Mutex::default(),
            unready: std::sync::Mutex::default(),
            state: AtomicU8::new(ServerState::Initializing as u8),
            failing: AtomicBool::new(false),
            stop: AtomicU8::new(0),
            stopping: Notify::new(),
            was_busy: AtomicBool::new(false),
            asked: std::sync::Mutex::default(),
        };
        running.set(ServerState::Initializing);
        running
    }

    /// The proxy is in this state from now on.
    pub(super) fn set(&self, state: ServerState) {
        self.state.store(state as u8, Ordering::Relaxed);
        self.stats.server().state().set(state as u64);
        self.stats.server().live().set(u64::from(state == ServerState::Live));
    }

    /// Remembers a listening socket, so that `/drain_listeners` can close it.
    pub(super) fn bound(&self, worker: usize, id: SocketId, direction: TrafficDirection) {
        self.bound_sockets().push((worker, id, direction));
    }

    /// Brings stats up to date that nothing else does. Called now and then, with the time since the last call. Whether there are connections
    /// that workers have, or were at the last call.
    pub(super) fn tick(&self, since: Duration) -> bool {
        self.stats.server().uptime().set(self.started.elapsed().as_secs());
        // Once more after the last connection: what it has left must not be shown for ever.
        let busy = self.stats.server().total_connections().value() > 0;
        let was_busy = self.was_busy.swap(busy, Ordering::Relaxed);
        if was_busy || busy {
            self.workers.iter().for_each(|worker| drop(worker.flush_stats()));
        }
        self.publisher.current().clusters().for_each(|cluster| cluster.observe());
        // Whoever changes the configuration, or looks at it, often does so again soon.
        if proto::release_unused_descriptors(since, DESCRIPTORS_KEPT) {
            memory::trim();
        }
        was_busy || busy
    }

    /// Those who want stats of now, from here on until the result is dropped.
    pub(super) fn take_asked(&self) -> UnboundedReceiver<Answer> {
        let (sender, asked) = unbounded_channel();
        *self.asked.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(sender);
        asked
    }

    /// Asks the main loop. It doesn't look before it runs, nor after.
    fn ask(&self) -> oneshot::Receiver<()> {
        let (done, answer) = oneshot::channel();
        if let Some(asked) = &*self.asked.lock().unwrap_or_else(std::sync::PoisonError::into_inner) {
            let _ = asked.send(Answer(done));
        }
        answer
    }

    /// Completes when the admin server was told to stop the process.
    pub(super) async fn stop_requested(&self) -> Stopping {
        loop {
            let notified = self.stopping.notified();
            if self.stop.load(Ordering::Relaxed) != 0 {
                return Stopping::Now;
            }
            notified.await;
        }
    }

    /// The vector is consistent after every statement, so a panic while it was locked spoils nothing.
    fn bound_sockets(&self) -> std::sync::MutexGuard<'_, Vec<(usize, SocketId, TrafficDirection)>> {
        self.bound.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Forgets a listening socket that was closed.
    pub(super) fn unbound(&self, id: SocketId) {
        self.bound_sockets().retain(|(_, known, _)| *known != id);
    }

    /// What start-up waits for, by kind.
    pub(super) fn set_unready(&self, unready: Vec<(&'static str, Vec<String>)>) {
        *self.unready.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = unready;
    }

    fn close_listeners(&self, inbound_only: bool) {
        let mut bound = self.bound_sockets();
        let closing = |direction: TrafficDirection| !inbound_only || direction == TrafficDirection::Inbound;
        let mut closed = std::collections::HashSet::new();
        bound.retain(|(worker, id, direction)| {
            if !closing(*direction) {
                return true;
            }
            if let Some(worker) = self.workers.get(*worker) {
                worker.send(worker::Command::Close(*id));
            }
            closed.insert(*id);
            false
        });
        self.stats.listener_manager().listener_stopped().add(closed.len() as u64);
    }
}

/// The admin server at work. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Serving {
    address: SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl Serving {
    /// Where it listens.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Starts the admin server, if the configuration has one, and writes `--admin-address-path`.
///
/// Where a predecessor still has the address, it is taken as soon as that process lets go of it.
pub(super) async fn start(proxy: &Proxy, running: &Arc<Running>) -> anyhow::Result<Option<Serving>> {
    let Some(config) = &proxy.loaded.bootstrap.admin else { return Ok(None) };
    let state: Arc<dyn State> = Arc::<Running>::clone(running);
    let stats = Arc::clone(&proxy.stats);
    let path = proxy.args.admin_address_path.clone();
    let wanted = config.address;
    let logs = AccessLogs::open(&config.access_log, &proxy.logs).context("admin.access_log")?;
    let (address, task) = match Admin::bind(wanted).await {
        Ok(admin) => {
            let admin = admin.access_log(logs);
            let address = admin.address();
            if let Some(path) = &path {
                write_address(path, address)?;
            }
            (address, tokio::spawn(async move { match admin.serve(state, stats).await {} }))
        }
        Err(error) if in_use(&error) && has_predecessor(proxy) => {
            tracing::info!(
                "the admin address {wanted} is the former process's until it has been told to drain"
            );
            (wanted, tokio::spawn(serve_when_free(wanted, path, logs, state, stats)))
        }
        Err(error) => return Err(error.into()),
    };
    Ok(Some(Serving { address, task }))
}

fn in_use(error: &AdminError) -> bool {
    let AdminError::Bind { source, .. } = error;
    source.kind() == std::io::ErrorKind::AddrInUse
}

fn has_predecessor(proxy: &Proxy) -> bool {
    let paths = StatePaths::from(proxy.args.state.clone());
    !proxy.args.no_interception && matches!(recorded(&paths.state_dir), Recorded::Alive(..))
}

async fn serve_when_free(
    address: SocketAddr,
    path: Option<PathBuf>,
    logs: AccessLogs,
    state: Arc<dyn State>,
    stats: Arc<Stats>,
) {
    let admin = loop {
        match Admin::bind(address).await {
            Ok(admin) => break admin.access_log(logs),
            Err(error) if in_use(&error) => tokio::time::sleep(ADMIN_RETRY).await,
            Err(error) => {
                tracing::error!("{error}");
                return;
            }
        }
    };
    if let Some(Err(error)) = path.map(|path| write_address(&path, admin.address())) {
        tracing::error!("{error:#}");
    }
    admin.serve(state, stats).await;
}

/// Whole or not at all: a reader may be waiting for the file to appear.
fn write_address(path: &Path, address: SocketAddr) -> anyhow::Result<()> {
    let temporary = path.with_extension("tmp");
    std::fs::write(&temporary, address.to_string())
        .and_then(|()| std::fs::rename(&temporary, path))
        .with_context(|| format!("can't write --admin-address-path {}", path.display()))
}

impl State for Running {
    fn refresh(&self) -> Refresh {
        let flushed: Vec<_> = self.workers.iter().map(worker::Sender::flush_stats).collect();
        let looked = self.ask();
        Box::pin(async move {
            let all = async {
                // Who can't answer has ended.
                for worker in flushed {
                    let _ = worker.await;
                }
                let _ = looked.await;
            };
            let _ = tokio::time::timeout(REFRESH_TIMEOUT, all).await;
        })
    }

    fn server_state(&self) -> ServerState {
        match self.state.load(Ordering::Relaxed) {
            0 if self.failing.load(Ordering::Relaxed) => ServerState::Draining,
            0 => ServerState::Live,
            1 => ServerState::Draining,
            2 => ServerState::PreInitializing,
            _ => ServerState::Initializing,
        }
    }

    fn server_info(&self) -> ServerInfo {
        ServerInfo {
            version: format!("tidegate/{}/Clean/RELEASE/none", env!("CARGO_PKG_VERSION")),
            uptime: self.started.elapsed(),
            command_line_options: self.command_line_options.clone(),
            node: self.node.clone(),
        }
    }

    fn clusters(&self) -> Vec<ClusterView> {
        let snapshot = self.publisher.current();
        let tables = self.tables.lock();
        let dynamic =
            |name: &str| tables.kind(Kind::Cluster).is_some_and(|table| table.records.contains_key(name));
        let view = |cluster| {
            let view = cluster_view(cluster);
            ClusterView { added_via_api: dynamic(&view.name), ..view }
        };
        let mut clusters: Vec<_> = snapshot.clusters().map(view).collect();
        clusters.sort_by(|a, b| a.name.cmp(&b.name));
        clusters
    }

    fn listeners(&self) -> Vec<ListenerView> {
        let snapshot = self.publisher.current();
        let view = |listener: &Arc<crate::listener::Listener>| ListenerView {
            name: Arc::clone(&listener.config.name),
            addresses: listener.config.addresses.clone(),
            data_path: self.data_paths.state(&listener.config.name).and_then(data_path),
        };
        let mut listeners: Vec<_> = snapshot.listeners().map(view).collect();
        listeners.sort_by(|a, b| a.name.cmp(&b.name));
        listeners
    }

    fn config_dump(&self, include_eds: bool) -> Value {
        config_dump::whole(&self.config.to_json(), self.config_read, &self.tables.lock(), include_eds)
    }

    fn certificates(&self) -> Vec<CertificatesView> {
        let snapshot = self.publisher.current();
        let mut clusters: Vec<_> =
            snapshot.clusters().filter(|cluster| cluster.credentials().is_some()).collect();
        clusters.sort_by(|a, b| a.name().cmp(b.name()));
        let view = |cluster: &Arc<Cluster>| {
            let (authorities, chain) = cluster.credentials()?.certificates();
            Some(CertificatesView { authorities, chain })
        };
        clusters.into_iter().filter_map(view).collect()
    }

    fn init_dump(&self) -> Value {
        let unready = self.unready.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let dumps: Vec<_> =
            unready.iter().map(|(name, targets)| json!({ "name": name, "target_names": targets })).collect();
        if dumps.is_empty() { json!({}) } else { json!({ "unready_targets_dumps": dumps }) }
    }

    fn log_levels(&self) -> Vec<(String, String)> {
        let (default, components) = self.log.levels();
        std::iter::once(("tidegate".to_owned(), default)).chain(components).collect()
    }

    fn set_log_level(&self, logger: Option<&str>, level: &str) -> Result<(), String> {
        let component = logger.filter(|name| *name != "tidegate");
        self.log.set_level(component, level).map_err(|error| error.to_string())
    }

    fn drain_listeners(&self, drain: Drain) {
        if drain.skip_exit {
            return; // connections of TCP listeners are not told to drain; nothing else was asked for
        }
        if !drain.graceful {
            self.close_listeners(drain.inbound_only);
            return;
        }
        // Graceful: the listeners go on for the drain time, then stop.
        let workers = self.workers.clone();
        let closing: Vec<_> = {
            let mut bound = self.bound_sockets();
            let inbound_only = drain.inbound_only;
            bound
                .extract_if(.., |(_, _, direction)| !inbound_only || *direction == TrafficDirection::Inbound)
                .collect()
        };
        let drain_time = self.drain_time;
        tokio::spawn(async move {
            tokio::time::sleep(drain_time).await;
            for (worker, id, _) in closing {
                if let Some(worker) = workers.get(worker) {
                    worker.send(worker::Command::Close(id));
                }
            }
        });
    }

    fn set_healthy(&self, healthy: bool) {
        self.failing.store(!healthy, Ordering::Relaxed);
        if self.state.load(Ordering::Relaxed) == ServerState::Live as u8 {
            self.stats.server().live().set(u64::from(healthy));
            self.stats.server().state().set(self.server_state() as u64);
        }
    }

    fn reopen_logs(&self) {
        self.logs.reopen();
        if let Err(error) = self.log.reopen() {
            tracing::error!("{error}; the old file stays in use");
        }
    }

    fn quit(&self) {
        self.stop.store(1, Ordering::Relaxed);
        self.stopping.notify_waiters();
    }
}

fn data_path(state: kernel_path::State) -> Option<DataPathView> {
    match state {
        state if state.is_unasked() => None,
        kernel_path::State::Kernel => Some(DataPathView::Kernel),
        kernel_path::State::Proxy(obstacles) => {
            Some(DataPathView::Proxy(obstacles.iter().map(ToString::to_string).collect()))
        }
    }
}

fn cluster_view(cluster: &Arc<Cluster>) -> ClusterView {
    let config = cluster.config();
    let default = config.circuit_breakers;
    let thresholds = ThresholdsView {
        max_connections: default.max_connections,
        max_pending_requests: default.max_pending_requests,
        ..ThresholdsView::default()
    };
    ClusterView {
        name: Arc::clone(&config.name),
        observability_name: Arc::clone(config.alt_stat_name.as_ref().unwrap_or(&config.name)),
        thresholds: [thresholds, ThresholdsView::default()],
        added_via_api: false,
        // As in Envoy, only when it is not the cluster's own name.
        eds_service_name: config
            .eds
            .as_ref()
            .map(|eds| Arc::clone(&eds.service_name))
            .filter(|name| *name != config.name)
            .unwrap_or_default(),
        outlier: cluster.outlier().map(|outlier| {
            let threshold = outlier.threshold().map(|it| (it.average, it.ejection));
            let split = outlier.config().split_external_local_origin_errors;
            if split { [None, threshold] } else { [threshold, None] }
        }),
        hosts: cluster.endpoints().iter().map(|endpoint| host_view(cluster, endpoint)).collect(),
    }
}

fn host_view(cluster: &Cluster, endpoint: &Endpoint) -> HostView {
    let host = &endpoint.host;
    let split = cluster.outlier().map(|outlier| outlier.config().split_external_local_origin_errors);
    let success_rate = split.and_then(|split| Some((split, host.monitor()?.history().success_rate?)));
    let has = |flag: HealthFlag| host.health_flags() & flag as u32 != 0;
    HostView {
        hostname: Arc::clone(&endpoint.hostname),
        cx_active: host.cx_active(),
        cx_connect_fail: host.cx_connect_fail(),
        cx_total: host.cx_total(),
        rq_active: host.rq_active(),
        rq_total: host.rq_total(),
        health: HealthView {
            failed_active_health_check: has(HealthFlag::FailedActive),
            failed_outlier_check: has(HealthFlag::FailedOutlier),
            failed_active_degraded_check: has(HealthFlag::DegradedActive),
            pending_active_hc: has(HealthFlag::PendingActive),
            pending_dynamic_removal: has(HealthFlag::PendingRemoval),
            active_hc_timeout: has(HealthFlag::ActiveTimeout),
            eds_health_status: endpoint.health_status,
        },
        success_rate: success_rate.filter(|(split, _)| !split).map(|(_, rate)| rate),
        local_origin_success_rate: success_rate.filter(|(split, _)| *split).map(|(_, rate)| rate),
        weight: endpoint.weight,
        region: Arc::clone(&endpoint.locality.region),
        zone: Arc::clone(&endpoint.locality.zone),
        sub_zone: Arc::clone(&endpoint.locality.sub_zone),
        priority: endpoint.priority,
        ..HostView::new(endpoint.address().clone())
    }
}
