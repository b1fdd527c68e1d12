//! Active health checks over TCP, HTTP and gRPC: the main thread connects to every host of a cluster now and then.
//!
//! Hosts begin as failed, so that nothing is sent to a host that was never seen alive; the first success is enough. What was
//! found stays with the host, so that a new version of the cluster does not begin from nothing: hosts that are in use
//! stay so until a check of the new version fails.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use fastrand::Rng;
use tokio::sync::{Notify, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::Cluster;
use super::endpoint::Endpoint;
use super::host::{HealthFlag, Host};
use crate::access_log::EventFile;
use crate::config::endpoint::Locality;
use crate::config::health_check::{Check, EndpointHealthCheck, HealthCheck, HttpHealthCheck, TcpHealthCheck};
use crate::stats::HealthCheckStats;

mod event;
mod http;
mod judgement;
mod tcp;

use event::{Action, Failure, Subject};
use http::Verdict;
use judgement::{Judgement, Transition};
pub use tcp::MarkOwn;
use tcp::Way;

/// Active health checks of one cluster.
#[derive(Debug)]
pub struct Checks {
    config: HealthCheck,
    stats: HealthCheckStats,
    /// The task that watches has to look: there are other hosts, or results.
    wake: Notify,
    /// The health of a host has changed. Main thread only.
    dirty: AtomicBool,
}

impl Checks {
    pub(super) fn new(config: HealthCheck, stats: HealthCheckStats) -> Self {
        Self { config, stats, wake: Notify::new(), dirty: AtomicBool::new(false) }
    }

    /// What is checked, and how often.
    pub fn config(&self) -> &HealthCheck {
        &self.config
    }

    pub(super) fn members_changed(&self) {
        self.wake.notify_one();
    }

    /// An endpoint gets into the cluster: unless it is in use already, it has to prove itself first.
    pub(super) fn adopt(&self, endpoint: &Endpoint) {
        let host = &endpoint.host;
        if target(endpoint).is_none() {
            host.forget_checks();
        } else if !host.has(HealthFlag::Member) {
            host.set_health_flag(HealthFlag::FailedActive, true);
            host.set_health_flag(HealthFlag::PendingActive, self.config.ignore_new_hosts);
        }
    }

    fn count_healthy(&self, more: bool) {
        // Only the main thread changes it.
        let healthy = self.stats.healthy().value();
        self.stats.healthy().set(if more { healthy + 1 } else { healthy.saturating_sub(1) });
    }
}

/// Where an endpoint is checked; none if it isn't.
pub(super) fn target(endpoint: &Endpoint) -> Option<SocketAddr> {
    // Pipes lead to control planes only.
    EndpointHealthCheck::target(endpoint.health_check.as_ref(), endpoint.address().ip()?)
}

/// What checks need from outside of their cluster.
#[derive(Clone)]
pub struct Surroundings {
    /// Called before each connect(2).
    pub mark_own: MarkOwn,
    /// Where events go.
    pub events: Vec<EventFile>,
}

/// Checks the hosts of one cluster until it is dropped. Held by the main thread, from before the cluster is in force.
#[derive(Debug)]
pub struct Watch {
    _supervisor: JoinSet<()>,
    progress: watch::Receiver<()>,
    checked: Arc<Mutex<Checked>>,
}

/// Addresses of hosts that had a first result. They are compared only.
type Checked = HashSet<usize>;

impl Watch {
    /// None for a cluster without health checks. Must be called within a tokio runtime.
    pub fn start(cluster: &Arc<Cluster>, surroundings: Surroundings) -> Option<Self> {
        cluster.health_check()?;
        let (report, progress) = watch::channel(());
        let checked = Arc::new(Mutex::default());
        let mut supervisor = JoinSet::new();
        supervisor.spawn(supervise(Arc::clone(cluster), surroundings, report, Arc::clone(&checked)));
        Some(Self { _supervisor: supervisor, progress, checked })
    }

    /// Completes when every host that the cluster has then was checked once, with or without success.
    pub fn first_round(&self, cluster: &Arc<Cluster>) -> impl Future<Output = ()> + use<> {
        let (mut progress, checked) = (self.progress.clone(), Arc::clone(&self.checked));
        let cluster = Arc::clone(cluster);
        async move {
            let is_done = || {
                let checked = lock(&checked);
                let set = cluster.hosts();
                let mut hosts = set.endpoints().filter(|endpoint| target(endpoint).is_some());
                hosts.all(|endpoint| checked.contains(&key(&endpoint.host)))
            };
            // An error means that nothing is left that could be waited for.
            let _ = progress.wait_for(|()| is_done()).await;
        }
    }
}

fn key(host: &Arc<Host>) -> usize {
    Arc::as_ptr(host).addr()
}

/// Has a task for each host. Puts what they find in force, many results at a time.
async fn supervise(
    cluster: Arc<Cluster>,
    surroundings: Surroundings,
    report: watch::Sender<()>,
    checked: Arc<Mutex<Checked>>,
) {
    let Some(checks) = cluster.health_check() else { return };
    let mut tasks = JoinSet::new();
    let mut running: HashMap<(usize, SocketAddr), AbortHandle> = HashMap::new();
    loop {
        if checks.dirty.swap(false, Relaxed) {
            cluster.active_health_changed();
        }
        let mut wanted = HashSet::new();
        for endpoint in cluster.hosts().endpoints() {
            let Some(target) = target(endpoint) else { continue };
            let id = (key(&endpoint.host), target);
            if wanted.insert(id) && !running.contains_key(&id) {
                let session = Session::new(&cluster, endpoint, target, &surroundings);
                running.insert(id, tasks.spawn(session.run(Arc::clone(&checked))));
            }
        }
        running.retain(|id, task| {
            let stays = wanted.contains(id);
            if !stays {
                task.abort();
            }
            stays
        });
        let hosts: HashSet<usize> = wanted.iter().map(|(host, _)| *host).collect();
        lock(&checked).retain(|host| hosts.contains(host));
        report.send_replace(());
        // Tasks that were aborted are taken out of the set here.
        while tasks.try_join_next().is_some() {}
        checks.wake.notified().await;
    }
}

/// Checks of one host.
struct Session {
    cluster: Arc<Cluster>,
    host: Arc<Host>,
    locality: Arc<Locality>,
    target: SocketAddr,
    surroundings: Surroundings,
    judgement: Judgement,
    /// It counts in `health_check.healthy`.
    counted: bool,
    /// It counts in `health_check.degraded`.
    counted_degraded: bool,
    rng: Rng,
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Passed { degraded: bool },
    Failed(Failure),
}

/// What serves several checks.
enum Connection {
    Tcp(tcp::Connection),
    Http(http::Connection),
}

impl Session {
    fn new(
        cluster: &Arc<Cluster>,
        endpoint: &Endpoint,
        target: SocketAddr,
        surroundings: &Surroundings,
    ) -> Self {
        let host = Arc::clone(&endpoint.host);
        // One that is in use, and that nobody has checked, has to prove itself too.
        let failed = host.has(HealthFlag::FailedActive) || !host.has(HealthFlag::Checked);
        let mut this = Self {
            cluster: Arc::clone(cluster),
            host,
            locality: Arc::clone(&endpoint.locality),
            target,
            surroundings: surroundings.clone(),
            judgement: Judgement::new(failed),
            counted: false,
            counted_degraded: false,
            rng: Rng::new(),
        };
        this.count(!failed);
        this.count_degraded(this.host.has(HealthFlag::DegradedActive));
        this
    }

    /// Never ends.
    async fn run(mut self, checked: Arc<Mutex<Checked>>) {
        let Some(config) = self.cluster.health_check().map(|checks| checks.config.clone()) else { return };
        let first = config.intervals.first(&mut self.rng);
        if !first.is_zero() {
            sleep(first).await;
        }
        let mut connection = None;
        loop {
            let outcome = self.check(&config, &mut connection).await;
            let mut wait = self.judge(&config, outcome);
            if lock(&checked).insert(key(&self.host)) {
                self.wake();
            }
            // A connection that is kept may end, or say something, between two checks.
            while let Some(outcome) = idle(&config, &mut connection, wait).await {
                wait = self.judge(&config, outcome);
            }
        }
    }

    /// Leaves the connection if it serves the next check too.
    async fn check(&self, config: &HealthCheck, connection: &mut Option<Connection>) -> Outcome {
        if let Some(checks) = self.cluster.health_check() {
            checks.stats.attempt().inc();
        }
        let check = async {
            match &config.check {
                Check::Tcp(check) => self.check_tcp(check, connection).await,
                Check::Http(check) | Check::Grpc(check) => {
                    let grpc = matches!(config.check, Check::Grpc(_));
                    self.check_http(check, grpc, connection).await
                }
            }
        };
        let outcome = match timeout(config.timeout, check).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Outcome::Failed(Failure::Network),
            Err(_) => Outcome::Failed(Failure::Timeout),
        };
        let answered = !matches!(outcome, Outcome::Failed(Failure::Network | Failure::Timeout));
        let silent = matches!(&config.check, Check::Tcp(check) if check.receive.is_empty());
        if !answered || !config.reuse_connection || silent {
            *connection = None;
        }
        outcome
    }

    fn way(&self) -> Way<'_> {
        Way { target: self.target, config: self.cluster.config(), mark_own: &self.surroundings.mark_own }
    }

    async fn check_tcp(
        &self,
        check: &TcpHealthCheck,
        connection: &mut Option<Connection>,
    ) -> io::Result<Outcome> {
        let kept = match connection.take() {
            Some(Connection::Tcp(kept)) => Some(kept),
            _ => None,
        };
        let mut tcp = match kept {
            Some(kept) => kept,
            None => tcp::Connection::open(&self.way(), check).await?,
        };
        if !check.receive.is_empty() {
            tcp.ask(check).await?;
        }
        *connection = Some(Connection::Tcp(tcp));
        Ok(Outcome::Passed { degraded: false })
    }

    async fn check_http(
        &self,
        check: &HttpHealthCheck,
        grpc: bool,
        connection: &mut Option<Connection>,
    ) -> io::Result<Outcome> {
        let mut kept = match connection.take() {
            Some(Connection::Http(kept)) => Some(kept),
            _ => None,
        };
        // That the server has closed it between two checks is no failure, as in Envoy.
        if let Some(http) = &mut kept
            && !http.is_ready().await
        {
            kept = None;
        }
        let mut http = match kept {
            Some(kept) => kept,
            None => http::Connection::open(&self.way(), check).await?,
        };
        let verdict = if grpc { http.call(check).await? } else { http.ask(check).await? };
        *connection = Some(Connection::Http(http));
        if check.service_name.is_some()
            && let Some(checks) = self.cluster.health_check()
        {
            checks.stats.verify_cluster().inc();
        }
        Ok(match verdict {
            Verdict::Healthy { degraded } => Outcome::Passed { degraded },
            Verdict::Unhealthy(failure) => Outcome::Failed(failure),
        })
    }

    /// Takes note of a result. Returns the time until the next check.
    fn judge(&mut self, config: &HealthCheck, outcome: Outcome) -> Duration {
        let first = self.judgement.first;
        let transition = match outcome {
            Outcome::Passed { .. } => self.judgement.passed(config.healthy_threshold),
            Outcome::Failed(failure) => {
                let at_once = matches!(failure, Failure::Active { at_once: true, .. });
                self.judgement.failed(config.unhealthy_threshold, at_once)
            }
        };
        self.log(config, outcome, first, transition);
        let failed = self.judgement.failed;
        let flags = self.host.health_flags();
        self.host.set_health_flag(HealthFlag::FailedActive, failed);
        let timed_out = outcome == Outcome::Failed(Failure::Timeout);
        self.host.set_health_flag(HealthFlag::ActiveTimeout, failed && timed_out);
        self.host.set_health_flag(HealthFlag::PendingActive, false);
        self.host.set_health_flag(HealthFlag::Checked, true);
        if let Outcome::Passed { degraded } = outcome {
            self.host.set_health_flag(HealthFlag::DegradedActive, degraded);
            self.count_degraded(degraded);
        }
        self.count(!failed);
        let counts = HealthFlag::FailedActive as u32
            | HealthFlag::PendingActive as u32
            | HealthFlag::DegradedActive as u32;
        if (flags ^ self.host.health_flags()) & counts != 0 {
            if let Some(checks) = self.cluster.health_check() {
                checks.dirty.store(true, Relaxed);
            }
            self.wake();
        }
        let passed = matches!(outcome, Outcome::Passed { .. });
        if passed
            && !failed
            && let Some(outlier) = self.cluster.outlier()
        {
            outlier.health_check_passed(&self.host);
        }
        let has_traffic = self.cluster.stats().upstream_cx_total().value() > 0;
        config.intervals.next(passed, transition, has_traffic, &mut self.rng)
    }

    fn wake(&self) {
        if let Some(checks) = self.cluster.health_check() {
            checks.wake.notify_one();
        }
    }

    fn count(&mut self, healthy: bool) {
        if std::mem::replace(&mut self.counted, healthy) != healthy
            && let Some(checks) = self.cluster.health_check()
        {
            checks.count_healthy(healthy);
        }
    }

    fn count_degraded(&mut self, degraded: bool) {
        if std::mem::replace(&mut self.counted_degraded, degraded) == degraded {
            return;
        }
        let Some(checks) = self.cluster.health_check() else { return };
        // Only the main thread changes it.
        let count = checks.stats.degraded().value();
        checks.stats.degraded().set(if degraded { count + 1 } else { count.saturating_sub(1) });
    }

    /// Before the host's flags change.
    fn log(&self, config: &HealthCheck, outcome: Outcome, first: bool, transition: Transition) {
        let Some(checks) = self.cluster.health_check() else { return };
        let changed = transition == Transition::Changed;
        match outcome {
            Outcome::Passed { degraded } => {
                checks.stats.success().inc();
                self.write(config, changed.then_some(Action::AddHealthy { first }));
                let was_degraded = self.host.has(HealthFlag::DegradedActive);
                self.write(config, (degraded && !was_degraded).then_some(Action::Degraded));
                self.write(config, (was_degraded && !degraded).then_some(Action::NoLongerDegraded));
                self.write(config, config.always_log_success.then_some(Action::Success));
            }
            Outcome::Failed(failure) => {
                checks.stats.failure().inc();
                if !matches!(failure, Failure::Active { .. }) {
                    checks.stats.network_failure().inc();
                }
                self.write(config, changed.then_some(Action::Eject(failure)));
                let logs = first || config.always_log_failures;
                self.write(config, logs.then_some(Action::Failure { failure, first }));
            }
        }
    }

    fn write(&self, config: &HealthCheck, action: Option<Action>) {
        let Some(action) = action else { return };
        let cluster = self.cluster.name();
        tracing::debug!(%cluster, host = %self.host.address(), ?action, "health check");
        let subject = Subject {
            checker: match config.check {
                Check::Tcp(_) => "TCP",
                Check::Http(_) => "HTTP",
                Check::Grpc(_) => "GRPC",
            },
            cluster,
            host: self.host.address().ip().unwrap_or(self.target),
            locality: &self.locality,
        };
        for events in &self.surroundings.events {
            events.write_line(&event::json(SystemTime::now(), &subject, action));
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.count(false);
        self.count_degraded(false);
    }
}

/// Waits between two checks. What comes meanwhile on a TCP connection that is kept is a result too, as in Envoy.
async fn idle(config: &HealthCheck, connection: &mut Option<Connection>, wait: Duration) -> Option<Outcome> {
    let deadline = Instant::now() + wait;
    let (Some(Connection::Tcp(kept)), Check::Tcp(check)) = (&mut *connection, &config.check) else {
        tokio::time::sleep_until(deadline).await;
        return None;
    };
    match timeout_at(deadline, kept.answer(check)).await {
        Err(_) => None,
        Ok(Ok(())) => Some(Outcome::Passed { degraded: false }),
        Ok(Err(_)) => {
            *connection = None;
            Some(Outcome::Failed(Failure::Network))
        }
    }
}

/// What is locked is consistent after every statement, so a panic meanwhile spoils nothing.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
