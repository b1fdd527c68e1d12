//! `cargo xtask fuzz`: the fuzz targets, for longer than `cargo xtask test` runs them. `proxy/src/fuzz.rs` says how they work.

use anyhow::{Result, ensure};
use clap::Args;

use crate::cargo;

/// Arguments of `fuzz`.
#[derive(Args, Debug)]
pub(crate) struct Fuzz {
    /// Only targets whose name contains this text: discovery_response, delta_response, rest_json, bootstrap_yaml,
    /// proxy_header, tls_hello.
    target: Option<String>,
    /// How long each target runs; they run side by side.
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u64,
    /// Where the chain of random numbers starts; another one each time unless this is given.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

impl Fuzz {
    pub(crate) fn run(&self) -> Result<()> {
        let mut cargo = cargo::command();
        cargo.args(["test", "--package", "tidegate", "--lib", "--"]);
        cargo.arg(format!("fuzz_{}", self.target.as_deref().unwrap_or_default())).arg("--nocapture");
        cargo.env("TIDEGATE_FUZZ_SECONDS", self.seconds.to_string());
        if let Some(seed) = self.seed {
            cargo.env("TIDEGATE_FUZZ_SEED", seed.to_string());
        }
        ensure!(cargo.status()?.success(), "a property does not hold; the input is in target/fuzz");
        Ok(())
    }
}
