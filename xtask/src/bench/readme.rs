//! `cargo xtask bench readme`: README's figures and the chart, from the bench.json in the repository.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use tidegate_tests::program;

use super::headline::{self, CAPTURED_SHOWN, SHOWN};
use super::report::number;
use super::results::{Results, Series};
use super::subject::Subject;
use super::{chart, goals};

/// The run that README shows, and its chart.
const RESULTS: &str = "benches/results/bench.json";
const CHART: &str = "benches/results/bench.svg";

const BEGIN: &str =
    "<!-- figures: written by `cargo xtask bench readme` from benches/results/bench.json -->\n";
const END: &str = "<!-- end of figures -->\n";

/// Arguments of `bench readme`.
#[derive(Args, Debug)]
pub(super) struct Readme {
    /// Take this run into the repository first.
    #[arg(long, value_name = "PATH", conflicts_with = "check")]
    from: Option<PathBuf>,
    /// Write nothing; fail when README or chart are not what bench.json gives.
    #[arg(long)]
    check: bool,
}

impl Readme {
    pub(super) fn run(&self) -> Result<()> {
        let repository = program::repository();
        if let Some(from) = &self.from {
            // Only what can be read again.
            let results = Results::read(from)?;
            ensure!(results.failures.is_empty(), "{} has failed measurements", from.display());
            ensure!(
                !results.about.versions.values().any(|version| version.contains('/')),
                "{} is not of a commit: let `cargo xtask bench` build tidegate, without --tidegate",
                from.display()
            );
            fs::create_dir_all(repository.join("benches/results"))?;
            fs::write(repository.join(RESULTS), serde_json::to_string(&results)? + "\n")?;
        }
        for (path, wanted) in files()? {
            let path = repository.join(path);
            if fs::read_to_string(&path).is_ok_and(|present| present == wanted) {
                continue;
            }
            if self.check {
                bail!("{} is not what {RESULTS} gives: run `cargo xtask bench readme`", path.display());
            }
            fs::write(&path, wanted).with_context(|| format!("write {}", path.display()))?;
            println!("written: {}", path.display());
        }
        Ok(())
    }
}

