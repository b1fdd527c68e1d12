//! `lb_policy` and `load_balancing_policy`.

use tidegate_api::cluster as api;
use tidegate_api::cluster::cluster as parts;
use tidegate_api::cluster::cluster::{LbConfig, LbPolicy as Enum};
use tidegate_api::core::RuntimeDouble;
use tidegate_api::envoy::extensions::load_balancing_policies as policies;

use super::lb_config_field;
use crate::config::cluster::{ConsistentHashing, LbPolicy};
use crate::config::convert::extension::Extension;
use crate::config::convert::{Report, enumeration, inactive};
use crate::config::proto::FieldPath;

mod hashing;

/// Envoy's defaults.
const CHOICE_COUNT: u32 = 2;
const ACTIVE_REQUEST_BIAS: f64 = 1.0;

/// `load_balancing_policy` wins over `lb_policy`, as in Envoy.
pub(super) fn lb_policy(
    lb_policy: i32,
    typed: Option<api::LoadBalancingPolicy>,
    config: Option<LbConfig>,
    hashing: ConsistentHashing,
    locality_weighted: &mut bool,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<LbPolicy> {
    if let Some(typed) = typed {
        // Its own settings hold, and not those of common_lb_config.
        *locality_weighted = false;
        return typed_policy(typed, locality_weighted, &path.field("load_balancing_policy"), report);
    }
    let policy = enumeration(lb_policy, path, "lb_policy", report)?;
    match (policy, config) {
        (Enum::LeastRequest, Some(LbConfig::LeastRequestLbConfig(config))) => {
            let parts::LeastRequestLbConfig { choice_count, active_request_bias, slow_start_config } = config;
            let path = path.field("least_request_lb_config");
            inactive!(report, &path, "LeastRequestLbConfig"; slow_start_config);
            Some(least_request(choice_count, active_request_bias))
        }
        (Enum::RingHash, config) => {
            let config = match config {
                Some(LbConfig::RingHashLbConfig(config)) => config,
                _ => parts::RingHashLbConfig::default(),
            };
            hashing::ring_hash(&config, hashing, &path.field("ring_hash_lb_config"), report)
        }
        (Enum::Maglev, config) => {
            let config = match config {
                Some(LbConfig::MaglevLbConfig(config)) => config,
                _ => parts::MaglevLbConfig::default(),
            };
            let parts::MaglevLbConfig { table_size } = config;
            hashing::maglev(table_size, hashing, &path.field("maglev_lb_config"), report)
        }
        (policy, config) => {
            // Envoy does not read the settings of a policy that is not chosen.
            if let Some(config @ (LbConfig::OriginalDstLbConfig(_) | LbConfig::RoundRobinLbConfig(_))) =
                &config
            {
                report.inactive("Cluster", path, lb_config_field(config));
            }
            plain(policy, path, report)
        }
    }
}

fn plain(policy: Enum, path: &FieldPath<'_>, report: &mut Report<'_>) -> Option<LbPolicy> {
    match policy {
        Enum::RoundRobin => Some(LbPolicy::RoundRobin),
        Enum::Random => Some(LbPolicy::Random),
        Enum::LeastRequest => Some(least_request(None, None)),
        Enum::ClusterProvided => Some(LbPolicy::ClusterProvided),
        // Those that hash are converted before.
        Enum::RingHash | Enum::Maglev | Enum::LoadBalancingPolicyConfig => {
            report.invalid(
                &path.field("lb_policy"),
                "LOAD_BALANCING_POLICY_CONFIG needs the field load_balancing_policy; set it",
            );
            None
        }
    }
}

fn least_request(choice_count: Option<u32>, bias: Option<RuntimeDouble>) -> LbPolicy {
    let bias =
        bias.map_or(ACTIVE_REQUEST_BIAS, |RuntimeDouble { default_value, runtime_key: _ }| default_value);
    LbPolicy::LeastRequest {
        choice_count: choice_count.unwrap_or(CHOICE_COUNT).max(2),
        active_request_bias: bias,
    }
}

/// The first policy of the list that is known.
fn typed_policy(
    policy: api::LoadBalancingPolicy,
    locality_weighted: &mut bool,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<LbPolicy> {
    let api::LoadBalancingPolicy { policies } = policy;
    let policies_path = path.field("policies");
    let mut names = Vec::new();
    for (index, policy) in policies.into_iter().enumerate() {
        let path = policies_path.index(index);
        let Some(config) = policy.typed_extension_config else {
            report.missing(&path, "typed_extension_config");
            continue;
        };
        let path = path.field("typed_extension_config");
        let path = path.field("typed_config");
        match known(config.typed_config.unwrap_or_default(), locality_weighted, &path, report) {
            Some(policy) => return Some(policy),
            None => names.push(config.name),
        }
    }
    report.unsupported(
        path,
        format!(
            "none of these load balancing policies is supported in this version: [{}]; use round_robin, \
                 least_request, random, ring_hash or maglev",
            names.join(", ")
        ),
    );
    None
}

fn known(
    any: tidegate_api::wkt::Any,
    locality_weighted: &mut bool,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<LbPolicy> {
    let config = Extension::new(any);
    if config.is::<policies::round_robin::v3::RoundRobin>() {
        let policies::round_robin::v3::RoundRobin { slow_start_config, locality_lb_config } =
            config.decode(path, report)?;
        inactive!(report, path, "RoundRobin"; slow_start_config);
        *locality_weighted |= weighs_localities(locality_lb_config, path, report);
        Some(LbPolicy::RoundRobin)
    } else if config.is::<policies::least_request::v3::LeastRequest>() {
        Some(typed_least_request(config.decode(path, report)?, locality_weighted, path, report))
    } else if config.is::<policies::random::v3::Random>() {
        let policies::random::v3::Random { locality_lb_config } = config.decode(path, report)?;
        *locality_weighted |= weighs_localities(locality_lb_config, path, report);
        Some(LbPolicy::Random)
    } else if config.is::<policies::cluster_provided::v3::ClusterProvided>() {
        Some(LbPolicy::ClusterProvided)
    } else if config.is::<policies::ring_hash::v3::RingHash>() {
        hashing::typed_ring_hash(config.decode(path, report)?, locality_weighted, path, report)
    } else if config.is::<policies::maglev::v3::Maglev>() {
        hashing::typed_maglev(config.decode(path, report)?, locality_weighted, path, report)
    } else if config.is::<policies::wrr_locality::v3::WrrLocality>() {
        let policies::wrr_locality::v3::WrrLocality { endpoint_picking_policy } =
            config.decode(path, report)?;
        *locality_weighted = true;
        typed_policy(
            endpoint_picking_policy?,
            locality_weighted,
            &path.field("endpoint_picking_policy"),
            report,
        )
    } else {
        None
    }
}

/// Whether load goes to localities by their weight.
fn weighs_localities(
    config: Option<policies::common::v3::LocalityLbConfig>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> bool {
    use policies::common::v3::locality_lb_config::LocalityConfigSpecifier;
    match config.and_then(|config| config.locality_config_specifier) {
        None => false,
        Some(LocalityConfigSpecifier::LocalityWeightedLbConfig(_)) => true,
        Some(LocalityConfigSpecifier::ZoneAwareLbConfig(_)) => {
            report.inactive("LocalityLbConfig", &path.field("locality_lb_config"), "zone_aware_lb_config");
            false
        }
    }
}

#[expect(deprecated, reason = "deprecated fields are accepted as long as Envoy accepts them")]
fn typed_least_request(
    config: policies::least_request::v3::LeastRequest,
    locality_weighted: &mut bool,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> LbPolicy {
    let policies::least_request::v3::LeastRequest {
        choice_count,
        active_request_bias,
        slow_start_config,
        locality_lb_config,
        enable_full_scan,
        selection_method,
    } = config;
    inactive!(report, path, "LeastRequest";
        slow_start_config, enable_full_scan, selection_method);
    *locality_weighted |= weighs_localities(locality_lb_config, path, report);
    least_request(choice_count, active_request_bias)
}
