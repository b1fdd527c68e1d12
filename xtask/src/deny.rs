//! `cargo xtask deny`: licences, duplicate versions and sources of the dependencies, by deny.toml.
//!
//! The same questions as `cargo deny check licenses bans sources`, answered without the minutes that installing
//! it takes.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde::Deserialize;
use tidegate_tests::program;

use crate::cargo;

/// Arguments of `deny`.
#[derive(Args, Debug)]
pub(crate) struct Deny {}

/// The part of deny.toml that is checked.
#[derive(Deserialize)]
struct Policy {
    graph: Graph,
    licenses: Licenses,
    bans: Bans,
}

#[derive(Deserialize)]
struct Graph {
    targets: Vec<String>,
}

#[derive(Deserialize)]
struct Licenses {
    allow: BTreeSet<String>,
}

#[derive(Deserialize)]
struct Bans {
    skip: Vec<Skip>,
}

/// A version that may exist beside a newer one.
#[derive(Deserialize)]
struct Skip {
    /// `name@version`
    #[serde(rename = "crate")]
    spec: String,
    reason: String,
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    source: Option<String>,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
}

impl Deny {
    #[allow(clippy::unused_self)] // every verb has the same shape
    pub(crate) fn run(&self) -> Result<()> {
        let path = program::repository().join("deny.toml");
        let policy: Policy = toml::from_str(&std::fs::read_to_string(&path)?).context("deny.toml")?;
        let mut problems = BTreeSet::new();
        let mut used = BTreeSet::new();
        let mut count = BTreeSet::new();
        for target in &policy.graph.targets {
            let packages = packages(target)?;
            problems.extend(licence_problems(&packages, &policy.licenses.allow));
            problems.extend(source_problems(&packages));
            problems.extend(duplicate_problems(&packages, &policy.bans.skip, &mut used));
            count.extend(packages.into_iter().map(|package| package.id));
        }
        for skip in &policy.bans.skip {
            if !used.contains(&skip.spec) {
                problems.insert(format!("{}: no longer a duplicate: remove it from deny.toml", skip.spec));
            } else if skip.reason.is_empty() {
                problems.insert(format!("{}: give a reason in deny.toml", skip.spec));
            }
        }
        for problem in &problems {
            println!("{problem}");
        }
        ensure!(problems.is_empty(), "{} problems with dependencies", problems.len());
        println!("{} packages: licences, versions and sources are as deny.toml says", count.len());
        Ok(())
    }
}

/// What is in the dependency graph of a target.
fn packages(target: &str) -> Result<Vec<Package>> {
    let output = cargo::command()
        .args(["metadata", "--format-version", "1", "--locked", "--filter-platform", target])
        .output()?;
    ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: Metadata = serde_json::from_slice(&output.stdout)?;
    let resolved: BTreeSet<String> = metadata.resolve.nodes.into_iter().map(|node| node.id).collect();
    Ok(metadata.packages.into_iter().filter(|package| resolved.contains(&package.id)).collect())
}

fn licence_problems(packages: &[Package], allowed: &BTreeSet<String>) -> Vec<String> {
    let problem = |package: &Package| {
        let name = format!("{}@{}", package.name, package.version);
        let Some(licence) = &package.license else { return Some(format!("{name}: names no licence")) };
        match is_allowed(licence, allowed) {
            Ok(true) => None,
            Ok(false) => Some(format!("{name}: licence {licence} is not in deny.toml's list")),
            Err(error) => Some(format!("{name}: licence {licence}: {error}")),
        }
    };
    packages.iter().filter_map(problem).collect()
}

fn source_problems(packages: &[Package]) -> Vec<String> {
    let foreign =
        |package: &&Package| package.source.as_ref().is_some_and(|source| !source.starts_with("registry+"));
    packages
        .iter()
        .filter(foreign)
        .map(|package| {
            format!(
                "{}@{}: comes from {:?}, not from a registry",
                package.name, package.version, package.source
            )
        })
        .collect()
}

