//! `ClusterLoadAssignment`.

use std::sync::Arc;

use tidegate_api::core;
use tidegate_api::endpoint as api;
use tidegate_api::endpoint::cluster_load_assignment::Policy;
use tidegate_api::endpoint::lb_endpoint::HostIdentifier;
use tidegate_api::endpoint::locality_lb_endpoints::LbConfig;
use tidegate_api::wkt::value::Kind;

use super::net::host_and_port;
use super::{Report, each, enumeration, inactive};
use crate::config::cluster::Discovery;
use crate::config::endpoint::{
    ClusterLoadAssignment, EndpointAddress, HealthStatus, LbEndpoint, Locality, LocalityLbEndpoints,
};
use crate::config::health_check::EndpointHealthCheck;
use crate::config::proto::FieldPath;
use crate::config::transport_socket::TransportSocketMatches;

/// Envoy's default, in percent.
const OVERPROVISIONING_FACTOR: u32 = 140;

/// What an assignment needs to know of its cluster.
pub(in crate::config) struct Of<'a> {
    pub(in crate::config) discovery: Discovery,
    pub(in crate::config) transport_sockets: &'a TransportSocketMatches,
}

pub(in crate::config) fn load_assignment(
    assignment: api::ClusterLoadAssignment,
    of: &Of<'_>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> ClusterLoadAssignment {
    let api::ClusterLoadAssignment {
        // EDS only; Envoy does not compare it with the cluster's name either.
        cluster_name: _,
        endpoints,
        named_endpoints,
        policy,
    } = assignment;
    let overprovisioning_factor = policy.map_or(OVERPROVISIONING_FACTOR, |policy| {
        let Policy {
            drop_overloads,
            overprovisioning_factor,
            endpoint_stale_after,
            weighted_priority_health,
        } = policy;
        let path = path.field("policy");
        inactive!(report, &path, "ClusterLoadAssignment.Policy";
            drop_overloads, endpoint_stale_after, weighted_priority_health);
        overprovisioning_factor.unwrap_or(OVERPROVISIONING_FACTOR)
    });
    let localities = each(endpoints, path, "endpoints", |group, path| {
        Some(locality_lb_endpoints(group, &named_endpoints, of, path, report))
    });
    ClusterLoadAssignment { localities, overprovisioning_factor }
}

type Named = std::collections::BTreeMap<String, api::Endpoint>;

#[expect(deprecated, reason = "deprecated fields are accepted as long as Envoy accepts them")]
fn locality_lb_endpoints(
    group: api::LocalityLbEndpoints,
    named: &Named,
    of: &Of<'_>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> LocalityLbEndpoints {
    let api::LocalityLbEndpoints {
        locality,
        metadata,
        lb_endpoints,
        load_balancing_weight,
        priority,
        proximity,
        lb_config,
    } = group;
    inactive!(report, path, "LocalityLbEndpoints"; proximity);
    let convert = |endpoints, path: &FieldPath<'_>, report: &mut Report<'_>| {
        each(endpoints, path, "lb_endpoints", |endpoint, path| {
            lb_endpoint(endpoint, metadata.as_ref(), named, of, path, report)
        })
    };
    let endpoints = match lb_config {
        None => convert(lb_endpoints, path, report),
        Some(LbConfig::LoadBalancerEndpoints(list)) => {
            convert(list.lb_endpoints, &path.field("load_balancer_endpoints"), report)
        }
        Some(LbConfig::LedsClusterLocalityConfig(_)) => {
            report.unsupported(
                &path.field("leds_cluster_locality_config"),
                "LEDS is not supported in this version; use lb_endpoints",
            );
            vec![]
        }
    };
    let core::Locality { region, zone, sub_zone } = locality.unwrap_or_default();
    LocalityLbEndpoints {
        locality: Locality { region: shared(region), zone: shared(zone), sub_zone: shared(sub_zone) },
        priority,
        load_balancing_weight,
        endpoints,
    }
}

