//! TLS for the control plane.

use std::sync::Arc;

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig, version};

/// Makes TLS connections of TCP connections.
pub(super) type Acceptor = TlsAcceptor;

/// An authority of this run only.
#[derive(Debug)]
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    /// A new one.
    pub fn new() -> Result<Self> {
        let mut ca = CertificateParams::new(Vec::new())?;
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // Two names: a certificate whose issuer is called like itself passes for self-signed.
        ca.distinguished_name.push(DnType::CommonName, "tidegate-tests authority");
        Ok(Self(CertifiedIssuer::self_signed(ca, KeyPair::generate()?)?))
    }

    /// Its certificate, for `trusted_ca`.
    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate for these DNS names, addresses and URIs.
    pub fn issue(&self, names: &[&str]) -> Result<Identity> {
        let key = KeyPair::generate()?;
        let (uris, names): (Vec<&str>, Vec<&str>) = names.iter().partition(|name| name.contains("://"));
        let mut certificate =
            CertificateParams::new(names.into_iter().map(str::to_owned).collect::<Vec<_>>())?;
        for uri in uris {
            certificate.subject_alt_names.push(SanType::URI(uri.try_into()?));
        }
        certificate.distinguished_name.push(DnType::CommonName, "tidegate-tests certificate");
        let certificate = certificate.signed_by(&key, &self.0)?;
        Ok(Identity {
            ca_pem: self.pem(),
            chain_pem: certificate.pem(),
            certificate: certificate.der().clone(),
            key,
            clients: false,
        })
    }
}

/// A certificate and the authority that issued it, both of this run only.
#[derive(Debug)]
pub struct Identity {
    ca_pem: String,
    chain_pem: String,
    key: KeyPair,
    certificate: CertificateDer<'static>,
    clients: bool,
}

impl Identity {
    /// A certificate for these DNS names and addresses, of an authority of its own.
    pub fn for_names(names: &[&str]) -> Result<Self> {
        Authority::new()?.issue(names)
    }

    /// As a server it asks clients for certificates of the same authority.
    #[must_use]
    pub fn for_known_clients(mut self) -> Self {
        self.clients = true;
        self
    }

    /// The authority's certificate, for `trusted_ca`.
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// The certificate, for `certificate_chain`.
    pub fn chain_pem(&self) -> &str {
        &self.chain_pem
    }

    /// Its private key, for `private_key`.
    pub fn key_pem(&self) -> String {
        self.key.serialize_pem()
    }

    /// The certificate, encoded.
    pub fn der(&self) -> &[u8] {
        &self.certificate
    }

    pub(super) fn acceptor(&self) -> Result<Acceptor> {
        let key = PrivateKeyDer::try_from(self.key.serialize_der()).map_err(anyhow::Error::msg)?;
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&version::TLS13, &version::TLS12])?;
        let builder = if self.clients {
            let mut roots = RootCertStore::empty();
            roots.add(CertificateDer::from_pem_slice(self.ca_pem.as_bytes()).context("the CA")?)?;
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build()?;
            builder.with_client_cert_verifier(verifier)
        } else {
            builder.with_no_client_auth()
        };
        let mut config = builder.with_single_cert(vec![self.certificate.clone()], key)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}
