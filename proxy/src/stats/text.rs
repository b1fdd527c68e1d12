//! `/stats` as text and as JSON.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Write};

use serde_json::json;

use super::block::{Block, Kind, Stat};
use super::histogram::{BOUNDS, HistogramValue, QUANTILES};
use super::query::{Buckets, Query};
use super::{INTERCEPT, Stats};

/// Calls `each` with every counter and gauge that is asked for, by name.
fn for_each_value(
    stats: &Stats,
    query: &Query,
    each: &mut dyn FnMut(&str, u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut intercept = Some(stats.intercept());
    for block in stats.blocks() {
        if block.layout().root > INTERCEPT.trim_end_matches('.')
            && let Some(intercept) = intercept.take()
        {
            for (name, kind, value) in intercept {
                let name = format!("{INTERCEPT}{name}");
                if query.wants_kind(kind) && query.wants_name(&name) {
                    each(&name, value)?;
                }
            }
        }
        block_values(&block, query, each)?;
    }
    Ok(())
}

fn block_values(
    block: &Block,
    query: &Query,
    each: &mut dyn FnMut(&str, u64) -> io::Result<()>,
) -> io::Result<()> {
    let layout = block.layout();
    let mut name = block.scope();
    let scope = name.len();
    let wanted = |stat: &&Stat| stat.kind != Kind::Histogram && query.wants_kind(stat.kind);
    for stat in layout.stats.iter().filter(wanted) {
        name.truncate(scope);
        name.push_str(stat.name);
        if query.wants_name(&name) && (!query.used_only || block.is_used(stat)) {
            each(&name, block.value(stat))?;
        }
    }
    for worker in 0..if layout.per_worker.is_empty() { 0 } else { block.workers() } {
        for stat in layout.stats.iter().filter(wanted).filter(|stat| layout.per_worker.contains(&stat.name)) {
            name.truncate(scope);
            // Writing to a String can't fail.
            let _ = fmt::Write::write_fmt(&mut name, format_args!("worker_{worker}.{}", stat.name));
            if query.wants_name(&name) && (!query.used_only || block.worker_is_used(stat, worker)) {
                each(&name, block.worker_value(stat, worker))?;
            }
        }
    }
    Ok(())
}

/// Every text that is asked for, by name. As in Envoy they come first.
fn for_each_text(
    stats: &Stats,
    query: &Query,
    each: &mut dyn FnMut(&str, &str) -> io::Result<()>,
) -> io::Result<()> {
    if !query.wants_texts() {
        return Ok(());
    }
    let mut texts = BTreeMap::new();
    for block in stats.blocks() {
        for (index, name) in block.layout().texts.iter().enumerate() {
            let name = format!("{}{name}", block.scope());
            let text = block.text(index).filter(|text| !query.used_only || !text.is_empty());
            if let Some(text) = text.filter(|_| query.wants_name(&name)) {
                texts.insert(name, text);
            }
        }
    }
    texts.iter().try_for_each(|(name, text)| each(name, text))
}

/// Every histogram that is asked for, by name.
fn for_each_histogram(
    stats: &Stats,
    query: &Query,
    each: &mut dyn FnMut(&str, &HistogramValue) -> io::Result<()>,
) -> io::Result<()> {
    if !query.wants_kind(Kind::Histogram) {
        return Ok(());
    }
    for block in stats.blocks() {
        for stat in block.layout().stats.iter().filter(|stat| stat.kind == Kind::Histogram) {
            let name = format!("{}{}", block.scope(), stat.name);
            if query.wants_name(&name) && (!query.used_only || block.is_used(stat)) {
                each(&name, &block.histogram(stat))?;
            }
        }
    }
    Ok(())
}

/// One `name: value` per line; histograms come last.
pub(super) fn write(stats: &Stats, query: &Query, out: &mut impl Write) -> io::Result<()> {
    // Envoy escapes nothing either.
    for_each_text(stats, query, &mut |name, text| writeln!(out, "{name}: \"{text}\""))?;
    for_each_value(stats, query, &mut |name, value| writeln!(out, "{name}: {value}"))?;
    for_each_histogram(stats, query, &mut |name, value| {
        if value.count() == 0 {
            return writeln!(out, "{name}: No recorded values");
        }
        write!(out, "{name}:")?;
        match query.buckets {
            Buckets::Summary => summary(value, " ", out)?,
            Buckets::Cumulative => buckets(&value.cumulative(), out)?,
            Buckets::Disjoint => buckets(&value.buckets, out)?,
            Buckets::Detailed => detailed(value, out)?,
        }
        writeln!(out)
    })
}

/// Envoy prints pairs of an interval and a cumulative value; only the latter is kept here, so the interval is
/// always an empty one.
fn summary(value: &HistogramValue, before: &str, out: &mut impl Write) -> io::Result<()> {
    for (index, percent) in QUANTILES.into_iter().enumerate() {
        let before = if index == 0 { before } else { " " };
        write!(out, "{before}P{percent}(nan,{})", value.quantile(percent))?;
    }
    Ok(())
}

fn buckets(counts: &[u64], out: &mut impl Write) -> io::Result<()> {
    for (bound, count) in BOUNDS.into_iter().zip(counts) {
        // As C prints a double with %g.
        match bound {
            bound if bound >= 1e6 => write!(out, " B{:.1}e+06(0,{count})", bound / 1e6)?,
            bound => write!(out, " B{bound}(0,{count})")?,
        }
    }
    Ok(())
}

fn detailed(value: &HistogramValue, out: &mut impl Write) -> io::Result<()> {
    write!(out, "\n  totals=")?;
    for (index, (lower, width, count)) in totals(value).enumerate() {
        write!(out, "{}{lower},{width}:{count}", if index == 0 { "" } else { " " })?;
    }
    write!(out, "\n  intervals=\n  summary=")?;
    summary(value, "", out)
}

/// Lower bound, width and count of every bucket that holds something.
fn totals(value: &HistogramValue) -> impl Iterator<Item = (f64, f64, u64)> {
    let last = BOUNDS[BOUNDS.len() - 1];
    value.buckets.iter().enumerate().filter(|(_, count)| **count > 0).map(move |(bucket, count)| {
        let lower = if bucket == 0 { 0.0 } else { BOUNDS[bucket - 1] };
        (lower, BOUNDS.get(bucket).unwrap_or(&last) - lower, *count)
    })
}

/// One object: `{"stats":[{"name":…,"value":…},…,{"histograms":…}]}`.
pub(super) fn write_json(stats: &Stats, query: &Query, out: &mut impl Write) -> io::Result<()> {
    write!(out, "{{\"stats\":[")?;
    let mut first = true;
    for_each_text(stats, query, &mut |name, text| {
        write!(out, "{}{}", comma(&mut first), json!({"name": name, "value": text}))
    })?;
    for_each_value(stats, query, &mut |name, value| {
        write!(out, "{}{}", comma(&mut first), json!({"name": name, "value": value}))
    })?;
    let mut histograms = 0;
    for_each_histogram(stats, query, &mut |name, value| {
        histograms += 1;
        if histograms == 1 {
            write!(out, "{}{}", comma(&mut first), json_head(query.buckets))?;
        } else {
            write!(out, ",")?;
        }
        write!(out, "{}", json_histogram(query.buckets, name, value))
    })?;
    if histograms > 0 {
        write!(out, "{}", if is_list(query.buckets) { "]}" } else { "]}}" })?;
    }
    write!(out, "]}}")
}

fn comma(first: &mut bool) -> &'static str {
    if std::mem::take(first) { "" } else { "," }
}

