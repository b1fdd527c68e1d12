//! `cargo xtask build-ebpf`.

use anyhow::{Result, bail};
use clap::Args;

/// Arguments of `build-ebpf`.
#[derive(Args, Debug)]
pub(crate) struct BuildEbpf {}

impl BuildEbpf {
    #[allow(clippy::unused_self)]
    pub(crate) fn run(&self) -> Result<()> {
        bail!("`cargo xtask build-ebpf` is not written yet")
    }
}
