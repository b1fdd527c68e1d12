//! A compiler and a linker for BPF.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use tidegate_tests::{program, tool};

/// The linker's version. It reads the compiler's LLVM bitcode with the compiler's own LLVM, of major version 22.
pub(super) const BPF_LINKER: &str = "0.10.3";

/// What makes the programs, besides the profile. `v3`: 32-bit registers and atomics (Linux 5.12).
pub(super) const FLAGS: &[&str] = &[
    "-Clinker=bpf-linker",
    "-Clinker-plugin-lto",
    "-Ctarget-cpu=v3",
    "-Clink-arg=--btf",
    "--cfg=bpf_target_arch=\"x86_64\"",
];

/// Packages of the second route.
const DEBIAN_PACKAGES: &[&str] = &["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf"];

/// Where a compiler for BPF can come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Route {
    /// rustup's nightly with rust-src: core is built along (`-Z build-std`).
    Rustup,
    /// Debian's rustc-web, which has a ready core for BPF.
    Debian,
}

/// A compiler and a linker that fit together.
pub(super) struct Toolchain {
    pub(super) route: Route,
    cargo: PathBuf,
    rustc: PathBuf,
    /// First line of `rustc -vV`, and its LLVM's version.
    version: String,
    /// Directory with the compiler's LLVM, and no other.
    llvm: PathBuf,
    linker_dir: PathBuf,
}

impl Toolchain {
    /// Finds or installs one: only `wanted`, else `preferred` first, else in the order of [`Route`].
    pub(super) fn find(wanted: Option<Route>, preferred: Option<Route>) -> Result<Self> {
        let mut routes = match wanted {
            Some(route) => vec![route],
            None => vec![Route::Rustup, Route::Debian],
        };
        routes.sort_by_key(|route| Some(*route) != preferred);
        let mut reasons = Vec::new();
        for route in routes {
            let found = match route {
                Route::Rustup => rustup(),
                Route::Debian => debian(),
            };
            match found {
                Ok((cargo, rustc)) => return Self::complete(route, cargo, rustc),
                Err(error) => reasons.push(format!("  {error:#}")),
            }
        }
        bail!("no Rust compiler for BPF:\n{}", reasons.join("\n"))
    }

    fn complete(route: Route, cargo: PathBuf, rustc: PathBuf) -> Result<Self> {
        let verbose = output(Command::new(&rustc).arg("-vV"))?;
        let llvm_version = verbose
            .lines()
            .find_map(|line| line.strip_prefix("LLVM version: "))
            .unwrap_or("of unknown version");
        ensure!(
            llvm_version.starts_with("22."),
            "{} has LLVM {llvm_version}, and bpf-linker {BPF_LINKER} needs 22; try `--toolchain {}`",
            rustc.display(),
            if route == Route::Rustup { "debian" } else { "rustup" }
        );
        let version = format!("{}, LLVM {llvm_version}", verbose.lines().next().unwrap_or_default());
        let llvm = llvm_dir(route, &rustc)?;
        Ok(Self { route, cargo, rustc, version, llvm, linker_dir: bpf_linker()? })
    }

    /// For messages and the record.
    pub(super) fn describe(&self) -> String {
        format!("{}, bpf-linker {BPF_LINKER}", self.version)
    }

    /// A file of this toolchain's target directory: two compilers must not share one.
    pub(super) fn output(&self, path: &str) -> PathBuf {
        let name = match self.route {
            Route::Rustup => "ebpf-rustup",
            Route::Debian => "ebpf-debian",
        };
        program::target().join(name).join(path)
    }

    /// The whole build, as one command.
    pub(super) fn cargo_build(&self) -> Result<Command> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let dirs = std::iter::once(self.linker_dir.clone()).chain(std::env::split_paths(&path));
        let mut cargo = Command::new(&self.cargo);
        cargo
            .current_dir(program::repository())
            .env_remove("CARGO")
            .env_remove("RUSTUP_TOOLCHAIN")
            .env_remove("RUSTFLAGS")
            .env_remove("RUSTC_WRAPPER")
            .env_remove("CARGO_TARGET_DIR")
            .env("PATH", std::env::join_paths(dirs)?)
            .env("RUSTC", &self.rustc)
            // Unstable features, with a stable compiler.
            .env("RUSTC_BOOTSTRAP", "1")
            // Where bpf-linker looks for LLVM first; it takes any version that it finds.
            .env("LD_LIBRARY_PATH", &self.llvm)
            .env("CARGO_ENCODED_RUSTFLAGS", self.rustflags()?.join("\x1f"))
            .args(["build", "--locked", "--package", "tidegate-ebpf", "--profile", "ebpf"])
            .args(["--target", "bpfel-unknown-none", "--target-dir"])
            .arg(self.output(""));
        if self.route == Route::Rustup {
            cargo.args(["-Z", "build-std=core"]);
        }
        Ok(cargo)
    }

    /// [`FLAGS`], and names instead of this machine's paths in the debug lines.
    fn rustflags(&self) -> Result<Vec<String>> {
        let sysroot = output(Command::new(&self.rustc).args(["--print", "sysroot"]))?;
        let library = Path::new(sysroot.trim()).join("lib/rustlib/src/rust");
        let remaps =
            [(program::repository().to_owned(), "tidegate"), (registry()?, "registry"), (library, "rust")];
        let remaps =
            remaps.iter().map(|(path, name)| format!("--remap-path-prefix={}={name}", path.display()));
        Ok(FLAGS.iter().map(|flag| (*flag).to_owned()).chain(remaps).collect())
    }
}

