//! `ConfigSource`: where resources come from.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tidegate_api::core::api_config_source::ApiType;
use tidegate_api::core::config_source::ConfigSourceSpecifier;
use tidegate_api::core::grpc_service::{self, TargetSpecifier};
use tidegate_api::core::{self, ApiVersion};

use super::{Report, enumeration, inactive, optional_duration};
use crate::config::config_source::{ApiSource, ConfigSource, PathSource, Protocol, RateLimit, Source};
use crate::config::proto::FieldPath;

/// Envoy's defaults.
const INITIAL_FETCH_TIMEOUT: Duration = Duration::from_secs(15);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(1);
const MAX_TOKENS: u32 = 100;
const FILL_RATE: f64 = 10.0;

/// A source of one kind of resource.
#[expect(deprecated, reason = "deprecated fields are accepted as long as Envoy accepts them")]
pub(in crate::config) fn config_source(
    source: core::ConfigSource,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<ConfigSource> {
    let core::ConfigSource {
        authorities,
        initial_fetch_timeout,
        resource_api_version,
        config_source_specifier,
    } = source;
    inactive!(report, path, "ConfigSource"; authorities);
    let initial_fetch_timeout =
        optional_duration(initial_fetch_timeout, path, "initial_fetch_timeout", report)
            .unwrap_or(INITIAL_FETCH_TIMEOUT);
    let v3 = only_v3(resource_api_version, path, "resource_api_version", report);
    let source = match config_source_specifier {
        Some(ConfigSourceSpecifier::Ads(core::AggregatedConfigSource {})) => {
            if !report.has_ads {
                report.invalid(
                    &path.field("ads"),
                    "ADS must be configured to support an ADS config source; add dynamic_resources.ads_config",
                );
            }
            Some(Source::Ads)
        }
        Some(ConfigSourceSpecifier::ApiConfigSource(api)) => {
            api_source(api, false, &path.field("api_config_source"), report)
                .map(|api| Source::Api(Arc::new(api)))
        }
        Some(ConfigSourceSpecifier::PathConfigSource(file)) => {
            path_source(file, &path.field("path_config_source"), report)
        }
        Some(ConfigSourceSpecifier::Path(file)) => {
            let file = core::PathConfigSource { path: file, ..Default::default() };
            path_source(file, &path.field("path"), report)
        }
        Some(ConfigSourceSpecifier::Self_(_)) => {
            report.unsupported(
                &path.field("self"),
                "self is not supported, nor is it in Envoy 1.40; name the source that the resource came from (ads: {}, …)",
            );
            None
        }
        None => {
            report
                .missing(path, "config_source_specifier (one of ads, api_config_source, path_config_source)");
            None
        }
    };
    v3?;
    let initial_fetch_timeout = Some(initial_fetch_timeout).filter(|timeout| !timeout.is_zero());
    Some(ConfigSource { source: source?, initial_fetch_timeout })
}

/// `dynamic_resources.ads_config`. Its protocol comes out as one of the aggregated ones.
pub(super) fn ads_config(
    api: core::ApiConfigSource,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<Arc<ApiSource>> {
    let mut api = api_source(api, true, path, report)?;
    api.protocol = match api.protocol {
        Protocol::DeltaGrpc | Protocol::AggregatedDeltaGrpc => Protocol::AggregatedDeltaGrpc,
        Protocol::Grpc | Protocol::AggregatedGrpc => Protocol::AggregatedGrpc,
        Protocol::Rest => {
            report.invalid(&path.field("api_type"), "ADS is gRPC only; use GRPC or DELTA_GRPC");
            return None;
        }
    };
    Some(Arc::new(api))
}

fn api_source(
    api: core::ApiConfigSource,
    aggregated: bool,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<ApiSource> {
    let core::ApiConfigSource {
        api_type,
        transport_api_version,
        cluster_names,
        grpc_services,
        refresh_delay,
        request_timeout,
        rate_limit_settings,
        set_node_on_first_message_only,
        config_validators,
    } = api;
    inactive!(report, path, "ApiConfigSource"; config_validators);
    only_v3(transport_api_version, path, "transport_api_version", report)?;
    let protocol = protocol(api_type, aggregated, path, report)?;
    let rate_limit = match rate_limit_settings {
        Some(settings) => Some(rate_limit(&settings, &path.field("rate_limit_settings"), report)?),
        None => None,
    };
    let given_delay = refresh_delay.is_some();
    let refresh_delay = optional_duration(refresh_delay, path, "refresh_delay", report);
    let request_timeout =
        optional_duration(request_timeout, path, "request_timeout", report).unwrap_or(REQUEST_TIMEOUT);
    let server = if protocol == Protocol::Rest {
        if !given_delay {
            report.refuse(
                &path.field("refresh_delay"),
                super::Reason::Missing("refresh_delay (REST polls that often)".into()),
            );
        }
        rest_server(cluster_names, &grpc_services, path, report)
    } else {
        grpc_server(&cluster_names, grpc_services, path, report)
    };
    let refresh_delay = if protocol == Protocol::Rest { refresh_delay? } else { Duration::ZERO };
    let Server { cluster, authority, initial_metadata } = server?;
    if !(report.is_server)(&cluster) {
        let message = format!(
            "cluster {cluster:?} was either not defined statically or is an EDS cluster; add it to \
             static_resources.clusters with its addresses"
        );
        report.invalid(path, message);
    }
    Some(ApiSource {
        protocol,
        cluster,
        authority,
        initial_metadata,
        set_node_on_first_message_only,
        rate_limit,
        refresh_delay,
        request_timeout,
    })
}

fn protocol(
    api_type: i32,
    aggregated: bool,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<Protocol> {
    #[expect(deprecated, reason = "its name says what becomes of it")]
    let refusal = match enumeration(api_type, path, "api_type", report)? {
        ApiType::Rest => return Some(Protocol::Rest),
        ApiType::Grpc => return Some(Protocol::Grpc),
        ApiType::DeltaGrpc => return Some(Protocol::DeltaGrpc),
        ApiType::AggregatedGrpc | ApiType::AggregatedDeltaGrpc if aggregated => {
            "ads_config is aggregated as such; use GRPC or DELTA_GRPC"
        }
        ApiType::AggregatedGrpc | ApiType::AggregatedDeltaGrpc => {
            "unsupported here, as in Envoy: for the aggregated stream write ads: {} and configure \
             dynamic_resources.ads_config"
        }
        ApiType::DeprecatedAndUnavailableDoNotUse => {
            "api_type is missing (its default is the v2 REST API, which is gone); use GRPC, DELTA_GRPC or REST"
        }
    };
    report.unsupported(&path.field("api_type"), refusal);
    None
}

/// The v2 API is gone; AUTO is v3, as in Envoy.
fn only_v3(version: i32, path: &FieldPath<'_>, field: &str, report: &mut Report<'_>) -> Option<()> {
    #[expect(deprecated, reason = "its name is needed to refuse it")]
    if enumeration::<ApiVersion>(version, path, field, report)? == ApiVersion::V2 {
        report.unsupported(&path.field(field), "the v2 API is not spoken any more; use V3");
        return None;
    }
    Some(())
}

/// How a server is reached.
struct Server {
    cluster: Arc<str>,
    authority: Option<Arc<str>>,
    initial_metadata: Vec<(String, String)>,
}

fn rest_server(
    clusters: Vec<String>,
    grpc_services: &[core::GrpcService],
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<Server> {
    if !grpc_services.is_empty() {
        report.invalid(
            &path.field("grpc_services"),
            "api_type REST has no gRPC service; name the server in cluster_names",
        );
        return None;
    }
    let field = path.field("cluster_names");
    match <[String; 1]>::try_from(clusters) {
        Ok([cluster]) if !cluster.is_empty() => {
            Some(Server { cluster: cluster.into(), authority: None, initial_metadata: vec![] })
        }
        Ok(_) => {
            report.invalid(&field.index(0), "the name of a cluster can't be empty");
            None
        }
        Err(names) => {
            let found = names.len();
            report.invalid(&field, format!("api_type REST needs exactly one cluster, found {found}"));
            None
        }
    }
}

fn grpc_server(
    clusters: &[String],
    services: Vec<core::GrpcService>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<Server> {
    if !clusters.is_empty() {
        report.invalid(
            &path.field("cluster_names"),
            "a gRPC api_type takes no cluster_names; use grpc_services[0].envoy_grpc.cluster_name",
        );
        return None;
    }
    let field = path.field("grpc_services");
    match <[core::GrpcService; 1]>::try_from(services) {
        Ok([service]) => grpc_service(service, &field.index(0), report),
        Err(services) if services.is_empty() => {
            report.missing(path, "grpc_services");
            None
        }
        Err(services) => {
            let message = format!(
                "{} servers: failing over between them is not supported, as in Envoy by default; keep one",
                services.len()
            );
            report.unsupported(&field, message);
            None
        }
    }
}

fn grpc_service(service: core::GrpcService, path: &FieldPath<'_>, report: &mut Report<'_>) -> Option<Server> {
    let core::GrpcService {
        timeout: _, // of unary calls; these are streams
        initial_metadata,
        retry_policy,
        target_specifier,
    } = service;
    inactive!(report, path, "GrpcService"; retry_policy);
    let initial_metadata = super::each(initial_metadata, path, "initial_metadata", |header, path| {
        metadata(header, path, report)
    });
    match target_specifier {
        Some(TargetSpecifier::EnvoyGrpc(target)) => {
            let path = path.field("envoy_grpc");
            let grpc_service::EnvoyGrpc {
                cluster_name,
                authority,
                retry_policy,
                max_receive_message_length,
                skip_envoy_headers: _, // there are none
            } = target;
            inactive!(report, &path, "GrpcService.EnvoyGrpc"; retry_policy, max_receive_message_length);
            if cluster_name.is_empty() {
                report.missing(&path, "cluster_name");
                return None;
            }
            let authority = Some(authority).filter(|authority| !authority.is_empty());
            if let Some(authority) = &authority
                && authority.parse::<http::uri::Authority>().is_err()
            {
                report.invalid(
                    &path.field("authority"),
                    format!("{authority:?} is not an authority (host:port)"),
                );
                return None;
            }
            Some(Server {
                cluster: cluster_name.into(),
                authority: authority.map(Arc::from),
                initial_metadata,
            })
        }
        Some(TargetSpecifier::GoogleGrpc(_)) => {
            report.unsupported(
                &path.field("google_grpc"),
                "google_grpc is not supported; use envoy_grpc with a cluster (for TLS, one with a transport_socket)",
            );
            None
        }
        None => {
            report.missing(path, "envoy_grpc");
            None
        }
    }
}

/// A header of each call. gRPC headers are ASCII, but for those whose name ends in `-bin`.
fn metadata(
    header: core::HeaderValue,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<(String, String)> {
    let core::HeaderValue { key, value, raw_value } = header;
    if !raw_value.is_empty() || key.ends_with("-bin") {
        report.unsupported(path, format!("header {key:?}: binary metadata is not supported in this version"));
        return None;
    }
    let key = key.to_ascii_lowercase();
    if http::HeaderName::from_bytes(key.as_bytes()).is_err() || key.starts_with("grpc-") {
        report.invalid(&path.field("key"), format!("{key:?} can't be the name of a gRPC header"));
        return None;
    }
    if !value.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        report.invalid(&path.field("value"), format!("header {key:?}: the value is not printable ASCII"));
        return None;
    }
    Some((key, value))
}

fn rate_limit(
    settings: &core::RateLimitSettings,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<RateLimit> {
    let core::RateLimitSettings { max_tokens, fill_rate } = settings;
    let rate = fill_rate.unwrap_or(FILL_RATE);
    // Slower than one in 1,000 s is a mistake, or meant as "never".
    let milli = (rate * 1000.0).round();
    if !(1.0..=1e12).contains(&milli) {
        report
            .invalid(&path.field("fill_rate"), format!("{rate} is out of range; use 0.001 to 1e9 a second"));
        return None;
    }
    let max_tokens = max_tokens.unwrap_or(MAX_TOKENS);
    if max_tokens == 0 {
        report.invalid(&path.field("max_tokens"), "0 would never let a request out; use at least 1");
        return None;
    }
    Some(RateLimit { max_tokens, fill_rate_milli: milli as u64 })
}

fn path_source(
    file: core::PathConfigSource,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<Source> {
    let core::PathConfigSource { path: file, watched_directory, poll_interval } = file;
    inactive!(report, path, "PathConfigSource"; poll_interval);
    if file.is_empty() {
        report.missing(path, "path");
        return None;
    }
    let watched_directory =
        watched_directory.map(|core::WatchedDirectory { path: directory, watch_modify }| {
            inactive!(report, &path.field("watched_directory"), "WatchedDirectory"; watch_modify);
            PathBuf::from(directory)
        });
    Some(Source::Path(Arc::new(PathSource { path: PathBuf::from(file), watched_directory })))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::proto::{Options, Source as Text, parse_bootstrap};

    /// Converts `lds_config: <yaml>` (flow style).
    fn convert(yaml: &str) -> Result<ConfigSource, String> {
        with(&format!("dynamic_resources: {{lds_config: {yaml}}}"), |resources, path, report| {
            config_source(resources.lds_config.unwrap(), &path.field("lds_config"), report)
        })
    }

    fn convert_ads(yaml: &str) -> Result<Arc<ApiSource>, String> {
        with(&format!("dynamic_resources: {{ads_config: {yaml}}}"), |resources, path, report| {
            ads_config(resources.ads_config.unwrap(), &path.field("ads_config"), report)
        })
    }

    fn with<T>(
        yaml: &str,
        convert: impl FnOnce(
            tidegate_api::bootstrap::bootstrap::DynamicResources,
            &FieldPath<'_>,
            &mut Report<'_>,
        ) -> Option<T>,
    ) -> Result<T, String> {
        let parsed = parse_bootstrap(&Text::yaml("t", yaml), &[], &Options::default())
            .map_err(|error| error.to_string())?;
        let mut report = Report::new(&parsed.source_map);
        let root = FieldPath::ROOT;
        let path = root.field("dynamic_resources");
        let converted = convert(parsed.message.dynamic_resources.unwrap(), &path, &mut report);
        report.finish().map_err(|error| error.to_string())?;
        Ok(converted.expect("without a problem there is a value"))
    }

    #[test]
    fn ads_and_the_default_of_initial_fetch_timeout() {
        let source = convert("{ads: {}, resource_api_version: V3}").unwrap();
        assert_eq!(
            source,
            ConfigSource { source: Source::Ads, initial_fetch_timeout: Some(Duration::from_secs(15)) }
        );
        assert_eq!(convert("{ads: {}, initial_fetch_timeout: 0s}").unwrap().initial_fetch_timeout, None);
        let source = convert("{ads: {}, initial_fetch_timeout: 3s}").unwrap();
        assert_eq!(source.initial_fetch_timeout, Some(Duration::from_secs(3)));
    }

    #[test]
    fn grpc_with_everything() {
        let source = convert(
            "{api_config_source: {api_type: DELTA_GRPC, transport_api_version: V3, \
             set_node_on_first_message_only: true, rate_limit_settings: {max_tokens: 7, fill_rate: 0.5}, \
             grpc_services: [{envoy_grpc: {cluster_name: xds, authority: istiod:15010}, \
             initial_metadata: [{key: Token, value: a b}]}]}}",
        )
        .unwrap();
        let Source::Api(api) = source.source else { panic!("{source:?}") };
        assert_eq!(
            *api,
            ApiSource {
                protocol: Protocol::DeltaGrpc,
                cluster: "xds".into(),
                authority: Some("istiod:15010".into()),
                initial_metadata: vec![("token".into(), "a b".into())],
                set_node_on_first_message_only: true,
                rate_limit: Some(RateLimit { max_tokens: 7, fill_rate_milli: 500 }),
                refresh_delay: Duration::ZERO,
                request_timeout: Duration::from_secs(1),
            }
        );
    }

    #[test]
    fn equal_sources_are_one_source() {
        let yaml =
            "{api_config_source: {api_type: GRPC, grpc_services: [{envoy_grpc: {cluster_name: xds}}]}}";
        assert_eq!(convert(yaml).unwrap(), convert(yaml).unwrap());
    }

    #[test]
    fn rest_and_files() {
        let source =
            convert("{api_config_source: {api_type: REST, cluster_names: [x], refresh_delay: 2s}}").unwrap();
        let Source::Api(api) = source.source else { panic!("{source:?}") };
        assert_eq!((api.protocol, &*api.cluster), (Protocol::Rest, "x"));
        assert_eq!((api.refresh_delay, api.rate_limit), (Duration::from_secs(2), None));
        let source =
            convert("{path_config_source: {path: /a/lds.yaml, watched_directory: {path: /a}}}").unwrap();
        let expected =
            PathSource { path: "/a/lds.yaml".into(), watched_directory: Some(PathBuf::from("/a")) };
        assert_eq!(source.source, Source::Path(Arc::new(expected)));
        let expected = PathSource { path: "/a/lds.yaml".into(), watched_directory: None };
        assert_eq!(convert("{path: /a/lds.yaml}").unwrap().source, Source::Path(Arc::new(expected)));
    }

    #[test]
    fn ads_config_is_aggregated() {
        let service = "grpc_services: [{envoy_grpc: {cluster_name: xds}}]";
        for (given, protocol) in
            [("GRPC", Protocol::AggregatedGrpc), ("DELTA_GRPC", Protocol::AggregatedDeltaGrpc)]
        {
            let api = convert_ads(&format!("{{api_type: {given}, {service}}}")).unwrap();
            assert_eq!(api.protocol, protocol);
        }
        let refused = convert_ads("{api_type: REST, cluster_names: [x], refresh_delay: 1s}").unwrap_err();
        assert!(refused.contains("ads_config.api_type: ADS is gRPC only"), "{refused}");
        let refused = convert_ads(&format!("{{api_type: AGGREGATED_GRPC, {service}}}")).unwrap_err();
        assert!(refused.contains("use GRPC or DELTA_GRPC"), "{refused}");
    }

    #[test]
    fn refusals_say_where_and_what_to_do() {
        let service = "grpc_services: [{envoy_grpc: {cluster_name: xds}}]";
        let api = |body: &str| format!("{{api_config_source: {{{body}}}}}");
        for (yaml, expected) in [
            ("{self: {}}".to_owned(), "lds_config.self: self is not supported"),
            ("{ads: {}, resource_api_version: V2}".into(), "resource_api_version: "),
            (
                api(&format!("api_type: GRPC, transport_api_version: V2, {service}")),
                "transport_api_version: ",
            ),
            (
                api(&format!("api_type: AGGREGATED_GRPC, {service}")),
                "api_type: unsupported here, as in Envoy",
            ),
            (api("api_type: GRPC"), "required field grpc_services"),
            (
                api("api_type: GRPC, grpc_services: [{google_grpc: {target_uri: a, stat_prefix: b}}]"),
                "grpc_services[0].google_grpc: google_grpc is not supported; use envoy_grpc",
            ),
            (
                api(
                    "api_type: GRPC, grpc_services: [{envoy_grpc: {cluster_name: a}}, {envoy_grpc: {cluster_name: b}}]",
                ),
                "2 servers: failing over",
            ),
            (api(&format!("api_type: GRPC, cluster_names: [x], {service}")), "takes no cluster_names"),
            (api("api_type: REST, cluster_names: [x]"), "refresh_delay"),
            (api("api_type: REST, cluster_names: [x, z], refresh_delay: 1s"), "exactly one cluster, found 2"),
            (api(&format!("api_type: REST, refresh_delay: 1s, {service}")), "has no gRPC service"),
            (
                api(&format!("api_type: GRPC, rate_limit_settings: {{max_tokens: 0}}, {service}")),
                "max_tokens: 0 would never",
            ),
            (
                api(
                    "api_type: GRPC, grpc_services: [{envoy_grpc: {cluster_name: a}, initial_metadata: [{key: 'a b', value: c}]}]",
                ),
                "can't be the name of a gRPC header",
            ),
        ] {
            let refused = convert(&yaml).expect_err(&yaml);
            assert!(refused.contains(expected), "{yaml}\n{refused}");
        }
    }
}