/// What the files should hold.
fn files() -> Result<[(&'static str, String); 2]> {
    let repository = program::repository();
    let results = Results::read(&repository.join(RESULTS))?;
    let readme = fs::read_to_string(repository.join("README.md")).context("README.md")?;
    Ok([("README.md", replace(&readme, &section(&results))?), (CHART, chart::svg(&results))])
}

/// The text with what is between the markers replaced.
fn replace(text: &str, section: &str) -> Result<String> {
    let (before, rest) =
        text.split_once(BEGIN).context("README.md lacks the marker that begins the figures")?;
    let (_, after) = rest.split_once(END).context("README.md lacks the marker that ends the figures")?;
    Ok(format!("{before}{BEGIN}{section}{END}{after}"))
}

fn section(results: &Results) -> String {
    let about = &results.about;
    let version = |subject: Subject| about.versions.get(&subject.to_string()).map_or("", String::as_str);
    let mut text = format!(
        "Measured {} on {} CPUs of an {} under Linux {}: {} rounds{}, one worker thread each, medians; in brackets \
         tidegate's figure divided by theirs, median over the rounds.\n\n",
        about.date,
        about.machine.cpus,
        about.machine.cpu,
        about.machine.kernel.split('-').next().unwrap_or_default(),
        about.settings.rounds,
        if about.settings.quick { " of `--quick`" } else { "" },
    );
    text.push_str("| |");
    for (subject, title) in SHOWN {
        let short = version(*subject).split(['-', '+']).next().unwrap_or_default();
        let version = if *subject == Subject::TIDEGATE { "" } else { short };
        let _ = write!(text, " {} |", format!("{title} {version}").trim());
    }
    let _ = writeln!(text, "\n|---|{}", "---|".repeat(SHOWN.len()));
    for (title, series) in headline::of(results) {
        let _ = writeln!(text, "| {title}, {} |{}", series.unit, cells(series, SHOWN));
    }
    let captured = headline::captured(results);
    if !captured.is_empty() {
        text.push_str(
            "\nClients in a pod that connect to a service's address, over veth: captured by eBPF, or sent by nftables' \
             REDIRECT to a proxy in the pod, as a sidecar's are; in brackets the figure of the first column divided by \
             theirs.\n\n| |",
        );
        for (_, title) in CAPTURED_SHOWN {
            let _ = write!(text, " {title} |");
        }
        let _ = writeln!(text, "\n|---|{}", "---|".repeat(CAPTURED_SHOWN.len()));
        for (title, series) in captured {
            let _ = writeln!(text, "| {title}, {} |{}", series.unit, cells(series, CAPTURED_SHOWN));
        }
    }
    let outcomes = goals::outcomes(results);
    let met = outcomes.iter().filter(|outcome| outcome.met).count();
    let _ = writeln!(
        text,
        "\n![The same as bars]({CHART})\n\nOf the {} goals of the data path, {met} are met by this run:\n",
        outcomes.len()
    );
    text.push_str("| goal | compared with | bound | measured | |\n|---|---|---|---|---|\n");
    for outcome in &outcomes {
        let (measured, place) = match &outcome.worst {
            Some((figure, place)) if place.is_empty() => (number(*figure), String::new()),
            Some((figure, place)) => (number(*figure), format!(" ({place})")),
            None => ("-".to_owned(), String::new()),
        };
        let verdict = match (&outcome.worst, outcome.met) {
            (None, _) => "not measured",
            (_, true) => "met",
            (_, false) => "**missed**",
        };
        let _ = writeln!(
            text,
            "| {} | {} | {} | {measured}{place} | {verdict} |",
            outcome.what, outcome.to, outcome.bound
        );
    }
    text
}

/// The figures of those who are shown, the first one's to theirs in brackets.
fn cells(series: &Series, shown: &[(Subject, &str)]) -> String {
    let own = shown.first().map(|(subject, _)| *subject);
    let cell = |(subject, _): &(Subject, &str)| {
        let own = own.filter(|own| own != subject);
        match (series.of(*subject), own.and_then(|own| series.ratio(own, *subject).map(|ratio| ratio.median)))
        {
            (None, _) => " |".to_owned(),
            (Some(spread), None) => format!(" {} |", number(spread.median)),
            (Some(spread), Some(ratio)) => format!(" {} ({ratio:.2}) |", number(spread.median)),
        }
    };
    shown.iter().map(cell).collect()
}

#[cfg(test)]
mod tests {
    use super::super::case::Case;
    use super::super::metric::Metric;
    use super::super::results::tests::results;
    use super::super::workload::Workload;
    use super::*;

    #[test]
    fn readme_and_chart_are_what_bench_json_gives() {
        for (path, wanted) in files().expect("bench.json and README.md can be read") {
            let present = fs::read_to_string(program::repository().join(path)).unwrap_or_default();
            assert!(present == wanted, "{path} is stale: run `cargo xtask bench readme`");
        }
    }

    #[test]
    fn only_what_is_between_the_markers_changes() {
        let text = format!("before\n{BEGIN}old\n{END}after\n");
        assert_eq!(replace(&text, "new\n").expect("markers"), format!("before\n{BEGIN}new\n{END}after\n"));
        assert!(replace("no markers", "new").is_err());
    }

    #[test]
    fn a_line_has_figures_and_ratios() {
        let mut results = results();
        results.add(
            Case::loopback(Workload::Short),
            Metric::ProxyCpu,
            &[(Subject::TIDEGATE, &[50.0, 50.0]), (Subject::ENVOY, &[100.0, 100.0])],
        );
        let section = section(&results);
        assert!(
            section
                .contains("| connect, 64 B, close: proxy CPU, µs/connection | 50.0 | 100 (0.50) | | | | |"),
            "{section}"
        );
        assert!(section.contains("Envoy 1.40.0 | HAProxy 2.6.12 |"), "{section}");
        assert!(section.contains("not measured"));
        assert!(!section.contains("REDIRECT"), "{section}");
        results.add(
            Case::veth(Workload::Short),
            Metric::Rate,
            &[(Subject::INTERCEPT, &[150.0, 150.0]), (Subject::ENVOY.redirected(), &[100.0, 100.0])],
        );
        let section = super::section(&results);
        assert!(
            section.contains("| connect, 64 B, close: rate, connections/s | 150 | | 100 (1.50) | |"),
            "{section}"
        );
    }
}
