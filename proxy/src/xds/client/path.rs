//! `path_config_source`: a file with a DiscoveryResponse, read at once and whenever another file takes its place.
//!
//! As Envoy, it looks at renames only: a file that is written in place may be seen half written. A rename counts when
//! it is onto the file, when it is in `watched_directory`, and when the file is behind a symbolic link and leads
//! somewhere else afterwards (Kubernetes renames `..data` to update a mounted ConfigMap). Only as long as the file is
//! missing or bad is it looked at again by itself.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask};
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

use super::Task;
use super::json::{self, Content, Refusal};
use super::state::{Asked, State};
use crate::config::config_source::PathSource;
use crate::config::proto::Source;
use crate::xds::Kind;

/// How often a directory is looked for that is not there, and a file that can't be used.
const RETRY: Duration = Duration::from_secs(1);

/// With a file that holds and a directory that is watched there is nothing to look for.
const SETTLED: Duration = Duration::from_hours(24);

/// Largest file.
const MAX_FILE: u64 = 1 << 30;

/// Reads and watches until nothing is wanted any more.
pub(super) async fn run(source: Arc<PathSource>, task: Task) {
    let mut state = State::new(task);
    if state.next_ask().await == Asked::Nothing {
        return;
    }
    let mut file = WatchedFile::new(&source);
    loop {
        // Watched before it is read, so that no change falls between.
        file.watch();
        // What can't be used may be a file that is being written, or is still to come: that is looked at again.
        let before = stamp(&source.path);
        let bad = (!read(&source.path, &mut state).await).then_some(before);
        loop {
            let settled = bad.is_none() && file.is_watched();
            let wake = Instant::now() + if settled { SETTLED } else { RETRY };
            tokio::select! {
                biased;
                asked = state.wait(wake) => match asked {
                    Some(Asked::Nothing) => return,
                    Some(Asked::Less) => {}
                    Some(Asked::More) => break,
                    None => {
                        let came = !file.is_watched() && file.watch();
                        if came || bad.is_some_and(|bad| stamp(&source.path) != bad) {
                            break;
                        }
                    }
                },
                changed = file.changed() => if changed { break },
            }
        }
    }
}

/// What shows that a file was written to, or is another one. None: there is no file.
fn stamp(path: &Path) -> Option<(SystemTime, u64, u64)> {
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.modified().ok()?, metadata.len(), metadata.ino()))
}

/// Reads the file and gives it to the store; false when there is nothing to be given.
async fn read(path: &Path, state: &mut State) -> bool {
    let (owned, kind) = (path.to_owned(), state.kind());
    let done = tokio::task::spawn_blocking(move || read_file(&owned, kind)).await;
    match done {
        Ok(Ok(content)) => {
            state.deliver(content, None);
            return true;
        }
        Ok(Err(Refusal::Unreadable(reason))) => state.failed(reason),
        Ok(Err(Refusal::Rejected { version, reason })) => {
            state.succeeded(None);
            state.rejected(version, format!("{}: {reason}", path.display()));
        }
        Err(error) => state.failed(format!("{}: {error}", path.display())),
    }
    false
}

/// Blocks.
fn read_file(path: &Path, kind: Kind) -> Result<Content, Refusal> {
    let name = path.display().to_string();
    let unreadable = |error: &dyn std::fmt::Display| Refusal::Unreadable(format!("{name}: {error}"));
    let metadata = std::fs::metadata(path).map_err(|error| unreadable(&error))?;
    if !metadata.is_file() {
        return Err(unreadable(&"not a regular file"));
    }
    if metadata.len() > MAX_FILE {
        return Err(unreadable(&format_args!("larger than {MAX_FILE} bytes")));
    }
    let content = std::fs::read(path).map_err(|error| unreadable(&error))?;
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("pb") => json::from_binary(&name, &content, kind),
        Some("pb_text") => Err(unreadable(&"text protobuf is not supported; use .yaml, .json or .pb")),
        _ => {
            let source = Source::from_file(name.as_str(), content)
                .map_err(|error| Refusal::Unreadable(error.to_string()))?;
            json::from_text(&source, kind)
        }
    }
}

/// Tells when another file has taken the place of a file.
struct WatchedFile<'a> {
    source: &'a PathSource,
    inotify: Option<AsyncFd<Inotify>>,
    /// The directory's, as long as it is there.
    directory: Option<WatchDescriptor>,
    /// Where the file leads to when it is behind symbolic links.
    target: Option<PathBuf>,
    buffer: Vec<u8>,
}

