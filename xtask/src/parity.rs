//! `cargo xtask parity`.

use anyhow::{Result, bail};
use clap::Args;

/// Arguments of `parity`.
#[derive(Args, Debug)]
pub(crate) struct Parity {}

impl Parity {
    #[allow(clippy::unused_self)]
    pub(crate) fn run(&self) -> Result<()> {
        bail!("`cargo xtask parity` is not written yet")
    }
}
