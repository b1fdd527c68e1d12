//! `cargo xtask test`.

use anyhow::{Result, bail};
use clap::Args;

/// Arguments of `test`.
#[derive(Args, Debug)]
pub(crate) struct Test {}

impl Test {
    #[allow(clippy::unused_self)]
    pub(crate) fn run(&self) -> Result<()> {
        bail!("`cargo xtask test` is not written yet")
    }
}
