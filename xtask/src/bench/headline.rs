//! The few figures that README and chart show.

use super::metric::Metric;
use super::results::{Results, Series};

/// One line of the table, one group of bars.
struct Headline {
    title: &'static str,
    case: &'static str,
    metric: Metric,
}

const fn headline(title: &'static str, case: &'static str, metric: Metric) -> Headline {
    Headline { title, case, metric }
}

const HEADLINES: &[Headline] = &[
    headline("bulk, 1 stream, one CPU: proxy CPU", "loopback/bulk-1-down@one-cpu", Metric::ProxyCpu),
    headline("bulk, 8 streams, one CPU: proxy CPU", "loopback/bulk-8-down@one-cpu", Metric::ProxyCpu),
    headline("bulk, 1 stream, one CPU: throughput", "loopback/bulk-1-down@one-cpu", Metric::Rate),
    headline("64 B, 1 connection, one CPU: p50", "loopback/request-64x1@one-cpu", Metric::P50),
    headline("64 B, 1 connection, one CPU: p99", "loopback/request-64x1@one-cpu", Metric::P99),
    headline("64 B, 64 connections: proxy CPU", "loopback/request-64x64", Metric::ProxyCpu),
    headline("64 B, 512 connections: rate", "loopback/request-64x512", Metric::Rate),
    headline("connect, 64 B, close: rate", "loopback/short", Metric::Rate),
    headline("connect, 64 B, close: proxy CPU", "loopback/short", Metric::ProxyCpu),
    headline("64 B beside 64 bulk streams: p99", "loopback/mixed-64", Metric::P99),
    headline("memory at start", "loopback/idle", Metric::RssStart),
    headline("memory per idle connection", "loopback/idle", Metric::RssPerConnection),
];

/// Those who are shown, and what they are called; of the programs, with the version.
pub(super) const SHOWN: &[(&str, &str)] = &[
    ("tidegate", "tidegate"),
    ("envoy", "Envoy"),
    ("haproxy", "HAProxy"),
    ("haproxy-splice", "HAProxy, tuned"),
    ("nginx", "nginx"),
    ("direct", "no proxy"),
];

/// The headlines that a run has measured.
pub(super) fn of(results: &Results) -> Vec<(&'static str, &Series)> {
    let find = |headline: &Headline| {
        let series = results.find(headline.case, headline.metric)?;
        series.subjects.contains_key("tidegate").then_some((headline.title, series))
    };
    HEADLINES.iter().filter_map(find).collect()
}

#[cfg(test)]
mod tests {
    use super::super::plan::Choice;
    use super::*;

    #[test]
    fn every_headline_is_measured_by_every_standard_run() {
        for quick in [true, false] {
            let plan = Choice { quick, ..Choice::default() }.plan();
            for headline in HEADLINES {
                assert!(
                    plan.entries.iter().any(|entry| entry.case.to_string() == headline.case),
                    "{}",
                    headline.case
                );
            }
        }
    }
}
