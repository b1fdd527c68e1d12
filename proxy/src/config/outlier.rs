//! `envoy.config.cluster.v3.OutlierDetection`.

use std::time::Duration;

use super::runtime::Runtime;

/// Outlier detection with every default applied. Percentages are 0 to 100.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutlierDetection {
    /// Failures in a row that eject, when they are not told apart by origin. Default 5.
    pub consecutive_5xx: u32,
    /// The same, for failures that HTTP calls 502, 503 and 504: every failed connect is one. Default 5.
    pub consecutive_gateway_failure: u32,
    /// Failed connects in a row that eject, when failures are told apart by origin. Default 5.
    pub consecutive_local_origin_failure: u32,
    /// Between sweeps: ejected hosts come back, success rates are compared. Default 10 s, never 0.
    pub interval: Duration,
    /// How long a host is ejected the first time; the second time twice as long, and so on. Default 30 s, never 0.
    pub base_ejection_time: Duration,
    /// How long at most. Default 300 s, or `base_ejection_time` if that is longer.
    pub max_ejection_time: Duration,
    /// Up to so much longer, at random. Default 0.
    pub max_ejection_time_jitter: Duration,
    /// How many hosts may be ejected at the same time. Default 10.
    pub max_ejection_percent: u32,
    /// One may always be. Default false.
    pub always_eject_one_host: bool,
    /// Failed connects count apart from failures that a server reports.
    pub split_external_local_origin_errors: bool,
    /// A success of active health checks ends an ejection. Default true.
    pub successful_active_health_check_uneject_host: bool,
    /// Hosts that fall behind the others.
    pub success_rate: SuccessRate,
    /// Hosts that fail too often.
    pub failure_percentage: FailurePercentage,
    /// How likely a detected outlier is ejected.
    pub enforcing: Enforcing,
}

/// Ejection of hosts whose success rate is far below the average.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SuccessRate {
    /// Hosts with enough requests in an interval, or nothing is compared. Default 5.
    pub minimum_hosts: u32,
    /// Requests in an interval that are enough. Default 100.
    pub request_volume: u32,
    /// A host is an outlier below the mean less so many standard deviations, in thousandths. Default 1900.
    pub stdev_factor: u32,
}

/// Ejection of hosts that fail in more than so many percent of all cases.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailurePercentage {
    /// Percent of failures from which a host is an outlier. Default 85.
    pub threshold: u32,
    /// Hosts with enough requests in an interval, or nothing is done. Default 5.
    pub minimum_hosts: u32,
    /// Requests in an interval that are enough. Default 50.
    pub request_volume: u32,
}

/// In how many percent of all cases a detected outlier is ejected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enforcing {
    /// Default 100.
    pub consecutive_5xx: u32,
    /// Default 0.
    pub consecutive_gateway_failure: u32,
    /// Default 100.
    pub consecutive_local_origin_failure: u32,
    /// Default 100.
    pub success_rate: u32,
    /// Default 100.
    pub local_origin_success_rate: u32,
    /// Default 0.
    pub failure_percentage: u32,
    /// Default 0.
    pub failure_percentage_local_origin: u32,
}

/// Envoy's default of `max_ejection_time`.
pub(super) const MAX_EJECTION_TIME: Duration = Duration::from_mins(5);

impl Default for OutlierDetection {
    fn default() -> Self {
        Self {
            consecutive_5xx: 5,
            consecutive_gateway_failure: 5,
            consecutive_local_origin_failure: 5,
            interval: Duration::from_secs(10),
            base_ejection_time: Duration::from_secs(30),
            max_ejection_time: MAX_EJECTION_TIME,
            max_ejection_time_jitter: Duration::ZERO,
            max_ejection_percent: 10,
            always_eject_one_host: false,
            split_external_local_origin_errors: false,
            successful_active_health_check_uneject_host: true,
            success_rate: SuccessRate { minimum_hosts: 5, request_volume: 100, stdev_factor: 1900 },
            failure_percentage: FailurePercentage { threshold: 85, minimum_hosts: 5, request_volume: 50 },
            enforcing: Enforcing {
                consecutive_5xx: 100,
                consecutive_gateway_failure: 0,
                consecutive_local_origin_failure: 100,
                success_rate: 100,
                local_origin_success_rate: 100,
                failure_percentage: 0,
                failure_percentage_local_origin: 0,
            },
        }
    }
}

impl OutlierDetection {
    /// Puts the runtime keys `outlier_detection.*` in the place of what the cluster says.
    pub fn apply_runtime(&mut self, runtime: &Runtime) {
        let number = |key: &str, value: &mut u32| {
            if let Some(number) = runtime.number("outlier_detection.", key) {
                *value = u32::try_from(number).unwrap_or(u32::MAX);
            }
        };
        number("consecutive_5xx", &mut self.consecutive_5xx);
        number("consecutive_gateway_failure", &mut self.consecutive_gateway_failure);
        number("consecutive_local_origin_failure", &mut self.consecutive_local_origin_failure);
        number("max_ejection_percent", &mut self.max_ejection_percent);
        let success_rate = &mut self.success_rate;
        number("success_rate_minimum_hosts", &mut success_rate.minimum_hosts);
        number("success_rate_request_volume", &mut success_rate.request_volume);
        number("success_rate_stdev_factor", &mut success_rate.stdev_factor);
        let failure_percentage = &mut self.failure_percentage;
        number("failure_percentage_threshold", &mut failure_percentage.threshold);
        number("failure_percentage_minimum_hosts", &mut failure_percentage.minimum_hosts);
        number("failure_percentage_request_volume", &mut failure_percentage.request_volume);
        let enforcing = &mut self.enforcing;
        for (key, value) in [
            ("enforcing_consecutive_5xx", &mut enforcing.consecutive_5xx),
            ("enforcing_consecutive_gateway_failure", &mut enforcing.consecutive_gateway_failure),
            ("enforcing_consecutive_local_origin_failure", &mut enforcing.consecutive_local_origin_failure),
            ("enforcing_success_rate", &mut enforcing.success_rate),
            ("enforcing_local_origin_success_rate", &mut enforcing.local_origin_success_rate),
            ("enforcing_failure_percentage", &mut enforcing.failure_percentage),
            ("enforcing_failure_percentage_local_origin", &mut enforcing.failure_percentage_local_origin),
        ] {
            number(key, value);
        }
        for (key, value) in [
            ("interval_ms", &mut self.interval),
            ("base_ejection_time_ms", &mut self.base_ejection_time),
            ("max_ejection_time_ms", &mut self.max_ejection_time),
            ("max_ejection_time_jitter_ms", &mut self.max_ejection_time_jitter),
        ] {
            if let Some(number) = runtime.number("outlier_detection.", key) {
                *value = Duration::from_millis(number);
            }
        }
        // A timer of 0 would never let go of the thread.
        self.interval = self.interval.max(Duration::from_millis(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runtime_keys_win() {
        let runtime = Runtime::with_numbers([
            ("outlier_detection.consecutive_5xx", 2),
            ("outlier_detection.interval_ms", 0),
            ("outlier_detection.base_ejection_time_ms", 1500),
            ("outlier_detection.enforcing_success_rate", 7),
        ]);
        let mut config = OutlierDetection::default();
        config.apply_runtime(&runtime);
        assert_eq!((config.consecutive_5xx, config.consecutive_gateway_failure), (2, 5));
        assert_eq!(config.interval, Duration::from_millis(1));
        assert_eq!(config.base_ejection_time, Duration::from_millis(1500));
        assert_eq!(config.enforcing.success_rate, 7);
    }
}
