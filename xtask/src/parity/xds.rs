//! What a control plane hears: the same scripts with the real Envoy and with tidegate, compared request by request.
//!
//! A script is a control plane that says what a well-behaved one would, or would not. Between its steps it waits until the
//! client has said everything that it has to say; that is a phase. Requests are compared phase by phase and, within one,
//! kind by kind in their order: between kinds the protocol orders nothing but what a phase ends with.

mod exceptions;
mod record;
mod scripts;
mod session;

use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Result, bail};
use serde_json::Value;
use tidegate_tests::proxy::Engine;

use self::record::{Difference, Observation};
use self::session::{Patience, Session};

/// Scripts that run at the same time: they wait more than they work.
const PARALLEL: usize = 10;

/// A conversation, from the control plane's side.
struct Script {
    name: &'static str,
    run: fn(&mut Session) -> Result<()>,
}

/// Runs every script whose name contains `filter` with both.
pub(super) fn compare(envoy: &Engine, filter: Option<&str>, verbose: bool) -> Result<()> {
    let scripts: Vec<&Script> = wanted(filter);
    let mut theirs = run_all(envoy, &scripts, &[], Patience::Usual);
    let mut ours = run_all(&Engine::Tidegate, &scripts, &theirs, Patience::Usual);
    let mut unused = if filter.is_none() { exceptions::uses() } else { Vec::new() };
    let mut failed = 0;
    for (number, script) in scripts.iter().enumerate() {
        let mut differences = judge(script, &theirs[number], &ours[number]);
        if !differences.unexcused.is_empty() {
            println!("  again  {}", script.name);
            if verbose {
                differences.unexcused.iter().for_each(|difference| println!("{difference}"));
            }
            // A busy machine may have cut a phase short, of either. A difference that is one shows again.
            theirs[number] = one(envoy, script, None, Patience::Long);
            ours[number] = one(&Engine::Tidegate, script, theirs[number].as_ref().ok(), Patience::Long);
            differences = judge(script, &theirs[number], &ours[number]);
        }
        unused.retain(|entry| !differences.excused.contains(entry));
        let same = differences.unexcused.is_empty();
        failed += usize::from(!same);
        println!("  {} {}", if same { "same  " } else { "DIFF  " }, script.name);
        for difference in &differences.unexcused {
            println!("{difference}");
        }
        if verbose {
            println!("{}", show(&theirs[number]));
        }
    }
    for exception in exceptions::ALL {
        println!("  excused: {}", exception.reason);
    }
    if !unused.is_empty() {
        let patterns: Vec<_> = unused.into_iter().map(exceptions::Use::pattern).collect();
        bail!("these differences do not occur any more; remove them from exceptions.rs: {patterns:#?}");
    }
    println!(
        "xDS transcripts, {} scripts:\n{} passed, {failed} failed",
        scripts.len(),
        scripts.len() - failed
    );
    if failed > 0 {
        bail!("tidegate speaks otherwise than Envoy in {failed} scripts");
    }
    Ok(())
}

/// Prints what one proxy says.
pub(super) fn show_all(engine: &Engine, filter: Option<&str>) {
    let scripts = wanted(filter);
    for (script, observation) in scripts.iter().zip(run_all(engine, &scripts, &[], Patience::Usual)) {
        println!("{}\n{}", script.name, show(&observation));
    }
}

fn show(observation: &Result<Observation>) -> String {
    match observation {
        Ok(observation) => {
            let lines = observation.iter().map(|(fact, value)| format!("    {fact}: {value}"));
            lines.collect::<Vec<_>>().join("\n")
        }
        Err(error) => format!("    {error:#}"),
    }
}

fn wanted(filter: Option<&str>) -> Vec<&'static Script> {
    scripts::ALL.iter().filter(|script| filter.is_none_or(|text| script.name.contains(text))).collect()
}

struct Differences {
    unexcused: Vec<Difference>,
    /// Those that are meant.
    excused: Vec<exceptions::Use>,
}

fn judge(script: &Script, theirs: &Result<Observation>, ours: &Result<Observation>) -> Differences {
    let mut found = Differences { unexcused: Vec::new(), excused: Vec::new() };
    let (theirs, ours) = match (theirs, ours) {
        (Ok(theirs), Ok(ours)) => (theirs, ours),
        (theirs, ours) => {
            let text = |observation: &Result<Observation>| match observation {
                Ok(_) => Value::Null,
                Err(error) => format!("{error:#}").into(),
            };
            let difference =
                Difference { fact: "the script's end".into(), theirs: text(theirs), ours: text(ours) };
            found.unexcused.push(difference);
            return found;
        }
    };
    for difference in record::differences(theirs, ours) {
        match exceptions::find(script.name, &difference.fact) {
            Some(entry) => found.excused.push(entry),
            None => found.unexcused.push(difference),
        }
    }
    found
}

/// Runs scripts side by side. `hints`: what another engine said, which tells how much there is to wait for.
fn run_all(
    engine: &Engine,
    scripts: &[&Script],
    hints: &[Result<Observation>],
    patience: Patience,
) -> Vec<Result<Observation>> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(script) = scripts.get(number) else { return done };
            let hint = hints.get(number).and_then(|hint| hint.as_ref().ok());
            done.push((number, one(engine, script, hint, patience)));
        }
    };
    let mut done: Vec<_> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..PARALLEL).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap_or_default()).collect()
    });
    done.sort_by_key(|(number, _)| *number);
    done.into_iter().map(|(_, observation)| observation).collect()
}

fn one(
    engine: &Engine,
    script: &Script,
    hint: Option<&Observation>,
    patience: Patience,
) -> Result<Observation> {
    let mut session = Session::new(engine.clone(), hint.cloned(), patience);
    (script.run)(&mut session)?;
    Ok(session.finish())
}
