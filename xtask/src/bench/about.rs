//! When, where and with what a run was made.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use tidegate_tests::{program, tool};

use super::results::Machine;
use super::subject::Program;
use super::tools::Programs;

pub(super) fn machine() -> Result<Machine> {
    let field = |path: &str, name: &str| -> Result<String> {
        let text = fs::read_to_string(path).with_context(|| path.to_owned())?;
        let line = text.lines().find(|line| line.starts_with(name));
        Ok(line.and_then(|line| line.split_once(':')).map_or("unknown", |(_, value)| value.trim()).to_owned())
    };
    let kib: u64 = field("/proc/meminfo", "MemTotal")?.trim_end_matches(" kB").parse().unwrap_or_default();
    Ok(Machine {
        cpu: field("/proc/cpuinfo", "model name")?,
        cpus: std::thread::available_parallelism()?.get(),
        memory_gib: kib.div_ceil(1 << 20),
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
    })
}

/// Now.
pub(super) fn date() -> Result<String> {
    output(Command::new("date").args(["-u", "+%F %R UTC"]))
}

/// The commit that is measured.
pub(super) fn commit() -> String {
    let mut git = Command::new("git");
    // The owner of the repository may be another user than root.
    git.current_dir(program::repository()).args([
        "-c",
        "safe.directory=*",
        "describe",
        "--always",
        "--dirty",
    ]);
    output(&mut git).unwrap_or_else(|_| "of an unknown commit".to_owned())
}

/// Versions of what is measured. A tidegate that was named is told by its path, since its commit is unknown.
pub(super) fn versions(programs: &Programs, named: Option<&Path>) -> Result<BTreeMap<String, String>> {
    let tidegate = named.map_or_else(commit, |path| path.display().to_string());
    let mut versions = BTreeMap::new();
    let mut add = |program: Program, version: String| _ = versions.insert(program.name().to_owned(), version);
    add(Program::Tidegate, tidegate);
    if programs.base != PathBuf::new() {
        add(Program::Base, programs.base.display().to_string());
    }
    if programs.envoy != PathBuf::new() {
        add(Program::Envoy, tool::ENVOY_VERSION.to_owned());
    }
    if programs.haproxy != PathBuf::new() {
        let text = output(Command::new(&programs.haproxy).arg("-v"))?;
        add(Program::Haproxy, text.split_whitespace().nth(2).unwrap_or("unknown").to_owned());
    }
    if programs.nginx != PathBuf::new() {
        // It says so on standard error.
        let said = Command::new(&programs.nginx).arg("-v").output()?.stderr;
        let said = String::from_utf8_lossy(&said).trim().to_owned();
        add(Program::Nginx, said.rsplit('/').next().unwrap_or("unknown").to_owned());
    }
    Ok(versions)
}

pub(super) fn load_average() -> Result<String> {
    let text = fs::read_to_string("/proc/loadavg")?;
    Ok(text.split_whitespace().next().unwrap_or_default().to_owned())
}

/// What a command prints.
fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("run {}", command.get_program().display()))?;
    ensure!(output.status.success(), "{}: {}", command.get_program().display(), output.status);
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Writes a file into target/bench.
pub(super) fn write(name: &str, text: &str) -> Result<PathBuf> {
    let dir = program::target().join("bench");
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let path = dir.join(name);
    fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}
