//! TLS of a cluster: what its context says, and the secrets that it names.

use std::sync::Arc;

use rustls::RootCertStore;
use tokio::sync::watch;

use super::{Identity, Material, SecretError, Trust};
use crate::config::tls::{Provided, ServerNames, UpstreamTls, Use};
use crate::secret::CertificateView;
use crate::stats::ClientTlsStats;

/// Where a user of a secret finds it: empty until it comes, and replaced when it is rotated.
#[derive(Clone, Debug)]
pub struct Slot {
    name: Arc<str>,
    current: watch::Receiver<Option<Material>>,
}

/// The other end of [`Slot`]s.
#[derive(Debug)]
pub struct Publication {
    name: Arc<str>,
    current: watch::Sender<Option<Material>>,
}

impl Publication {
    /// Of a secret that has not come yet.
    pub fn new(name: Arc<str>) -> Self {
        Self { name, current: watch::Sender::new(None) }
    }

    /// For a user.
    pub fn slot(&self) -> Slot {
        Slot { name: Arc::clone(&self.name), current: self.current.subscribe() }
    }

    /// The secret is this from now on. Whether that is new.
    pub fn publish(&self, material: Material) -> bool {
        self.current.send_if_modified(|current| {
            let is_new = current.as_ref() != Some(&material);
            if is_new {
                *current = Some(material);
            }
            is_new
        })
    }

    /// Whether it ever came.
    pub fn has_come(&self) -> bool {
        self.current.borrow().is_some()
    }
}

/// What a cluster needs for handshakes.
#[derive(Clone, Debug)]
pub struct Credentials {
    tls: Arc<UpstreamTls>,
    certificate: Option<Slot>,
    validation: Option<Slot>,
    stats: ClientTlsStats,
}

/// What the next handshake uses.
#[derive(Debug)]
pub struct CurrentCredentials {
    /// Our own certificate.
    pub identity: Option<Arc<Identity>>,
    /// Who may sign the server's.
    pub roots: Arc<RootCertStore>,
    /// For whom it has to be.
    pub names: ServerNames,
}

/// Why there can't be a handshake now.
#[derive(Debug, thiserror::Error)]
pub enum NotReady {
    /// SDS has not brought these.
    #[error("waiting for the secret {}, which SDS has not brought yet", quoted(.0))]
    Missing(Vec<Arc<str>>),
    /// What the context names can't be loaded.
    #[error(transparent)]
    Bad(#[from] SecretError),
}

fn quoted(names: &[Arc<str>]) -> String {
    names.iter().map(|name| format!("'{name}'")).collect::<Vec<_>>().join(", ")
}

impl Credentials {
    /// For this context. `slot` finds the secrets that it names.
    pub fn new(
        tls: &Arc<UpstreamTls>,
        stats: ClientTlsStats,
        mut slot: impl FnMut(&crate::config::tls::SecretSource) -> Slot,
    ) -> Self {
        let certificate = match &tls.certificate {
            Some(Provided::Secret(source)) => Some(slot(source)),
            Some(Provided::Here(_)) | None => None,
        };
        let validation = tls.validation_secret.as_ref().map(slot);
        Self { tls: Arc::clone(tls), certificate, validation, stats }
    }

    /// `cluster.<name>.client_ssl_socket_factory.*`
    pub fn stats(&self) -> &ClientTlsStats {
        &self.stats
    }

    fn slots(&self) -> impl Iterator<Item = &Slot> {
        self.certificate.iter().chain(&self.validation)
    }

    /// Secrets that have not come.
    fn missing(&self) -> Vec<Arc<str>> {
        let missing = self.slots().filter(|slot| slot.current.borrow().is_none());
        missing.map(|slot| Arc::clone(&slot.name)).collect()
    }

    /// Completes when every secret is there.
    pub async fn complete(&self) {
        for slot in self.slots() {
            // An error means that nobody will bring it any more: then it is missed below.
            let _ = slot.current.clone().wait_for(Option::is_some).await;
        }
    }

    /// What holds now. Reads the files that the context itself names, so that renewed ones count.
    pub fn current(&self) -> Result<CurrentCredentials, NotReady> {
        let missing = self.missing();
        if !missing.is_empty() {
            return Err(NotReady::Missing(missing));
        }
        let has_ca = self.tls.validation.trusted_ca.is_some();
        if let Some(slot) = &self.validation
            && let Some(material) = &*slot.current.borrow()
        {
            material.fits(Use::Validation { has_ca })?;
        }
        let (own, secret) = (self.trust()?, self.secret_trust());
        let roots = secret.as_ref().and_then(|secret| secret.roots.clone()).or(own.roots);
        let mut names = own.names;
        names.extend(secret.iter().flat_map(|secret| secret.names.iter().cloned()));
        let names = match (names.is_empty(), self.tls.auto_sni_san_validation) {
            (false, _) => ServerNames::Match(names),
            (true, true) => ServerNames::Sni,
            (true, false) => ServerNames::Any,
        };
        Ok(CurrentCredentials { identity: self.identity()?, roots: roots.ok_or(SecretError::NoCa)?, names })
    }

    fn identity(&self) -> Result<Option<Arc<Identity>>, SecretError> {
        match (&self.tls.certificate, &self.certificate) {
            (Some(Provided::Here(certificate)), _) => Identity::load(certificate).map(Arc::new).map(Some),
            (_, Some(slot)) => match &*slot.current.borrow() {
                Some(Material::Identity(identity)) => Ok(Some(Arc::clone(identity))),
                Some(other) => other.fits(Use::Certificate).map(|()| None),
                None => Ok(None),
            },
            (_, None) => Ok(None),
        }
    }

    /// Whether no names are asked for, unless a secret does.
    pub fn accepts_any_name(&self) -> bool {
        self.tls.validation.names.is_empty() && !self.tls.auto_sni_san_validation
    }

    /// What the context itself says. Its CA is not read when a secret's takes its place.
    fn trust(&self) -> Result<Trust, SecretError> {
        let mut validation = self.tls.validation.clone();
        if self.secret_trust().is_some_and(|secret| secret.roots.is_some()) {
            validation.trusted_ca = None;
        }
        Trust::load(&validation)
    }

    fn secret_trust(&self) -> Option<Arc<Trust>> {
        match &*self.validation.as_ref()?.current.borrow() {
            Some(Material::Trust(trust)) => Some(Arc::clone(trust)),
            _ => None,
        }
    }

    /// For `/certs`: the authorities, and our own chain. What can't be loaded now is left out.
    pub fn certificates(&self) -> (Vec<CertificateView>, Vec<CertificateView>) {
        let trust = self.secret_trust().filter(|secret| secret.roots.is_some());
        let trust = trust.or_else(|| self.trust().ok().map(Arc::new));
        let identity = self.identity().ok().flatten();
        let authorities = trust.iter().flat_map(|trust| view(&trust.place, &trust.authorities)).collect();
        let chain = identity.iter().flat_map(|identity| view(&identity.place, &identity.key.cert)).collect();
        (authorities, chain)
    }
}

fn view(place: &str, certificates: &[rustls::pki_types::CertificateDer<'static>]) -> Vec<CertificateView> {
    certificates.iter().filter_map(|certificate| CertificateView::new(place, certificate)).collect()
}
