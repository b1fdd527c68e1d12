//! Plain validated configuration: what Envoy's messages mean, with every default applied. No I/O, no async.
//!
//! [`load`] is the way in: text, then proto ([`proto`]), then these types (`convert` holds the rules and the
//! table of what is not acted on).

use std::collections::BTreeMap;

use bootstrap::Bootstrap;
use error::{ConfigError, Problem};
use proto::{Encoded, Options, Source, UnknownType, UnknownTypes, parse_bootstrap};

pub mod access_log;
pub mod bootstrap;
pub mod cluster;
pub mod config_source;
mod convert;
pub mod dynamic;
pub mod endpoint;
pub mod error;
pub mod filter_chain;
pub mod health_check;
pub mod listener;
pub mod outlier;
pub mod proto;
pub mod route;
pub mod runtime;
pub mod tcp_proxy;
pub mod tls;
pub mod transport_socket;
pub mod upstream_bind;

/// The texts of a static configuration.
#[derive(Clone, Debug)]
pub struct Sources {
    /// The file of `-c`, read by the caller.
    pub config_path: Option<Source>,
    /// The text of `--config-yaml`, merged over it.
    pub config_yaml: Option<Source>,
}

/// A static configuration that can be run.
#[derive(Debug)]
pub struct Loaded {
    /// What it means.
    pub bootstrap: Bootstrap,
    /// What it says, for `/config_dump`.
    pub proto: Encoded,
    /// What was accepted, but works otherwise than Envoy would: one line each.
    pub warnings: Vec<Problem>,
    /// Names of network filters that are accepted without effect (`istio.stats`), with the number of filters.
    pub ignored_filters: BTreeMap<String, usize>,
}

/// Reads a static configuration. What is not in it has Envoy's defaults; all problems are reported at once.
pub fn load(sources: &Sources, options: &Options) -> Result<Loaded, ConfigError> {
    // As in protobuf, merging over nothing is the message itself.
    let (base, overlay) = match (&sources.config_path, &sources.config_yaml) {
        (Some(file), overlay) => (file.clone(), overlay.as_ref()),
        (None, Some(yaml)) => (yaml.clone(), None),
        (None, None) => (Source::yaml("configuration", "{}"), None),
    };
    let parsed = parse_bootstrap(&base, overlay.map_or(&[], std::slice::from_ref), options)?;
    let mut report = convert::Report::new(&parsed.source_map);
    let bootstrap = convert::bootstrap(parsed.message, &mut report);
    let ignored_filters = report.ignored_filters().clone();
    let mut warnings = parsed.warnings;
    warnings.extend(report.finish()?);
    Ok(Loaded { bootstrap, proto: Encoded::new(&parsed.dynamic), warnings, ignored_filters })
}

/// What static configuration may contain: Envoy's own types and fields, and the filters that Istio's proxy adds.
pub fn static_options() -> Options {
    Options { unknown_types: UnknownTypes::Ask(is_istio_filter), ..Options::default() }
}

/// Whether an unknown type belongs to a filter of Istio's, to be ignored, or judged by its name later.
fn is_istio_filter(unknown: &UnknownType<'_>) -> bool {
    unknown.extension_name.is_some_and(|name| name.starts_with("istio."))
}
