//! RING_HASH and MAGLEV.

use tidegate_api::cluster::cluster as parts;
use tidegate_api::cluster::cluster::ring_hash_lb_config::HashFunction as Function;
use tidegate_api::envoy::extensions::load_balancing_policies as policies;
use tidegate_api::route::route_action as api;
use tidegate_api::route::route_action::hash_policy::PolicySpecifier;

use crate::config::cluster::{
    ClusterHashPolicy, ConsistentHashing, HashFunction, LbPolicy, Maglev, RingHash,
};
use crate::config::convert::{Report, enumeration};
use crate::config::proto::FieldPath;

/// Envoy's defaults.
const MINIMUM_RING_SIZE: u64 = 1024;
const MAXIMUM_RING_SIZE: u64 = 8 << 20;
const TABLE_SIZE: u64 = 65_537;

pub(super) fn ring_hash(
    config: &parts::RingHashLbConfig,
    hashing: ConsistentHashing,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<LbPolicy> {
    let parts::RingHashLbConfig { minimum_ring_size, maximum_ring_size, hash_function } = *config;
    let hash_function = match enumeration::<Function>(hash_function, path, "hash_function", report)? {
        Function::XxHash => HashFunction::XxHash,
        Function::MurmurHash2 => HashFunction::MurmurHash2,
    };
    ring((minimum_ring_size, maximum_ring_size), hash_function, hashing, path, report)
}

fn ring(
    (minimum, maximum): (Option<u64>, Option<u64>),
    hash_function: HashFunction,
    hashing: ConsistentHashing,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<LbPolicy> {
    let minimum_ring_size = minimum.unwrap_or(MINIMUM_RING_SIZE);
    let maximum_ring_size = maximum.unwrap_or(MAXIMUM_RING_SIZE);
    if minimum_ring_size > maximum_ring_size {
        report.invalid(
            path,
            format!(
                "ring hash: minimum_ring_size ({minimum_ring_size}) > maximum_ring_size ({maximum_ring_size})"
            ),
        );
        return None;
    }
    Some(LbPolicy::RingHash(RingHash { minimum_ring_size, maximum_ring_size, hash_function, hashing }))
}

pub(super) fn maglev(
    table_size: Option<u64>,
    hashing: ConsistentHashing,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<LbPolicy> {
    let table_size = table_size.unwrap_or(TABLE_SIZE);
    if !is_prime(table_size) {
        report.invalid(
            &path.field("table_size"),
            format!("the table size of Maglev must be a prime number, and {table_size} is not one"),
        );
        return None;
    }
    Some(LbPolicy::Maglev(Maglev { table_size, hashing }))
}

fn is_prime(number: u64) -> bool {
    let divisors = (2..).take_while(|divisor| divisor * divisor <= number);
    number >= 2 && divisors.into_iter().all(|divisor| !number.is_multiple_of(divisor))
}

#[expect(deprecated, reason = "deprecated fields are accepted as long as Envoy accepts them")]
pub(super) fn typed_ring_hash(
    config: policies::ring_hash::v3::RingHash,
    locality_weighted: &mut bool,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<LbPolicy> {
    use policies::ring_hash::v3::ring_hash::HashFunction as Typed;
    let policies::ring_hash::v3::RingHash {
        hash_function,
        minimum_ring_size,
        maximum_ring_size,
        use_hostname_for_hashing,
        hash_balance_factor,
        consistent_hashing_lb_config,
        locality_weighted_lb_config,
    } = config;
    *locality_weighted |= locality_weighted_lb_config.is_some();
    let hash_function = match enumeration::<Typed>(hash_function, path, "hash_function", report)? {
        Typed::DefaultHash | Typed::XxHash => HashFunction::XxHash,
        Typed::MurmurHash2 => HashFunction::MurmurHash2,
    };
    let hashing = match consistent_hashing_lb_config {
        Some(config) => typed(config, path, report),
        None => ConsistentHashing {
            use_hostname_for_hashing,
            hash_balance_factor,
            hash_policy: ClusterHashPolicy::Unset,
        },
    };
    ring((minimum_ring_size, maximum_ring_size), hash_function, hashing, path, report)
}

pub(super) fn typed_maglev(
    config: policies::maglev::v3::Maglev,
    locality_weighted: &mut bool,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<LbPolicy> {
    let policies::maglev::v3::Maglev {
        table_size,
        consistent_hashing_lb_config,
        locality_weighted_lb_config,
    } = config;
    *locality_weighted |= locality_weighted_lb_config.is_some();
    let hashing = consistent_hashing_lb_config.map(|config| typed(config, path, report));
    maglev(table_size, hashing.unwrap_or_default(), path, report)
}

fn typed(
    config: policies::common::v3::ConsistentHashingLbConfig,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> ConsistentHashing {
    let policies::common::v3::ConsistentHashingLbConfig {
        use_hostname_for_hashing,
        hash_balance_factor,
        hash_policy,
    } = config;
    let path = path.field("consistent_hashing_lb_config");
    let hash_policy = cluster_hash_policy(hash_policy, &path.field("hash_policy"), report);
    ConsistentHashing { use_hostname_for_hashing, hash_balance_factor, hash_policy }
}

/// What of a list of policies that is made for HTTP a TCP connection has.
fn cluster_hash_policy(
    policies: Vec<api::HashPolicy>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> ClusterHashPolicy {
    if policies.is_empty() {
        return ClusterHashPolicy::Unset;
    }
    let mut times = 0_u8;
    for (index, api::HashPolicy { terminal, policy_specifier }) in policies.into_iter().enumerate() {
        let path = path.index(index);
        let other = match policy_specifier {
            Some(PolicySpecifier::ConnectionProperties(properties)) => {
                times = times.saturating_add(u8::from(properties.source_ip));
                if terminal && times > 0 {
                    break;
                }
                continue;
            }
            Some(PolicySpecifier::Header(_)) => "header",
            Some(PolicySpecifier::Cookie(_)) => "cookie",
            Some(PolicySpecifier::QueryParameter(_)) => "query_parameter",
            Some(PolicySpecifier::FilterState(_)) => "filter_state",
            None => {
                report.missing(&path, "connection_properties");
                continue;
            }
        };
        report.warn_once(
            format!("HashPolicy.{other}"),
            &path.field(other),
            "a TCP connection has nothing of it: this entry hashes nothing, as in Envoy",
        );
        if terminal && times > 0 {
            break;
        }
    }
    if times > 0 { ClusterHashPolicy::SourceIp(times) } else { ClusterHashPolicy::Nothing }
}

#[cfg(test)]
mod tests {
    use super::is_prime;

    #[test]
    fn primes() {
        let primes: Vec<u64> = (0..30).filter(|number| is_prime(*number)).collect();
        assert_eq!(primes, [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]);
        assert!(is_prime(65_537) && is_prime(5_000_011) && !is_prime(65_536) && !is_prime(251 * 257));
    }
}
