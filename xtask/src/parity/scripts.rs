//! The same random dialogues ([`tidegate_tests::dialogue`]) through the real Envoy and through tidegate, each data path forced
//! in turn: what both ends see, the access log and the counters must be the same.
//!
//! Two judgements, of which none excuses the other:
//!
//! 1. *What is certain whoever relays* ([`Dialogue::judge`]): every byte in its place, FIN as FIN and RST as RST, in the
//!    phase in which the other end made it. Bytes are compared one by one with what was sent, which says more than a hash.
//!    Held against every run of tidegate; where Envoy itself breaks it, that is printed.
//! 2. *What Envoy does*: each fact of tidegate's (what ends saw, log fields, counters) against Envoy's fact.
//!
//! Where bytes and a RST are on their way at the same time, TCP itself leaves open how many arrive, and which of two ends is
//! noticed first. These facts are not compared; [`free`] names them, by the kind of end, with the reason. Every other fact
//! that differs is tried again with Envoy alone ([`AGAIN`] times): if Envoy shows tidegate's value too, it is a matter of
//! chance with both; if not, it is a difference, and the run fails. tidegate gets no second try.

mod free;
mod run;

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tidegate_tests::dialogue::Dialogue;
use tidegate_tests::proxy::Engine;

use super::exceptions;
use super::observe::Observation;

/// Seeds from here on are what every run tries, so that a change shows as one.
const FIXED: u64 = 1_000;

/// How often Envoy is asked again about a difference.
const AGAIN: usize = 6;

/// tidegate's data paths: a name and the argument that forces it.
const PATHS: [(&str, &[&str]); 3] = [
    ("tidegate", &[]),
    ("tidegate, copy only", &["--pump-mode", "copy"]),
    ("tidegate, splice only", &["--pump-mode", "splice"]),
];

/// Which dialogues are tried: half of them always the same, half of them new, unless a seed is given.
pub(super) fn seeds(first: Option<u64>, count: usize) -> Vec<u64> {
    let from = |first: u64, count: usize| -> Range<u64> { first..first + count as u64 };
    match first {
        Some(first) => from(first, count).collect(),
        None => {
            let fresh = std::time::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_millis() as u64);
            from(FIXED, count - count / 2).chain(from(fresh, count / 2)).collect()
        }
    }
}

/// Plays the dialogues of these seeds with both and compares.
pub(super) fn compare(envoy: &Engine, seeds: &[u64], verbose: bool) -> Result<()> {
    let started = Instant::now();
    let dialogues: Vec<_> = seeds.iter().map(|seed| Dialogue::random(*seed)).collect();
    // Half of them may start elsewhere.
    let starts = seeds.iter().enumerate().filter(|(at, seed)| *at == 0 || seeds[at - 1] + 1 != **seed);
    let starts: Vec<_> = starts.map(|(_, seed)| seed.to_string()).collect();
    println!("random scripts: {}, of the seeds from {}", seeds.len(), starts.join(" and from "));
    let (theirs, ours) = everybody(envoy, &dialogues)?;
    let (mut failed, mut by_chance) = (0, 0);
    for (number, dialogue) in dialogues.iter().enumerate() {
        for what in &theirs[number].wrong {
            println!("  Envoy itself is wrong about seed {}: {what}", dialogue.seed);
        }
        let mut report = Vec::new();
        for ((name, _), ours) in PATHS.iter().zip(&ours) {
            report.extend(ours[number].wrong.iter().map(|what| format!("{name}: {what}")));
        }
        let mut differences = Vec::new();
        for ((name, _), ours) in PATHS.iter().zip(&ours) {
            let facts = (&theirs[number].observation, &ours[number].observation);
            differences.extend(
                differing(dialogue, facts.0, facts.1)
                    .into_iter()
                    .map(|(fact, theirs, ours)| (*name, fact, theirs, ours)),
            );
        }
        if !differences.is_empty() {
            let before = differences.len();
            let others = run::again(envoy, dialogue, AGAIN).context("Envoy, again")?;
            differences.retain(|(_, fact, _, ours)| {
                !others.iter().any(|other| other.observation.get(fact).unwrap_or(&Value::Null) == ours)
            });
            by_chance += before - differences.len();
        }
        report.extend(differences.iter().map(|(name, fact, theirs, ours)| {
            format!("{fact}\n             Envoy    {theirs}\n             {name}: {ours}")
        }));
        if report.is_empty() {
            if verbose {
                println!("  same   {dialogue}");
            }
            continue;
        }
        failed += 1;
        println!("  DIFF   {dialogue}");
        for line in &report {
            println!("         {line}");
        }
        println!("         again: cargo xtask parity --only scripts --scripts 1 --seed {}", dialogue.seed);
    }
    free::reasons().for_each(|reason| println!("  free: {reason}"));
    println!(
        "random scripts through Envoy and {} data paths, {:.0} s; {by_chance} facts differed that Envoy leaves to chance:\n\
         {} passed, {failed} failed",
        PATHS.len(),
        started.elapsed().as_secs_f64(),
        dialogues.len() - failed
    );
    if failed > 0 {
        bail!("tidegate differs from Envoy, or from what is certain, in {failed} random scripts");
    }
    Ok(())
}

/// Prints what one proxy does.
pub(super) fn show(engine: &Engine, seeds: &[u64]) -> Result<()> {
    let dialogues: Vec<_> = seeds.iter().map(|seed| Dialogue::random(*seed)).collect();
    for (dialogue, played) in dialogues.iter().zip(run::all(engine, &[], &dialogues)?) {
        println!("{dialogue}");
        played.wrong.iter().for_each(|what| println!("    WRONG {what}"));
        played.observation.iter().for_each(|(fact, value)| println!("    {fact}: {value}"));
    }
    Ok(())
}

type Played = Vec<run::Played>;

/// Envoy and all data paths at once: they wait more than they work.
fn everybody(envoy: &Engine, dialogues: &[Dialogue]) -> Result<(Played, Vec<Played>)> {
    std::thread::scope(|scope| {
        let theirs = scope.spawn(|| run::all(envoy, &[], dialogues).context("Envoy"));
        let ours: Vec<_> = PATHS
            .iter()
            .map(|&(name, args)| {
                scope.spawn(move || run::all(&Engine::Tidegate, args, dialogues).context(name))
            })
            .collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, Result<Played>>| {
            thread.join().unwrap_or_else(|_| bail!("a thread that plays dialogues panicked"))
        };
        Ok((join(theirs)?, ours.into_iter().map(join).collect::<Result<_>>()?))
    })
}

/// Facts that are not free, not excused, and not the same.
fn differing(dialogue: &Dialogue, theirs: &Observation, ours: &Observation) -> Vec<(String, Value, Value)> {
    let facts: BTreeSet<&String> = theirs.keys().chain(ours.keys()).collect();
    let value = |of: &Observation, fact: &str| of.get(fact).cloned().unwrap_or_default();
    facts
        .into_iter()
        .filter(|fact| !free::is_free(dialogue, fact) && exceptions::find("random scripts", fact).is_none())
        .map(|fact| (fact.clone(), value(theirs, fact), value(ours, fact)))
        .filter(|(_, theirs, ours)| theirs != ours)
        .collect()
}