impl<'a> WatchedFile<'a> {
    fn new(source: &'a PathSource) -> Self {
        Self { source, inotify: None, directory: None, target: None, buffer: vec![0; 4096] }
    }

    fn is_watched(&self) -> bool {
        self.directory.is_some()
    }

    fn directory(&self) -> &Path {
        let parent = || self.source.path.parent().filter(|parent| !parent.as_os_str().is_empty());
        self.source.watched_directory.as_deref().or_else(parent).unwrap_or(Path::new("."))
    }

    /// Watches the directory unless it is watched already, and notes where the file leads to. Whether it is watched.
    fn watch(&mut self) -> bool {
        if self.directory.is_none()
            && let Err(error) = self.try_watch()
        {
            tracing::debug!(directory = %self.directory().display(), %error, "the directory can't be watched");
        }
        self.target = std::fs::canonicalize(&self.source.path).ok();
        self.is_watched()
    }

    fn try_watch(&mut self) -> io::Result<()> {
        let inotify = match &self.inotify {
            Some(inotify) => inotify,
            None => self.inotify.insert(readiness(Inotify::init()?)?),
        };
        let mask = WatchMask::MOVED_TO | WatchMask::DELETE_SELF | WatchMask::MOVE_SELF | WatchMask::ONLYDIR;
        let directory = inotify.get_ref().watches().add(self.directory(), mask)?;
        self.directory = Some(directory);
        Ok(())
    }

    /// Waits for something to happen in the directory. Whether the file is another one now.
    async fn changed(&mut self) -> bool {
        let Some(inotify) = &mut self.inotify else { return std::future::pending().await };
        let happened = match inotify.readable_mut().await {
            Ok(mut ready) => {
                let happened = Happened::read(
                    ready.get_inner_mut(),
                    &mut self.buffer,
                    self.source,
                    self.directory.as_ref(),
                );
                ready.clear_ready();
                happened
            }
            Err(_) => Happened { unwatched: true, ..Happened::default() },
        };
        if happened.unwatched {
            if let (Some(inotify), Some(directory)) = (&self.inotify, self.directory.take()) {
                inotify.get_ref().watches().remove(directory).ok(); // gone already, as a rule
            }
            // Another directory may have come in its place.
            return self.watch();
        }
        let target = std::fs::canonicalize(&self.source.path).ok();
        // A file that is gone leaves its content in force.
        let elsewhere = target.is_some() && target != self.target;
        happened.replaced || (happened.any && elsewhere)
    }
}

/// What replaces this constructor is unsafe, for types that may close or change their descriptor: an `Inotify` has one
/// from its first day to its last.
#[allow(deprecated)]
fn readiness(inotify: Inotify) -> io::Result<AsyncFd<Inotify>> {
    AsyncFd::new(inotify)
}

#[derive(Debug, Default)]
struct Happened {
    /// Something was renamed.
    any: bool,
    /// Something was renamed onto the file, or events were lost.
    replaced: bool,
    /// The directory itself is gone or has moved.
    unwatched: bool,
}

