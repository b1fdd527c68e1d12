//! Certificates and keys from PEM, checked. Pure: configuration checks with it what is written inline, and `secret` loads
//! with it what it has read. What it says of a fault has nothing of the content, which may be a key at the wrong place.

use std::sync::{Arc, LazyLock};

use rustls::RootCertStore;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use webpki::EndEntityCert;

/// What does the cryptography.
pub(crate) static PROVIDER: LazyLock<Arc<CryptoProvider>> =
    LazyLock::new(|| Arc::new(ring::default_provider()));

/// What something is read as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The certificates that a peer is shown.
    Chain,
    /// Their key.
    Key,
    /// Certificates of authorities.
    Authorities,
}

impl Part {
    /// In Envoy's words.
    pub fn words(self) -> &'static str {
        match self {
            Self::Chain => "certificate chain",
            Self::Key => "private key",
            Self::Authorities => "trusted CA certificates",
        }
    }
}

/// Content that is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bad {
    /// Which content.
    pub part: Part,
    /// What is wrong.
    pub reason: String,
}

impl Bad {
    fn new(part: Part, reason: impl Into<String>) -> Self {
        Self { part, reason: reason.into() }
    }

    /// For the operator: `place` is where the content is from.
    pub fn describe(&self, place: impl std::fmt::Display) -> String {
        format!("Failed to load {} from {place}: {}", self.part.words(), self.reason)
    }
}

/// A certificate chain and its key, which belong together.
///
/// # Errors
/// They are no PEM, of no supported kind, or do not belong together.
pub fn identity(chain: &[u8], key: &[u8]) -> Result<(CertifiedKey, PrivateKeyDer<'static>), Bad> {
    let chain = certificates(chain, Part::Chain)?;
    for (index, certificate) in chain.iter().enumerate() {
        if EndEntityCert::try_from(certificate).is_err() {
            let reason = format!("certificate {} is not valid X.509", index + 1);
            return Err(Bad::new(Part::Chain, reason));
        }
    }
    // The reader's own errors quote what they have read.
    let key =
        PrivateKeyDer::from_pem_slice(key).map_err(|error| Bad::new(Part::Key, key_problem(&error, key)))?;
    let certified =
        CertifiedKey::from_der(chain, key.clone_key(), &PROVIDER).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => Bad::new(Part::Key, "it is not the key of the certificate"),
            rustls::Error::InvalidCertificate(_) => {
                Bad::new(Part::Chain, "its first certificate has no usable public key")
            }
            _ => Bad::new(
                Part::Key,
                "it is of no supported kind; use RSA (2048 bits or more), ECDSA (P-256, P-384) or Ed25519",
            ),
        })?;
    Ok((certified, key))
}

/// Whom to trust: the certificates, and the same for verification.
///
/// # Errors
/// It is no PEM, or a certificate in it can't be an authority's.
pub fn authorities(pem: &[u8]) -> Result<(Vec<CertificateDer<'static>>, RootCertStore), Bad> {
    let authorities = certificates(pem, Part::Authorities)?;
    let mut roots = RootCertStore::empty();
    for (index, certificate) in authorities.iter().enumerate() {
        roots.add(certificate.clone()).map_err(|_| {
            Bad::new(Part::Authorities, format!("certificate {} can't be a trust anchor", index + 1))
        })?;
    }
    Ok((authorities, roots))
}

/// At least one certificate.
fn certificates(pem: &[u8], part: Part) -> Result<Vec<CertificateDer<'static>>, Bad> {
    let found: Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(pem).collect();
    let found = found.map_err(|_| Bad::new(part, "it is not valid PEM"))?;
    if found.is_empty() {
        return Err(Bad::new(part, "there is no certificate in it (PEM: -----BEGIN CERTIFICATE-----)"));
    }
    Ok(found)
}

fn key_problem(error: &pem::Error, pem: &[u8]) -> &'static str {
    let has = |text: &[u8]| pem.windows(text.len()).any(|window| window == text);
    if has(b"BEGIN ENCRYPTED PRIVATE KEY") || has(b"Proc-Type: 4,ENCRYPTED") {
        "it is encrypted, which is not supported; use a key without a password"
    } else if matches!(error, pem::Error::NoItemsFound) {
        "there is no key in it (PEM: -----BEGIN PRIVATE KEY-----)"
    } else {
        "it is not valid PEM"
    }
}
