//! The process log: `tracing` to stderr or `--log-path`, levels changeable at run time.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

use crate::args::LogLevel;

/// What can go wrong with the process log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// `--log-path` can't be opened.
    #[error("--log-path {path}: {source}; give a path in a directory that exists and is writable")]
    Open {
        /// The path as given.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A level or component that doesn't exist.
    #[error("log level: {0}; levels are trace, debug, info, warning, error, critical, off")]
    Level(String),
    /// A second subscriber in one process.
    #[error("the process log is already set up")]
    Twice,
}

/// Changes what is logged, and where to, while the process runs. Held by the main thread.
#[derive(Clone, Debug)]
pub struct Log {
    filter: reload::Handle<EnvFilter, Registry>,
    levels: Arc<Mutex<Levels>>,
    sink: Sink,
}

/// The levels in force.
#[derive(Clone, Debug)]
struct Levels {
    default: String,
    components: Vec<(String, String)>,
}

impl Levels {
    /// As `EnvFilter` directives. Envoy's `warning` and `critical` are tracing's `warn` and `error`.
    fn filter(&self) -> Result<EnvFilter, LogError> {
        let level = |name: &str| match name {
            "trace" | "debug" | "info" | "error" | "off" => Ok(name.to_owned()),
            "warning" | "warn" => Ok("warn".to_owned()),
            "critical" => Ok("error".to_owned()),
            other => Err(LogError::Level(format!("unknown level '{other}'"))),
        };
        let mut directives = vec![level(&self.default)?];
        for (component, name) in &self.components {
            let known = !component.is_empty()
                && component.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b':');
            if !known {
                return Err(LogError::Level(format!("'{component}' is not a component name")));
            }
            directives.push(format!("tidegate::{component}={}", level(name)?));
        }
        EnvFilter::try_new(directives.join(",")).map_err(|error| LogError::Level(error.to_string()))
    }
}

/// Where lines go. The file can be swapped; lines are written whole.
#[derive(Clone, Debug)]
enum Sink {
    Stderr,
    File { path: PathBuf, file: Arc<Mutex<File>> },
}

impl<'a> MakeWriter<'a> for Sink {
    type Writer = Box<dyn Write + 'a>;

    fn make_writer(&'a self) -> Self::Writer {
        match self {
            Self::Stderr => Box::new(io::stderr()),
            Self::File { file, .. } => Box::new(FileLine(file)),
        }
    }
}

struct FileLine<'a>(&'a Mutex<File>);

impl Write for FileLine<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(line)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn open(path: &Path) -> Result<File, LogError> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .map_err(|source| LogError::Open { path: path.to_owned(), source })
}

impl Log {
    /// Sets up the log of this process.
    ///
    /// `components` is `--component-log-level`: `name:level` pairs separated by commas, a name being a module
    /// of this crate.
    pub fn install(level: LogLevel, components: &str, path: Option<&Path>) -> Result<Self, LogError> {
        let levels = Levels { default: level.to_string(), components: pairs(components)? };
        let sink = match path {
            None => Sink::Stderr,
            Some(path) => Sink::File { path: path.to_owned(), file: Arc::new(Mutex::new(open(path)?)) },
        };
        let (filter, handle) = reload::Layer::new(levels.filter()?);
        let lines = fmt::layer().with_writer(sink.clone()).with_ansi(false);
        tracing_subscriber::registry().with(filter).with(lines).try_init().map_err(|_| LogError::Twice)?;
        Ok(Self { filter: handle, levels: Arc::new(Mutex::new(levels)), sink })
    }

    /// Changes the level of everything (`component` none) or of one module.
    pub fn set_level(&self, component: Option<&str>, level: &str) -> Result<(), LogError> {
        let mut current = self.levels.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = current.clone();
        match component {
            None => {
                level.clone_into(&mut next.default);
                next.components.clear();
            }
            Some(component) => {
                next.components.retain(|(name, _)| name != component);
                next.components.push((component.to_owned(), level.to_owned()));
            }
        }
        self.filter.reload(next.filter()?).map_err(|error| LogError::Level(error.to_string()))?;
        *current = next;
        Ok(())
    }

    /// The level of everything, then those of single components.
    pub fn levels(&self) -> (String, Vec<(String, String)>) {
        let levels = self.levels.lock().unwrap_or_else(PoisonError::into_inner);
        (levels.default.clone(), levels.components.clone())
    }

    /// Opens `--log-path` again, after a log rotation moved it. The old file stays in use when that fails.
    pub fn reopen(&self) -> Result<(), LogError> {
        if let Sink::File { path, file } = &self.sink {
            *file.lock().unwrap_or_else(PoisonError::into_inner) = open(path)?;
        }
        Ok(())
    }
}

fn pairs(list: &str) -> Result<Vec<(String, String)>, LogError> {
    list.split(',')
        .filter(|pair| !pair.is_empty())
        .map(|pair| match pair.split_once(':') {
            Some((name, level)) => Ok((name.to_owned(), level.to_owned())),
            None => Err(LogError::Level(format!("--component-log-level '{pair}' is not `name:level`"))),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn envoys_level_names_become_directives() {
        let levels = Levels {
            default: "warning".into(),
            components: vec![("pump".into(), "trace".into()), ("xds".into(), "critical".into())],
        };
        let text = levels.filter().unwrap().to_string();
        assert!(text.contains("tidegate::pump=trace") && text.contains("tidegate::xds=error"), "{text}");
        assert!(text.contains("warn"), "{text}");
    }

    #[test]
    fn unknown_levels_and_components_are_errors() {
        assert!(Levels { default: "loud".into(), components: vec![] }.filter().is_err());
        assert!(
            Levels { default: "info".into(), components: vec![("a=b".into(), "info".into())] }
                .filter()
                .is_err()
        );
        assert!(pairs("pump").is_err());
        assert_eq!(pairs("").unwrap(), []);
    }
}
