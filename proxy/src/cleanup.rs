//! `tidegate cleanup`: removes what a killed process left behind.

use std::fmt;

use crate::intercept::InterceptError;
use crate::intercept::programs;
use crate::takeover::{self, Recorded, StatePaths, TakeoverError};

/// Why nothing, or not everything, was removed.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    /// A process is at work.
    #[error("process {0} is at work; stop it (it removes everything itself), or use --force")]
    Alive(u32),
    /// Links and maps.
    #[error(transparent)]
    Intercept(#[from] InterceptError),
    /// Lock and record.
    #[error(transparent)]
    State(#[from] TakeoverError),
}

/// What was removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// eBPF links and map directories.
    pub pins: programs::Cleaned,
    /// The record of a process.
    pub record: bool,
}

/// Removes links, maps and state files. Refuses while a process is at work there; with `force` that process goes on
/// without interception. Fine when there is nothing.
pub fn run(paths: &StatePaths, force: bool) -> Result<Removed, CleanupError> {
    if !force && let Recorded::Alive(id, _) = takeover::recorded(&paths.state_dir) {
        return Err(CleanupError::Alive(id.pid));
    }
    let pins = programs::cleanup(&paths.pin_dir, force)?;
    let record = takeover::remove_state(&paths.state_dir)?;
    Ok(Removed { pins, record })
}

impl fmt::Display for Removed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pins: programs::Cleaned { links, map_dirs }, record } = self;
        if *self == Self::default() {
            return f.write_str("nothing to remove");
        }
        write!(f, "removed: {links} eBPF links, {map_dirs} map directories")?;
        if *record { f.write_str(", 1 process record") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_while_a_process_is_at_work() {
        let dir = tempfile::tempdir().unwrap();
        let paths = StatePaths { pin_dir: dir.path().join("no-pins"), state_dir: dir.path().join("state") };
        assert_eq!(run(&paths, false).unwrap().to_string(), "nothing to remove");
        let record = takeover::Starting::claim(&paths.state_dir).unwrap().finish().unwrap();
        let error = run(&paths, false).unwrap_err();
        assert!(matches!(error, CleanupError::Alive(pid) if pid == std::process::id()), "{error}");
        let removed = run(&paths, true).unwrap();
        assert_eq!(removed.to_string(), "removed: 0 eBPF links, 0 map directories, 1 process record");
        assert!(!paths.state_dir.exists());
        drop(record);
    }
}
