//! `cargo xtask bench instructions`: how many instructions the pure core takes, against the counts in the repository.
//!
//! Callgrind counts them, so that no noise of the machine is in it. Only instructions of the program itself count, not
//! those of libc: which memcpy or allocator runs depends on the CPU and on the distribution.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde::{Deserialize, Serialize};
use tidegate_tests::{program, tool};

use crate::cargo;

/// The counts that hold.
const COUNTS: &str = "benches/instructions.json";

/// The function whose instructions count, with what it calls; as callgrind names it (mangled).
const COUNTED: &str = "*counted_by_callgrind*";

/// Arguments of `bench instructions`.
#[derive(Args, Debug)]
pub(super) struct Instructions {
    /// Write what is counted now into the repository.
    #[arg(long)]
    bless: bool,
}

/// `benches/instructions.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Counts {
    /// Another compiler makes other instructions.
    rustc: String,
    /// Hash tables have random keys, and code moves a little when its neighbours change.
    tolerance_percent: f64,
    /// For one lookup, pick or line.
    instructions: BTreeMap<String, f64>,
}

impl Instructions {
    pub(super) fn run(&self) -> Result<()> {
        tool::require(&[("valgrind", "valgrind")])?;
        let counted = count(&build()?)?;
        let rustc = rustc()?;
        let path = program::repository().join(COUNTS);
        if self.bless {
            let counts = Counts { rustc, tolerance_percent: 3.0, instructions: counted };
            fs::write(&path, format!("{}\n", serde_json::to_string_pretty(&counts)?))
                .with_context(|| format!("write {}", path.display()))?;
            println!("written: {}", path.display());
            return Ok(());
        }
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let known: Counts = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        ensure!(
            known.rustc == rustc,
            "{COUNTS} is of {}, this is {rustc}: run with --bless on the commit before yours first",
            known.rustc
        );
        let (table, grown) = known.compare(&counted);
        print!("{table}");
        if !grown.is_empty() {
            bail!(
                "not as in {COUNTS} (tolerance {} %): {}. If that is as it should be: --bless",
                known.tolerance_percent,
                grown.join(", ")
            );
        }
        Ok(())
    }
}

impl Counts {
    /// What to print, and the names of those that take more, are new or are gone. Less is shown only.
    fn compare(&self, now: &BTreeMap<String, f64>) -> (String, Vec<String>) {
        let mut table = format!("{:<40}{:>10}{:>10}{:>9}\n", "instructions", "known", "now", "");
        let mut wrong = Vec::new();
        for (name, count) in now {
            let Some(known) = self.instructions.get(name) else {
                wrong.push(format!("{name} is new"));
                continue;
            };
            let change = (count / known - 1.0) * 100.0;
            let _ = writeln!(table, "{name:<40}{known:>10.1}{count:>10.1}{change:>+8.1}%");
            if change > self.tolerance_percent {
                wrong.push(name.clone());
            }
        }
        let gone = self.instructions.keys().filter(|name| !now.contains_key(*name));
        wrong.extend(gone.map(|name| format!("{name} is gone")));
        (table, wrong)
    }
}

fn build() -> Result<PathBuf> {
    let status = cargo::command()
        .args(["build", "--quiet", "--release", "--package", "tidegate-benches", "--bin", "instructions"])
        .status()?;
    ensure!(status.success(), "cargo build --release: {status}");
    Ok(program::target().join("release/instructions"))
}

