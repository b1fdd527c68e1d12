//! Resources that come one by one from a control plane.
//!
//! Envoy has two ways to refuse them, and so have we. A resource that can't be decoded or breaks a rule of the API
//! ([`check`]) spoils the whole response; one that is right by these rules but can't be built ([`cluster`],
//! [`listener`], …) only itself.

use std::sync::Arc;

use prost::{Message, Name};
use tidegate_api::wkt::Any;
use tidegate_api::{
    cluster as cluster_api, endpoint as endpoint_api, listener as listener_api, route as route_api,
    tls as tls_api,
};

use super::cluster::Cluster;
use super::config_source::ConfigSource;
use super::convert::Report;
use super::convert::route::Validate;
use super::endpoint::ClusterLoadAssignment;
use super::error::{ConfigError, Problem};
use super::listener::Listener;
use super::proto::{self, FieldPath, SourceMap};
use super::route::{HttpRouting, RdsRouting};
use super::runtime::Runtime;
use super::tls::Secret;
use super::upstream_bind::BindConfig;
use super::{convert, proto::Checked};

/// A resource that follows the rules of the API.
#[derive(Clone, Debug)]
pub struct Valid<M> {
    /// The message.
    pub message: M,
    /// Fields that this version's API does not have; they are dropped.
    pub unknown_fields: Vec<Problem>,
    /// What is wrong inside its extensions, which only refuses the resource itself.
    nested: Vec<Problem>,
}

/// A converted resource.
#[derive(Debug)]
pub struct Converted<T> {
    /// What it means.
    pub value: T,
    /// What was accepted, but works otherwise than Envoy would.
    pub warnings: Vec<Problem>,
    /// Number of network filters that are accepted without effect.
    pub ignored_filters: usize,
}

/// What a resource needs to know of the rest of the configuration.
pub struct Surroundings<'a> {
    /// Whether a cluster exists.
    pub is_cluster: &'a dyn Fn(&str) -> bool,
    /// Whether a cluster has Unix domain sockets, where connections of clients can't go.
    pub has_pipes: &'a dyn Fn(&str) -> bool,
    /// Runtime keys.
    pub runtime: &'a Runtime,
}

/// Decodes a resource and checks it against the rules of the API. `label` stands where a file's name would.
pub fn check<M: Message + Name + Default>(body: &Any, label: &Arc<str>) -> Result<Valid<M>, ConfigError> {
    let Checked { message, broken, nested, unknown_fields } = proto::check_encoded(&body.value, label)?;
    match ConfigError::from_problems(broken) {
        Some(error) => Err(error),
        None => Ok(Valid { message, unknown_fields, nested }),
    }
}

/// Decodes a resource of which it is known that it follows the rules.
///
/// # Errors
/// The bytes are no such message after all.
pub fn decode<M: Message + Name + Default>(bytes: &[u8], label: &Arc<str>) -> Result<Valid<M>, ConfigError> {
    let malformed = |error| {
        let reason = super::error::Reason::Invalid(format!("not a valid {}: {error}", M::full_name()));
        SourceMap::unplaced(Arc::clone(label)).problem(&FieldPath::ROOT, reason)
    };
    let message = M::decode(bytes).map_err(malformed)?;
    Ok(Valid { message, unknown_fields: Vec::new(), nested: Vec::new() })
}

/// Converts with the rules that a static configuration has too. Without `around` what is named is taken to exist.
fn convert<M, T>(
    valid: Valid<M>,
    label: &Arc<str>,
    around: Option<&Surroundings<'_>>,
    convert: impl FnOnce(M, &FieldPath<'_>, &mut Report<'_>) -> Option<T>,
) -> Result<Converted<T>, ConfigError> {
    if let Some(error) = ConfigError::from_problems(valid.nested) {
        return Err(error);
    }
    let source = SourceMap::unplaced(Arc::clone(label));
    let mut report = Report::new(&source);
    match around {
        Some(around) => {
            report.set_clusters(around.is_cluster);
            report.set_pipes(around.has_pipes);
        }
        None => report.set_clusters(|_| true),
    }
    let value = convert(valid.message, &FieldPath::ROOT, &mut report);
    let ignored_filters = report.ignored_filters().values().sum();
    let warnings = report.finish()?;
    match value {
        Some(value) => Ok(Converted { value, warnings, ignored_filters }),
        None => {
            Err(source.problem(&FieldPath::ROOT, super::error::Reason::Invalid("not usable".into())).into())
        }
    }
}

/// A cluster. `upstream_bind` is the cluster manager's, which is the default.
pub fn cluster(
    valid: Valid<cluster_api::Cluster>,
    upstream_bind: Option<&Arc<BindConfig>>,
    label: &Arc<str>,
) -> Result<Converted<Cluster>, ConfigError> {
    convert(valid, label, None, |message, path, report| {
        report.set_upstream_bind(upstream_bind.cloned());
        convert::cluster::cluster(message, path, report)
    })
}

/// A listener.
pub fn listener(
    valid: Valid<listener_api::Listener>,
    label: &Arc<str>,
    around: &Surroundings<'_>,
) -> Result<Converted<Listener>, ConfigError> {
    convert(valid, label, Some(around), |message, path, report| {
        convert::listener::listener(message, around.runtime, path, report)
    })
}

/// The endpoints of a cluster.
pub fn load_assignment(
    valid: Valid<endpoint_api::ClusterLoadAssignment>,
    cluster: &Cluster,
    label: &Arc<str>,
) -> Result<Converted<ClusterLoadAssignment>, ConfigError> {
    let of =
        convert::endpoint::Of { discovery: cluster.discovery, transport_sockets: &cluster.transport_sockets };
    convert(valid, label, None, |message, path, report| {
        Some(convert::endpoint::load_assignment(message, &of, path, report))
    })
}

/// The routes of an HTTP listener, with the virtual hosts that came by VHDS.
pub fn routes(
    valid: Valid<route_api::RouteConfiguration>,
    discovered: Vec<route_api::VirtualHost>,
    manager: &RdsRouting,
    label: &Arc<str>,
) -> Result<Converted<HttpRouting>, ConfigError> {
    convert(valid, label, None, |message, path, report| {
        Some(convert::route::route_config(message, discovered, Validate::Never, &manager.proxy, path, report))
    })
}

/// A secret.
pub fn secret(valid: Valid<tls_api::Secret>, label: &Arc<str>) -> Result<Converted<Secret>, ConfigError> {
    convert(valid, label, None, convert::secret::secret)
}

/// Where something comes from, as a resource says.
pub fn config_source(
    message: tidegate_api::core::ConfigSource,
    label: &Arc<str>,
) -> Result<ConfigSource, ConfigError> {
    let valid = Valid { message, unknown_fields: Vec::new(), nested: Vec::new() };
    convert(valid, label, None, convert::config_source::config_source).map(|converted| converted.value)
}