/// All versions of a crate but the newest must be listed.
fn duplicate_problems(packages: &[Package], skips: &[Skip], used: &mut BTreeSet<String>) -> Vec<String> {
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in packages {
        versions.entry(&package.name).or_default().push(&package.version);
    }
    let mut problems = Vec::new();
    for (name, mut versions) in versions {
        versions.sort_by_key(|version| numbers(version));
        let newest = versions.pop().unwrap_or_default();
        for version in versions {
            let spec = format!("{name}@{version}");
            if skips.iter().any(|skip| skip.spec == spec) {
                used.insert(spec);
            } else {
                problems.push(format!("{spec}: there is {newest} too (`cargo tree -i {spec}` says why)"));
            }
        }
    }
    problems
}

fn numbers(version: &str) -> Vec<u64> {
    let core = version.split(['-', '+']).next().unwrap_or_default();
    core.split('.').map(|number| number.parse().unwrap_or_default()).collect()
}

/// Evaluates an SPDX expression: whether it can be satisfied with the allowed licences. The old `MIT/Apache-2.0`
/// means OR.
fn is_allowed(expression: &str, allowed: &BTreeSet<String>) -> Result<bool> {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut parser = Parser { words: &words, allowed };
    let value = parser.any()?;
    ensure!(parser.words.is_empty(), "{:?} is left over", parser.words);
    Ok(value)
}

struct Parser<'a> {
    words: &'a [&'a str],
    allowed: &'a BTreeSet<String>,
}

impl Parser<'_> {
    fn any(&mut self) -> Result<bool> {
        let mut value = self.all()?;
        while self.accept("OR") {
            value |= self.all()?;
        }
        Ok(value)
    }

    fn all(&mut self) -> Result<bool> {
        let mut value = self.one()?;
        while self.accept("AND") {
            value &= self.one()?;
        }
        Ok(value)
    }

    fn one(&mut self) -> Result<bool> {
        if self.accept("(") {
            let value = self.any()?;
            ensure!(self.accept(")"), "a parenthesis is not closed");
            return Ok(value);
        }
        let Some((licence, rest)) = self.words.split_first() else { bail!("it ends early") };
        self.words = rest;
        let mut name = (*licence).to_owned();
        if self.accept("WITH") {
            let Some((exception, rest)) = self.words.split_first() else { bail!("it ends after WITH") };
            self.words = rest;
            name = format!("{name} WITH {exception}");
        }
        Ok(self.allowed.contains(&name))
    }

    fn accept(&mut self, word: &str) -> bool {
        let found = self.words.first() == Some(&word);
        if found {
            self.words = &self.words[1..];
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_evaluated() -> Result<()> {
        let allowed = ["MIT", "ISC", "Apache-2.0 WITH LLVM-exception"].map(str::to_owned).into();
        for (expression, expected) in [
            ("MIT", true),
            ("GPL-3.0", false),
            ("GPL-3.0 OR MIT", true),
            ("MIT/Apache-2.0", true),
            ("MIT AND ISC", true),
            ("MIT AND Apache-2.0", false),
            ("(MIT OR Apache-2.0) AND ISC", true),
            ("ISC AND (GPL-3.0 OR Apache-2.0)", false),
            ("Apache-2.0 WITH LLVM-exception", true),
        ] {
            assert_eq!(is_allowed(expression, &allowed)?, expected, "{expression}");
        }
        assert!(is_allowed("(MIT", &allowed).is_err());
        assert!(is_allowed("MIT OR", &allowed).is_err());
        Ok(())
    }

    #[test]
    fn only_the_newest_version_needs_no_reason() {
        let package = |version: &str| Package {
            id: version.into(),
            name: "rand".into(),
            version: version.into(),
            license: None,
            source: None,
        };
        let packages = ["0.9.5", "0.10.3", "0.8.8"].map(package);
        let skips = [Skip { spec: "rand@0.8.8".into(), reason: "old".into() }];
        let mut used = BTreeSet::new();
        let problems = duplicate_problems(&packages, &skips, &mut used);
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].starts_with("rand@0.9.5: there is 0.10.3"), "{problems:?}");
        assert!(used.contains("rand@0.8.8"));
    }
}
