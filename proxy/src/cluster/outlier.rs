//! Passive outlier detection: hosts that connects fail at are not chosen for a while.
//!
//! Workers count how connects end ([`Detector::note`]: a few relaxed atomics in the host's [`Monitor`]) and wake the main
//! thread when a threshold is reached. It alone ejects and takes back ([`Watch`]). What it knows of a host stays with
//! the host, so that a new version of the cluster goes on where the former one was.
//!
//! TCP has no more to tell than connects do. Without `split_external_local_origin_errors` a failed one is what HTTP calls
//! 503, a timeout is 504, and both count as gateway failures and as 5xx; with it, they are failures of local origin.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use fastrand::Rng;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use super::Cluster;
use super::host::{HealthFlag, Host};
use crate::access_log::EventFile;
use crate::config::outlier::OutlierDetection;
use crate::stats::{OutlierStats, SharedCounter};

mod event;
mod monitor;
mod success_rate;

use event::{Action, Details, Event};
use monitor::Streak;
pub use monitor::{History, Monitor, Outcome};
use success_rate::Sample;
pub use success_rate::Threshold;

/// Outlier detection of one cluster.
#[derive(Debug)]
pub struct Detector {
    config: OutlierDetection,
    stats: OutlierStats,
    /// A threshold was reached, or there are other hosts.
    wake: Notify,
    /// Of the last interval; none if there were too few hosts with enough connects.
    threshold: Mutex<Option<Threshold>>,
}

/// Why a host is ejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reason {
    Consecutive5xx,
    ConsecutiveGatewayFailure,
    ConsecutiveLocalOriginFailure,
    SuccessRate,
    SuccessRateLocalOrigin,
    FailurePercentage,
    FailurePercentageLocalOrigin,
}

impl Reason {
    /// As in `envoy.data.cluster.v3.OutlierEjectionType`.
    fn name(self) -> &'static str {
        match self {
            Self::Consecutive5xx => "CONSECUTIVE_5XX",
            Self::ConsecutiveGatewayFailure => "CONSECUTIVE_GATEWAY_FAILURE",
            Self::ConsecutiveLocalOriginFailure => "CONSECUTIVE_LOCAL_ORIGIN_FAILURE",
            Self::SuccessRate => "SUCCESS_RATE",
            Self::SuccessRateLocalOrigin => "SUCCESS_RATE_LOCAL_ORIGIN",
            Self::FailurePercentage => "FAILURE_PERCENTAGE",
            Self::FailurePercentageLocalOrigin => "FAILURE_PERCENTAGE_LOCAL_ORIGIN",
        }
    }

    fn enforcing(self, config: &OutlierDetection) -> u32 {
        let enforcing = &config.enforcing;
        match self {
            Self::Consecutive5xx => enforcing.consecutive_5xx,
            Self::ConsecutiveGatewayFailure => enforcing.consecutive_gateway_failure,
            Self::ConsecutiveLocalOriginFailure => enforcing.consecutive_local_origin_failure,
            Self::SuccessRate => enforcing.success_rate,
            Self::SuccessRateLocalOrigin => enforcing.local_origin_success_rate,
            Self::FailurePercentage => enforcing.failure_percentage,
            Self::FailurePercentageLocalOrigin => enforcing.failure_percentage_local_origin,
        }
    }

    fn detected(self, stats: &OutlierStats) -> SharedCounter<'_> {
        match self {
            Self::Consecutive5xx => stats.ejections_detected_consecutive_5xx(),
            Self::ConsecutiveGatewayFailure => stats.ejections_detected_consecutive_gateway_failure(),
            Self::ConsecutiveLocalOriginFailure => {
                stats.ejections_detected_consecutive_local_origin_failure()
            }
            Self::SuccessRate => stats.ejections_detected_success_rate(),
            Self::SuccessRateLocalOrigin => stats.ejections_detected_local_origin_success_rate(),
            Self::FailurePercentage => stats.ejections_detected_failure_percentage(),
            Self::FailurePercentageLocalOrigin => stats.ejections_detected_local_origin_failure_percentage(),
        }
    }

    fn enforced(self, stats: &OutlierStats) -> SharedCounter<'_> {
        match self {
            Self::Consecutive5xx => stats.ejections_enforced_consecutive_5xx(),
            Self::ConsecutiveGatewayFailure => stats.ejections_enforced_consecutive_gateway_failure(),
            Self::ConsecutiveLocalOriginFailure => {
                stats.ejections_enforced_consecutive_local_origin_failure()
            }
            Self::SuccessRate => stats.ejections_enforced_success_rate(),
            Self::SuccessRateLocalOrigin => stats.ejections_enforced_local_origin_success_rate(),
            Self::FailurePercentage => stats.ejections_enforced_failure_percentage(),
            Self::FailurePercentageLocalOrigin => stats.ejections_enforced_local_origin_failure_percentage(),
        }
    }
}

