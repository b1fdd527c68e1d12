//! What the object is made from, as one number: so that a change without a rebuild is noticed even where the
//! compiler that built the committed object isn't at hand.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};
use tidegate_tests::program;

use super::toolchain::{BPF_LINKER, FLAGS};

/// SHA-256 over source files (path and contents), flags, and locked dependencies.
pub(super) fn digest() -> Result<String> {
    let root = program::repository();
    let mut files = vec![root.join("proxy-ebpf/Cargo.toml"), root.join("proxy-common/Cargo.toml")];
    collect(&root.join("proxy-ebpf/src"), &mut files)?;
    collect(&root.join("proxy-common/src"), &mut files)?;
    files.sort();
    let mut hash = Sha256::new();
    for file in files {
        let name = file.strip_prefix(root)?.display().to_string();
        let text = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
        part(&mut hash, name.as_bytes());
        part(&mut hash, &text);
    }
    part(&mut hash, profile(root)?.as_bytes());
    part(&mut hash, FLAGS.join(" ").as_bytes());
    part(&mut hash, BPF_LINKER.as_bytes());
    part(&mut hash, dependencies()?.as_bytes());
    Ok(hex(&hash.finalize()))
}

/// SHA-256 of a file's contents.
pub(super) fn digest_of(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// With its length, so that no two lists of parts hash alike.
fn part(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

/// The profile's lines in the workspace manifest.
fn profile(root: &Path) -> Result<String> {
    let manifest = fs::read_to_string(root.join("Cargo.toml"))?;
    let lines = manifest.lines().skip_while(|line| *line != "[profile.ebpf]");
    let text: Vec<_> = lines.take_while(|line| !line.is_empty()).collect();
    ensure!(!text.is_empty(), "Cargo.toml has no [profile.ebpf]");
    Ok(text.join("\n"))
}

/// Names and versions of everything that is linked into the programs, or generates code for them.
fn dependencies() -> Result<String> {
    let output = crate::cargo::command()
        .args([
            "tree",
            "--locked",
            "--package",
            "tidegate-ebpf",
            "--edges",
            "normal,build",
            "--prefix",
            "none",
        ])
        .args(["--format", "{p} {f}", "--target", "bpfel-unknown-none"])
        .output()
        .context("run cargo tree")?;
    ensure!(output.status.success(), "cargo tree: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout)?;
    // Local packages come with their path, repeated ones with a star.
    let mut lines: Vec<_> = text
        .lines()
        .filter(|line| !line.contains("(/"))
        .map(|line| line.trim_end_matches("(*)").trim_end().to_owned())
        .collect();
    lines.sort();
    lines.dedup();
    Ok(lines.join("\n"))
}
