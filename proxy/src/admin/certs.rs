//! `/certs`: `envoy.admin.v3.Certificates`.

use std::time::SystemTime;

use serde_json::{Map, Value, json};

use crate::secret::{CertificateView, SanView};

/// The certificates of one TLS context.
#[derive(Clone, Debug, Default)]
pub struct CertificatesView {
    /// `trusted_ca`
    pub authorities: Vec<CertificateView>,
    /// Our own, leaf first.
    pub chain: Vec<CertificateView>,
}

/// All contexts that have any.
pub(super) fn json(contexts: &[CertificatesView], now: SystemTime) -> Value {
    let list =
        |all: &[CertificateView]| -> Vec<Value> { all.iter().map(|it| certificate(it, now)).collect() };
    let context = |context: &CertificatesView| json!({ "ca_cert": list(&context.authorities), "cert_chain": list(&context.chain) });
    let any = |context: &&CertificatesView| !context.authorities.is_empty() || !context.chain.is_empty();
    json!({ "certificates": contexts.iter().filter(any).map(context).collect::<Vec<_>>() })
}

fn certificate(view: &CertificateView, now: SystemTime) -> Value {
    json!({
        "path": view.path,
        "serial_number": view.serial_number,
        "subject_alt_names": view.subject_alt_names.iter().map(name).collect::<Vec<_>>(),
        "days_until_expiration": view.days_until_expiration(now).to_string(),
        "valid_from": time(view.valid_from),
        "expiration_time": time(view.expiration_time),
    })
}

fn name(name: &SanView) -> Value {
    let (kind, text) = match name {
        SanView::Dns(name) => ("dns", name.clone()),
        SanView::Uri(uri) => ("uri", uri.clone()),
        SanView::IpAddress(address) => ("ip_address", address.to_string()),
    };
    Map::from_iter([(kind.to_owned(), text.into())]).into()
}

fn time(at: SystemTime) -> String {
    jiff::Timestamp::try_from(at).map(|time| time.to_string()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// As Envoy 1.40 prints it.
    #[test]
    fn a_context_as_json() {
        let at = |days: u64| SystemTime::UNIX_EPOCH + Duration::from_hours(24 * days);
        let view = CertificateView {
            path: "/client.pem".into(),
            serial_number: "0aff".into(),
            subject_alt_names: vec![
                SanView::Dns("a".into()),
                SanView::Uri("spiffe://a/b".into()),
                SanView::IpAddress("10.0.0.1".parse().unwrap()),
            ],
            valid_from: at(20_000),
            expiration_time: at(20_090),
        };
        let own = CertificatesView { authorities: vec![], chain: vec![view] };
        assert_eq!(
            json(&[CertificatesView::default(), own], at(20_000) + Duration::from_secs(1)),
            json!({ "certificates": [{ "ca_cert": [], "cert_chain": [{
                "path": "/client.pem",
                "serial_number": "0aff",
                "subject_alt_names": [{"dns": "a"}, {"uri": "spiffe://a/b"}, {"ip_address": "10.0.0.1"}],
                "days_until_expiration": "89",
                "valid_from": "2024-10-04T00:00:00Z",
                "expiration_time": "2025-01-02T00:00:00Z",
            }]}]})
        );
        assert_eq!(json(&[], at(1)), json!({ "certificates": [] }));
    }
}
