//! `cargo xtask soak`: tidegate under a mixed load for hours, and nothing may grow.
//!
//! A node with pods, as in `demo`, all of whose connections are captured. In rounds: load of every kind at once ([`load`]),
//! then quiet. Quiet means that every gauge of what is going on is back at zero, or the run fails; then a sample is taken
//! ([`sample`]). At the end each quantity is judged over all samples ([`growth`]).

mod growth;
mod load;
mod sample;
mod world;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde_json::json;
use tidegate_tests::{program, tool};

use self::growth::{Point, Verdict};
use self::sample::{QUANTITIES, Quantity, Sample};
use self::world::World;
use crate::{cargo, root};

/// How long connections may take to end when nobody wants them any more. Those of a pod that is gone have 5 s.
const QUIET: Duration = Duration::from_secs(30);

/// How long what is counted may take to come back to the lowest count so far.
const SETTLE: Duration = Duration::from_secs(8);

/// Arguments of `soak`.
#[derive(Args, Debug)]
pub(crate) struct Soak {
    /// How long: `90s`, `15m`, `2h`. It takes at least the nine rounds that a judgement needs.
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = duration)]
    duration: Duration,
    /// Soak this tidegate instead of a release build of this repository.
    #[arg(long, value_name = "PATH")]
    tidegate: Option<PathBuf>,
    /// The first seed of the random scripts among the load.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

impl Soak {
    pub(crate) fn run(&self) -> Result<()> {
        cargo::build(&["workload"])?;
        let tidegate = match &self.tidegate {
            Some(path) => path.canonicalize().with_context(|| format!("--tidegate {}", path.display()))?,
            None => cargo::build_release()?,
        };
        root::become_root()?;
        root::clean_up_on_signals()?;
        tool::require(&[("ip", "iproute2"), ("nsenter", "util-linux"), ("bpftool", "bpftool")])?;
        let seed = self
            .seed
            .unwrap_or_else(|| std::time::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_millis() as u64));
        println!("{} for {:?}, random scripts from seed {seed}", tidegate.display(), self.duration);
        let mut run = Run { samples: Vec::new(), rounds: Vec::new(), started: Instant::now() };
        let outcome = run.soak(self.duration, &tidegate, seed);
        run.write(&tidegate, seed, &outcome)?;
        outcome
    }
}

/// What a run has seen so far.
struct Run {
    started: Instant,
    samples: Vec<(f64, Sample)>,
    /// What the load did, round by round.
    rounds: Vec<BTreeMap<&'static str, u64>>,
}

impl Run {
    fn soak(&mut self, duration: Duration, tidegate: &std::path::Path, seed: u64) -> Result<()> {
        let mut world = World::start(tidegate, seed)?;
        let load = (duration / 16).clamp(Duration::from_secs(1), Duration::from_secs(20));
        self.started = Instant::now();
        print_header();
        while self.samples.len() < growth::rounds() || self.started.elapsed() < duration {
            let round = self.rounds.len();
            let outcome = load::round(&mut world, load).with_context(|| format!("round {round}"));
            let done = outcome.with_context(|| format!("the proxy's log:\n{}", world.proxy.log_tail()))?;
            world.empty_log()?;
            quiet(&world).with_context(|| format!("after round {round}"))?;
            let sample = self.settled(&world)?;
            print_row(round, self.started.elapsed(), &done, &sample);
            self.samples.push((self.started.elapsed().as_secs_f64(), sample));
            self.rounds.push(done);
        }
        self.judge()
    }

    /// A sample; when something that is counted is above the lowest count so far, it gets a moment to come back.
    fn settled(&self, world: &World) -> Result<Sample> {
        let deadline = Instant::now() + SETTLE;
        loop {
            let sample = sample::take(&world.proxy)?;
            let above = |quantity: &&Quantity| {
                let lowest = self.samples.iter().filter_map(|(_, sample)| sample.get(quantity.name));
                let lowest = lowest.copied().fold(f64::INFINITY, f64::min);
                quantity.bound < 1.0 && sample.get(quantity.name).is_some_and(|value| *value > lowest)
            };
            if Instant::now() > deadline || !QUANTITIES.iter().any(|quantity| above(&quantity)) {
                return Ok(sample);
            }
            sleep(Duration::from_millis(250));
        }
    }

