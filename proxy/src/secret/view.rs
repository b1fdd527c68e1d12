//! Certificates as `/certs` shows them.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use x509_parser::extensions::GeneralName;
use x509_parser::prelude::X509Certificate;
use x509_parser::time::ASN1Time;

/// `envoy.admin.v3.CertificateDetails`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateView {
    /// The file; `<inline>` when there is none.
    pub path: String,
    /// Hexadecimal.
    pub serial_number: String,
    /// Names, those that Envoy shows.
    pub subject_alt_names: Vec<SanView>,
    /// From when it is valid.
    pub valid_from: SystemTime,
    /// Until when.
    pub expiration_time: SystemTime,
}

/// A name of a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SanView {
    /// `dns`
    Dns(String),
    /// `uri`
    Uri(String),
    /// `ip_address`
    IpAddress(IpAddr),
}

impl CertificateView {
    /// None if it can't be parsed.
    pub(super) fn new(place: &str, der: &[u8]) -> Option<Self> {
        let (_, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
        Some(Self {
            path: place.to_owned(),
            serial_number: serial(certificate.raw_serial()),
            subject_alt_names: names(&certificate),
            valid_from: time(certificate.validity().not_before),
            expiration_time: time(certificate.validity().not_after),
        })
    }

    /// Whole days from `now` on; 0 when it has expired.
    pub fn days_until_expiration(&self, now: SystemTime) -> u64 {
        const DAY: Duration = Duration::from_hours(24);
        self.expiration_time.duration_since(now).unwrap_or_default().as_secs() / DAY.as_secs()
    }
}

fn serial(bytes: &[u8]) -> String {
    let mut text = String::new();
    for byte in bytes.iter().skip_while(|byte| **byte == 0) {
        let _ = write!(text, "{byte:02x}"); // writing to a String can't fail
    }
    if text.is_empty() { "0".to_owned() } else { text }
}

fn names(certificate: &X509Certificate<'_>) -> Vec<SanView> {
    let Ok(Some(extension)) = certificate.subject_alternative_name() else { return Vec::new() };
    let all = &extension.value.general_names;
    let dns = all.iter().filter_map(|name| match name {
        GeneralName::DNSName(name) => Some(SanView::Dns((*name).to_owned())),
        _ => None,
    });
    let uris = all.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(SanView::Uri((*uri).to_owned())),
        _ => None,
    });
    let addresses = all.iter().filter_map(|name| match name {
        GeneralName::IPAddress(bytes) => address(bytes).map(SanView::IpAddress),
        _ => None,
    });
    // Envoy's order.
    dns.chain(uris).chain(addresses).collect()
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}

fn time(at: ASN1Time) -> SystemTime {
    let seconds = at.timestamp();
    let distance = Duration::from_secs(seconds.unsigned_abs());
    if seconds < 0 { SystemTime::UNIX_EPOCH - distance } else { SystemTime::UNIX_EPOCH + distance }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, SanType, SerialNumber, date_time_ymd};

    use super::*;

    #[test]
    fn what_a_certificate_says() {
        let mut params = CertificateParams::new(vec!["a.example".into(), "10.0.0.1".into()]).unwrap();
        params.subject_alt_names.insert(0, SanType::URI("spiffe://a/b".try_into().unwrap()));
        params.subject_alt_names.push(SanType::Rfc822Name("a@b".try_into().unwrap()));
        params.serial_number = Some(SerialNumber::from_slice(&[0x0a, 0xff, 0x00]));
        params.not_before = date_time_ymd(2026, 1, 2);
        params.not_after = date_time_ymd(2026, 1, 12);
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        let view = CertificateView::new("/x.pem", certificate.der()).unwrap();
        assert_eq!((view.path.as_str(), view.serial_number.as_str()), ("/x.pem", "0aff00"));
        assert_eq!(
            view.subject_alt_names,
            [
                SanView::Dns("a.example".into()),
                SanView::Uri("spiffe://a/b".into()),
                SanView::IpAddress("10.0.0.1".parse().unwrap()),
            ]
        );
        let start = view.valid_from;
        assert_eq!(start, SystemTime::UNIX_EPOCH + Duration::from_hours(490_920));
        assert_eq!(view.days_until_expiration(start), 10);
        assert_eq!(view.days_until_expiration(start + Duration::from_secs(1)), 9);
        assert_eq!(view.days_until_expiration(start + Duration::from_hours(24 * 365)), 0);
        assert_eq!(CertificateView::new("", b"junk"), None);
        assert_eq!((serial(&[0, 0x80]), serial(&[0])), ("80".into(), "0".into()));
    }
}
