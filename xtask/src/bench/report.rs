//! The table for people.

use std::fmt::Write as _;

use super::metric::Metric;
use super::results::{About, Results, Series, Spread};
use super::subject::Subject;

/// When, where and how, in three lines. `base`: what figures are divided by, as for [`table`].
pub(super) fn header(about: &About, base: Option<Subject>) -> String {
    let ratio = base.map_or_else(
        || "tidegate's figure divided by it".to_owned(),
        |base| format!("its figure divided by that of {base}"),
    );
    let settings = &about.settings;
    let versions: Vec<_> = about.versions.iter().map(|(name, version)| format!("{name} {version}")).collect();
    format!(
        "{}: {} CPUs of {}, {} GiB, Linux {}; load average {} before, {} after; {:.0} s\n{}; one worker thread each, {}\n\
         medians of {} rounds of {} s; ×: {ratio}, median over the rounds; ±: half of the widest \
         spread\n",
        about.date,
        about.machine.cpus,
        about.machine.cpu,
        about.machine.memory_gib,
        about.machine.kernel,
        about.load_average_before,
        about.load_average_after,
        about.seconds,
        versions.join(", "),
        settings.congestion_control,
        settings.rounds,
        settings.seconds_per_measurement,
    )
}

/// Every case with every figure that says something about the subjects. Ratios are tidegate's figures divided by theirs, or
/// theirs divided by those of `base`.
pub(super) fn table(results: &Results, base: Option<Subject>) -> String {
    let mut text = String::new();
    let mut case = "";
    let mut columns = Vec::new();
    for series in results.series.iter().filter(|series| series.metric != Metric::LoadCpu) {
        if series.case != case {
            case = &series.case;
            let _ = write!(text, "\n{:<54}{:>6}", format!("{case}: {}", series.title), "±");
            columns = subjects(results, case);
            for subject in &columns {
                let _ = write!(text, "{:>15}", shorter(*subject));
            }
            text.push('\n');
        }
        line(&mut text, series, &columns, base);
    }
    for failure in &results.failures {
        let _ = writeln!(text, "not measured: {failure}");
    }
    text
}

fn line(text: &mut String, series: &Series, columns: &[Subject], base: Option<Subject>) {
    let label = format!("  {} ({})", series.metric.title(), series.unit);
    let _ = write!(text, "{label:<54}{:>6}", widest(series.subjects.values()));
    for subject in columns {
        let value = series.of(*subject).map_or_else(|| "-".to_owned(), |spread| number(spread.median));
        let ratio = match base {
            None => series.tidegate_to.get(&subject.to_string()).map(|spread| spread.median),
            Some(base) if base == *subject => None,
            Some(base) => series.ratio(*subject, base).map(|ratio| ratio.median),
        };
        let ratio = ratio.map_or_else(String::new, |ratio| format!("×{ratio:.2}"));
        let _ = write!(text, "{value:>9}{ratio:>6}");
    }
    text.push('\n');
}

/// Everybody who has a figure in a case: tidegate first, no proxy last.
fn subjects(results: &Results, case: &str) -> Vec<Subject> {
    let series = results.series.iter().filter(|series| series.case == case);
    let mut subjects: Vec<Subject> =
        series.flat_map(|series| series.subjects.keys()).filter_map(|name| name.parse().ok()).collect();
    subjects.sort_unstable();
    subjects.dedup();
    subjects
}

fn shorter(subject: Subject) -> String {
    let name = subject.to_string();
    name.replace("haproxy-splice", "hap-splice")
        .replace("intercept", "icpt")
        .replace("redirect", "redir")
        .replace("tidegate+kernel", "kernel")
}

/// Half of the distance between the extremes, in percent of the median, of whoever varied most.
fn widest<'a>(spreads: impl Iterator<Item = &'a Spread>) -> String {
    let half = |spread: &Spread| (spread.max - spread.min) / 2.0 / spread.median.abs();
    let widest = spreads.map(half).filter(|half| half.is_finite()).fold(0.0, f64::max);
    format!("{:.0}%", widest * 100.0)
}

/// Three digits that matter.
pub(super) fn number(value: f64) -> String {
    match value {
        value if value.is_nan() => "-".to_owned(),
        0.0 => "0".to_owned(),
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value if value >= 1.0 => format!("{value:.2}"),
        value => format!("{value:.3}"),
    }
}
