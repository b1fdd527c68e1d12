//! The few figures that README and chart show.

use super::case::Case;
use super::metric::Metric;
use super::results::{Results, Series};
use super::subject::Subject;
use super::workload::Workload;

/// One line of the table, one group of bars.
struct Headline {
    title: &'static str,
    case: Case,
    metric: Metric,
}

const fn headline(title: &'static str, case: Case, metric: Metric) -> Headline {
    Headline { title, case, metric }
}

const BULK_1: Case = Case::loopback(Workload::down(1)).one_cpu();
const BULK_8: Case = Case::loopback(Workload::down(8)).one_cpu();
const REQUEST_1: Case = Case::loopback(Workload::request(64, 1)).one_cpu();
const REQUEST_64: Case = Case::loopback(Workload::request(64, 64));
const REQUEST_512: Case = Case::loopback(Workload::request(64, 512));
const SHORT: Case = Case::loopback(Workload::Short);
const MIXED: Case = Case::loopback(Workload::MIXED);
const IDLE: Case = Case::loopback(Workload::Idle);

const HEADLINES: &[Headline] = &[
    headline("bulk, 1 stream, one CPU: proxy CPU", BULK_1, Metric::ProxyCpu),
    headline("bulk, 8 streams, one CPU: proxy CPU", BULK_8, Metric::ProxyCpu),
    headline("bulk, 1 stream, one CPU: throughput", BULK_1, Metric::Rate),
    headline("64 B, 1 connection, one CPU: p50", REQUEST_1, Metric::P50),
    headline("64 B, 1 connection, one CPU: p99", REQUEST_1, Metric::P99),
    headline("64 B, 64 connections: proxy CPU", REQUEST_64, Metric::ProxyCpu),
    headline("64 B, 512 connections: rate", REQUEST_512, Metric::Rate),
    headline("connect, 64 B, close: rate", SHORT, Metric::Rate),
    headline("connect, 64 B, close: proxy CPU", SHORT, Metric::ProxyCpu),
    headline("64 B beside 64 bulk streams: p99", MIXED, Metric::P99),
    headline("memory at start", IDLE, Metric::RssStart),
    headline("memory per idle connection", IDLE, Metric::RssPerConnection),
];

const POD_REQUEST: Case = Case::veth(Workload::request(64, 64));
const POD_SHORT: Case = Case::veth(Workload::Short);

/// Of clients in a pod whose connections are captured, whoever captures them.
const CAPTURED_HEADLINES: &[Headline] = &[
    headline("connect, 64 B, close: rate", POD_SHORT, Metric::Rate),
    headline("connect, 64 B, close: proxy CPU", POD_SHORT, Metric::ProxyCpu),
    headline("connect, 64 B, close: machine CPU", POD_SHORT, Metric::MachineCpu),
    headline("64 B, 64 connections: rate", POD_REQUEST, Metric::Rate),
    headline("64 B, 64 connections: proxy CPU", POD_REQUEST, Metric::ProxyCpu),
    headline("64 B, 64 connections: p99", POD_REQUEST, Metric::P99),
];

/// Those who are shown for [`captured`]: others are divided by the first.
pub(super) const CAPTURED_SHOWN: &[(Subject, &str)] = &[
    (Subject::INTERCEPT, "tidegate, eBPF"),
    (Subject::TIDEGATE.redirected(), "tidegate, REDIRECT"),
    (Subject::ENVOY.redirected(), "Envoy, REDIRECT"),
    (Subject::HAPROXY.redirected(), "HAProxy, REDIRECT"),
];

/// Those who are shown, and what they are called; of the programs, with the version.
pub(super) const SHOWN: &[(Subject, &str)] = &[
    (Subject::TIDEGATE, "tidegate"),
    (Subject::ENVOY, "Envoy"),
    (Subject::HAPROXY, "HAProxy"),
    (Subject::HAPROXY_SPLICE, "HAProxy, tuned"),
    (Subject::NGINX, "nginx"),
    (Subject::DIRECT, "no proxy"),
];

/// The headlines that a run has measured.
pub(super) fn of(results: &Results) -> Vec<(&'static str, &Series)> {
    measured(HEADLINES, &[Subject::TIDEGATE], results)
}

/// Those of captured clients that a run has measured with eBPF and with REDIRECT.
pub(super) fn captured(results: &Results) -> Vec<(&'static str, &Series)> {
    measured(CAPTURED_HEADLINES, &[Subject::INTERCEPT, Subject::ENVOY.redirected()], results)
}

/// Where all of `by` have a figure.
fn measured<'a>(
    headlines: &[Headline],
    by: &[Subject],
    results: &'a Results,
) -> Vec<(&'static str, &'a Series)> {
    let find = |headline: &Headline| {
        let series = results.find(&headline.case.to_string(), headline.metric)?;
        by.iter().all(|subject| series.of(*subject).is_some()).then_some((headline.title, series))
    };
    headlines.iter().filter_map(find).collect()
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
                for (subject, _) in SHOWN {
                    assert!(plan.measures(headline.case, *subject), "{}: {subject}", headline.case);
                }
            }
        }
        let full = Choice::default().plan();
        for headline in CAPTURED_HEADLINES {
            for (subject, _) in CAPTURED_SHOWN {
                assert!(full.measures(headline.case, *subject), "{}: {subject}", headline.case);
            }
        }
    }
}
