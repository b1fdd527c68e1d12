//! `UpstreamTlsContext`.

use std::sync::Arc;

use tidegate_api::core;
use tidegate_api::core::data_source::Specifier;
use tidegate_api::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use tidegate_api::tls as api;
use tidegate_api::tls::certificate_validation_context::TrustChainVerification;
use tidegate_api::tls::common_tls_context::ValidationContextType;
use tidegate_api::tls::subject_alt_name_matcher::SanType as ApiSanType;
use tidegate_api::tls::tls_parameters::TlsProtocol;

use super::{Report, each, enumeration, inactive};
use crate::config::proto::FieldPath;
use crate::config::tls::{
    Certificate, DataSource, SanType, ServerNames, StringMatch, SubjectAltName, UpstreamTls,
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
    let Common { trusted_ca, names, certificate, alpn_protocols, tls12, tls13 } =
        common(common_tls_context.unwrap_or_default(), &common_path, report)?;
    let sni = Some(sni).filter(|sni| !sni.is_empty()).map(Arc::from);
    let server_names = match (names.is_empty(), auto_sni_san_validation) {
        (false, _) => ServerNames::Match(names),
        (true, true) if sni.is_none() => {
            report.invalid(&path.field("auto_sni_san_validation"), "there is no sni to validate");
            return None;
        }
        (true, true) => ServerNames::Sni,
        (true, false) => {
            report.warn(
                path,
                "any certificate of the trusted CA is accepted, whatever its names; add \
                 match_typed_subject_alt_names, or sni with auto_sni_san_validation",
            );
            ServerNames::Any
        }
    };
    Some(UpstreamTls { trusted_ca, sni, server_names, certificate, alpn_protocols, tls12, tls13 })
}

struct Common {
    trusted_ca: DataSource,
    names: Vec<SubjectAltName>,
    certificate: Option<Certificate>,
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
        ("tls_certificate_sds_secret_configs", !tls_certificate_sds_secret_configs.is_empty()),
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
            report.unsupported(&path.field(field), "not supported in this version; use tls_certificates");
        }
    }
    let (tls12, tls13) = versions(tls_params, path, report)?;
    let mut certificates =
        each(tls_certificates, path, "tls_certificates", |it, path| certificate(it, path, report));
    if certificates.len() > 1 {
        report
            .unsupported(&path.field("tls_certificates").index(1), "a client has one certificate; keep one");
        return None;
    }
    let validation = match validation_context_type {
        Some(ValidationContextType::ValidationContext(validation)) => validation,
        Some(_) => {
            report.unsupported(
                path,
                "certificates to trust can't come from SDS or a provider in this version; use validation_context",
            );
            return None;
        }
        None => api::CertificateValidationContext::default(),
    };
    let (trusted_ca, names) = validation_context(validation, &path.field("validation_context"), report)?;
    Some(Common { trusted_ca, names, certificate: certificates.pop(), alpn_protocols, tls12, tls13 })
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

