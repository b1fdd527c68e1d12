//! The table for people and bench.json for programs.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use tidegate_tests::{program, tool};

use super::Samples;
use super::subject::{Kind, Programs};
use super::workload::Metric;

/// How the run was made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Settings {
    pub(super) rounds: u32,
    /// Length of one measurement.
    pub(super) seconds: f64,
    pub(super) idle_connections: usize,
    pub(super) pinned: bool,
}

/// A report in the making.
#[derive(Debug)]
pub(super) struct Report {
    about: Map<String, Value>,
}

impl Report {
    /// Notes machine, versions and settings before anything runs.
    pub(super) fn start(settings: Settings, programs: &Programs) -> Result<Self> {
        let mut about = Map::new();
        about.insert("date".to_owned(), json!(date()?));
        about.insert("machine".to_owned(), machine()?);
        about.insert("versions".to_owned(), versions(programs)?);
        about.insert(
            "settings".to_owned(),
            json!({
                "worker_threads": 1,
                "rounds": settings.rounds,
                "seconds_per_measurement": settings.seconds,
                "idle_connections": settings.idle_connections,
                "network": "loopback of a network namespace of its own",
                "listeners": "bound",
                "access_logs": false,
                "proxies_pinned_to_cpu_0": settings.pinned,
            }),
        );
        about.insert("load_average_before".to_owned(), json!(load_average()?));
        Ok(Self { about })
    }

    /// Prints the table and writes target/bench/bench.json.
    pub(super) fn finish(&mut self, samples: &Samples) -> Result<()> {
        self.about.insert("load_average_after".to_owned(), json!(load_average()?));
        print!("{}{}", self.header(), table(samples));
        let mut document = self.about.clone();
        document.insert("metrics".to_owned(), Value::Array(metrics(samples)));
        write("bench.json", document)
    }

    fn header(&self) -> String {
        let (versions, settings) = (&self.about["versions"], &self.about["settings"]);
        format!(
            "{}\n\
             tidegate {}, Envoy {}, HAProxy {}; one worker thread each, loopback{}; {} rounds of {} s\n\
             medians; x: ratio of tidegate to it, median over the rounds\n\n",
            describe_machine(&self.about),
            text(&versions["tidegate"]),
            text(&versions["envoy"]),
            text(&versions["haproxy"]),
            if settings["proxies_pinned_to_cpu_0"] == json!(true) { ", proxies pinned to CPU 0" } else { "" },
            settings["rounds"],
            settings["seconds_per_measurement"],
        )
    }
}

/// Writes a document into target/bench, and says so.
pub(super) fn write(name: &str, document: Map<String, Value>) -> Result<()> {
    let dir = program::target().join("bench");
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let path = dir.join(name);
    fs::write(&path, format!("{:#}\n", Value::Object(document)))
        .with_context(|| format!("write {}", path.display()))?;
    give_back(&[&dir, &path])?;
    println!("\nall figures of all rounds: {}", path.display());
    Ok(())
}

