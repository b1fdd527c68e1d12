//! `UpstreamTlsContext`.

use std::collections::HashSet;
use std::sync::Arc;

use tidegate_api::tls as api;
use tidegate_api::tls::common_tls_context::{CombinedCertificateValidationContext, ValidationContextType};
use tidegate_api::tls::tls_parameters::TlsProtocol;

use super::config_source::config_source;
use super::secret::{certificate, validation};
use super::{Report, each, enumeration, inactive};
use crate::config::bootstrap::DynamicResources;
use crate::config::cluster::Cluster;
use crate::config::config_source::Source;
use crate::config::proto::FieldPath;
use crate::config::tls::{
    ANY_NAME, Certificate, Provided, SecretContent, SecretSource, UpstreamTls, Validation,
};

/// TLS as a client. What would weaken it when it is left out is refused.
#[expect(deprecated, reason = "deprecated fields are accepted as long as Envoy accepts them")]
pub(super) fn upstream_tls(
    context: api::UpstreamTlsContext,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<UpstreamTls> {
    let api::UpstreamTlsContext {
        common_tls_context,
        sni,
        auto_host_sni: _, // there is no host header to take it from
        auto_sni_san_validation,
        allow_renegotiation: _,   // never done
        max_session_keys: _,      // how many sessions Envoy remembers
        enforce_rsa_key_usage: _, // always enforced
    } = context;
    let common_path = path.field("common_tls_context");
    let common = common(common_tls_context.unwrap_or_default(), &common_path, report)?;
    let Common { validation, validation_secret, certificate, alpn_protocols, tls12, tls13 } = common;
    let sni = Some(sni).filter(|sni| !sni.is_empty()).map(Arc::from);
    match (validation.names.is_empty(), auto_sni_san_validation) {
        (true, true) if sni.is_none() => {
            report.invalid(&path.field("auto_sni_san_validation"), "there is no sni to validate");
            return None;
        }
        // What comes from SDS may have names: the store looks at it.
        (true, false) if validation_secret.is_none() => report.warn(path, ANY_NAME),
        _ => {}
    }
    Some(UpstreamTls {
        sni,
        auto_sni_san_validation,
        certificate,
        validation,
        validation_secret,
        alpn_protocols,
        tls12,
        tls13,
    })
}

struct Common {
    validation: Validation,
    validation_secret: Option<SecretSource>,
    certificate: Option<Provided<Certificate>>,
    alpn_protocols: Vec<String>,
    tls12: bool,
    tls13: bool,
}

#[expect(deprecated, reason = "deprecated fields are accepted as long as Envoy accepts them")]
fn common(context: api::CommonTlsContext, path: &FieldPath<'_>, report: &mut Report<'_>) -> Option<Common> {
    let api::CommonTlsContext {
        tls_params,
        tls_certificates,
        tls_certificate_sds_secret_configs,
        tls_certificate_provider_instance,
        custom_tls_certificate_selector,
        tls_certificate_certificate_provider,
        tls_certificate_certificate_provider_instance,
        alpn_protocols,
        custom_handshaker,
        key_log,
        validation_context_type,
    } = context;
    inactive!(report, path, "CommonTlsContext"; key_log);
    for (field, present) in [
        ("tls_certificate_provider_instance", tls_certificate_provider_instance.is_some()),
        ("custom_tls_certificate_selector", custom_tls_certificate_selector.is_some()),
        ("tls_certificate_certificate_provider", tls_certificate_certificate_provider.is_some()),
        (
            "tls_certificate_certificate_provider_instance",
            tls_certificate_certificate_provider_instance.is_some(),
        ),
        ("custom_handshaker", custom_handshaker.is_some()),
    ] {
        if present {
            report.unsupported(
                &path.field(field),
                "not supported in this version; use tls_certificates or tls_certificate_sds_secret_configs",
            );
        }
    }
    let (tls12, tls13) = versions(tls_params, path, report)?;
    let certificate = own_certificate(tls_certificates, tls_certificate_sds_secret_configs, path, report);
    let validated = trusted(validation_context_type, path, report);
    let (validation, validation_secret) = validated?;
    if validation.trusted_ca.is_none() && validation_secret.is_none() {
        report.refuse(
            &path.field("validation_context").field("trusted_ca"),
            super::Reason::Missing("trusted_ca (without it anybody could be the server)".into()),
        );
        return None;
    }
    Some(Common { validation, validation_secret, certificate: certificate?, alpn_protocols, tls12, tls13 })
}

/// The certificate that the server gets to see, if it asks.
#[expect(clippy::option_option, reason = "none: it was refused; Some(None): there is none")]
fn own_certificate(
    inline: Vec<api::TlsCertificate>,
    secrets: Vec<api::SdsSecretConfig>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<Option<Provided<Certificate>>> {
    let count = inline.len() + secrets.len();
    if count > 1 {
        let (field, index) = match secrets.len() {
            0 => ("tls_certificates", 1),
            more => ("tls_certificate_sds_secret_configs", more - 1),
        };
        report.unsupported(&path.field(field).index(index), "a client has one certificate; keep one");
        return None;
    }
    let mut found =
        each(inline, path, "tls_certificates", |it, path| certificate(it, path, report).map(Provided::Here));
    found.extend(each(secrets, path, "tls_certificate_sds_secret_configs", |it, path| {
        secret_config(it, path, report, |content| match content {
            SecretContent::Certificate(certificate) => Some(certificate.clone()),
            _ => None,
        })
    }));
    (found.len() == count).then(|| found.pop())
}

/// Whom to trust: what is written in the context, and the secret that adds to it.
#[expect(deprecated, reason = "deprecated fields are accepted as long as Envoy accepts them")]
fn trusted(
    context: Option<ValidationContextType>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<(Validation, Option<SecretSource>)> {
    match context {
        Some(ValidationContextType::ValidationContext(context)) => {
            Some((validation(context, &path.field("validation_context"), report)?, None))
        }
        Some(ValidationContextType::ValidationContextSdsSecretConfig(secret)) => {
            let path = path.field("validation_context_sds_secret_config");
            Some(merged(Validation::default(), validation_secret(secret, &path, report)?))
        }
        Some(ValidationContextType::CombinedValidationContext(combined)) => {
            let CombinedCertificateValidationContext {
                default_validation_context,
                validation_context_sds_secret_config,
                validation_context_certificate_provider: None,
                validation_context_certificate_provider_instance: None,
            } = combined
            else {
                report.unsupported(
                    &path.field("combined_validation_context"),
                    "certificate providers are not supported in this version; use \
                     validation_context_sds_secret_config",
                );
                return None;
            };
            let path = path.field("combined_validation_context");
            let default = default_validation_context.unwrap_or_default();
            let default = validation(default, &path.field("default_validation_context"), report);
            let Some(secret) = validation_context_sds_secret_config else {
                report.missing(&path, "validation_context_sds_secret_config");
                return None;
            };
            let secret =
                validation_secret(secret, &path.field("validation_context_sds_secret_config"), report);
            Some(merged(default?, secret?))
        }
        Some(_) => {
            report.unsupported(
                path,
                "certificate providers are not supported in this version; use validation_context or \
                 validation_context_sds_secret_config",
            );
            None
        }
        None => Some((Validation::default(), None)),
    }
}

/// A secret of the bootstrap is known already; one from SDS is merged when it comes.
fn merged(default: Validation, secret: Provided<Validation>) -> (Validation, Option<SecretSource>) {
    match secret {
        Provided::Here(secret) => (default.merged_with(&secret), None),
        Provided::Secret(source) => (default, Some(source)),
    }
}

fn validation_secret(
    config: api::SdsSecretConfig,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<Provided<Validation>> {
    secret_config(config, path, report, |content| match content {
        SecretContent::Validation(validation) => Some(validation.clone()),
        _ => None,
    })
}

/// A secret by name: one of `static_resources.secrets` when it has no source.
fn secret_config<T>(
    config: api::SdsSecretConfig,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
    pick: impl Fn(&SecretContent) -> Option<T>,
) -> Option<Provided<T>> {
    let api::SdsSecretConfig { name, sds_config } = config;
    if let Some(source) = sds_config {
        let config = config_source(source, &path.field("sds_config"), report)?;
        return Some(Provided::Secret(SecretSource { name: name.into(), config }));
    }
    let of_this_name = || report.secrets.iter().filter(|secret| *secret.name == *name);
    let found = of_this_name().find_map(|secret| pick(&secret.content));
    if found.is_none() {
        let message = match of_this_name().next() {
            Some(other) => format!("the static secret {name:?} is a {}", other.content.field()),
            None => format!(
                "Unknown static secret: {name:?}; add it to static_resources.secrets, or say in sds_config where \
                 it comes from"
            ),
        };
        report.invalid(&path.field("name"), message);
    }
    found.map(Provided::Here)
}

/// A cluster that needs itself to fetch its own secrets would wait for ever.
pub(super) fn check_secret_servers(
    clusters: &[Arc<Cluster>],
    dynamic: &DynamicResources,
    path_of: impl Fn(&str) -> Option<usize>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) {
    let servers_of = |name: &str| -> Vec<(Arc<str>, Arc<str>)> {
        let tls = clusters.iter().filter(|cluster| *cluster.name == *name).filter_map(|it| it.tls.as_ref());
        let server = |source: &SecretSource| {
            let server = match &source.config.source {
                Source::Ads => Arc::clone(&dynamic.ads.as_ref()?.cluster),
                Source::Api(api) => Arc::clone(&api.cluster),
                Source::Path(_) => return None,
            };
            Some((Arc::clone(&source.name), server))
        };
        tls.flat_map(|tls| tls.secrets().filter_map(|(source, _)| server(source)).collect::<Vec<_>>())
            .collect()
    };
    for cluster in clusters {
        let mut seen = HashSet::new();
        for (secret, first) in servers_of(&cluster.name) {
            let mut next = vec![first];
            while let Some(server) = next.pop() {
                if server == cluster.name {
                    let clusters = path.field("clusters");
                    let at = clusters.index(path_of(&cluster.name).unwrap_or_default());
                    report.invalid(
                        &at.field("transport_socket"),
                        format!(
                            "the secret {:?} of cluster {:?} can only be fetched through that cluster itself, which \
                             needs it to connect; take it from a file (path_config_source), or from a server that \
                             is reached without it",
                            &*secret, &*cluster.name
                        ),
                    );
                    break;
                }
                if seen.insert(Arc::clone(&server)) {
                    next.extend(servers_of(&server).into_iter().map(|(_, server)| server));
                }
            }
        }
    }
}

/// Whether TLS 1.2 and TLS 1.3 may be used.
fn versions(
    params: Option<api::TlsParameters>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<(bool, bool)> {
    let path = path.field("tls_params");
    let api::TlsParameters {
        tls_minimum_protocol_version,
        tls_maximum_protocol_version,
        cipher_suites,
        ecdh_curves,
        signature_algorithms,
        compliance_policies,
    } = params.unwrap_or_default();
    inactive!(report, &path, "TlsParameters";
        cipher_suites, ecdh_curves, signature_algorithms, compliance_policies);
    let min: TlsProtocol =
        enumeration(tls_minimum_protocol_version, &path, "tls_minimum_protocol_version", report)?;
    let max: TlsProtocol =
        enumeration(tls_maximum_protocol_version, &path, "tls_maximum_protocol_version", report)?;
    let tls12 = min != TlsProtocol::TlSv13
        && matches!(max, TlsProtocol::TlsAuto | TlsProtocol::TlSv12 | TlsProtocol::TlSv13);
    let tls13 = matches!(max, TlsProtocol::TlsAuto | TlsProtocol::TlSv13);
    if !tls12 && !tls13 {
        report.unsupported(
            &path.field("tls_maximum_protocol_version"),
            "only TLS 1.2 and 1.3 are spoken; use TLSv1_2 or TLSv1_3",
        );
        return None;
    }
    Some((tls12, tls13))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::proto::{Options, Source, parse_bootstrap};
    use crate::config::tls::{DataSource, SanType, Secret, StringMatch, SubjectAltName, Use};

    /// Converts a cluster with this `UpstreamTlsContext` (flow style): its TLS and the warnings, or the problems.
    fn convert(context: &str, is_server: bool) -> Result<(Cluster, String), String> {
        convert_with(context, is_server, Vec::new())
    }

    /// The same with these static secrets.
    fn convert_with(
        context: &str,
        is_server: bool,
        secrets: Vec<Secret>,
    ) -> Result<(Cluster, String), String> {
        let yaml = format!(
            "static_resources: {{clusters: [{{name: xds, transport_socket: {{name: tls, typed_config: \
             {{\"@type\": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext, \
             {context}}}}}}}]}}"
        );
        let parsed = parse_bootstrap(&Source::yaml("t", yaml), &[], &Options::default())
            .map_err(|error| error.to_string())?;
        let mut report = Report::new(&parsed.source_map);
        report.secrets = secrets;
        if is_server {
            report.server_clusters.insert("xds".into());
        }
        let root = FieldPath::ROOT;
        let message = parsed.message.static_resources.unwrap().clusters.remove(0);
        let converted = super::super::cluster::cluster(message, &root.field("cluster"), &mut report);
        let warnings = report.finish().map_err(|error| error.to_string())?;
        let warnings: Vec<_> = warnings.iter().map(ToString::to_string).collect();
        Ok((converted.unwrap(), warnings.join("\n")))
    }

    const CA: &str = "trusted_ca: {filename: /ca.pem}";

    #[test]
    fn everything_that_is_supported() {
        let (cluster, warnings) = convert(
            "sni: istiod, common_tls_context: {alpn_protocols: [h2], \
             tls_params: {tls_minimum_protocol_version: TLSv1_3}, \
             tls_certificates: [{certificate_chain: {filename: /chain.pem}, private_key: {inline_string: secret}, \
             watched_directory: {path: /w}}], \
             validation_context: {trusted_ca: {environment_variable: CA}, match_typed_subject_alt_names: \
             [{san_type: URI, matcher: {exact: 'spiffe://a'}}, {san_type: DNS, matcher: {suffix: .svc, ignore_case: true}}]}}",
            true,
        )
        .unwrap();
        assert_eq!(warnings, "");
        let tls = cluster.tls.unwrap();
        let names = vec![
            SubjectAltName {
                san_type: SanType::Uri,
                pattern: StringMatch::Exact("spiffe://a".into()),
                ignore_case: false,
            },
            SubjectAltName {
                san_type: SanType::Dns,
                pattern: StringMatch::Suffix(".svc".into()),
                ignore_case: true,
            },
        ];
        let expected = UpstreamTls {
            sni: Some("istiod".into()),
            auto_sni_san_validation: false,
            certificate: Some(Provided::Here(Certificate {
                chain: DataSource::File("/chain.pem".into()),
                private_key: DataSource::Inline(b"secret".as_slice().into()),
                watched_directories: vec!["/w".into()],
            })),
            validation: Validation {
                trusted_ca: Some(DataSource::Environment("CA".into())),
                names,
                watched_directories: vec![],
            },
            validation_secret: None,
            alpn_protocols: vec!["h2".into()],
            tls12: false,
            tls13: true,
        };
        assert_eq!(*tls, expected);
        assert!(!format!("{tls:?}").contains("secret\""), "keys are not printed");
    }

    #[test]
    fn secrets_from_elsewhere() {
        let file = |name: &str| format!("{{path_config_source: {{path: /{name}}}}}");
        let context = format!(
            "sni: a, common_tls_context: {{tls_certificate_sds_secret_configs: [{{name: own, sds_config: {}}}], \
             combined_validation_context: {{default_validation_context: {{match_typed_subject_alt_names: \
             [{{san_type: DNS, matcher: {{exact: a}}}}]}}, validation_context_sds_secret_config: \
             {{name: ca, sds_config: {}}}}}}}",
            file("own"),
            file("ca")
        );
        let (cluster, warnings) = convert(&context, true).unwrap();
        assert_eq!(warnings, "");
        let tls = cluster.tls.unwrap();
        let secrets: Vec<_> = tls.secrets().map(|(source, wanted)| (&*source.name, wanted)).collect();
        assert_eq!(secrets, [("own", Use::Certificate), ("ca", Use::Validation { has_ca: false })]);
        assert_eq!(tls.validation.names.len(), 1);
        let alone = "common_tls_context: {validation_context_sds_secret_config: \
                     {name: ca, sds_config: {path_config_source: {path: /ca}}}}";
        let tls = convert(alone, true).unwrap().0.tls.unwrap();
        assert_eq!((tls.secrets().count(), &tls.validation), (1, &Validation::default()));
    }

    #[test]
    fn static_secrets_are_found_by_name_and_kind() {
        let source = |name: &str| DataSource::File(name.into());
        let content = SecretContent::Certificate(Certificate {
            chain: source("/chain"),
            private_key: source("/key"),
            watched_directories: vec![],
        });
        let ca = Validation { trusted_ca: Some(source("/ca")), ..Validation::default() };
        let secrets = || {
            vec![
                Secret { name: "own".into(), content: content.clone() },
                Secret { name: "ca".into(), content: SecretContent::Validation(ca.clone()) },
            ]
        };
        let with = |own: &str, ca: &str| {
            let context = format!(
                "sni: a, auto_sni_san_validation: true, common_tls_context: \
                 {{tls_certificate_sds_secret_configs: [{{name: {own}}}], validation_context_sds_secret_config: \
                 {{name: {ca}}}}}"
            );
            convert_with(&context, true, secrets())
        };
        let tls = with("own", "ca").unwrap().0.tls.unwrap();
        assert_eq!((tls.secrets().count(), &tls.validation), (0, &ca));
        assert!(matches!(&tls.certificate, Some(Provided::Here(it)) if it.chain == source("/chain")));
        for (own, ca, expected) in [
            ("nope", "ca", "Unknown static secret: \"nope\""),
            ("own", "nope", "Unknown static secret: \"nope\""),
            ("ca", "ca", "the static secret \"ca\" is a validation_context"),
        ] {
            let refused = with(own, ca).unwrap_err();
            assert!(refused.contains(expected), "{refused}");
        }
    }

    #[test]
    fn names_are_checked_as_envoy_does_with_a_warning_when_they_are_not() {
        let (cluster, warnings) =
            convert(&format!("sni: a, common_tls_context: {{validation_context: {{{CA}}}}}"), true).unwrap();
        assert!(!cluster.tls.unwrap().auto_sni_san_validation);
        assert!(warnings.contains("any certificate of the trusted CA is accepted"), "{warnings}");
        let (cluster, warnings) = convert(
            &format!(
                "sni: a, auto_sni_san_validation: true, common_tls_context: {{validation_context: {{{CA}}}}}"
            ),
            true,
        )
        .unwrap();
        assert_eq!((cluster.tls.unwrap().auto_sni_san_validation, &*warnings), (true, ""));
    }

    #[test]
    fn what_would_weaken_it_is_refused() {
        let validation =
            |fields: &str| format!("sni: a, common_tls_context: {{validation_context: {{{CA}, {fields}}}}}");
        let common =
            |fields: &str| format!("sni: a, common_tls_context: {{{fields}, validation_context: {{{CA}}}}}");
        for (context, expected) in [
            (String::new(), "required field trusted_ca (without it anybody could be the server) is missing"),
            (validation("trust_chain_verification: ACCEPT_UNTRUSTED"), "nobody vouches for"),
            (validation("crl: {filename: /crl.pem}"), "validation_context.crl: not supported"),
            (validation("allow_expired_certificate: true"), "allow_expired_certificate: not supported"),
            (
                validation(
                    "match_typed_subject_alt_names: [{san_type: DNS, matcher: {safe_regex: {regex: a}}}]",
                ),
                "use exact, prefix, suffix or contains",
            ),
            (
                validation("match_typed_subject_alt_names: [{san_type: EMAIL, matcher: {exact: a}}]"),
                "use DNS, URI or IP_ADDRESS",
            ),
            (
                common("tls_params: {tls_maximum_protocol_version: TLSv1_1}"),
                "only TLS 1.2 and 1.3 are spoken",
            ),
            (
                common(
                    "tls_certificates: [{certificate_chain: {filename: /a}, private_key: {filename: /b}}], \
                     tls_certificate_sds_secret_configs: [{name: a}]",
                ),
                "a client has one certificate",
            ),
            (
                common(
                    "tls_certificates: [{certificate_chain: {inline_string: a}, private_key: {inline_string: b}}]",
                ),
                "Failed to load certificate chain from <inline>",
            ),
            (common("tls_certificates: [{pkcs12: {filename: /a}}]"), "pkcs12: not supported"),
            (
                common(
                    "tls_certificates: [{certificate_chain: {filename: /a}, private_key: {filename: /b}, \
                     password: {inline_string: hush}}]",
                ),
                "use a private_key that is not encrypted",
            ),
            (
                "common_tls_context: {validation_context: {trusted_ca: {inline_string: junk}}}".into(),
                "Failed to load trusted CA certificates from <inline>",
            ),
            (
                format!(
                    "auto_sni_san_validation: true, common_tls_context: {{validation_context: {{{CA}}}}}"
                ),
                "there is no sni to validate",
            ),
        ] {
            let refused = convert(&context, true).expect_err(&context);
            assert!(refused.contains(expected) && !refused.contains("hush"), "{context}\n{refused}");
        }
    }

    #[test]
    fn clusters_of_clients_have_no_tls() {
        let context = format!("sni: a, common_tls_context: {{validation_context: {{{CA}}}}}");
        let refused = convert(&context, false).unwrap_err();
        assert!(refused.contains("sending to upstreams in plaintext instead would be unsafe"), "{refused}");
    }
}
