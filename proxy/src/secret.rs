//! Secrets at run time: certificates with their keys, and whom to trust. Read, checked, and ready for handshakes.
//!
//! A [`Material`] is what a secret of SDS holds. It is loaded when the secret comes and when one of its files is
//! replaced ([`Watcher`]), and reaches its users through a [`Slot`]. What is written in a TLS context itself is loaded at
//! each handshake. Nothing here ever shows a key: not in errors, not in `Debug`.

use std::fmt;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

use crate::config::tls::{Certificate, DataSource, Secret, SecretContent, SubjectAltName, Use, Validation};
use crate::x509::{self, Bad, Part};

mod credentials;
mod view;
mod watch;

pub use credentials::{Credentials, CurrentCredentials, NotReady, Publication, Slot};
pub use view::{CertificateView, SanView};
pub use watch::Watcher;

/// Largest file with certificates or a key, in bytes: ten times a bundle of all public authorities.
const MAX_FILE: u64 = 4 << 20;

/// Why a secret can't be used. Its words are for control planes and logs, so they have nothing of its content.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    /// A file, or a variable of the environment.
    #[error("{what} can't be read from {place}: {reason}")]
    Unreadable {
        /// `certificate_chain`, …
        what: &'static str,
        /// Which file or variable.
        place: String,
        /// What the system says.
        reason: String,
    },
    /// The content is not what it should be. Envoy's words, and the reason.
    #[error("Failed to load {what} from {place}: {reason}")]
    Bad {
        /// `certificate chain`, …
        what: &'static str,
        /// Which file, or `<inline>`.
        place: String,
        /// What is wrong.
        reason: String,
    },
    /// It is a good secret, but not for this.
    #[error("it is a {found}, and is wanted as a {wanted}")]
    OfAnotherKind {
        /// What it is.
        found: &'static str,
        /// What it should be.
        wanted: &'static str,
    },
    /// Nobody would be verified.
    #[error("it has no trusted_ca (without it anybody could be the server)")]
    NoCa,
}

impl SecretError {
    fn bad(bad: Bad, source: &DataSource) -> Self {
        let Bad { part, reason } = bad;
        Self::Bad { what: part.words(), place: source.to_string(), reason }
    }
}

/// The content of a secret, loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Material {
    /// `tls_certificate`
    Identity(Arc<Identity>),
    /// `validation_context`
    Trust(Arc<Trust>),
    /// A kind that nothing uses here.
    Unused(&'static str),
}

impl Material {
    /// Reads and checks what a secret says.
    pub fn load(secret: &Secret) -> Result<Self, SecretError> {
        Ok(match &secret.content {
            SecretContent::Certificate(certificate) => Self::Identity(Arc::new(Identity::load(certificate)?)),
            SecretContent::Validation(validation) => Self::Trust(Arc::new(Trust::load(validation)?)),
            other @ (SecretContent::SessionTicketKeys | SecretContent::Generic) => {
                Self::Unused(other.field())
            }
        })
    }

    /// Whether somebody can use it for this.
    pub fn fits(&self, wanted: Use) -> Result<(), SecretError> {
        match (self, wanted) {
            (Self::Identity(_), Use::Certificate) => Ok(()),
            (Self::Trust(trust), Use::Validation { has_ca }) if has_ca || trust.roots.is_some() => Ok(()),
            (Self::Trust(_), Use::Validation { .. }) => Err(SecretError::NoCa),
            (_, wanted) => Err(SecretError::OfAnotherKind {
                found: self.field(),
                wanted: match wanted {
                    Use::Certificate => "tls_certificate",
                    Use::Validation { .. } => "validation_context",
                },
            }),
        }
    }

    fn field(&self) -> &'static str {
        match self {
            Self::Identity(_) => "tls_certificate",
            Self::Trust(_) => "validation_context",
            Self::Unused(field) => field,
        }
    }
}