/// When, where and beside what a run was made: the first line of its report.
pub(super) fn describe_machine(about: &Map<String, Value>) -> String {
    let machine = &about["machine"];
    format!(
        "{}: {} CPUs of {}, {} GiB, Linux {}; load average {} before, {} after",
        text(&about["date"]),
        machine["cpus"],
        text(&machine["cpu"]),
        machine["memory_gib"],
        text(&machine["kernel"]),
        text(&about["load_average_before"]),
        text(&about["load_average_after"]),
    )
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Makes files below target/ its owner's: under sudo they are made by root.
fn give_back(paths: &[&Path]) -> Result<()> {
    let owner = fs::metadata(program::target())?;
    for path in paths {
        chown(path, Some(owner.uid()), Some(owner.gid()))
            .with_context(|| format!("chown {}", path.display()))?;
    }
    Ok(())
}

/// The metrics that were measured, in order.
fn measured(samples: &Samples) -> Vec<Metric> {
    let mut metrics: Vec<_> = samples.keys().map(|(metric, _)| *metric).collect();
    metrics.dedup();
    metrics
}

fn table(samples: &Samples) -> String {
    let mut text = format!("{:<34}{:<15}{:>9}", "", "", "tidegate");
    for kind in &Kind::ALL[1..] {
        let _ = write!(text, "{:>15}{:>7}", kind.name(), "x");
    }
    text.push('\n');
    for metric in measured(samples) {
        let _ = write!(text, "{:<34}{:<15}", metric.title(), metric.unit());
        let own = samples.get(&(metric, Kind::Tidegate)).map_or(&[][..], Vec::as_slice);
        let _ = write!(text, "{:>9}", number(median(own)));
        for kind in &Kind::ALL[1..] {
            let line = match samples.get(&(metric, *kind)) {
                Some(theirs) => format!("{:>15}{:>7}", number(median(theirs)), ratio_text(own, theirs)),
                None => format!("{:>15}{:>7}", "-", ""),
            };
            text.push_str(&line);
        }
        text.push('\n');
    }
    text
}

fn metrics(samples: &Samples) -> Vec<Value> {
    let metric = |metric: Metric| {
        let own = samples.get(&(metric, Kind::Tidegate)).map_or(&[][..], Vec::as_slice);
        let (mut subjects, mut ratios) = (Map::new(), Map::new());
        for ((_, kind), values) in samples.iter().filter(|((other, _), _)| *other == metric) {
            subjects.insert(kind.name().to_owned(), spread(values));
            if *kind != Kind::Tidegate {
                ratios.insert(kind.name().to_owned(), spread(&ratios_by_round(own, values)));
            }
        }
        json!({
            "id": metric.id(),
            "title": metric.title(),
            "unit": metric.unit(),
            "lower_is_better": metric.lower_is_better(),
            "subjects": subjects,
            "tidegate_to": ratios,
        })
    };
    measured(samples).into_iter().map(metric).collect()
}

/// Median, extremes and everything.
pub(super) fn spread(values: &[f64]) -> Value {
    let (least, most) =
        values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(*v), b.max(*v)));
    json!({"median": median(values), "min": least, "max": most, "rounds": values})
}

/// Round by round: what disturbed one round disturbed both.
pub(super) fn ratios_by_round(own: &[f64], theirs: &[f64]) -> Vec<f64> {
    own.iter().zip(theirs).map(|(own, theirs)| own / theirs).collect()
}

pub(super) fn ratio_text(own: &[f64], theirs: &[f64]) -> String {
    let ratio = median(&ratios_by_round(own, theirs));
    if ratio.is_finite() { format!("{ratio:.2}") } else { "-".to_owned() }
}

/// NaN of nothing.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => sorted[count / 2],
        count => f64::midpoint(sorted[count / 2 - 1], sorted[count / 2]),
    }
}

/// Three digits that matter.
pub(super) fn number(value: f64) -> String {
    match value {
        value if value.is_nan() => "-".to_owned(),
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value if value >= 1.0 => format!("{value:.2}"),
        value => format!("{value:.3}"),
    }
}

pub(super) fn machine() -> Result<Value> {
    let field = |path: &str, name: &str| -> Result<String> {
        let text = fs::read_to_string(path).with_context(|| path.to_owned())?;
        let line = text.lines().find(|line| line.starts_with(name));
        Ok(line.and_then(|line| line.split_once(':')).map_or("unknown", |(_, value)| value.trim()).to_owned())
    };
    let kib: u64 = field("/proc/meminfo", "MemTotal")?.trim_end_matches(" kB").parse().unwrap_or_default();
    Ok(json!({
        "cpu": field("/proc/cpuinfo", "model name")?,
        "cpus": std::thread::available_parallelism()?.get(),
        "memory_gib": kib.div_ceil(1 << 20),
        "kernel": fs::read_to_string("/proc/sys/kernel/osrelease")?.trim(),
    }))
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

fn versions(programs: &Programs) -> Result<Value> {
    let haproxy = output(Command::new(&programs.haproxy).arg("-v"))?;
    let haproxy = haproxy.split_whitespace().nth(2).unwrap_or("unknown").to_owned();
    Ok(json!({"tidegate": commit(), "envoy": tool::ENVOY_VERSION, "haproxy": haproxy}))
}

pub(super) fn load_average() -> Result<String> {
    let text = fs::read_to_string("/proc/loadavg")?;
    Ok(text.split_whitespace().next().unwrap_or_default().to_owned())
}

/// What a command prints.
fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("run {}", command.get_program().display()))?;
    anyhow::ensure!(output.status.success(), "{}: {}", command.get_program().display(), output.status);
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_values() {
        assert!(median(&[]).is_nan());
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
    }

    #[test]
    fn ratios_are_of_the_same_round() {
        // One slow round of both: the ratio does not show it.
        assert_eq!(ratio_text(&[1.0, 10.0, 1.0], &[2.0, 20.0, 2.0]), "0.50");
        assert_eq!(ratio_text(&[], &[2.0]), "-");
    }
}
