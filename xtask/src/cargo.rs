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

/// Builds these programs, with the profile of the running xtask. Does nothing in the process that
/// [`crate::root::become_root`] started: its parent has built them; nor when `TIDEGATE_BIN_DIR` says where they are.
///
/// No package is named: then every crate has the features that all default members ask for together, as in `cargo test`,
/// and is not built once more with fewer.
pub(crate) fn build(programs: &[&str]) -> Result<()> {
    if crate::root::is_child() || std::env::var_os("TIDEGATE_BIN_DIR").is_some() {
        return Ok(());
    }
    let mut cargo = command();
    cargo.arg("build");
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    for program in programs {
        cargo.args(["--bin", program]);
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
        cargo.args(["build", "--release", "--package", "tidegate", "--bin", "tidegate"]);
        let status = cargo.status()?;
        ensure!(status.success(), "cargo build --release: {status}");
    }
    Ok(program::target().join("release/tidegate"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Each crate with its features, for this selection of packages.
    fn crates(selection: &[&str]) -> BTreeSet<String> {
        let format = ["tree", "--locked", "--offline", "--prefix", "none", "--format", "{p} [{f}]"];
        let output = command().args(format).args(selection).output().expect("cargo tree");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        text.lines().map(|line| line.trim_end_matches(" (*)").to_owned()).collect()
    }

    /// Where they differ, a contributor waits minutes for crates to be built a second time.
    #[test]
    fn every_command_builds_crates_with_the_same_features() {
        let tests = crates(&["--edges", "normal,build,dev"]);
        for (what, selection) in [
            ("cargo xtask", &["--edges", "normal,build", "--package", "xtask"][..]),
            ("cargo build", &["--edges", "normal,build"]),
        ] {
            let own: Vec<_> = crates(selection).difference(&tests).cloned().collect();
            assert!(
                own.is_empty(),
                "{what} and `cargo test` disagree (see the end of xtask/Cargo.toml): {own:#?}"
            );
        }
    }
}