fn is_list(buckets: Buckets) -> bool {
    matches!(buckets, Buckets::Cumulative | Buckets::Disjoint)
}

fn json_head(buckets: Buckets) -> String {
    let quantiles = QUANTILES.map(|percent| json_number(percent).to_string()).join(",");
    match buckets {
        Buckets::Cumulative | Buckets::Disjoint => "{\"histograms\":[".to_owned(),
        Buckets::Summary => {
            format!("{{\"histograms\":{{\"supported_quantiles\":[{quantiles}],\"computed_quantiles\":[")
        }
        Buckets::Detailed => {
            format!("{{\"histograms\":{{\"supported_percentiles\":[{quantiles}],\"details\":[")
        }
    }
}

fn json_histogram(buckets: Buckets, name: &str, value: &HistogramValue) -> serde_json::Value {
    let list = |counts: &[u64]| -> Vec<_> {
        let pairs = BOUNDS.into_iter().zip(counts);
        pairs.map(|(b, n)| json!({"upper_bound": json_number(b), "interval": 0, "cumulative": n})).collect()
    };
    let quantiles = || -> Vec<_> {
        let one = |percent| (value.count() > 0).then(|| json_number(value.quantile(percent)));
        QUANTILES.into_iter().map(|percent| json!({"cumulative": one(percent), "interval": null})).collect()
    };
    match buckets {
        Buckets::Cumulative => json!({"name": name, "buckets": list(&value.cumulative())}),
        Buckets::Disjoint => json!({"name": name, "buckets": list(&value.buckets)}),
        Buckets::Summary => json!({"name": name, "values": quantiles()}),
        Buckets::Detailed => {
            let total = |(lower, width, count)| json!({"lower_bound": json_number(lower), "width": json_number(width), "count": count});
            let totals: Vec<_> = totals(value).map(total).collect();
            json!({"name": name, "totals": totals, "intervals": [], "percentiles": quantiles()})
        }
    }
}

