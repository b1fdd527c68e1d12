//! TLS for the control plane.

use std::sync::Arc;

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{ServerConfig, version};

/// Makes TLS connections of TCP connections.
pub(super) type Acceptor = TlsAcceptor;

/// A certificate and the authority that issued it, both of this run only.
#[derive(Debug)]
pub struct Identity {
    ca_pem: String,
    chain_pem: String,
    key: KeyPair,
    certificate: CertificateDer<'static>,
}

impl Identity {
    /// A certificate for these DNS names and addresses.
    pub fn for_names(names: &[&str]) -> Result<Self> {
        let mut ca = CertificateParams::new(Vec::new())?;
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // Two names: a certificate whose issuer is called like itself passes for self-signed.
        ca.distinguished_name.push(DnType::CommonName, "tidegate-tests authority");
        let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate()?)?;
        let key = KeyPair::generate()?;
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let mut certificate = CertificateParams::new(names)?;
        certificate.distinguished_name.push(DnType::CommonName, "tidegate-tests control plane");
        let certificate = certificate.signed_by(&key, &ca)?;
        Ok(Self {
            ca_pem: ca.pem(),
            chain_pem: certificate.pem(),
            certificate: certificate.der().clone(),
            key,
        })
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

    pub(super) fn acceptor(&self) -> Result<Acceptor> {
        let key = PrivateKeyDer::try_from(self.key.serialize_der()).map_err(anyhow::Error::msg)?;
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&version::TLS13, &version::TLS12])?
            .with_no_client_auth()
            .with_single_cert(vec![self.certificate.clone()], key)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}
