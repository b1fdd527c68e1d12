//! `cargo xtask gen-api`.

use anyhow::{Result, bail};
use clap::Args;

/// Arguments of `gen-api`.
#[derive(Args, Debug)]
pub(crate) struct GenApi {}

impl GenApi {
    #[allow(clippy::unused_self)]
    pub(crate) fn run(&self) -> Result<()> {
        bail!("`cargo xtask gen-api` is not written yet")
    }
}
