//! `cargo xtask demo`.

use anyhow::{Result, bail};
use clap::Args;

/// Arguments of `demo`.
#[derive(Args, Debug)]
pub(crate) struct Demo {}

impl Demo {
    #[allow(clippy::unused_self)]
    pub(crate) fn run(&self) -> Result<()> {
        bail!("`cargo xtask demo` is not written yet")
    }
}
