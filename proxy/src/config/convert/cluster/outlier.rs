//! `outlier_detection`.

use std::time::Duration;

use tidegate_api::cluster as api;

use super::super::{Report, inactive, optional_duration};
use crate::config::cluster::Discovery;
use crate::config::outlier::{
    Enforcing, FailurePercentage, MAX_EJECTION_TIME, OutlierDetection, SuccessRate,
};
use crate::config::proto::FieldPath;

pub(super) fn outlier_detection(
    detection: Option<api::OutlierDetection>,
    discovery: Discovery,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<OutlierDetection> {
    let detection = detection?;
    if discovery == Discovery::OriginalDst {
        // Envoy's balancer of these clusters does not look at health either.
        report.warn_once(
            "outlier_detection of ORIGINAL_DST".into(),
            &path.field("outlier_detection"),
            "no effect on a cluster of type ORIGINAL_DST, where clients choose the endpoint",
        );
        return None;
    }
    let path = path.field("outlier_detection");
    let api::OutlierDetection {
        consecutive_5xx,
        interval,
        base_ejection_time,
        max_ejection_percent,
        enforcing_consecutive_5xx,
        enforcing_success_rate,
        success_rate_minimum_hosts,
        success_rate_request_volume,
        success_rate_stdev_factor,
        consecutive_gateway_failure,
        enforcing_consecutive_gateway_failure,
        split_external_local_origin_errors,
        consecutive_local_origin_failure,
        enforcing_consecutive_local_origin_failure,
        enforcing_local_origin_success_rate,
        failure_percentage_threshold,
        enforcing_failure_percentage,
        enforcing_failure_percentage_local_origin,
        failure_percentage_minimum_hosts,
        failure_percentage_request_volume,
        max_ejection_time,
        max_ejection_time_jitter,
        successful_active_health_check_uneject_host,
        monitors,
        always_eject_one_host,
        detect_degraded_hosts: _, // HTTP only: a response's header says so
    } = detection;
    inactive!(report, &path, "OutlierDetection"; monitors);
    let default = OutlierDetection::default();
    let mut time = |value, field: &str| optional_duration(value, &path, field, report);
    let interval = time(interval, "interval").unwrap_or(default.interval);
    let base = time(base_ejection_time, "base_ejection_time").unwrap_or(default.base_ejection_time);
    let max = time(max_ejection_time, "max_ejection_time");
    let jitter = time(max_ejection_time_jitter, "max_ejection_time_jitter").unwrap_or(Duration::ZERO);
    if max.is_some_and(|max| max < base) {
        report.invalid(
            &path.field("max_ejection_time"),
            "outlier detector's max_ejection_time cannot be smaller than base_ejection_time",
        );
    }
    Some(OutlierDetection {
        consecutive_5xx: consecutive_5xx.unwrap_or(default.consecutive_5xx),
        consecutive_gateway_failure: consecutive_gateway_failure
            .unwrap_or(default.consecutive_gateway_failure),
        consecutive_local_origin_failure: consecutive_local_origin_failure
            .unwrap_or(default.consecutive_local_origin_failure),
        interval,
        base_ejection_time: base,
        max_ejection_time: max.unwrap_or_else(|| MAX_EJECTION_TIME.max(base)),
        max_ejection_time_jitter: jitter,
        max_ejection_percent: max_ejection_percent.unwrap_or(default.max_ejection_percent),
        always_eject_one_host: always_eject_one_host.unwrap_or(default.always_eject_one_host),
        split_external_local_origin_errors,
        successful_active_health_check_uneject_host: successful_active_health_check_uneject_host
            .unwrap_or(default.successful_active_health_check_uneject_host),
        success_rate: SuccessRate {
            minimum_hosts: success_rate_minimum_hosts.unwrap_or(default.success_rate.minimum_hosts),
            request_volume: success_rate_request_volume.unwrap_or(default.success_rate.request_volume),
            stdev_factor: success_rate_stdev_factor.unwrap_or(default.success_rate.stdev_factor),
        },
        failure_percentage: FailurePercentage {
            threshold: failure_percentage_threshold.unwrap_or(default.failure_percentage.threshold),
            minimum_hosts: failure_percentage_minimum_hosts
                .unwrap_or(default.failure_percentage.minimum_hosts),
            request_volume: failure_percentage_request_volume
                .unwrap_or(default.failure_percentage.request_volume),
        },
        enforcing: Enforcing {
            consecutive_5xx: enforcing_consecutive_5xx.unwrap_or(default.enforcing.consecutive_5xx),
            consecutive_gateway_failure: enforcing_consecutive_gateway_failure
                .unwrap_or(default.enforcing.consecutive_gateway_failure),
            consecutive_local_origin_failure: enforcing_consecutive_local_origin_failure
                .unwrap_or(default.enforcing.consecutive_local_origin_failure),
            success_rate: enforcing_success_rate.unwrap_or(default.enforcing.success_rate),
            local_origin_success_rate: enforcing_local_origin_success_rate
                .unwrap_or(default.enforcing.local_origin_success_rate),
            failure_percentage: enforcing_failure_percentage.unwrap_or(default.enforcing.failure_percentage),
            failure_percentage_local_origin: enforcing_failure_percentage_local_origin
                .unwrap_or(default.enforcing.failure_percentage_local_origin),
        },
    })
}
