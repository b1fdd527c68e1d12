//! `Secret` and what is in it: certificates with their keys, and whom to trust.

use std::path::PathBuf;

use tidegate_api::core;
use tidegate_api::core::data_source::Specifier;
use tidegate_api::envoy::r#type::matcher::v3::StringMatcher;
use tidegate_api::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use tidegate_api::tls as api;
use tidegate_api::tls::certificate_validation_context::TrustChainVerification;
use tidegate_api::tls::secret::Type;
use tidegate_api::tls::subject_alt_name_matcher::SanType as ApiSanType;

use super::{Report, each, enumeration, inactive};
use crate::config::proto::FieldPath;
use crate::config::tls::{
    Certificate, DataSource, SanType, Secret, SecretContent, StringMatch, SubjectAltName, Validation,
};
use crate::x509;

/// A secret: a static one, or one from SDS.
pub(in crate::config) fn secret(
    secret: api::Secret,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<Secret> {
    let api::Secret { name, r#type } = secret;
    let content = match r#type {
        Some(Type::TlsCertificate(it)) => {
            SecretContent::Certificate(certificate(it, &path.field("tls_certificate"), report)?)
        }
        Some(Type::ValidationContext(it)) => {
            SecretContent::Validation(validation(it, &path.field("validation_context"), report)?)
        }
        Some(Type::SessionTicketKeys(api::TlsSessionTicketKeys { keys: _ })) => {
            SecretContent::SessionTicketKeys
        }
        Some(Type::GenericSecret(api::GenericSecret { secret: _, secrets: _ })) => SecretContent::Generic,
        None => {
            report.missing(path, "type (one of tls_certificate, validation_context, session_ticket_keys)");
            return None;
        }
    };
    Some(Secret { name: name.into(), content })
}

/// Static secrets, without those that can't be.
pub(super) fn secrets(
    messages: Vec<api::Secret>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Vec<Secret> {
    let mut known: Vec<Secret> = Vec::new();
    for (index, message) in messages.into_iter().enumerate() {
        let all = path.field("secrets");
        let path = all.index(index);
        let Some(it) = secret(message, &path, report) else { continue };
        let field = it.content.field();
        if known.iter().any(|other| other.name == it.name && other.content.field() == field) {
            report.invalid(&path.field("name"), format!("duplicate static {field} {:?}", &*it.name));
            continue;
        }
        known.push(it);
    }
    known
}

/// A certificate with its key. What is written inline is checked; files may come later.
pub(super) fn certificate(
    certificate: api::TlsCertificate,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<Certificate> {
    let api::TlsCertificate {
        certificate_chain,
        private_key,
        pkcs12,
        watched_directory,
        private_key_provider,
        password,
        ocsp_staple: _,                  // of servers
        signed_certificate_timestamp: _, // of servers
        tls_params,
    } = certificate;
    let mut supported = true;
    for (field, present, remedy) in [
        ("pkcs12", pkcs12.is_some(), "use certificate_chain and private_key (PEM)"),
        ("private_key_provider", private_key_provider.is_some(), "use private_key (PEM)"),
        ("password", password.is_some(), "use a private_key that is not encrypted"),
        ("tls_params", tls_params.is_some(), "use those of the context"),
    ] {
        if present {
            report.unsupported(&path.field(field), format!("not supported in this version; {remedy}"));
            supported = false;
        }
    }
    if !supported {
        return None;
    }
    let mut watched_directories = watched(watched_directory, path, report);
    let chain = data_source(certificate_chain, &mut watched_directories, path, "certificate_chain", report);
    let private_key = data_source(private_key, &mut watched_directories, path, "private_key", report);
    let certificate = Certificate { chain: chain?, private_key: private_key?, watched_directories };
    if let (DataSource::Inline(chain), DataSource::Inline(key)) =
        (&certificate.chain, &certificate.private_key)
        && let Err(bad) = x509::identity(chain, key)
    {
        report.invalid(path, bad.describe(&certificate.chain));
        return None;
    }
    Some(certificate)
}

/// Whom to trust. What would weaken it when it is left out is refused; so is a CA that is written inline and is none.
#[expect(deprecated, reason = "deprecated fields are accepted as long as Envoy accepts them")]
pub(super) fn validation(
    context: api::CertificateValidationContext,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<Validation> {
    let api::CertificateValidationContext {
        trusted_ca,
        ca_certificate_provider_instance,
        system_root_certs,
        watched_directory,
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
    let mut supported = true;
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
            supported = false;
        }
    }
    let trust: TrustChainVerification =
        enumeration(trust_chain_verification, path, "trust_chain_verification", report)?;
    if trust == TrustChainVerification::AcceptUntrusted {
        report.unsupported(
            &path.field("trust_chain_verification"),
            "configuration is never taken from a server that nobody vouches for; remove it",
        );
        supported = false;
    }
    if !match_subject_alt_names.is_empty() {
        report.unsupported(
            &path.field("match_subject_alt_names"),
            "deprecated and not supported; use match_typed_subject_alt_names",
        );
        supported = false;
    }
    let wanted = match_typed_subject_alt_names.len();
    let names = each(match_typed_subject_alt_names, path, "match_typed_subject_alt_names", |it, path| {
        subject_alt_name(it, path, report)
    });
    // With one name less, or none, other certificates would pass.
    if !supported || names.len() < wanted {
        return None;
    }
    let mut watched_directories = watched(watched_directory, path, report);
    let trusted_ca = match trusted_ca {
        None => None,
        ca => Some(data_source(ca, &mut watched_directories, path, "trusted_ca", report)?),
    };
    let validation = Validation { trusted_ca, names, watched_directories };
    if let Some(source @ DataSource::Inline(pem)) = &validation.trusted_ca
        && let Err(bad) = x509::authorities(pem)
    {
        report.invalid(path, bad.describe(source));
        return None;
    }
    Some(validation)
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
    let path = path.field("matcher");
    let (pattern, ignore_case) = string_match(matcher.unwrap_or_default(), &path, report)?;
    if san_type == SanType::IpAddress && !matches!(pattern, StringMatch::Exact(_)) {
        report.unsupported(&path, "addresses are compared as a whole; use exact");
        return None;
    }
    Some(SubjectAltName { san_type, pattern, ignore_case })
}

/// Whether case does not count is told too.
pub(super) fn string_match(
    matcher: StringMatcher,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<(StringMatch, bool)> {
    let StringMatcher { ignore_case, match_pattern } = matcher;
    let pattern = match match_pattern {
        Some(MatchPattern::Exact(text)) => StringMatch::Exact(text),
        Some(MatchPattern::Prefix(text)) => StringMatch::Prefix(text),
        Some(MatchPattern::Suffix(text)) => StringMatch::Suffix(text),
        Some(MatchPattern::Contains(text)) => StringMatch::Contains(text),
        Some(MatchPattern::SafeRegex(_) | MatchPattern::Custom(_)) => {
            report.unsupported(path, "not supported in this version; use exact, prefix, suffix or contains");
            return None;
        }
        None => {
            report.missing(path, "match_pattern");
            return None;
        }
    };
    Some((pattern, ignore_case))
}

fn watched(
    directory: Option<core::WatchedDirectory>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Vec<PathBuf> {
    let directory = directory.map(|core::WatchedDirectory { path: directory, watch_modify }| {
        inactive!(report, &path.field("watched_directory"), "WatchedDirectory"; watch_modify);
        PathBuf::from(directory)
    });
    directory.into_iter().collect()
}

/// Where something is read from. Its own `watched_directory` goes to `directories`.
fn data_source(
    source: Option<core::DataSource>,
    directories: &mut Vec<PathBuf>,
    path: &FieldPath<'_>,
    field: &str,
    report: &mut Report<'_>,
) -> Option<DataSource> {
    let Some(core::DataSource { watched_directory, specifier: Some(specifier) }) = source else {
        report.missing(path, field);
        return None;
    };
    directories.extend(watched(watched_directory, &path.field(field), report));
    Some(match specifier {
        Specifier::Filename(name) => DataSource::File(name.into()),
        Specifier::InlineBytes(bytes) => DataSource::Inline(bytes.into()),
        Specifier::InlineString(text) => DataSource::Inline(text.into_bytes().into()),
        Specifier::EnvironmentVariable(name) => DataSource::Environment(name),
    })
}