impl From<Streak> for Reason {
    fn from(streak: Streak) -> Self {
        match streak {
            Streak::Gateway => Self::ConsecutiveGatewayFailure,
            Streak::Any => Self::Consecutive5xx,
            Streak::LocalOrigin => Self::ConsecutiveLocalOriginFailure,
        }
    }
}

impl Detector {
    pub(super) fn new(config: OutlierDetection, stats: OutlierStats) -> Self {
        Self { config, stats, wake: Notify::new(), threshold: Mutex::default() }
    }

    /// What it goes by.
    pub fn config(&self) -> &OutlierDetection {
        &self.config
    }

    /// A connect to a host of this cluster ended. Called by workers; neither blocks nor allocates.
    pub fn note(&self, host: &Host, outcome: Outcome) {
        if let Some(monitor) = host.monitor()
            && monitor.count(outcome, &self.config)
        {
            self.wake.notify_one();
        }
    }

    /// A success of active health checks ends an ejection, if the cluster wants that.
    pub fn health_check_passed(&self, host: &Host) {
        if self.config.successful_active_health_check_uneject_host
            && host.has(HealthFlag::FailedOutlier)
            && let Some(monitor) = host.monitor()
        {
            monitor.ask_back();
            self.wake.notify_one();
        }
    }

    /// There are other hosts than before, or could be.
    pub(super) fn members_changed(&self) {
        self.wake.notify_one();
    }

    /// Success rates of the last interval that had enough.
    pub fn threshold(&self) -> Option<Threshold> {
        *self.threshold_slot()
    }

    fn threshold_slot(&self) -> MutexGuard<'_, Option<Threshold>> {
        self.threshold.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn compares_rates(&self, hosts: usize) -> bool {
        let minimum =
            self.config.success_rate.minimum_hosts.min(self.config.failure_percentage.minimum_hosts);
        hosts as u64 >= u64::from(minimum)
    }

    /// Whether something happens when the interval is over.
    fn wants_interval(&self, hosts: &[Arc<Host>]) -> bool {
        let is_remembered = |host: &Arc<Host>| {
            host.has(HealthFlag::FailedOutlier)
                || host.monitor().is_some_and(|monitor| monitor.history().multiplier > 0)
        };
        self.compares_rates(hosts.len()) || hosts.iter().any(is_remembered)
    }
}

/// Decides over the hosts of one cluster until it is dropped. Held by the main thread while the cluster is in force.
#[derive(Debug)]
pub struct Watch(JoinHandle<()>);