impl Happened {
    fn read(
        inotify: &mut Inotify,
        buffer: &mut [u8],
        source: &PathSource,
        directory: Option<&WatchDescriptor>,
    ) -> Self {
        let mut happened = Self::default();
        loop {
            let events = match inotify.read_events(buffer) {
                Ok(events) => events,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return happened,
                Err(_) => {
                    happened.unwatched = true;
                    return happened;
                }
            };
            for event in events {
                if event.mask.contains(EventMask::Q_OVERFLOW) {
                    happened.replaced = true;
                    continue;
                }
                if Some(&event.wd) != directory {
                    continue; // of a directory that was watched before
                }
                let gone =
                    EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::IGNORED | EventMask::UNMOUNT;
                happened.unwatched |= event.mask.intersects(gone);
                if event.mask.contains(EventMask::MOVED_TO) {
                    happened.any = true;
                    happened.replaced |=
                        source.watched_directory.is_some() || event.name == source.path.file_name();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use prost::Message;
    use tempfile::TempDir;
    use tidegate_api::discovery::DiscoveryResponse;
    use tokio::sync::mpsc;

    use super::super::Ask;
    use super::super::testing::{Nowhere, names, task, wildcard};
    use super::*;
    use crate::xds::{Change, Event, Verdict};

    fn clusters(version: &str, names: &[&str]) -> String {
        let cluster = "'@type': type.googleapis.com/envoy.config.cluster.v3.Cluster";
        let list: Vec<_> = names
            .iter()
            .map(|name| format!("- {{{cluster}, name: {name}, connect_timeout: 1s}}\n"))
            .collect();
        format!("version_info: '{version}'\nresources:\n{}", list.concat())
    }

    fn replace(path: &Path, content: impl AsRef<[u8]>) {
        let new = path.with_extension("new");
        std::fs::write(&new, content).unwrap();
        std::fs::rename(&new, path).unwrap();
    }

    struct Watched {
        asks: mpsc::UnboundedSender<(Kind, Ask)>,
        events: mpsc::UnboundedReceiver<Event>,
    }

    impl Watched {
        fn start(path: &Path, watched_directory: Option<&Path>) -> Self {
            let (task, asks, events) = task(Kind::Cluster, Rc::new(Nowhere));
            let watched_directory = watched_directory.map(Path::to_owned);
            let source = PathSource { path: path.to_owned(), watched_directory };
            tokio::task::spawn_local(run(Arc::new(source), task));
            asks.send((Kind::Cluster, Ask::Replace(wildcard()))).unwrap();
            Self { asks, events }
        }

        /// Version and names of the next update, which is accepted.
        async fn update(&mut self) -> (String, Vec<String>) {
            loop {
                match self.events.recv().await.unwrap() {
                    Event::Update(update) => {
                        update.verdict.send(Verdict::Accept).unwrap();
                        let Change::State { version, resources, .. } = update.change else { panic!() };
                        return (version, names(&resources));
                    }
                    Event::Connected { .. } => {}
                    other => panic!("{other:?}"),
                }
            }
        }

        async fn failure(&mut self) -> String {
            match self.events.recv().await.unwrap() {
                Event::Failed { reason, .. } | Event::Rejected { reason, .. } => reason,
                other => panic!("{other:?}"),
            }
        }
    }

    fn run_local(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, async {
            tokio::time::timeout(Duration::from_mins(1), test).await.expect("the test hangs");
        });
    }

    #[test]
    fn a_file_is_read_at_once_and_after_every_rename_onto_it() {
        run_local(async {
            let dir = TempDir::new().unwrap();
            let path = dir.path().join("cds.yaml");
            std::fs::write(&path, clusters("1", &["a"])).unwrap();
            let mut watched = Watched::start(&path, None);
            assert_eq!(watched.update().await, ("1".into(), vec!["a".into()]));
            // Others in the directory are nobody's business.
            replace(&dir.path().join("lds.yaml"), "[");
            for version in ["2", "3"] {
                replace(&path, clusters(version, &["a", "b"]));
                assert_eq!(watched.update().await, (version.into(), vec!["a".into(), "b".into()]));
            }
            // A file that is gone says nothing.
            std::fs::remove_file(&path).unwrap();
            replace(&path, clusters("4", &[]));
            assert_eq!(watched.update().await, ("4".into(), vec![]));
        });
    }

    #[test]
    fn bad_content_has_file_line_and_path_and_is_got_over() {
        run_local(async {
            let dir = TempDir::new().unwrap();
            let path = dir.path().join("cds.yaml");
            std::fs::write(&path, clusters("1", &["a"])).unwrap();
            let mut watched = Watched::start(&path, None);
            watched.update().await;
            replace(&path, "version_info: '2'\nresources: [");
            let reason = watched.failure().await;
            assert!(reason.starts_with(&format!("{}:2: ", path.display())), "{reason}");
            replace(&path, clusters("2", &["a", "a"]));
            let reason = loop {
                match watched.events.recv().await.unwrap() {
                    Event::Rejected { version, reason, .. } => break format!("{version} {reason}"),
                    Event::Connected { .. } => {}
                    other => panic!("{other:?}"),
                }
            };
            assert_eq!(reason, format!("2 {}: \"a\" comes twice", path.display()));
            replace(&path, clusters("2", &["a"]) + "- {'@type': type.googleapis.com/x.Y, name: z}\n");
            let Some(Event::Update(update)) = watched.events.recv().await else { panic!() };
            let Change::State { resources, unreadable, .. } = &update.change else { panic!() };
            assert_eq!(names(resources), ["a"]);
            assert_eq!(unreadable[0].name.as_deref(), Some("z"));
            let start = format!("{}:4: resources[1]: unknown type", path.display());
            assert!(unreadable[0].error.starts_with(&start), "{}", unreadable[0].error);
            replace(&path, clusters("3", &["b"]));
            assert_eq!(watched.update().await, ("3".into(), vec!["b".into()]));
        });
    }

    #[test]
    fn json_and_binary_files_are_told_by_their_names() {
        run_local(async {
            let dir = TempDir::new().unwrap();
            let json = dir.path().join("cds.json");
            std::fs::write(&json, r#"{"version_info": "j", "resources": [],}"#).unwrap();
            assert_eq!(Watched::start(&json, None).update().await.0, "j");
            let binary = dir.path().join("cds.pb");
            let response = DiscoveryResponse { version_info: "b".into(), ..Default::default() };
            std::fs::write(&binary, response.encode_to_vec()).unwrap();
            assert_eq!(Watched::start(&binary, None).update().await.0, "b");
            let text = dir.path().join("cds.pb_text");
            std::fs::write(&text, "").unwrap();
            assert!(Watched::start(&text, None).failure().await.contains("use .yaml, .json or .pb"));
        });
    }

    /// As kubelet updates a mounted ConfigMap: file → ..data/file, ..data → ..2026, and `..data` is renamed over.
    fn config_map(dir: &Path, generation: &str, content: &str) {
        std::fs::create_dir(dir.join(generation)).unwrap();
        std::fs::write(dir.join(generation).join("cds.yaml"), content).unwrap();
        std::os::unix::fs::symlink(generation, dir.join("..data_tmp")).unwrap();
        std::fs::rename(dir.join("..data_tmp"), dir.join("..data")).unwrap();
        std::os::unix::fs::symlink("..data/cds.yaml", dir.join("cds.yaml")).ok();
    }

    #[test]
    fn a_config_map_is_followed_with_and_without_watched_directory() {
        run_local(async {
            for told in [true, false] {
                let dir = TempDir::new().unwrap();
                config_map(dir.path(), "..1", &clusters("1", &["a"]));
                let watched_directory = told.then(|| dir.path());
                let mut watched = Watched::start(&dir.path().join("cds.yaml"), watched_directory);
                assert_eq!(watched.update().await.0, "1");
                config_map(dir.path(), "..2", &clusters("2", &["b"]));
                assert_eq!(watched.update().await, ("2".into(), vec!["b".into()]));
                config_map(dir.path(), "..3", &clusters("3", &[]));
                assert_eq!(watched.update().await.0, "3");
            }
        });
    }

    #[test]
    fn files_and_directories_may_come_later_and_come_back() {
        run_local(async {
            let dir = TempDir::new().unwrap();
            let inner = dir.path().join("xds");
            let path = inner.join("cds.yaml");
            let mut watched = Watched::start(&path, None);
            assert!(watched.failure().await.contains("No such file"));
            std::fs::create_dir(&inner).unwrap();
            // Written in place: seen because there was nothing before.
            std::fs::write(&path, clusters("1", &["a"])).unwrap();
            loop {
                match watched.events.recv().await.unwrap() {
                    Event::Update(_) => break,
                    Event::Failed { .. } | Event::Connected { .. } => {}
                    other @ (Event::Rejected { .. } | Event::RateLimited { .. }) => panic!("{other:?}"),
                }
            }
            std::fs::rename(&inner, dir.path().join("old")).unwrap();
            std::fs::create_dir(&inner).unwrap();
            replace(&path, clusters("2", &["b"]));
            loop {
                match watched.events.recv().await.unwrap() {
                    Event::Update(update) => {
                        let Change::State { version, .. } = update.change else { panic!() };
                        assert_eq!(version, "2");
                        break;
                    }
                    Event::Failed { .. } | Event::Connected { .. } => {}
                    other @ (Event::Rejected { .. } | Event::RateLimited { .. }) => panic!("{other:?}"),
                }
            }
        });
    }

    #[test]
    fn more_names_read_the_file_again_and_none_end_the_watch() {
        run_local(async {
            let dir = TempDir::new().unwrap();
            let path = dir.path().join("cds.yaml");
            std::fs::write(&path, clusters("1", &["a"])).unwrap();
            let mut watched = Watched::start(&path, None);
            watched.update().await;
            watched.asks.send((Kind::Cluster, Ask::Add("b".into()))).unwrap();
            assert_eq!(watched.update().await.0, "1");
            let nothing = crate::xds::Wanted::default();
            watched.asks.send((Kind::Cluster, Ask::Replace(nothing))).unwrap();
            watched.asks.closed().await;
        });
    }
}