    fn verdicts(&self) -> Vec<(Quantity, Verdict)> {
        let judge = |quantity: &Quantity| {
            let points: Vec<_> = self
                .samples
                .iter()
                .filter_map(|(seconds, sample)| {
                    Some(Point { seconds: *seconds, value: *sample.get(quantity.name)? })
                })
                .collect();
            Some((*quantity, growth::judge(&points, quantity.bound)?))
        };
        QUANTITIES.iter().filter_map(judge).collect()
    }

    fn judge(&self) -> Result<()> {
        let verdicts = self.verdicts();
        ensure!(!verdicts.is_empty(), "too few samples to judge: {}", self.samples.len());
        println!(
            "\n{:>14} {:>10} {:>10} {:>10} {:>10} {:>10}",
            "", "first", "last", "growth", "step", "bound"
        );
        for (quantity, verdict) in &verdicts {
            let cells = [verdict.first, verdict.last, verdict.growth, verdict.step, verdict.bound];
            let cells = cells.map(|value| format!("{:>10}", shown(*quantity, value))).join(" ");
            println!("{:>14} {cells}  {}", quantity.name, if verdict.grows { "GROWS" } else { "" });
        }
        let growing: Vec<_> = verdicts.iter().filter(|(_, verdict)| verdict.grows).collect();
        if !growing.is_empty() {
            let names: Vec<_> = growing.iter().map(|(quantity, _)| quantity.name).collect();
            bail!("grows: {}", names.join(", "));
        }
        println!("nothing grows: {} samples in {:.0?}", self.samples.len(), self.started.elapsed());
        Ok(())
    }

    /// `target/soak.json`, whatever the outcome.
    fn write(&self, tidegate: &std::path::Path, seed: u64, outcome: &Result<()>) -> Result<()> {
        let verdicts: BTreeMap<_, _> =
            self.verdicts().into_iter().map(|(quantity, verdict)| (quantity.name, verdict)).collect();
        let samples: Vec<_> = self
            .samples
            .iter()
            .map(|(seconds, sample)| json!({"seconds": seconds, "quiet": sample}))
            .collect();
        let text = serde_json::to_string_pretty(&json!({
            "schema": 1,
            "tidegate": tidegate,
            "seed": seed,
            "error": outcome.as_ref().err().map(|error| format!("{error:#}")),
            "verdicts": verdicts,
            "samples": samples,
            "load": self.rounds,
        }))?;
        let path = program::target().join("soak.json");
        std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        println!("{}", path.display());
        Ok(())
    }
}

/// Waits until nothing is going on.
fn quiet(world: &World) -> Result<()> {
    let deadline = Instant::now() + QUIET;
    loop {
        let raised = sample::raised_gauges(world.proxy.admin())?;
        if raised.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!(
                "{QUIET:?} after the load was gone, these gauges are not back at zero: {}\n{}",
                raised.join(", "),
                world.proxy.log_tail()
            );
        }
        sleep(Duration::from_millis(100));
    }
}

fn print_header() {
    let names: Vec<_> = QUANTITIES.iter().map(|quantity| format!("{:>12}", quantity.name)).collect();
    println!("{:>5} {:>7} {:>11} {}", "round", "time", "connections", names.join(" "));
}

fn print_row(round: usize, elapsed: Duration, done: &BTreeMap<&'static str, u64>, sample: &Sample) {
    let value = |quantity: &Quantity| {
        let value = sample.get(quantity.name);
        format!("{:>12}", value.map_or("-".to_owned(), |value| shown(*quantity, *value)))
    };
    let values: Vec<_> = QUANTITIES.iter().map(value).collect();
    let connections = done.get(load::CONNECTIONS).copied().unwrap_or(0);
    println!("{round:>5} {:>6.0}s {connections:>11} {}", elapsed.as_secs_f64(), values.join(" "));
}

fn shown(quantity: Quantity, value: f64) -> String {
    match value {
        value if value.is_infinite() => "-".to_owned(),
        value if quantity.bytes => format!("{:.2} MiB", value / f64::from(1 << 20)),
        value => format!("{value:.1}"),
    }
}