/// Whole numbers without a fraction.
fn json_number(value: f64) -> serde_json::Value {
    if value.fract() == 0.0 { json!(value as i64) } else { json!(value) }
}

/// All stats as text, for tests and debugging.
impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = Vec::new();
        // Writing to a Vec can't fail.
        let _ = write(self, &Query::all(super::Format::Text), &mut out);
        f.write_str(&String::from_utf8_lossy(&out))
    }
}

impl fmt::Debug for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stats").field("workers", &self.workers()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::{Format, set_shard};
    use super::*;

    fn text(stats: &Stats, parameters: &[(&str, &str)]) -> String {
        let query = Query::parse(Format::Text, parameters.iter().copied()).unwrap();
        let mut out = Vec::new();
        stats.write(&query, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn busy() -> (Arc<Stats>, impl Sized) {
        set_shard(0);
        let stats = Stats::new(2);
        let cluster = stats.cluster("foo");
        cluster.upstream_cx_total().add(3);
        cluster.upstream_cx_active().inc();
        cluster.upstream_cx_active().dec();
        cluster.membership_degraded().set(0);
        cluster.upstream_cx_connect_ms().record(0);
        cluster.upstream_cx_connect_ms().record(7);
        let listener = stats.listener("127.0.0.1:80".parse().unwrap(), None);
        listener.downstream_cx_total().inc();
        let active = listener.downstream_cx_active().guard();
        stats.set_intercept_counter("captured", 5);
        (stats, (cluster, listener, active))
    }

    #[test]
    fn texts_come_first_and_in_quotes() {
        let stats = Stats::new(1);
        stats.cluster_manager().cds_version_text().set(&"v\"7".into());
        let texts = "cluster_manager.cds.version_text: \"v\"7\"\n\
                     control_plane.identifier: \"\"\n\
                     listener_manager.lds.version_text: \"\"\n";
        assert_eq!(text(&stats, &[("type", "TextReadouts")]), texts);
        assert!(text(&stats, &[]).starts_with(texts));
        let used = [("type", "TextReadouts"), ("usedonly", "")];
        assert_eq!(text(&stats, &used), texts.lines().next().unwrap().to_owned() + "\n");
        assert_eq!(text(&stats, &[("type", "Gauges"), ("filter", "_text")]), "");
        let json = text(&stats, &[("format", "json"), ("type", "TextReadouts"), ("filter", "cds")]);
        let expected = json!({"stats": [{"name": "cluster_manager.cds.version_text", "value": "v\"7"}]});
        assert_eq!(json, expected.to_string());
    }

    #[test]
    fn usedonly_shows_what_was_ever_written() {
        let (stats, _keep) = busy();
        assert_eq!(
            text(&stats, &[("usedonly", ""), ("filter", "^(cluster|listener\\.|tidegate)")]),
            "cluster.foo.membership_degraded: 0\n\
             cluster.foo.upstream_cx_active: 0\n\
             cluster.foo.upstream_cx_total: 3\n\
             listener.127.0.0.1_80.downstream_cx_active: 1\n\
             listener.127.0.0.1_80.downstream_cx_total: 1\n\
             listener.127.0.0.1_80.worker_0.downstream_cx_active: 1\n\
             listener.127.0.0.1_80.worker_0.downstream_cx_total: 1\n\
             tidegate.intercept.captured: 5\n\
             cluster.foo.upstream_cx_connect_ms: P0(nan,0) P25(nan,0) P50(nan,0) P75(nan,7.5) P90(nan,9) \
             P95(nan,9.5) P99(nan,9.9) P99.5(nan,9.95) P99.9(nan,9.99) P100(nan,10)\n"
        );
    }

    #[test]
    fn bucket_modes_print_as_envoys() {
        let (stats, _keep) = busy();
        let connect = |mode| text(&stats, &[("filter", "connect_ms"), ("histogram_buckets", mode)]);
        assert_eq!(
            connect("cumulative"),
            "cluster.foo.upstream_cx_connect_ms: B0.5(0,1) B1(0,1) B5(0,1) B10(0,2) B25(0,2) B50(0,2) B100(0,2) \
             B250(0,2) B500(0,2) B1000(0,2) B2500(0,2) B5000(0,2) B10000(0,2) B30000(0,2) B60000(0,2) \
             B300000(0,2) B600000(0,2) B1.8e+06(0,2) B3.6e+06(0,2)\n"
        );
        assert!(connect("disjoint").contains(" B5(0,0) B10(0,1) B25(0,0)"));
        assert!(connect("detailed").starts_with(
            "cluster.foo.upstream_cx_connect_ms:\n  totals=0,0.5:1 5,5:1\n  intervals=\n  summary=P0(nan,0) P25("
        ));
        assert!(
            text(&stats, &[("filter", "length_ms")]).contains("upstream_cx_length_ms: No recorded values\n")
        );
    }

    #[test]
    fn json_is_one_valid_object_in_every_mode() {
        let (stats, _keep) = busy();
        for mode in ["", "summary", "cumulative", "disjoint", "detailed"] {
            let printed = text(&stats, &[("format", "json"), ("histogram_buckets", mode)]);
            let parsed: serde_json::Value = serde_json::from_str(&printed).unwrap();
            let list = parsed["stats"].as_array().unwrap();
            assert!(list.contains(&json!({"name": "cluster.foo.upstream_cx_total", "value": 3})), "{mode}");
            assert!(
                list.last().unwrap()["histograms"].is_object() != matches!(mode, "cumulative" | "disjoint")
            );
        }
        assert_eq!(text(&stats, &[("format", "json"), ("filter", "^none")]), "{\"stats\":[]}");
        let histogram = text(
            &stats,
            &[("format", "json"), ("filter", "foo.*connect_ms"), ("histogram_buckets", "cumulative")],
        );
        assert!(histogram.contains(r#"{"upper_bound":10,"interval":0,"cumulative":2}"#), "{histogram}");
    }

    #[test]
    fn type_and_inverted_filter() {
        let (stats, _keep) = busy();
        assert_eq!(
            text(&stats, &[("type", "Gauges"), ("filter", "membership_h")]),
            "cluster.foo.membership_healthy: 0\n"
        );
        assert_eq!(text(&stats, &[("type", "Counters"), ("filter", "membership_h")]), "");
        assert!(!text(&stats, &[("invert_filter", ""), ("filter", "cluster")]).contains("cluster"));
    }

    #[test]
    fn wrong_parameters_get_envoys_texts() {
        for (name, value, expected) in [
            ("type", "bogus", "invalid &type= param"),
            (
                "histogram_buckets",
                "bogus",
                "usage: /stats?histogram_buckets=(cumulative|disjoint|detailed|summary|prometheusnative)\n",
            ),
            ("format", "bogus", "usage: /stats?format=(html|active-html|json|prometheus|text)\n\n"),
        ] {
            assert_eq!(Query::parse(Format::Text, [(name, value)]).unwrap_err().to_string(), expected);
        }
        let error = Query::parse(Format::Text, [("filter", "((")]).unwrap_err().to_string();
        assert!(error.starts_with("Invalid re2 regex: ") && error.ends_with(": (("), "{error}");
    }
}
