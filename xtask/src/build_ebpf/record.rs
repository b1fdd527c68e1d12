//! `proxy-ebpf/prebuilt/BUILD.txt`: how the committed object was built.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum as _;

use super::inputs;
use super::toolchain::{Route, Toolchain};

/// Lines `key = value`.
pub(super) struct Record {
    route: String,
    toolchain: String,
    inputs: String,
    object: String,
}

impl Record {
    /// For an object that was just built.
    pub(super) fn of(toolchain: &Toolchain, bytes: &[u8]) -> Result<Self> {
        Ok(Self {
            route: toolchain.route.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default(),
            toolchain: toolchain.describe(),
            inputs: inputs::digest()?,
            object: inputs::digest_of(bytes),
        })
    }

    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let Self { route, toolchain, inputs, object } = self;
        let text = format!(
            "# Written by `cargo xtask build-ebpf`.\nroute = {route}\ntoolchain = {toolchain}\n\
             inputs = {inputs}\nobject = {object}\n"
        );
        fs::write(path, text).with_context(|| format!("write {}", path.display()))
    }

    pub(super) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        let value = |key: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(key)?.strip_prefix(" = "))
                .map(str::to_owned)
                .with_context(|| format!("{} has no line `{key} = …`", path.display()))
        };
        Ok(Self {
            route: value("route")?,
            toolchain: value("toolchain")?,
            inputs: value("inputs")?,
            object: value("object")?,
        })
    }

    pub(super) fn route(&self) -> Result<Route> {
        Route::from_str(&self.route, false).map_err(anyhow::Error::msg)
    }

    pub(super) fn toolchain(&self) -> &str {
        &self.toolchain
    }

    /// The object is the one that the record is about.
    pub(super) fn check_object(&self, bytes: &[u8]) -> Result<()> {
        ensure!(
            inputs::digest_of(bytes) == self.object,
            "proxy-ebpf/prebuilt: BUILD.txt is not about this tidegate.o; run `cargo xtask build-ebpf` and commit both"
        );
        Ok(())
    }

    /// Nothing has changed since.
    pub(super) fn check_inputs(&self) -> Result<()> {
        ensure!(
            inputs::digest()? == self.inputs,
            "the sources, flags or locked dependencies of the eBPF programs have changed since \
             proxy-ebpf/prebuilt/tidegate.o was built; run `cargo xtask build-ebpf` and commit proxy-ebpf/prebuilt"
        );
        Ok(())
    }
}
