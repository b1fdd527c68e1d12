//! TLS to a control plane.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme, version};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use webpki::EndEntityCert;

use super::{Alpn, Connection};
use crate::addr::EndpointAddr;
use crate::config::tls::{SanType, ServerNames, StringMatch, SubjectAltName, UpstreamTls};
use crate::secret::CurrentCredentials;
use crate::x509::PROVIDER;

/// Does the handshake.
///
/// # Errors
/// What is wrong, for the operator: the server's certificate, or the handshake.
pub(super) async fn connect(
    stream: Box<dyn Connection>,
    endpoint: &EndpointAddr,
    tls: &UpstreamTls,
    credentials: CurrentCredentials,
    alpn: Alpn,
) -> Result<TlsStream<Box<dyn Connection>>, String> {
    let (config, name) = client(endpoint, tls, credentials, alpn)?;
    let connector = TlsConnector::from(Arc::new(config));
    let stream = connector.connect(name, stream).await.map_err(|error| error.to_string())?;
    if alpn == Alpn::Http2 && stream.get_ref().1.alpn_protocol().is_some_and(|chosen| chosen != b"h2") {
        return Err("the server does not speak HTTP/2 (ALPN h2)".to_owned());
    }
    Ok(stream)
}

fn client(
    endpoint: &EndpointAddr,
    tls: &UpstreamTls,
    credentials: CurrentCredentials,
    alpn: Alpn,
) -> Result<(ClientConfig, ServerName<'static>), String> {
    let CurrentCredentials { identity, roots, names } = credentials;
    let provider = Arc::clone(&PROVIDER);
    let mut versions = Vec::new();
    versions.extend(tls.tls13.then_some(&version::TLS13));
    versions.extend(tls.tls12.then_some(&version::TLS12));
    let verifier = Verifier { roots, names, provider: Arc::clone(&provider) };
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&versions)
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(identity) => {
            let resolver = SingleCertAndKey::from(CertifiedKey::clone(identity.key()));
            builder.with_client_cert_resolver(Arc::new(resolver))
        }
    };
    config.alpn_protocols = if tls.alpn_protocols.is_empty() {
        vec![match alpn {
            Alpn::Http1 => b"http/1.1".to_vec(),
            Alpn::Http2 => b"h2".to_vec(),
        }]
    } else {
        tls.alpn_protocols.iter().map(|name| name.clone().into_bytes()).collect()
    };
    let name = match &tls.sni {
        Some(sni) => {
            ServerName::try_from(sni.to_string()).map_err(|_| format!("sni {sni:?} is not a host name"))?
        }
        None => {
            config.enable_sni = false;
            // Neither sent nor checked: without an sni nothing is validated by it.
            ServerName::IpAddress(endpoint.ip().map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |it| it.ip()).into())
        }
    };
    Ok((config, name))
}

/// Envoy's rules: signed by a trusted CA, and one of the names that the configuration asks for.
#[derive(Debug)]
struct Verifier {
    roots: Arc<RootCertStore>,
    names: ServerNames,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn check_names(&self, certificate: &CertificateDer<'_>, sni: &ServerName<'_>) -> Result<(), String> {
        let certificate = EndEntityCert::try_from(certificate).map_err(|error| error.to_string())?;
        match &self.names {
            ServerNames::Any => Ok(()),
            ServerNames::Sni => certificate
                .verify_is_valid_for_subject_name(sni)
                .map_err(|_| format!("the server's certificate is not for {}", sni.to_str())),
            ServerNames::Match(matchers) if matchers.iter().any(|matcher| matcher.accepts(&certificate)) => {
                Ok(())
            }
            ServerNames::Match(_) => {
                let names: Vec<&str> =
                    certificate.valid_dns_names().chain(certificate.valid_uri_names()).take(10).collect();
                Err(format!(
                    "none of match_typed_subject_alt_names is in the server's certificate, which is for {names:?}"
                ))
            }
        }
    }
}

impl SubjectAltName {
    fn accepts(&self, certificate: &EndEntityCert<'_>) -> bool {
        let matches = |name: &str| self.pattern.matches(name, self.ignore_case);
        match (self.san_type, &self.pattern) {
            (SanType::Uri, _) => certificate.valid_uri_names().any(matches),
            // A whole name also matches a wildcard in the certificate.
            (SanType::Dns | SanType::IpAddress, StringMatch::Exact(name)) => {
                let is_subject = ServerName::try_from(name.as_str()).is_ok_and(|name| {
                    matches!(name, ServerName::DnsName(_)) == (self.san_type == SanType::Dns)
                        && certificate.verify_is_valid_for_subject_name(&name).is_ok()
                });
                is_subject || (self.san_type == SanType::Dns && certificate.valid_dns_names().any(matches))
            }
            (SanType::Dns, _) => certificate.valid_dns_names().any(matches),
            (SanType::IpAddress, _) => false,
        }
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&certificate, &self.roots, intermediates, now, algorithms)?;
        self.check_names(end_entity, server_name).map_err(rustls::Error::General)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
