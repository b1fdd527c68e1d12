//! Where the built programs and installed tools are.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

/// The repository.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests package has a parent")
}

/// Cargo's target directory.
pub fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => repository().join(dir),
        None => repository().join("target"),
    }
}

/// A program of this workspace, built with the same profile as the program that asks.
/// `TIDEGATE_BIN_DIR` overrides where it is looked for.
pub fn built(name: &str) -> Result<PathBuf> {
    let dir = match std::env::var_os("TIDEGATE_BIN_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => own_dir()?,
    };
    let path = dir.join(name);
    if !path.exists() {
        bail!(
            "{} is missing: `cargo xtask test` builds it (or: cargo build -p tidegate -p tidegate-tests)",
            path.display()
        );
    }
    Ok(path)
}

fn own_dir() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let dir = own.parent().unwrap_or(Path::new("/"));
    // Test programs are in deps/, one below the programs.
    Ok(if dir.ends_with("deps") { dir.parent().unwrap_or(dir) } else { dir }.to_path_buf())
}