/// The directory that holds the sources of registry packages.
fn registry() -> Result<PathBuf> {
    let text = output(crate::cargo::command().args(["metadata", "--locked", "--format-version", "1"]))?;
    let metadata: serde_json::Value = serde_json::from_str(&text)?;
    let packages = metadata["packages"].as_array().context("cargo metadata has no packages")?;
    let manifest =
        packages.iter().find(|p| p["name"] == "aya-ebpf").and_then(|p| p["manifest_path"].as_str());
    let manifest = Path::new(manifest.context("cargo metadata has no aya-ebpf")?);
    Ok(manifest.ancestors().nth(2).context("a registry path")?.into())
}

fn rustup() -> Result<(PathBuf, PathBuf)> {
    const REMEDY: &str = "rustup toolchain install nightly --profile minimal --component rust-src";
    ensure!(tool::find("rustup").is_some(), "rustup is not installed; with it: `{REMEDY}`");
    let which = |name: &str| {
        output(Command::new("rustup").args(["which", "--toolchain", "nightly", name]))
            .map(|path| PathBuf::from(path.trim()))
            .with_context(|| format!("rustup has no nightly toolchain: `{REMEDY}`"))
    };
    let (cargo, rustc) = (which("cargo")?, which("rustc")?);
    let core = rustc.ancestors().nth(2).map(|sysroot| sysroot.join("lib/rustlib/src/rust/library/core"));
    ensure!(core.is_some_and(|core| core.is_dir()), "rustup's nightly has no rust-src: `{REMEDY}`");
    Ok((cargo, rustc))
}

fn debian() -> Result<(PathBuf, PathBuf)> {
    let (cargo, rustc) = (PathBuf::from("/usr/bin/cargo"), PathBuf::from("/usr/bin/rustc"));
    let remedy = format!("apt-get install {}", DEBIAN_PACKAGES.join(" "));
    let complete = || {
        let sysroot = output(Command::new(&rustc).args(["--print", "sysroot"])).ok()?;
        let core = Path::new(sysroot.trim()).join("lib/rustlib/bpfel-unknown-none");
        (cargo.is_file() && core.is_dir()).then_some(())
    };
    if complete().is_none() {
        ensure!(tool::find("apt-get").is_some(), "no Debian either (there: `{remedy}`)");
        ensure!(
            nix::unistd::geteuid().is_root(),
            "/usr/bin/rustc can't compile for BPF: as root, `{remedy}`"
        );
        tool::apt_install(DEBIAN_PACKAGES)
            .with_context(|| format!("Debian 12 and later have the packages: `{remedy}`"))?;
        complete().with_context(|| format!("/usr/bin/rustc still can't compile for BPF after `{remedy}`"))?;
    }
    Ok((cargo, rustc))
}

/// A directory in which the compiler's LLVM is the only one.
fn llvm_dir(route: Route, rustc: &Path) -> Result<PathBuf> {
    match route {
        Route::Rustup => Ok(rustc.ancestors().nth(2).context("a toolchain directory")?.join("lib")),
        Route::Debian => {
            let libraries = output(Command::new("ldd").arg(rustc))?;
            let library = libraries
                .lines()
                .filter(|line| line.trim_start().starts_with("libLLVM"))
                .find_map(|line| line.split_whitespace().nth(2))
                .with_context(|| format!("{} uses no shared libLLVM", rustc.display()))?;
            let dir = program::target().join("tools/llvm");
            let _ = fs::remove_dir_all(&dir);
            fs::create_dir_all(&dir)?;
            std::os::unix::fs::symlink(library, dir.join("libLLVM.so"))?;
            Ok(dir)
        }
    }
}

/// The directory of bpf-linker, installed into target/tools if this version is nowhere.
fn bpf_linker() -> Result<PathBuf> {
    let version = format!("bpf-linker {BPF_LINKER}");
    let right =
        |path: &Path| output(Command::new(path).arg("--version")).is_ok_and(|text| text.trim() == version);
    let tools = program::target().join("tools");
    let candidates = [Some(tools.join("bin/bpf-linker")), tool::find("bpf-linker")];
    if let Some(found) = candidates.into_iter().flatten().find(|path| path.is_file() && right(path)) {
        return Ok(found.parent().context("a directory")?.into());
    }
    eprintln!("installing {version} into {} (about three minutes, once)", tools.display());
    let status = crate::cargo::command()
        .args(["install", "--locked", "--quiet", "bpf-linker", "--version", BPF_LINKER, "--root"])
        .arg(&tools)
        .status()
        .context("run cargo install")?;
    ensure!(
        status.success(),
        "cargo install bpf-linker: {status}; remedy: `cargo install --locked bpf-linker --version {BPF_LINKER}`"
    );
    Ok(tools.join("bin"))
}

/// What a command prints, if it succeeds.
fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().display().to_string();
    let output = command.output().with_context(|| format!("run {name}"))?;
    ensure!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr).trim_end());
    Ok(String::from_utf8(output.stdout)?)
}