/// `90s`, `15m`, `2h`.
fn duration(text: &str) -> Result<Duration, String> {
    let unit = |text: &str| match text {
        "s" => Some(1),
        "m" => Some(60),
        "h" => Some(3600),
        _ => None,
    };
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, rest) = text.split_at(split);
    let seconds =
        number.parse::<u64>().ok().zip(unit(rest)).and_then(|(number, unit)| number.checked_mul(unit));
    match seconds {
        Some(seconds @ 1..) => Ok(Duration::from_secs(seconds)),
        _ => Err("a number above 0 of seconds, minutes or hours: 90s, 15m, 2h".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser, Debug)]
    struct Line {
        #[command(flatten)]
        soak: Soak,
    }

    fn parse(line: &str) -> Result<Soak, clap::Error> {
        Line::try_parse_from(line.split(' ')).map(|line| line.soak)
    }

    #[test]
    fn a_command_line() {
        let soak = parse("soak").expect("nothing is required");
        assert_eq!((soak.duration, soak.tidegate, soak.seed), (Duration::from_mins(2), None, None));
        let soak = parse("soak --duration 90s --tidegate target/debug/tidegate --seed 7").expect("options");
        assert_eq!(soak.duration, Duration::from_secs(90));
        assert_eq!(soak.tidegate, Some(PathBuf::from("target/debug/tidegate")));
        assert_eq!(soak.seed, Some(7));
    }

    #[test]
    fn an_error_names_the_option_and_the_remedy() {
        for bad in ["2", "0s", "-2h", "1h30m", "2H", "2d", "1.5h", "99999999999999999999h"] {
            let error = parse(&format!("soak --duration={bad}")).expect_err(bad).to_string();
            assert!(error.contains(&format!("'{bad}' for '--duration <TIME>'")), "{error}");
            assert!(error.contains("a number above 0 of seconds, minutes or hours: 90s, 15m, 2h"), "{error}");
        }
        for (line, wanted) in [
            ("soak --duration", "--duration <TIME>"),
            ("soak --seed=-1", "--seed <N>"),
            ("soak --durations 2h", "'--duration'"),
            ("soak 2h", "unexpected argument '2h'"),
        ] {
            let error = parse(line).expect_err(line).to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn durations() {
        assert_eq!(duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("15m"), Ok(Duration::from_mins(15)));
        assert_eq!(duration("2h"), Ok(Duration::from_hours(2)));
        for bad in ["", "h", "0s", "2", "2 h", "-2h", "2d", "99999999999999999999h", "9999999999999999999h"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    fn run(rounds: usize, sample: impl Fn(f64) -> Sample) -> Run {
        let samples = (0..rounds).map(|round| (round as f64 * 10.0, sample(round as f64))).collect();
        Run { started: Instant::now(), samples, rounds: Vec::new() }
    }

    #[test]
    fn a_leak_among_the_samples_fails_the_run() {
        assert!(run(12, |_| Sample::from([("rss", 20e6), ("files", 40.0)])).judge().is_ok());
        let leak = run(12, |round| Sample::from([("rss", 20e6), ("files", 40.0 + round)]));
        assert_eq!(leak.judge().expect_err("it leaks").to_string(), "grows: files");
        let both = run(12, |round| Sample::from([("rss", 20e6 + round * 1e6), ("files", 40.0 + round)]));
        assert_eq!(both.judge().expect_err("it leaks").to_string(), "grows: rss, files");
    }

    #[test]
    fn what_belongs_to_others_or_is_missing_fails_nothing() {
        // The whole machine's, and a kernel without the memory controller.
        let machine = run(12, |round| Sample::from([("files", 40.0), ("machine slab", round * 1e9)]));
        assert!(machine.judge().is_ok());
        let judged: Vec<_> = machine.verdicts().iter().map(|(quantity, _)| quantity.name).collect();
        assert_eq!(judged, ["files", "machine slab"]);
    }

    #[test]
    fn a_run_that_cannot_be_judged_has_not_passed() {
        let short = run(growth::rounds() - 1, |_| Sample::from([("files", 40.0)]));
        assert_eq!(short.judge().expect_err("too few").to_string(), "too few samples to judge: 8");
        assert!(run(growth::rounds(), |_| Sample::from([("files", 40.0)])).judge().is_ok());
    }
}
