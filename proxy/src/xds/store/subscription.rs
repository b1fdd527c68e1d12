//! What Envoy counts of every subscription: attempts, outcomes, the version that was accepted last.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use crate::config::config_source::{Protocol, Source};
use crate::stats::{
    ClusterManagerStats, ClusterStats, Histogram, ListenerManagerStats, RdsStats, SdsStats, SharedCounter,
    SharedGauge, Text, version_hash,
};

/// A response that is being applied.
#[derive(Clone, Debug)]
pub(super) struct Applying {
    /// `version_info`, or `system_version_info`.
    pub(super) version: Arc<str>,
    /// Since when.
    pub(super) since: Instant,
}

impl Applying {
    pub(super) fn now(version: &str) -> Self {
        Self { version: version.into(), since: Instant::now() }
    }
}

/// The stats that subscriptions have in common.
pub(super) trait SubscriptionStats {
    fn attempt(&self) -> SharedCounter<'_>;
    fn failure(&self) -> SharedCounter<'_>;
    fn rejected(&self) -> SharedCounter<'_>;
    fn success(&self) -> SharedCounter<'_>;
    fn timeout(&self) -> SharedCounter<'_>;
    fn time(&self) -> SharedGauge<'_>;
    fn version(&self) -> SharedGauge<'_>;
    fn text(&self) -> Text<'_>;
    /// There are too many clusters for a histogram of each.
    fn duration(&self) -> Option<Histogram<'_>>;

    /// It is asked for. A file is read at once, which counts as an update then.
    fn subscribed(&self, source: &Source) {
        self.text().set(&Arc::default());
        if !matches!(source, Source::Path(_)) {
            self.attempt().inc();
        }
    }

    fn count_success(&self, applying: &Applying) {
        self.attempt().inc();
        self.success().inc();
        self.time().set(now());
        self.version().set(version_hash(&applying.version));
        self.text().set(&applying.version);
        if let Some(duration) = self.duration() {
            duration.record(u64::try_from(applying.since.elapsed().as_millis()).unwrap_or(u64::MAX));
        }
    }

    fn count_rejected(&self) {
        self.attempt().inc();
        self.rejected().inc();
    }

    fn count_failure(&self) {
        self.attempt().inc();
        self.failure().inc();
    }

    fn count_timeout(&self) {
        self.attempt().inc();
        self.timeout().inc();
    }
}

macro_rules! subscription_stats {
    ($stats:ty: $attempt:ident, $failure:ident, $rejected:ident, $success:ident, $timeout:ident, $time:ident,
     $version:ident, $text:ident, $duration:expr) => {
        impl SubscriptionStats for $stats {
            fn attempt(&self) -> SharedCounter<'_> {
                self.$attempt()
            }
            fn failure(&self) -> SharedCounter<'_> {
                self.$failure()
            }
            fn rejected(&self) -> SharedCounter<'_> {
                self.$rejected()
            }
            fn success(&self) -> SharedCounter<'_> {
                self.$success()
            }
            fn timeout(&self) -> SharedCounter<'_> {
                self.$timeout()
            }
            fn time(&self) -> SharedGauge<'_> {
                self.$time()
            }
            fn version(&self) -> SharedGauge<'_> {
                self.$version()
            }
            fn text(&self) -> Text<'_> {
                self.$text()
            }
            fn duration(&self) -> Option<Histogram<'_>> {
                let duration: fn(&Self) -> Option<Histogram<'_>> = $duration;
                duration(self)
            }
        }
    };
}

subscription_stats!(ClusterManagerStats: cds_update_attempt, cds_update_failure, cds_update_rejected, cds_update_success,
    cds_init_fetch_timeout, cds_update_time, cds_version, cds_version_text, |it| Some(it.cds_update_duration()));
subscription_stats!(ListenerManagerStats: lds_update_attempt, lds_update_failure, lds_update_rejected, lds_update_success,
    lds_init_fetch_timeout, lds_update_time, lds_version, lds_version_text, |it| Some(it.lds_update_duration()));
subscription_stats!(ClusterStats: update_attempt, update_failure, update_rejected, update_success,
    init_fetch_timeout, update_time, version, version_text, |_| None);
subscription_stats!(RdsStats: update_attempt, update_failure, update_rejected, update_success,
    init_fetch_timeout, update_time, version, version_text, |it| Some(it.update_duration()));
subscription_stats!(SdsStats: update_attempt, update_failure, update_rejected, update_success,
    init_fetch_timeout, update_time, version, version_text, |it| Some(it.update_duration()));

impl RdsStats {
    /// The routes are others now.
    pub(super) fn count_reload(&self) {
        self.config_reload().inc();
        self.config_reload_time_ms().set(now());
    }
}

/// Whether a response tells each subscription of its source something, also when it does not have its resource: on a gRPC
/// stream those who are not mentioned hear nothing.
pub(super) fn tells_all(source: &Source) -> bool {
    match source {
        Source::Path(_) => true,
        Source::Api(api) => api.protocol == Protocol::Rest,
        Source::Ads => false,
    }
}

/// Milliseconds since 1970.
pub(super) fn now() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}
