//! Calls of cargo.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, ensure};
use tidegate_tests::program;

/// Cargo, in the repository.
pub(crate) fn command() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(program::repository());
    cargo
}

/// Builds the programs of these packages, with the profile of the running xtask. Does nothing in the process
/// that [`crate::root::become_root`] started: its parent has built them; nor when `TIDEGATE_BIN_DIR` says where
/// they are.
pub(crate) fn build(packages: &[&str]) -> Result<()> {
    if crate::root::is_child() || std::env::var_os("TIDEGATE_BIN_DIR").is_some() {
        return Ok(());
    }
    let mut cargo = command();
    cargo.args(["build", "--quiet", "--bins"]);
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    for package in packages {
        cargo.args(["--package", package]);
    }
    let status = cargo.status()?;
    ensure!(status.success(), "cargo build: {status}");
    Ok(())
}

/// Builds tidegate as its users do, with the release profile, and says where it is. After
/// [`crate::root::become_root`] it is there already.
pub(crate) fn build_release() -> Result<PathBuf> {
    if !crate::root::is_child() {
        let mut cargo = command();
        cargo.args(["build", "--quiet", "--release", "--package", "tidegate", "--bin", "tidegate"]);
        let status = cargo.status()?;
        ensure!(status.success(), "cargo build --release: {status}");
    }
    Ok(program::target().join("release/tidegate"))
}
