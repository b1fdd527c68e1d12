//! `cargo xtask build-ebpf`: makes `proxy-ebpf/prebuilt/tidegate.o` from source, or checks it.
//!
//! The object is committed, so that building tidegate needs stable Rust and a C compiler only. Building the object
//! needs a Rust that can compile for BPF, and bpf-linker; both are installed where that is possible.

mod inputs;
mod object;
mod record;
mod toolchain;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use tidegate_tests::program;

use record::Record;
use toolchain::{Route, Toolchain};

/// Arguments of `build-ebpf`.
#[derive(Args, Debug)]
pub(crate) struct BuildEbpf {
    /// Write nothing; fail when the committed object is not what the source gives.
    #[arg(long)]
    check: bool,
    /// Use only this toolchain. Default: rustup's nightly if it has rust-src, else Debian's rustc-web; with --check,
    /// the one that built the committed object first.
    #[arg(long, value_enum)]
    toolchain: Option<Route>,
}

impl BuildEbpf {
    pub(crate) fn run(&self) -> Result<()> {
        let dir = program::repository().join("proxy-ebpf/prebuilt");
        let (object, record) = (dir.join("tidegate.o"), dir.join("BUILD.txt"));
        if self.check {
            return self.compare(&object, &record);
        }
        let toolchain = Toolchain::find(self.toolchain, None)?;
        let bytes = build(&toolchain)?;
        fs::create_dir_all(&dir)?;
        fs::write(&object, &bytes).with_context(|| format!("write {}", object.display()))?;
        Record::of(&toolchain, &bytes)?.write(&record)?;
        println!("{}: {} bytes, by {}", object.display(), bytes.len(), toolchain.describe());
        Ok(())
    }

    fn compare(&self, object: &Path, record: &Path) -> Result<()> {
        let committed = fs::read(object).with_context(|| format!("read {}", object.display()))?;
        let recorded = Record::read(record)?;
        recorded.check_object(&committed)?;
        recorded.check_inputs()?;
        let toolchain = Toolchain::find(self.toolchain, Some(recorded.route()?))?;
        let built = build(&toolchain)?;
        if built == committed {
            println!("{}: identical to what {} builds", object.display(), toolchain.describe());
            return Ok(());
        }
        let fresh = toolchain.output("tidegate.o");
        fs::write(&fresh, &built)?;
        let difference = object::difference(&committed, &built)?;
        if toolchain.describe() == recorded.toolchain() {
            bail!(
                "{} is not what the source gives ({}); run `cargo xtask build-ebpf` and commit proxy-ebpf/prebuilt \
                 (the fresh object is {})",
                object.display(),
                difference.unwrap_or_else(|| "same interface, other instructions or debug lines".into()),
                fresh.display()
            );
        }
        // Two compilers never give the same bytes. What they must agree on is what userspace and the kernel see.
        ensure!(
            difference.is_none(),
            "{} differs from what {} builds: {}; run `cargo xtask build-ebpf`",
            object.display(),
            toolchain.describe(),
            difference.unwrap_or_default()
        );
        println!(
            "{}: NOT compared byte by byte: it was built by {}, and here is {}. The source files, the flags and the \
             locked dependencies are those it was built from, and programs, maps and globals agree.",
            object.display(),
            recorded.toolchain(),
            toolchain.describe()
        );
        Ok(())
    }
}

/// Compiles, links and strips.
fn build(toolchain: &Toolchain) -> Result<Vec<u8>> {
    let status = toolchain.cargo_build()?.status().context("run cargo")?;
    ensure!(status.success(), "building the eBPF programs with {}: {status}", toolchain.describe());
    let linked: PathBuf = toolchain.output("bpfel-unknown-none/ebpf/tidegate");
    let bytes = fs::read(&linked).with_context(|| format!("read {}", linked.display()))?;
    object::strip(&bytes)
}