/// The directories in which a rename may change what a secret says.
pub fn directories(secret: &Secret) -> Vec<PathBuf> {
    let (sources, watched) = match &secret.content {
        SecretContent::Certificate(Certificate { chain, private_key, watched_directories }) => {
            (vec![chain, private_key], watched_directories)
        }
        SecretContent::Validation(Validation { trusted_ca, names: _, watched_directories }) => {
            (trusted_ca.iter().collect(), watched_directories)
        }
        SecretContent::SessionTicketKeys | SecretContent::Generic => return Vec::new(),
    };
    let parents: Vec<PathBuf> =
        sources.iter().filter_map(|source| source.path()).map(|path| parent(path).to_owned()).collect();
    if parents.is_empty() {
        return Vec::new(); // nothing is read from a file
    }
    let mut directories = watched.clone();
    directories.extend(parents);
    directories.sort();
    directories.dedup();
    directories
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A certificate chain with its key.
#[derive(Clone)]
pub struct Identity {
    key: Arc<CertifiedKey>,
    /// The key as it was read: shows whether two are one.
    der: Arc<PrivateKeyDer<'static>>,
    /// Where the chain was read from, for `/certs`.
    place: String,
}

impl Identity {
    /// Reads a certificate and its key, and checks that they belong together.
    pub fn load(certificate: &Certificate) -> Result<Self, SecretError> {
        let Certificate { chain, private_key, watched_directories: _ } = certificate;
        let pem = (read(chain, "certificate_chain")?, read(private_key, "private_key")?);
        let (certified, key) = x509::identity(&pem.0, &pem.1).map_err(|bad| match bad.part {
            Part::Key => SecretError::bad(bad, private_key),
            Part::Chain | Part::Authorities => SecretError::bad(bad, chain),
        })?;
        let place = chain.to_string();
        Ok(Self { key: Arc::new(certified), der: Arc::new(key), place })
    }

    /// For handshakes.
    pub fn key(&self) -> &Arc<CertifiedKey> {
        &self.key
    }
}

impl PartialEq for Identity {
    fn eq(&self, other: &Self) -> bool {
        self.key.cert == other.key.cert && self.der == other.der && self.place == other.place
    }
}

impl Eq for Identity {}

impl fmt::Debug for Identity {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({} certificates from {})", self.key.cert.len(), self.place)
    }
}

/// Whom to trust.
#[derive(Clone, Debug)]
pub struct Trust {
    roots: Option<Arc<RootCertStore>>,
    /// The certificates in `roots`.
    authorities: Vec<CertificateDer<'static>>,
    names: Vec<SubjectAltName>,
    /// Where they were read from, for `/certs`.
    place: String,
}

impl Trust {
    /// Reads the certificates of authorities.
    pub fn load(validation: &Validation) -> Result<Self, SecretError> {
        let Validation { trusted_ca, names, watched_directories: _ } = validation;
        let Some(source) = trusted_ca else {
            return Ok(Self {
                roots: None,
                authorities: Vec::new(),
                names: names.clone(),
                place: String::new(),
            });
        };
        let pem = read(source, "trusted_ca")?;
        let (authorities, roots) = x509::authorities(&pem).map_err(|bad| SecretError::bad(bad, source))?;
        let roots = Some(Arc::new(roots));
        Ok(Self { roots, authorities, names: names.clone(), place: source.to_string() })
    }

    /// Names that are asked for.
    pub fn names(&self) -> &[SubjectAltName] {
        &self.names
    }
}

impl PartialEq for Trust {
    fn eq(&self, other: &Self) -> bool {
        self.authorities == other.authorities && self.names == other.names && self.place == other.place
    }
}

impl Eq for Trust {}

fn read(source: &DataSource, what: &'static str) -> Result<Vec<u8>, SecretError> {
    let unreadable = |reason: String| SecretError::Unreadable { what, place: source.to_string(), reason };
    match source {
        DataSource::Inline(bytes) => Ok(bytes.to_vec()),
        DataSource::File(path) => read_file(path).map_err(|error| unreadable(error.to_string())),
        DataSource::Environment(name) => match std::env::var_os(name) {
            Some(value) => Ok(value.into_encoded_bytes()),
            None => Err(unreadable("it is not set".to_owned())),
        },
    }
}

/// A control plane may name any file: one that has no end, or that nobody writes to, must not hold the process up.
fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut content = Vec::new();
    std::fs::File::open(path)?.take(MAX_FILE + 1).read_to_end(&mut content)?;
    if content.len() as u64 > MAX_FILE {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("larger than {MAX_FILE} bytes")));
    }
    Ok(content)
}

#[cfg(test)]
pub(crate) mod tests {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

    use super::*;

    /// An authority, and certificates that it issued.
    pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

    impl Authority {
        pub(crate) fn new() -> Self {
            let mut ca = CertificateParams::new(Vec::new()).unwrap();
            ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            Self(CertifiedIssuer::self_signed(ca, KeyPair::generate().unwrap()).unwrap())
        }

        pub(crate) fn pem(&self) -> String {
            self.0.pem()
        }