fn rustc() -> Result<String> {
    let output = Command::new("rustc").arg("--version").current_dir(program::repository()).output()?;
    ensure!(output.status.success(), "rustc --version: {}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Every work that the program lists, one process each.
fn count(binary: &Path) -> Result<BTreeMap<String, f64>> {
    let list = Command::new(binary).output().with_context(|| format!("run {}", binary.display()))?;
    ensure!(list.status.success(), "{}: {}", binary.display(), list.status);
    let list = String::from_utf8(list.stdout)?;
    let out = program::target().join("bench/callgrind.out");
    fs::create_dir_all(program::target().join("bench"))?;
    let mut counts = BTreeMap::new();
    for line in list.lines() {
        let (name, times) = line.split_once(' ').with_context(|| format!("no work: {line:?}"))?;
        let times: f64 = times.parse()?;
        super::progress(name);
        let output = Command::new("valgrind")
            .args(["--tool=callgrind", "--demangle=no", &format!("--toggle-collect={COUNTED}")])
            .arg(format!("--callgrind-out-file={}", out.display()))
            .arg(binary)
            .arg(name)
            .output()
            .context("run valgrind")?;
        ensure!(
            output.status.success(),
            "{name} under valgrind: {}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        let profile = fs::read_to_string(&out).with_context(|| format!("read {}", out.display()))?;
        let counted = own_instructions(&profile, &binary.display().to_string());
        ensure!(counted > 0, "{name}: callgrind has not found {COUNTED}");
        counts.insert(name.to_owned(), (counted as f64 / times * 10.0).round() / 10.0);
    }
    super::progress("");
    let _ = fs::remove_file(&out);
    Ok(counts)
}

/// Instructions in functions of one object file, without what they call, summed up: the format of callgrind's output
/// has a line for each position, with the cost; the line after `calls=` is the cost of the callee and counts there.
fn own_instructions(profile: &str, object: &str) -> u64 {
    // `ob=(1) /path` names a number, `ob=(1)` refers to it.
    let mut objects: BTreeMap<&str, bool> = BTreeMap::new();
    let (mut own, mut callee, mut sum) = (false, false, 0);
    for line in profile.lines() {
        if let Some(name) = line.strip_prefix("ob=").or_else(|| line.strip_prefix("cob=")) {
            let (number, path) = name.split_once(' ').unwrap_or((name, ""));
            if !path.is_empty() {
                objects.insert(number, path == object);
            }
            if line.starts_with("ob=") {
                own = objects.get(number).copied().unwrap_or(false);
            }
        } else if line.starts_with("calls=") {
            callee = true;
        } else if line.starts_with(|c: char| c.is_ascii_digit() || "+-*".contains(c)) {
            let cost = line.split_whitespace().nth(1).and_then(|cost| cost.parse::<u64>().ok());
            if own && !callee {
                sum += cost.unwrap_or(0);
            }
            callee = false;
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROFILE: &str = "version: 1\npositions: line\nevents: Ir\nsummary: 1000\n\nob=(1) /bin/own\nfl=(1) a.rs\nfn=(1) \
        counted\n10 5\n+2 7\ncob=(2) /lib/libc.so.6\ncfn=(2) memcpy\ncalls=3 0\n* 300\n-1 8\n\nob=(2)\nfn=(2)\n0 300\n\n\
        ob=(1)\nfn=(3) helper\n20 80\ntotals: 400\n";

    #[test]
    fn only_instructions_of_the_program_itself_count() {
        assert_eq!(own_instructions(PROFILE, "/bin/own"), 5 + 7 + 8 + 80);
        assert_eq!(own_instructions(PROFILE, "/lib/libc.so.6"), 300);
        assert_eq!(own_instructions(PROFILE, "/bin/other"), 0);
    }

    #[test]
    fn more_than_the_tolerance_is_too_much() {
        let map = |figures: &[(&str, f64)]| {
            figures.iter().map(|(name, figure)| ((*name).to_owned(), *figure)).collect::<BTreeMap<_, _>>()
        };
        let known = Counts {
            rustc: String::new(),
            tolerance_percent: 3.0,
            instructions: map(&[("a", 100.0), ("b", 100.0), ("c", 100.0)]),
        };
        let (_, wrong) = known.compare(&map(&[("a", 102.9), ("b", 103.1), ("c", 50.0)]));
        assert_eq!(wrong, ["b"]);
        let (_, wrong) = known.compare(&map(&[("a", 100.0), ("b", 100.0), ("d", 1.0)]));
        assert_eq!(wrong, ["d is new", "c is gone"]);
    }
}
