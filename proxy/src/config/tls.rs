//! `envoy.extensions.transport_sockets.tls.v3`, as far as connections to control planes need it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::config_source::ConfigSource;

/// `UpstreamTlsContext`: TLS as a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamTls {
    /// Sent as the name of the server, if there is one.
    pub sni: Option<Arc<str>>,
    /// The server's certificate has to have the name in `sni`, unless other names are asked for.
    pub auto_sni_san_validation: bool,
    /// Our own certificate, for servers that ask for one.
    pub certificate: Option<Provided<Certificate>>,
    /// Whom to trust, as far as it is written here. A `combined_validation_context` has both.
    pub validation: Validation,
    /// What a secret adds to it.
    pub validation_secret: Option<SecretSource>,
    /// `alpn_protocols`. Empty: what is going to be spoken (`h2` for gRPC).
    pub alpn_protocols: Vec<String>,
    /// TLS 1.2 may be used.
    pub tls12: bool,
    /// TLS 1.3 may be used.
    pub tls13: bool,
}

impl UpstreamTls {
    /// The secrets that have to come from somewhere, and what each is to be.
    pub fn secrets(&self) -> impl Iterator<Item = (&SecretSource, Use)> {
        let certificate = match &self.certificate {
            Some(Provided::Secret(source)) => Some((source, Use::Certificate)),
            Some(Provided::Here(_)) | None => None,
        };
        let validation = Use::Validation { has_ca: self.validation.trusted_ca.is_some() };
        certificate.into_iter().chain(self.validation_secret.iter().map(move |source| (source, validation)))
    }
}

/// The warning where no name is asked for.
pub const ANY_NAME: &str = "any certificate of the trusted CA is accepted, whatever its names; add \
    match_typed_subject_alt_names, or sni with auto_sni_san_validation";

/// A part of a TLS context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Provided<T> {
    /// Written there, or in `static_resources.secrets`.
    Here(T),
    /// It comes from SDS.
    Secret(SecretSource),
}

/// `SdsSecretConfig` with a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretSource {
    /// The name to subscribe to.
    pub name: Arc<str>,
    /// From where.
    pub config: ConfigSource,
}

/// What somebody takes a secret for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// An own certificate.
    Certificate,
    /// Whom to trust.
    Validation {
        /// There is a `trusted_ca` already: the secret may go without.
        has_ca: bool,
    },
}

/// `Secret`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Secret {
    /// Its name.
    pub name: Arc<str>,
    /// What it is.
    pub content: SecretContent,
}

/// Kinds of secrets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretContent {
    /// `tls_certificate`
    Certificate(Certificate),
    /// `validation_context`
    Validation(Validation),
    /// `session_ticket_keys`: for servers; nothing uses them here.
    SessionTicketKeys,
    /// `generic_secret`: for HTTP filters; nothing uses them here.
    Generic,
}

impl SecretContent {
    /// The field that it is in.
    pub fn field(&self) -> &'static str {
        match self {
            Self::Certificate(_) => "tls_certificate",
            Self::Validation(_) => "validation_context",
            Self::SessionTicketKeys => "session_ticket_keys",
            Self::Generic => "generic_secret",
        }
    }
}

/// `CertificateValidationContext`
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Validation {
    /// Whose certificates are trusted (PEM).
    pub trusted_ca: Option<DataSource>,
    /// `match_typed_subject_alt_names`: one of them has to match, if there is any.
    pub names: Vec<SubjectAltName>,
    /// `watched_directory`: files are read again when something is renamed in there, too.
    pub watched_directories: Vec<PathBuf>,
}

impl Validation {
    /// These settings with those of a secret, as a `combined_validation_context` has them: single fields are the
    /// secret's where it has them, lists are put together.
    #[must_use]
    pub fn merged_with(&self, secret: &Self) -> Self {
        Self {
            trusted_ca: secret.trusted_ca.clone().or_else(|| self.trusted_ca.clone()),
            names: self.names.iter().chain(&secret.names).cloned().collect(),
            watched_directories: self
                .watched_directories
                .iter()
                .chain(&secret.watched_directories)
                .cloned()
                .collect(),
        }
    }
}

/// Names that a server's certificate must have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerNames {
    /// None in particular: any certificate of the CA will do, as in Envoy without `match_typed_subject_alt_names`.
    Any,
    /// The one in `sni` (`auto_sni_san_validation`).
    Sni,
    /// One that at least one of these matches.
    Match(Vec<SubjectAltName>),
}

/// `SubjectAltNameMatcher`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubjectAltName {
    /// Which of the names are looked at.
    pub san_type: SanType,
    /// What they have to be.
    pub pattern: StringMatch,
    /// Case does not count.
    pub ignore_case: bool,
}

/// Kinds of names in a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SanType {
    /// `*.example.com` in the certificate stands for one label.
    Dns,
    /// `spiffe://…`
    Uri,
    /// An address: exact matches only.
    IpAddress,
}

/// `StringMatcher`, without regular expressions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StringMatch {
    /// All of it.
    Exact(String),
    /// Its start.
    Prefix(String),
    /// Its end.
    Suffix(String),
    /// A part of it.
    Contains(String),
}

impl StringMatch {
    /// Whether a text is what it should be.
    pub fn matches(&self, text: &str, ignore_case: bool) -> bool {
        let lower = |text: &str| if ignore_case { text.to_ascii_lowercase() } else { text.to_owned() };
        let text = lower(text);
        match self {
            Self::Exact(pattern) => text == lower(pattern),
            Self::Prefix(pattern) => text.starts_with(&lower(pattern)),
            Self::Suffix(pattern) => text.ends_with(&lower(pattern)),
            Self::Contains(pattern) => text.contains(&lower(pattern)),
        }
    }
}

/// `TlsCertificate`: a certificate with its key (PEM).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// Leaf first.
    pub chain: DataSource,
    /// PKCS#8, PKCS#1 or SEC1, not encrypted.
    pub private_key: DataSource,
    /// `watched_directory`: files are read again when something is renamed in there, too.
    pub watched_directories: Vec<PathBuf>,
}

/// `DataSource`. Files and the environment are read when they are needed.
#[derive(Clone, PartialEq, Eq)]
pub enum DataSource {
    /// `filename`
    File(PathBuf),
    /// `inline_bytes` or `inline_string`
    Inline(Arc<[u8]>),
    /// `environment_variable`
    Environment(String),
}

impl DataSource {
    /// The file, if it is one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::File(path) => Some(path),
            Self::Inline(_) | Self::Environment(_) => None,
        }
    }
}

impl fmt::Display for DataSource {
    /// Where it is; never what.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Inline(_) => f.write_str("<inline>"),
            Self::Environment(name) => write!(f, "environment variable {name}"),
        }
    }
}

impl fmt::Debug for DataSource {
    /// Without the content: it may be a key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Inline(bytes) => write!(f, "Inline({} bytes)", bytes.len()),
            Self::Environment(name) => f.debug_tuple("Environment").field(name).finish(),
        }
    }
}