fn lb_endpoint(
    endpoint: api::LbEndpoint,
    locality_metadata: Option<&core::Metadata>,
    named: &Named,
    of: &Of<'_>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<LbEndpoint> {
    let api::LbEndpoint { health_status, metadata, load_balancing_weight, host_identifier } = endpoint;
    // An endpoint's own labels win over those of its locality.
    let labelled =
        |metadata: &&core::Metadata| metadata.filter_metadata.contains_key("envoy.transport_socket_match");
    let effective = metadata.as_ref().filter(labelled).or(locality_metadata);
    if let Some(name) = of.transport_sockets.selects_encryption(effective) {
        report.unsupported(
            &path.field("metadata"),
            format!(
                "this endpoint selects transport_socket_matches {name:?}, which is not supported in this version, \
                 and sending in plaintext instead would be unsafe"
            ),
        );
    }
    let (endpoint, field) = match host_identifier {
        Some(HostIdentifier::Endpoint(endpoint)) => (endpoint, "endpoint"),
        Some(HostIdentifier::EndpointName(name)) => {
            let Some(endpoint) = named.get(&name) else {
                report.invalid(&path.field("endpoint_name"), format!("named_endpoints has no {name:?}"));
                return None;
            };
            (endpoint.clone(), "endpoint_name")
        }
        None => {
            report.missing(path, "endpoint");
            return None;
        }
    };
    let health_status = match enumeration(health_status, path, "health_status", report)? {
        core::HealthStatus::Unknown => HealthStatus::Unknown,
        core::HealthStatus::Healthy => HealthStatus::Healthy,
        core::HealthStatus::Unhealthy => HealthStatus::Unhealthy,
        core::HealthStatus::Draining => HealthStatus::Draining,
        core::HealthStatus::Timeout => HealthStatus::Timeout,
        core::HealthStatus::Degraded => HealthStatus::Degraded,
    };
    let (address, hostname, health_check) = host(endpoint, of.discovery, &path.field(field), report)?;
    let hash_key = metadata.and_then(|metadata| hash_key(metadata, &path.field("metadata"), report));
    Some(LbEndpoint {
        address,
        hostname,
        load_balancing_weight: load_balancing_weight.unwrap_or(1).max(1),
        health_status,
        health_check,
        hash_key,
    })
}

/// `hash_key` of the filter metadata `envoy.lb`. Only the endpoint's own counts in Envoy, not that of its locality.
fn hash_key(mut metadata: core::Metadata, path: &FieldPath<'_>, report: &mut Report<'_>) -> Option<Arc<str>> {
    let key = metadata.filter_metadata.get_mut("envoy.lb")?.fields.remove("hash_key")?;
    match key.kind? {
        Kind::StringValue(key) if key.is_empty() => None,
        Kind::StringValue(key) => Some(key.into()),
        _ => {
            report.warn(
                &path.field("filter_metadata"),
                "hash_key of envoy.lb is not a string and is not used, as in Envoy; write it in quotes",
            );
            None
        }
    }
}

fn host(
    endpoint: api::Endpoint,
    discovery: Discovery,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<(EndpointAddress, Arc<str>, Option<Arc<EndpointHealthCheck>>)> {
    let api::Endpoint { address, health_check_config, hostname, additional_addresses, observability_name } =
        endpoint;
    inactive!(report, path, "Endpoint"; additional_addresses, observability_name);
    let health_check = match health_check_config {
        Some(config) => Some(Arc::new(health_check(config, &path.field("health_check_config"), report)?)),
        None => None,
    };
    let address = host_and_port(address, path, "address", report)?;
    if let EndpointAddress::Pipe(_) = address {
        return pipe_refusal(discovery, report).map_or(Some((address, shared(hostname), None)), |refusal| {
            report.unsupported(&path.field("address").field("pipe"), refusal);
            None
        });
    }
    if let (EndpointAddress::Name(name, _), Discovery::Static | Discovery::Eds) = (&address, discovery) {
        let path = path.field("address");
        let path = path.field("socket_address");
        report.invalid(
            &path.field("address"),
            format!("malformed IP address: {name}. Consider setting cluster type to 'STRICT_DNS'"),
        );
        return None;
    }
    Some((address, shared(hostname), health_check))
}

/// Where an endpoint is checked. An address is there already when the endpoint's own name is still to be resolved.
fn health_check(
    config: api::endpoint::HealthCheckConfig,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<EndpointHealthCheck> {
    let api::endpoint::HealthCheckConfig {
        port_value,
        hostname: _, // HTTP and gRPC only
        address,
        disable_active_health_check,
    } = config;
    let address = match address {
        None => None,
        Some(address) => match host_and_port(Some(address), path, "address", report)? {
            EndpointAddress::Ip(address) => Some(address),
            EndpointAddress::Name(name, _) => {
                report.invalid(&path.field("address"), format!("malformed IP address: {name}"));
                return None;
            }
            EndpointAddress::Pipe(_) => {
                report.unsupported(
                    &path.field("address").field("pipe"),
                    "health checks go to socket addresses only in this version",
                );
                return None;
            }
        },
    };
    let port = super::port(port_value, &path.field("port_value"), report)?;
    Some(EndpointHealthCheck { address, port, disabled: disable_active_health_check })
}

/// Why an endpoint may not be a Unix domain socket, unless it may.
fn pipe_refusal(discovery: Discovery, report: &Report<'_>) -> Option<&'static str> {
    if !report.is_bootstrap {
        return Some(
            "unix domain sockets lead to control planes only, and those clusters are in static_resources of the \
             bootstrap; use socket_address",
        );
    }
    (discovery != Discovery::Static)
        .then_some("there is nothing to resolve; set the cluster's type to STATIC")
}

/// There are many empty ones, for which nothing needs to be allocated.
fn shared(text: String) -> Arc<str> {
    if text.is_empty() { Arc::default() } else { text.into() }
}