impl Watch {
    /// None for a cluster without outlier detection. Must be called within a tokio runtime.
    pub fn start(cluster: &Arc<Cluster>, events: Option<EventFile>) -> Option<Self> {
        cluster.outlier()?;
        Some(Self(tokio::spawn(watch(Arc::clone(cluster), events))))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn watch(cluster: Arc<Cluster>, events: Option<EventFile>) {
    let Some(detector) = cluster.outlier() else { return };
    let interval = detector.config.interval;
    let mut rng = Rng::new();
    let mut next = Instant::now() + interval;
    let mut ticking = false;
    let mut is_tick = false;
    loop {
        let hosts = members(&cluster);
        let now = Instant::now();
        let (name, events) = (&**cluster.name(), events.as_ref());
        let mut round = Round { detector, cluster: name, hosts: &hosts, events, rng: &mut rng };
        let changed = if is_tick { round.interval(now) } else { round.look(now) };
        if changed {
            cluster.refresh_health();
        }
        let was_ticking = std::mem::replace(&mut ticking, detector.wants_interval(&hosts));
        if ticking && !was_ticking {
            // Nobody has emptied the counts for a while.
            for monitor in hosts.iter().filter_map(|host| host.monitor()) {
                monitor.take_attempts();
            }
        }
        next = following(next, interval, now);
        is_tick = tokio::select! {
            biased; // what was detected before the interval ended counts before
            () = detector.wake.notified() => false,
            () = sleep_until(next), if ticking => true,
        };
    }
}

/// The first of `next`, `next` + `interval`, … that is still to come.
fn following(next: Instant, interval: Duration, now: Instant) -> Instant {
    if next > now {
        return next;
    }
    let missed = now.duration_since(next).as_nanos() / interval.as_nanos().max(1);
    let skip = interval.saturating_mul(u32::try_from(missed).unwrap_or(u32::MAX).saturating_add(1));
    let following = next + skip;
    // After years of nothing the multiple above is not enough.
    if following > now { following } else { now + interval }
}

/// Every host once.
fn members(cluster: &Cluster) -> Vec<Arc<Host>> {
    let mut seen = HashSet::new();
    let set = cluster.hosts();
    let hosts = set.endpoints().map(|endpoint| &endpoint.host);
    hosts.filter(|host| seen.insert(Arc::as_ptr(host))).cloned().collect()
}

/// One look of the main thread at the hosts.
struct Round<'a> {
    detector: &'a Detector,
    cluster: &'a str,
    hosts: &'a [Arc<Host>],
    events: Option<&'a EventFile>,
    rng: &'a mut Rng,
}

impl Round<'_> {
    /// Hosts that failed often enough in a row are ejected. Returns whether any flag changed.
    fn look(&mut self, now: Instant) -> bool {
        let mut changed = false;
        for host in self.hosts {
            let Some(monitor) = host.monitor() else { continue };
            let wants_back = monitor.take_wish();
            if wants_back && host.has(HealthFlag::FailedOutlier) {
                self.take_back(host, monitor, now);
                changed = true;
            }
            for streak in monitor.take_detected() {
                if host.has(HealthFlag::FailedOutlier) {
                    continue;
                }
                let stats = &self.detector.stats;
                if streak == Streak::Any {
                    stats.ejections_consecutive_5xx().inc();
                }
                changed |= self.eject(host, monitor, streak.into(), Details::Consecutive, now);
                monitor.reset_streak(streak);
            }
        }
        self.detector.stats.ejections_active().set(self.active());
        changed
    }

    /// An interval is over. Returns whether any flag changed.
    fn interval(&mut self, now: Instant) -> bool {
        let mut changed = false;
        for host in self.hosts {
            let Some(monitor) = host.monitor() else { continue };
            let mut history = monitor.history();
            history.success_rate = None;
            if !host.has(HealthFlag::FailedOutlier) {
                history.multiplier = history.multiplier.saturating_sub(1);
            } else if history.is_over(now, &self.detector.config) {
                drop(history);
                self.take_back(host, monitor, now);
                changed = true;
            }
        }
        changed |= self.compare_rates(now);
        self.detector.stats.ejections_active().set(self.active());
        changed
    }

    fn compare_rates(&mut self, now: Instant) -> bool {
        let detector = self.detector;
        let samples = self.samples();
        *detector.threshold_slot() = None;
        if !detector.compares_rates(self.hosts.len()) {
            return false;
        }
        let (by_rate, by_failures) = (&detector.config.success_rate, &detector.config.failure_percentage);
        let enough = by_rate.request_volume.min(by_failures.request_volume);
        for sample in samples.iter().filter(|sample| sample.attempts >= enough) {
            if let Some(monitor) = self.hosts[sample.host].monitor() {
                monitor.history().success_rate = Some(sample.rate);
            }
        }
        let with_volume = |volume: u32, minimum: u32| {
            let samples: Vec<Sample> =
                samples.iter().filter(|sample| sample.attempts >= volume).copied().collect();
            (!samples.is_empty() && samples.len() as u64 >= u64::from(minimum)).then_some(samples)
        };
        let mut changed = false;
        let split = detector.config.split_external_local_origin_errors;
        if let Some(samples) = with_volume(by_rate.request_volume, by_rate.minimum_hosts) {
            let threshold = Threshold::of(&samples, by_rate.stdev_factor);
            *detector.threshold_slot() = Some(threshold);
            let reason = if split { Reason::SuccessRateLocalOrigin } else { Reason::SuccessRate };
            for sample in samples.iter().filter(|sample| sample.rate < threshold.ejection) {
                detector.stats.ejections_success_rate().inc();
                let (average, threshold) = (threshold.average, threshold.ejection);
                let details = Details::SuccessRate { host: sample.rate, average, threshold };
                changed |= self.eject_sample(sample, reason, details, now);
            }
        }
        if let Some(samples) = with_volume(by_failures.request_volume, by_failures.minimum_hosts) {
            let reason = if split { Reason::FailurePercentageLocalOrigin } else { Reason::FailurePercentage };
            let limit = f64::from(by_failures.threshold);
            for sample in samples.iter().filter(|sample| 100.0 - sample.rate >= limit) {
                let details = Details::FailurePercentage { host: sample.rate };
                changed |= self.eject_sample(sample, reason, details, now);
            }
        }
        changed
    }

