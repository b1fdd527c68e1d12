//! `envoy.extensions.transport_sockets.tls.v3`, as far as connections to control planes need it.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

/// `UpstreamTlsContext`: TLS as a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamTls {
    /// Whose certificates are trusted (PEM).
    pub trusted_ca: DataSource,
    /// Sent as the name of the server, if there is one.
    pub sni: Option<Arc<str>>,
    /// What the server's certificate has to say besides being signed.
    pub server_names: ServerNames,
    /// Our own certificate, for servers that ask for one.
    pub certificate: Option<Certificate>,
    /// `alpn_protocols`. Empty: what is going to be spoken (`h2` for gRPC).
    pub alpn_protocols: Vec<String>,
    /// TLS 1.2 may be used.
    pub tls12: bool,
    /// TLS 1.3 may be used.
    pub tls13: bool,
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

/// A certificate with its key (PEM).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// Leaf first.
    pub chain: DataSource,
    /// PKCS#8, PKCS#1 or SEC1.
    pub private_key: DataSource,
}

/// `DataSource`. Files are read when they are needed, so that a replaced file counts at the next connection.
#[derive(Clone, PartialEq, Eq)]
pub enum DataSource {
    /// `filename`
    File(PathBuf),
    /// `inline_bytes`, `inline_string`, or what `environment_variable` held.
    Inline(Arc<[u8]>),
}

impl fmt::Debug for DataSource {
    /// Without the content: it may be a key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Inline(bytes) => write!(f, "Inline({} bytes)", bytes.len()),
        }
    }
}