        /// Chain and key.
        pub(crate) fn issue(&self, names: &[&str]) -> (String, String) {
            let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
            let key = KeyPair::generate().unwrap();
            let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &self.0).unwrap();
            (certificate.pem(), key.serialize_pem())
        }
    }

    pub(crate) fn inline(text: &str) -> DataSource {
        DataSource::Inline(text.as_bytes().into())
    }

    fn certificate(chain: &str, key: &str) -> Certificate {
        Certificate { chain: inline(chain), private_key: inline(key), watched_directories: vec![] }
    }

    fn validation(ca: Option<&str>) -> Validation {
        Validation { trusted_ca: ca.map(inline), ..Validation::default() }
    }

    #[test]
    fn a_certificate_with_its_key() {
        let ca = Authority::new();
        let ((chain, key), (other_chain, other_key)) = (ca.issue(&["a"]), ca.issue(&["b"]));
        let identity = Identity::load(&certificate(&chain, &key)).unwrap();
        assert_eq!(identity, Identity::load(&certificate(&chain, &key)).unwrap());
        assert_ne!(identity, Identity::load(&certificate(&other_chain, &other_key)).unwrap());
        let with_ca = Identity::load(&certificate(&format!("{chain}{}", ca.pem()), &key)).unwrap();
        assert_eq!(with_ca.key().cert.len(), 2);
        let one_line = key.replace('\n', " ");
        for (chain, key, expected) in [
            (
                &*chain,
                &*other_key,
                "Failed to load private key from <inline>: it is not the key of the certificate",
            ),
            (&chain, "junk", "there is no key in it"),
            (&chain, &one_line, "it is not valid PEM"),
            (
                &chain,
                "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n",
                "it is encrypted",
            ),
            (
                &chain,
                "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
                "of no supported kind",
            ),
            ("junk", &key, "Failed to load certificate chain from <inline>: there is no certificate in it"),
            (&key, &key, "there is no certificate in it"),
            (
                "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
                &key,
                "certificate 1 is not valid X.509",
            ),
        ] {
            let error = Identity::load(&certificate(chain, key)).unwrap_err().to_string();
            assert!(error.contains(expected), "{expected}: {error}");
        }
    }

    #[test]
    fn nothing_shows_a_key() {
        let ca = Authority::new();
        let (chain, key) = ca.issue(&["a"]);
        let body: String = key.lines().filter(|line| !line.starts_with("-----")).collect();
        let pieces = [&body[..16], &body[body.len() - 16..]];
        let one_line = key.replace('\n', "");
        let mut shown = vec![
            format!("{:?}", Identity::load(&certificate(&chain, &key)).unwrap()),
            format!("{:?}", certificate(&chain, &key)),
            format!("{:?}", Trust::load(&validation(Some(&one_line))).unwrap_err()),
        ];
        for (chain, key) in [(&*chain, &*one_line), (&one_line, &key), (&chain, &body), (&key, &chain)] {
            let error = Identity::load(&certificate(chain, key)).unwrap_err();
            shown.push(format!("{error} {error:?}"));
        }
        let shown = shown.join(" ");
        for piece in pieces {
            assert!(!shown.contains(piece), "{shown}");
        }
    }

    #[test]
    fn files_and_the_environment() {
        let ca = Authority::new();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        let of = |source| Validation { trusted_ca: Some(source), ..Validation::default() };
        let from_file = of(DataSource::File(path.clone()));
        let error = Trust::load(&from_file).unwrap_err().to_string();
        assert!(
            error.starts_with("trusted_ca can't be read from /") && error.contains("No such file"),
            "{error}"
        );
        for path in ["/dev/zero", "/proc/self"] {
            let error = Trust::load(&of(DataSource::File(path.into()))).unwrap_err().to_string();
            assert!(error.contains("not a regular file"), "{error}");
        }
        std::fs::File::create(&path).unwrap().set_len(MAX_FILE + 1).unwrap();
        let error = Trust::load(&from_file).unwrap_err().to_string();
        assert!(error.contains("larger than 4194304 bytes"), "{error}");
        std::fs::write(&path, ca.pem()).unwrap();
        assert_eq!(Trust::load(&from_file).unwrap().authorities.len(), 1);
        let unset = of(DataSource::Environment("TIDEGATE_NO_SUCH_VARIABLE".into()));
        let error = Trust::load(&unset).unwrap_err().to_string();
        assert!(error.contains("environment variable TIDEGATE_NO_SUCH_VARIABLE: it is not set"), "{error}");
        let junk = Trust::load(&validation(Some("junk"))).unwrap_err().to_string();
        assert!(junk.starts_with("Failed to load trusted CA certificates from <inline>"), "{junk}");
    }

    #[test]
    fn what_a_secret_is_for() {
        let ca = Authority::new();
        let (chain, key) = ca.issue(&["a"]);
        let load = |content| Material::load(&Secret { name: "s".into(), content }).unwrap();
        let identity = load(SecretContent::Certificate(certificate(&chain, &key)));
        let trust = load(SecretContent::Validation(validation(Some(&ca.pem()))));
        let only_names = load(SecretContent::Validation(validation(None)));
        let validation = |has_ca| Use::Validation { has_ca };
        assert_eq!(identity.fits(Use::Certificate), Ok(()));
        assert_eq!(trust.fits(validation(false)), Ok(()));
        assert_eq!(only_names.fits(validation(true)), Ok(()));
        assert_eq!(only_names.fits(validation(false)), Err(SecretError::NoCa));
        let error = identity.fits(validation(true)).unwrap_err().to_string();
        assert_eq!(error, "it is a tls_certificate, and is wanted as a validation_context");
        assert!(load(SecretContent::Generic).fits(Use::Certificate).is_err());
    }
}
