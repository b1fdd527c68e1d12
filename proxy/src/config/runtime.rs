//! Runtime keys that have an effect here.

use std::collections::BTreeMap;

/// What the static layers of `layered_runtime` say together, later layers over earlier ones.
#[derive(Clone, Debug, Default)]
pub struct Runtime {
    /// By listener name.
    pub(super) connection_limits: BTreeMap<String, u64>,
    /// Keys below `outlier_detection.` and `health_check.`.
    pub(super) numbers: BTreeMap<String, u64>,
}

/// Every key that a cluster's health can be tuned with.
pub(super) const HEALTH_KEYS: [&str; 23] = [
    "health_check.max_interval",
    "health_check.min_interval",
    "outlier_detection.base_ejection_time_ms",
    "outlier_detection.consecutive_5xx",
    "outlier_detection.consecutive_gateway_failure",
    "outlier_detection.consecutive_local_origin_failure",
    "outlier_detection.enforcing_consecutive_5xx",
    "outlier_detection.enforcing_consecutive_gateway_failure",
    "outlier_detection.enforcing_consecutive_local_origin_failure",
    "outlier_detection.enforcing_failure_percentage",
    "outlier_detection.enforcing_failure_percentage_local_origin",
    "outlier_detection.enforcing_local_origin_success_rate",
    "outlier_detection.enforcing_success_rate",
    "outlier_detection.failure_percentage_minimum_hosts",
    "outlier_detection.failure_percentage_request_volume",
    "outlier_detection.failure_percentage_threshold",
    "outlier_detection.interval_ms",
    "outlier_detection.max_ejection_percent",
    "outlier_detection.max_ejection_time_jitter_ms",
    "outlier_detection.max_ejection_time_ms",
    "outlier_detection.success_rate_minimum_hosts",
    "outlier_detection.success_rate_request_volume",
    "outlier_detection.success_rate_stdev_factor",
];

impl Runtime {
    /// `envoy.resource_limits.listener.<name>.connection_limit`.
    pub fn connection_limit(&self, listener: &str) -> Option<u64> {
        self.connection_limits.get(listener).copied()
    }

    /// The number that `<prefix><key>` has, if it is set.
    pub fn number(&self, prefix: &str, key: &str) -> Option<u64> {
        if self.numbers.is_empty() {
            return None;
        }
        self.numbers.get(&format!("{prefix}{key}")).copied()
    }

    #[cfg(test)]
    pub(crate) fn with_numbers(numbers: impl IntoIterator<Item = (&'static str, u64)>) -> Self {
        let numbers = numbers.into_iter().map(|(key, number)| (key.to_owned(), number)).collect();
        Self { numbers, ..Self::default() }
    }
}
