//! `cargo xtask test`: every test there is.

use std::process::Command;

use anyhow::{Result, bail, ensure};
use clap::Args;
use tidegate_tests::{run, tool};

use crate::{cargo, root};

/// Arguments of `test`.
#[derive(Args, Debug)]
pub(crate) struct Test {
    /// Also capture real containers, run by podman (installed if it is missing).
    #[arg(long)]
    containers: bool,
    /// Only tests whose name contains this text.
    filter: Option<String>,
    /// Run this many tests at a time.
    #[arg(long, value_name = "N")]
    threads: Option<u32>,
}

/// Programs that the fixtures call, and the Debian packages that have them.
const PROGRAMS: &[(&str, &str)] = &[
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("nsenter", "util-linux"),
    ("setpriv", "util-linux"),
    ("mount", "mount"),
];

impl Test {
    pub(crate) fn run(&self) -> Result<()> {
        tool::require(PROGRAMS)?;
        if self.containers {
            tool::require(&[("podman", "podman"), ("runc", "runc")])?;
        }
        cargo::build(&["tidegate", "workload"])?;
        root::pass_on_signals()?;
        let outcome = self.cargo_test();
        sweep()?;
        root::give_back();
        root::not_interrupted().and(outcome)
    }

    fn cargo_test(&self) -> Result<()> {
        let nextest = tool::find("cargo-nextest").is_some() || cargo_home_has("cargo-nextest");
        let mut cargo = cargo::command();
        cargo.args(if nextest {
            &["nextest", "run", "--no-fail-fast"][..]
        } else {
            &["test", "--no-fail-fast"][..]
        });
        if self.containers {
            cargo.args(["--features", "tidegate-tests/containers"]);
        }
        if let (Some(threads), true) = (self.threads, nextest) {
            cargo.args(["--test-threads", &threads.to_string()]);
        }
        cargo.args(&self.filter);
        as_root(&mut cargo)?;
        let mut passed = true;
        if nextest && self.filter.is_none() {
            // The examples in doc comments: nextest has no part in them.
            let mut docs = cargo::command();
            docs.args(["test", "--quiet", "--doc"]);
            passed = root::run_child(&mut docs)?.success();
            root::not_interrupted()?;
        }
        passed &= root::run_child(&mut cargo)?.success();
        ensure!(passed, "some tests failed");
        Ok(())
    }
}

/// Removes what tests have left that were killed.
fn sweep() -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        return run::sweep();
    }
    let status = tool::as_root(&std::env::current_exe()?.display().to_string()).arg("sweep").status()?;
    ensure!(status.success(), "cargo xtask sweep: {status}");
    Ok(())
}

/// Has cargo start test programs through sudo, so that what it builds stays the caller's.
fn as_root(cargo: &mut Command) -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    if tool::find("sudo").is_none() {
        bail!("network namespaces and eBPF need root: run this as root, or install sudo");
    }
    let triple = host_triple()?.to_uppercase().replace('-', "_");
    cargo.env(format!("CARGO_TARGET_{triple}_RUNNER"), "sudo -E");
    Ok(())
}

/// `x86_64-unknown-linux-gnu`
fn host_triple() -> Result<String> {
    let output = Command::new("rustc").arg("-vV").output()?;
    let text = String::from_utf8(output.stdout)?;
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    host.map_or_else(|| bail!("`rustc -vV` names no host"), |host| Ok(host.to_owned()))
}

fn cargo_home_has(program: &str) -> bool {
    let home = std::env::var("CARGO_HOME").or_else(|_| std::env::var("HOME").map(|home| home + "/.cargo"));
    home.is_ok_and(|home| std::path::Path::new(&home).join("bin").join(program).exists())
}