    /// How hosts that are not ejected did since the last interval.
    fn samples(&self) -> Vec<Sample> {
        let sample = |(at, host): (usize, &Arc<Host>)| {
            let (attempts, successes) = host.monitor()?.take_attempts();
            if attempts == 0 || host.has(HealthFlag::FailedOutlier) {
                return None;
            }
            Some(Sample { host: at, attempts, rate: f64::from(successes) * 100.0 / f64::from(attempts) })
        };
        self.hosts.iter().enumerate().filter_map(sample).collect()
    }

    fn eject_sample(&mut self, sample: &Sample, reason: Reason, details: Details, now: Instant) -> bool {
        let host = &self.hosts[sample.host];
        let Some(monitor) = host.monitor() else { return false };
        if host.has(HealthFlag::FailedOutlier) {
            return false; // by its success rate, just now
        }
        self.eject(host, monitor, reason, details, now)
    }

    /// An outlier was detected. Returns whether it is ejected.
    fn eject(
        &mut self,
        host: &Host,
        monitor: &Monitor,
        reason: Reason,
        details: Details,
        now: Instant,
    ) -> bool {
        let Detector { config, stats, .. } = self.detector;
        reason.detected(stats).inc();
        let active = self.active();
        let share = 100.0 * (active + 1) as f64 / self.hosts.len() as f64;
        let fits = share <= f64::from(config.max_ejection_percent.min(100))
            || config.always_eject_one_host && active == 0;
        if !fits {
            stats.ejections_overflow().inc();
            return false;
        }
        if matches!(reason, Reason::Consecutive5xx | Reason::SuccessRate) {
            stats.ejections_total().inc();
        }
        let enforced = self.rng.u32(..100) < reason.enforcing(config);
        let mut history = monitor.history();
        if enforced {
            let jitter = config.max_ejection_time_jitter.as_millis() as u64;
            let jitter = if jitter == 0 { 0 } else { self.rng.u64(..=jitter) };
            history.eject(now, Duration::from_millis(jitter), config);
            host.set_health_flag(HealthFlag::FailedOutlier, true);
            reason.enforced(stats).inc();
            stats.ejections_enforced_total().inc();
        }
        let since_last = history.returned_at.map(|at| now.saturating_duration_since(at).as_secs());
        self.log(host, history.ejections, since_last, Action::Eject { reason, enforced, details });
        enforced
    }

    fn take_back(&mut self, host: &Host, monitor: &Monitor, now: Instant) {
        host.set_health_flag(HealthFlag::FailedOutlier, false);
        // What it failed at while nobody should have chosen it does not count.
        monitor.reset();
        let mut history = monitor.history();
        history.returned_at = Some(now);
        let since_last = history.ejected_at.map(|at| now.saturating_duration_since(at).as_secs());
        self.log(host, history.ejections, since_last, Action::Uneject);
    }

    fn log(&self, host: &Host, ejections: u32, since_last: Option<u64>, action: Action) {
        tracing::debug!(cluster = %self.cluster, host = %host.address(), ?action, "outlier detection");
        if let Some(events) = self.events {
            let (at, address) = (SystemTime::now(), host.address().to_string());
            let event = Event { at, since_last, cluster: self.cluster, address, ejections, action };
            events.write_line(&event.json());
        }
    }

    /// How many are ejected now.
    fn active(&self) -> u64 {
        self.hosts.iter().filter(|host| host.has(HealthFlag::FailedOutlier)).count() as u64
    }
}

#[cfg(test)]
mod tests;