fn certificate(
    certificate: api::TlsCertificate,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<Certificate> {
    let api::TlsCertificate {
        certificate_chain,
        private_key,
        pkcs12,
        watched_directory: _, // files are read at each connection
        private_key_provider,
        password,
        ocsp_staple: _,                  // of servers
        signed_certificate_timestamp: _, // of servers
        tls_params,
    } = certificate;
    for (field, present) in [
        ("pkcs12", pkcs12.is_some()),
        ("private_key_provider", private_key_provider.is_some()),
        ("password", password.is_some()),
        ("tls_params", tls_params.is_some()),
    ] {
        if present {
            report.unsupported(
                &path.field(field),
                "not supported; use certificate_chain and private_key (PEM)",
            );
        }
    }
    let chain = data_source(certificate_chain, path, "certificate_chain", report);
    let private_key = data_source(private_key, path, "private_key", report);
    Some(Certificate { chain: chain?, private_key: private_key? })
}

#[expect(deprecated, reason = "deprecated fields are accepted as long as Envoy accepts them")]
fn validation_context(
    context: api::CertificateValidationContext,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<(DataSource, Vec<SubjectAltName>)> {
    let api::CertificateValidationContext {
        trusted_ca,
        ca_certificate_provider_instance,
        system_root_certs,
        watched_directory: _, // files are read at each connection
        verify_certificate_spki,
        verify_certificate_hash,
        match_typed_subject_alt_names,
        match_subject_alt_names,
        require_signed_certificate_timestamp,
        crl,
        allow_expired_certificate,
        trust_chain_verification,
        custom_validator_config,
        only_verify_leaf_cert_crl: _, // there is no crl
        max_verify_depth,
        suppress_client_ca_list: _, // of servers
    } = context;
    inactive!(report, path, "CertificateValidationContext"; max_verify_depth);
    for (field, present) in [
        ("ca_certificate_provider_instance", ca_certificate_provider_instance.is_some()),
        ("system_root_certs", system_root_certs.is_some()),
        ("verify_certificate_spki", !verify_certificate_spki.is_empty()),
        ("verify_certificate_hash", !verify_certificate_hash.is_empty()),
        ("require_signed_certificate_timestamp", require_signed_certificate_timestamp == Some(true)),
        ("crl", crl.is_some()),
        ("allow_expired_certificate", allow_expired_certificate),
        ("custom_validator_config", custom_validator_config.is_some()),
    ] {
        if present {
            report.unsupported(
                &path.field(field),
                "not supported in this version; use trusted_ca and match_typed_subject_alt_names",
            );
        }
    }
    let trust: TrustChainVerification =
        enumeration(trust_chain_verification, path, "trust_chain_verification", report)?;
    if trust == TrustChainVerification::AcceptUntrusted {
        report.unsupported(
            &path.field("trust_chain_verification"),
            "configuration is never taken from a server that nobody vouches for; remove it",
        );
    }
    let mut names = each(match_typed_subject_alt_names, path, "match_typed_subject_alt_names", |it, path| {
        subject_alt_name(it, path, report)
    });
    if !match_subject_alt_names.is_empty() {
        report.unsupported(
            &path.field("match_subject_alt_names"),
            "deprecated and not supported; use match_typed_subject_alt_names",
        );
        names.clear();
    }
    if trusted_ca.is_none() {
        report.refuse(
            &path.field("trusted_ca"),
            super::Reason::Missing("trusted_ca (without it anybody could be the server)".into()),
        );
        return None;
    }
    Some((data_source(trusted_ca, path, "trusted_ca", report)?, names))
}

fn subject_alt_name(
    matcher: api::SubjectAltNameMatcher,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<SubjectAltName> {
    let api::SubjectAltNameMatcher { san_type, matcher, oid: _ } = matcher;
    let san_type = match enumeration(san_type, path, "san_type", report)? {
        ApiSanType::Dns => SanType::Dns,
        ApiSanType::Uri => SanType::Uri,
        ApiSanType::IpAddress => SanType::IpAddress,
        ApiSanType::Unspecified | ApiSanType::Email | ApiSanType::OtherName => {
            report.unsupported(
                &path.field("san_type"),
                "not supported in this version; use DNS, URI or IP_ADDRESS",
            );
            return None;
        }
    };
    let matcher = matcher.unwrap_or_default();
    let ignore_case = matcher.ignore_case;
    let path = path.field("matcher");
    let pattern = match matcher.match_pattern {
        Some(MatchPattern::Exact(text)) => StringMatch::Exact(text),
        Some(MatchPattern::Prefix(text)) => StringMatch::Prefix(text),
        Some(MatchPattern::Suffix(text)) => StringMatch::Suffix(text),
        Some(MatchPattern::Contains(text)) => StringMatch::Contains(text),
        Some(MatchPattern::SafeRegex(_) | MatchPattern::Custom(_)) => {
            report.unsupported(&path, "not supported in this version; use exact, prefix, suffix or contains");
            return None;
        }
        None => {
            report.missing(&path, "match_pattern");
            return None;
        }
    };
    if san_type == SanType::IpAddress && !matches!(pattern, StringMatch::Exact(_)) {
        report.unsupported(&path, "addresses are compared as a whole; use exact");
        return None;
    }
    Some(SubjectAltName { san_type, pattern, ignore_case })
}

fn data_source(
    source: Option<core::DataSource>,
    path: &FieldPath<'_>,
    field: &str,
    report: &mut Report<'_>,
) -> Option<DataSource> {
    let Some(core::DataSource { watched_directory: _, specifier: Some(specifier) }) = source else {
        report.missing(path, field);
        return None;
    };
    let path = path.field(field);
    match specifier {
        Specifier::Filename(name) => Some(DataSource::File(name.into())),
        Specifier::InlineBytes(bytes) => Some(DataSource::Inline(bytes.into())),
        Specifier::InlineString(text) => Some(DataSource::Inline(text.into_bytes().into())),
        Specifier::EnvironmentVariable(name) => {
            report.unsupported(
                &path.field("environment_variable"),
                format!(
                    "the environment is not read; put the content of {name} into a file and use filename"
                ),
            );
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::cluster::Cluster;
    use crate::config::proto::{Options, Source, parse_bootstrap};

    /// Converts a cluster with this `UpstreamTlsContext` (flow style): its TLS and the warnings, or the problems.
    fn convert(context: &str, is_server: bool) -> Result<(Cluster, String), String> {
        let yaml = format!(
            "static_resources: {{clusters: [{{name: xds, transport_socket: {{name: tls, typed_config: \
             {{\"@type\": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext, \
             {context}}}}}}}]}}"
        );
        let parsed = parse_bootstrap(&Source::yaml("t", yaml), &[], &Options::default())
            .map_err(|error| error.to_string())?;
        let mut report = Report::new(&parsed.source_map);
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
             tls_certificates: [{certificate_chain: {filename: /chain.pem}, private_key: {inline_string: secret}}], \
             validation_context: {trusted_ca: {inline_string: pem}, match_typed_subject_alt_names: \
             [{san_type: URI, matcher: {exact: 'spiffe://a'}}, {san_type: DNS, matcher: {suffix: .svc, ignore_case: true}}]}}",
            true,
        )
        .unwrap();
        assert_eq!(warnings, "");
        let tls = cluster.tls.unwrap();
        let inline = |text: &str| DataSource::Inline(text.as_bytes().into());
        let expected = UpstreamTls {
            trusted_ca: inline("pem"),
            sni: Some("istiod".into()),
            server_names: ServerNames::Match(vec![
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
            ]),
            certificate: Some(Certificate {
                chain: DataSource::File("/chain.pem".into()),
                private_key: inline("secret"),
            }),
            alpn_protocols: vec!["h2".into()],
            tls12: false,
            tls13: true,
        };
        assert_eq!(*tls, expected);
        assert!(!format!("{tls:?}").contains("secret"), "keys are not printed");
    }

    #[test]
    fn names_are_checked_as_envoy_does_with_a_warning_when_they_are_not() {
        let (cluster, warnings) =
            convert(&format!("sni: a, common_tls_context: {{validation_context: {{{CA}}}}}"), true).unwrap();
        assert_eq!(cluster.tls.unwrap().server_names, ServerNames::Any);
        assert!(warnings.contains("any certificate of the trusted CA is accepted"), "{warnings}");
        let (cluster, warnings) = convert(
            &format!(
                "sni: a, auto_sni_san_validation: true, common_tls_context: {{validation_context: {{{CA}}}}}"
            ),
            true,
        )
        .unwrap();
        assert_eq!((&cluster.tls.unwrap().server_names, &*warnings), (&ServerNames::Sni, ""));
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
                validation("match_typed_subject_alt_names: [{san_type: DNS, matcher: {safe_regex: {regex: a}}}]"),
                "use exact, prefix, suffix or contains",
            ),
            (
                validation("match_typed_subject_alt_names: [{san_type: EMAIL, matcher: {exact: a}}]"),
                "use DNS, URI or IP_ADDRESS",
            ),
            (common("tls_params: {tls_maximum_protocol_version: TLSv1_1}"), "only TLS 1.2 and 1.3 are spoken"),
            (
                common("tls_certificate_sds_secret_configs: [{name: a, sds_config: {ads: {}}}]"),
                "tls_certificate_sds_secret_configs: not supported",
            ),
            (
                "common_tls_context: {validation_context_sds_secret_config: {name: a, sds_config: {ads: {}}}}".into(),
                "can't come from SDS",
            ),
            (
                format!("auto_sni_san_validation: true, common_tls_context: {{validation_context: {{{CA}}}}}"),
                "there is no sni to validate",
            ),
        ] {
            let refused = convert(&context, true).expect_err(&context);
            assert!(refused.contains(expected), "{context}\n{refused}");
        }
    }

    #[test]
    fn clusters_of_clients_have_no_tls() {
        let context = format!("sni: a, common_tls_context: {{validation_context: {{{CA}}}}}");
        let refused = convert(&context, false).unwrap_err();
        assert!(refused.contains("sending to upstreams in plaintext instead would be unsafe"), "{refused}");
    }
}
