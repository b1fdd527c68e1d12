//! The last accepted state on disk (`--xds-cache`), so that a restart without a control plane serves what was known.
//!
//! One file for each kind: an encoded `DiscoveryResponse` whose resources are in `Resource` wrappers. Secrets are never
//! written.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use tidegate_api::discovery::{self, DiscoveryResponse};
use tidegate_api::wkt::Any;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::tables::{Held, Tables};
use super::{Kind, Resource};

/// What is kept.
const KINDS: [Kind; 5] =
    [Kind::Cluster, Kind::ClusterLoadAssignment, Kind::Listener, Kind::RouteConfiguration, Kind::VirtualHost];

/// Writes are at least so far apart: a control plane may push many times a second.
const INTERVAL: Duration = Duration::from_secs(2);

/// Why there is no cache.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The directory can't be used.
    #[error("can't use --xds-cache {path}: {source}")]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file can't be read.
    #[error("{path}: {reason}; the file is ignored")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// A directory with the last accepted state.
#[derive(Debug)]
pub struct Cache {
    dir: PathBuf,
    tables: Tables,
    /// Of the tables, at the last write.
    written: u64,
    next: Instant,
    writing: Option<JoinHandle<()>>,
}

impl Cache {
    /// Opens (or makes) the directory. Only its owner may read it.
    pub fn open(dir: &Path, tables: &Tables) -> Result<Self, CacheError> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.and_then(|()| fs::metadata(dir))
            .map_err(|source| CacheError::Directory { path: dir.to_owned(), source })?;
        Ok(Self {
            dir: dir.to_owned(),
            tables: tables.clone(),
            written: 0,
            next: Instant::now(),
            writing: None,
        })
    }

    fn path(&self, kind: Kind) -> PathBuf {
        self.dir.join(format!("{}.pb", kind.service().to_ascii_lowercase()))
    }

    /// What was accepted before this process: version and resources. None when there is no file.
    pub fn load(&self, kind: Kind) -> Result<Option<(String, Vec<Resource>)>, CacheError> {
        let path = self.path(kind);
        let failed = |reason: String| CacheError::File { path: path.clone(), reason };
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error.to_string())),
        };
        let response = DiscoveryResponse::decode(&bytes[..])
            .map_err(|error| failed(format!("not a DiscoveryResponse: {error}")))?;
        if response.type_url != kind.type_url() {
            return Err(failed(format!(
                "has the type {:?} instead of {:?}",
                response.type_url,
                kind.type_url()
            )));
        }
        let resources = response.resources.iter().map(|any| {
            let wrapper =
                discovery::Resource::decode(&any.value[..]).map_err(|error| failed(error.to_string()))?;
            let body =
                wrapper.resource.ok_or_else(|| failed(format!("resource {:?} is empty", wrapper.name)))?;
            let name = (kind == Kind::VirtualHost).then(|| wrapper.name.into());
            Ok(Resource { name, version: wrapper.version, body, unknown_fields: Vec::new() })
        });
        Ok(Some((response.version_info, resources.collect::<Result<_, _>>()?)))
    }

    /// Writes what has changed since the last time, in the background. Call it now and then; `finish` waits.
    pub fn save(&mut self) {
        let busy = self.writing.as_ref().is_some_and(|writing| !writing.is_finished());
        if busy || Instant::now() < self.next {
            return;
        }
        let Some(files) = self.changed() else { return };
        self.next = Instant::now() + INTERVAL;
        self.writing = Some(tokio::task::spawn_blocking(move || write_all(&files)));
    }

    /// Writes what has changed since the last time.
    pub fn finish(&mut self) {
        if let Some(files) = self.changed() {
            write_all(&files);
        }
    }

    /// The files to write, if anything has changed.
    fn changed(&mut self) -> Option<Vec<File>> {
        let tables = self.tables.lock();
        if tables.generation() == self.written {
            return None;
        }
        let file = |kind: Kind| {
            let table = tables.kind(kind)?;
            let latest = |(name, record): (&Arc<str>, &super::tables::Record)| {
                // What warms was accepted too, and is what the control plane wants.
                Some((Arc::clone(name), record.warming.as_deref().or(record.active.as_ref())?.clone()))
            };
            let resources = table.records.iter().filter_map(latest).collect();
            Some(File { path: self.path(kind), kind, version: table.version.clone(), resources })
        };
        let files = KINDS.into_iter().filter_map(file).collect();
        self.written = tables.generation();
        Some(files)
    }
}

/// What goes into one file.
struct File {
    path: PathBuf,
    kind: Kind,
    version: String,
    resources: Vec<(Arc<str>, Held)>,
}

fn write_all(files: &[File]) {
    for file in files {
        if let Err(error) = write(file) {
            tracing::warn!(%error, "can't write {}; the cache is out of date", file.path.display());
        }
    }
}

/// Whole or not at all: the process may end at any moment.
fn write(file: &File) -> io::Result<()> {
    let wrapped = |(name, held): &(Arc<str>, Held)| {
        let resource = discovery::Resource {
            name: name.to_string(),
            version: held.version.to_string(),
            resource: Some(Any { type_url: file.kind.type_url().to_owned(), value: held.body.to_vec() }),
            ..Default::default()
        };
        Any {
            type_url: "type.googleapis.com/envoy.service.discovery.v3.Resource".to_owned(),
            value: resource.encode_to_vec(),
        }
    };
    let response = DiscoveryResponse {
        version_info: file.version.clone(),
        type_url: file.kind.type_url().to_owned(),
        resources: file.resources.iter().map(wrapped).collect(),
        ..Default::default()
    };
    let temporary = file.path.with_extension("pb.tmp");
    let mut out =
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    out.write_all(&response.encode_to_vec())?;
    out.sync_all()?;
    fs::rename(&temporary, &file.path)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    fn held(version: &str, body: &[u8]) -> Held {
        Held { version: version.into(), body: body.into(), at: SystemTime::UNIX_EPOCH, stale: false }
    }

    #[test]
    fn what_was_saved_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        let tables = Tables::default();
        let mut cache = Cache::open(&path, &tables).unwrap();
        assert!(cache.load(Kind::Cluster).unwrap().is_none());
        {
            let mut tables = tables.lock();
            let table = tables.kind_mut(Kind::Cluster);
            table.version = "7".into();
            table.accept(&"a".into(), held("7", b"old"));
            table.activate("a");
            table.accept(&"a".into(), held("8", b"new"));
            tables.kind_mut(Kind::Secret).accept(&"s".into(), held("1", b"key"));
        }
        cache.finish();
        let (version, resources) = cache.load(Kind::Cluster).unwrap().unwrap();
        assert_eq!((version.as_str(), resources.len()), ("7", 1));
        assert_eq!((resources[0].version.as_str(), &resources[0].body.value[..]), ("8", &b"new"[..]));
        let files: Vec<_> = fs::read_dir(&path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        assert_eq!(files, ["cds.pb"], "no secrets, no left-overs");
    }

    #[test]
    fn a_broken_file_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path(), &Tables::default()).unwrap();
        fs::write(dir.path().join("lds.pb"), [0xff; 20]).unwrap();
        let error = cache.load(Kind::Listener).unwrap_err().to_string();
        assert!(error.contains("lds.pb: not a DiscoveryResponse"), "{error}");
        let other = DiscoveryResponse { type_url: "x".into(), ..Default::default() };
        fs::write(dir.path().join("lds.pb"), other.encode_to_vec()).unwrap();
        assert!(cache.load(Kind::Listener).is_err());
    }
}
