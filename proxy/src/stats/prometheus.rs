//! `/stats/prometheus`: Envoy's metric names and labels.
//!
//! Counters and gauges go through the recorder of `metrics-exporter-prometheus`, one metric family at a time: what
//! a scrape needs stays small with 10,000 clusters. Histograms are kept as bucket counts, which the recorder can't
//! take, and are written here.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::sync::Arc;

use metrics::Label;
use metrics_exporter_prometheus::PrometheusBuilder;

use super::block::{Block, Kind, Layout, Stat};
use super::histogram::{BOUNDS, BUCKETS, HistogramValue, QUANTILES};
use super::query::{Buckets, Query};
use super::{INTERCEPT, Stats};

/// A metric family: its name, what it is, and where its samples come from.
struct Family<'a> {
    name: String,
    kind: Kind,
    sources: Vec<Source<'a>>,
}

/// Which stat of a block, and the labels that its name turns into.
struct Source<'a> {
    stat: &'a Stat,
    label: Option<(&'static str, &'static str)>,
    /// The per-worker values instead of the sum.
    per_worker: bool,
}

/// Writes all families that are asked for.
pub(super) fn write(stats: &Stats, query: &Query, out: &mut impl Write) -> io::Result<()> {
    let mut kinds: BTreeMap<_, Vec<Arc<Block>>> = BTreeMap::new();
    for block in stats.blocks() {
        kinds.entry(super::kind(block.layout())).or_default().push(block);
    }
    for blocks in kinds.values() {
        for family in families(&blocks[0]) {
            match family.kind {
                Kind::Histogram => write_histograms(&family, blocks, query, out)?,
                _ => write_values(&family, blocks, query, out)?,
            }
        }
        if query.wants_prometheus_texts() {
            write_texts(blocks, query, out)?;
        }
    }
    for (name, kind, value) in stats.intercept() {
        if query.wants_kind(kind) && query.wants_name(&format!("{INTERCEPT}{name}")) {
            let family = metric_name(INTERCEPT.trim_end_matches('.'), &name);
            out.write_all(render(&family, kind, [(Vec::new(), value)]).as_bytes())?;
        }
    }
    Ok(())
}

/// The families of a kind of block, by name.
fn families(block: &Block) -> Vec<Family<'_>> {
    let layout = block.layout();
    let mut families: BTreeMap<String, Family<'_>> = BTreeMap::new();
    let mut add = |name: String, source: Source<'static>| {
        let kind = source.stat.kind;
        let family = families.entry(name.clone()).or_insert(Family { name, kind, sources: Vec::new() });
        family.sources.push(source);
    };
    for stat in layout.stats {
        let (name, label) = match stat.name {
            // proxy_proto.versions.v1.found: the version is a label.
            name if name.starts_with("versions.v1.") => {
                (&name[12..], Some(("envoy_proxy_protocol_version", "1")))
            }
            name if name.starts_with("versions.v2.") => {
                (&name[12..], Some(("envoy_proxy_protocol_version", "2")))
            }
            name => (name, None),
        };
        add(metric_name(&root(layout), name), Source { stat, label, per_worker: false });
        if layout.per_worker.contains(&stat.name) {
            let name = metric_name(&root(layout), &format!("worker_{}", stat.name));
            add(name, Source { stat, label: None, per_worker: true });
        }
    }
    families.into_values().collect()
}

/// What a block's metrics begin with: `http_rds` of `http.<stat_prefix>.rds.<route configuration>`.
fn root(layout: &Layout) -> String {
    layout.part.map_or_else(|| layout.root.to_owned(), |(part, _)| format!("{}_{part}", layout.root))
}

/// `envoy_<root>_<name>`; what Envoy does not have is `tidegate_…`.
fn metric_name(root: &str, name: &str) -> String {
    let prefix = if root.starts_with("tidegate.") { "" } else { "envoy_" };
    let root = if root.is_empty() { String::new() } else { format!("{root}_") };
    let clean = |c: char| if c.is_ascii_alphanumeric() || c == '_' { c } else { '_' };
    format!("{prefix}{root}{name}").chars().map(clean).collect()
}

fn labels(block: &Block, source: &Source<'_>, worker: Option<usize>) -> Vec<Label> {
    let mut labels = Vec::new();
    if let Some(worker) = worker {
        labels.push(Label::new("envoy_worker_id", worker.to_string()));
    }
    if let Some((key, value)) = source.label {
        labels.push(Label::from_static_parts(key, value));
    }
    labels.extend(scope_labels(block));
    labels
}

/// The names of a block's scope.
fn scope_labels(block: &Block) -> Vec<Label> {
    let (layout, name) = (block.layout(), block.name());
    if layout.label.is_empty() || name.is_empty() {
        return Vec::new();
    }
    let Some((part, label)) = layout.part else { return vec![Label::new(layout.label, name.to_owned())] };
    // As Envoy takes it apart: at the first one.
    let (first, second) = name.split_once(&format!(".{part}.")).unwrap_or((name, ""));
    vec![Label::new(label, second.to_owned()), Label::new(layout.label, first.to_owned())]
}

/// Texts, as gauges with the text for a label.
fn write_texts(blocks: &[Arc<Block>], query: &Query, out: &mut impl Write) -> io::Result<()> {
    let layout = blocks[0].layout();
    for (index, name) in layout.texts.iter().enumerate() {
        let mut samples = Vec::new();
        for block in blocks {
            let text = block.text(index).filter(|text| !query.used_only || !text.is_empty());
            if let Some(text) = text.filter(|_| query.wants_name(&format!("{}{name}", block.scope()))) {
                let mut labels = scope_labels(block);
                labels.push(Label::new("text_value", text.to_string()));
                samples.push((labels, 0));
            }
        }
        if !samples.is_empty() {
            out.write_all(render(&metric_name(&root(layout), name), Kind::Gauge, samples).as_bytes())?;
        }
    }
    Ok(())
}

/// Whether the query asks for this stat of this block, by its full dotted name.
fn wanted(block: &Block, source: &Source<'_>, worker: Option<usize>, query: &Query) -> bool {
    let name = match worker {
        Some(worker) => format!("{}worker_{worker}.{}", block.scope(), source.stat.name),
        None => format!("{}{}", block.scope(), source.stat.name),
    };
    let used = || match worker {
        Some(worker) => block.worker_is_used(source.stat, worker),
        None => block.is_used(source.stat),
    };
    query.wants_name(&name) && (!query.used_only || used())
}

fn write_values(
    family: &Family<'_>,
    blocks: &[Arc<Block>],
    query: &Query,
    out: &mut impl Write,
) -> io::Result<()> {
    if !query.wants_kind(family.kind) {
        return Ok(());
    }
    let mut samples = Vec::new();
    for block in blocks {
        for source in &family.sources {
            let workers = if source.per_worker { 0..block.workers() } else { 0..0 };
            let only = (!source.per_worker).then_some(None);
            for worker in workers.map(Some).chain(only) {
                if wanted(block, source, worker, query) {
                    let value = match worker {
                        Some(worker) => block.worker_value(source.stat, worker),
                        None => block.value(source.stat),
                    };
                    samples.push((labels(block, source, worker), value));
                }
            }
        }
    }
    if samples.is_empty() {
        return Ok(());
    }
    out.write_all(render(&family.name, family.kind, samples).as_bytes())
}

/// Has the exporter write one family. Its order is a hash map's, so the lines are sorted.
fn render(family: &str, kind: Kind, samples: impl IntoIterator<Item = (Vec<Label>, u64)>) -> String {
    let recorder = PrometheusBuilder::new().build_recorder();
    metrics::with_local_recorder(&recorder, || {
        for (labels, value) in samples {
            match kind {
                Kind::Counter => metrics::counter!(family.to_owned(), labels).absolute(value),
                _ => metrics::gauge!(family.to_owned(), labels).set(value as f64),
            }
        }
    });
    let rendered = recorder.handle().render();
    let (mut comments, mut lines): (Vec<&str>, Vec<&str>) =
        rendered.lines().filter(|line| !line.is_empty()).partition(|line| line.starts_with('#'));
    lines.sort_unstable();
    comments.append(&mut lines);
    comments.join("\n") + "\n"
}

fn write_histograms(
    family: &Family<'_>,
    blocks: &[Arc<Block>],
    query: &Query,
    out: &mut impl Write,
) -> io::Result<()> {
    if !query.wants_kind(Kind::Histogram) {
        return Ok(());
    }
    let mut text = String::new();
    for block in blocks {
        for source in family.sources.iter().filter(|source| wanted(block, source, None, query)) {
            let labels: Vec<String> = labels(block, source, None)
                .iter()
                .map(|label| format!("{}=\"{}\",", label.key(), escaped(label.value())))
                .collect();
            write_histogram(
                &family.name,
                &labels.concat(),
                &block.histogram(source.stat),
                query.buckets,
                &mut text,
            );
        }
    }
    if text.is_empty() {
        return Ok(());
    }
    let kind = if query.buckets == Buckets::Summary { "summary" } else { "histogram" };
    write!(out, "# TYPE {} {kind}\n{text}", family.name)
}

/// `labels` ends with a comma, or is empty. Writing to a String can't fail.
fn write_histogram(name: &str, labels: &str, value: &HistogramValue, buckets: Buckets, out: &mut String) {
    let count = value.count();
    if buckets == Buckets::Summary {
        for percent in QUANTILES {
            let _ = write!(out, "{name}{{{labels}quantile=\"{}\"}} ", percent / 100.0);
            let _ =
                if count == 0 { writeln!(out, "nan") } else { writeln!(out, "{}", value.quantile(percent)) };
        }
    } else {
        let cumulative = value.cumulative();
        for (bound, below) in BOUNDS.into_iter().zip(cumulative) {
            let _ = writeln!(out, "{name}_bucket{{{labels}le=\"{bound}\"}} {below}");
        }
        let _ = writeln!(out, "{name}_bucket{{{labels}le=\"+Inf\"}} {}", cumulative[BUCKETS - 1]);
    }
    let plain = labels.trim_end_matches(',');
    let braces = if plain.is_empty() { String::new() } else { format!("{{{plain}}}") };
    let _ = writeln!(out, "{name}_sum{braces} {}\n{name}_count{braces} {count}", value.sum);
}

fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::super::{Format, set_shard};
    use super::*;

    fn print(stats: &Stats, parameters: &[(&str, &str)]) -> String {
        let query = Query::parse(Format::Prometheus, parameters.iter().copied()).unwrap();
        let mut out = Vec::new();
        stats.write(&query, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn names_and_labels_are_envoys() {
        set_shard(0);
        let stats = Stats::new(2);
        let foo = stats.cluster("outbound|80|v1|foo.svc");
        let bar = stats.cluster("b\"ar");
        foo.upstream_cx_total().add(3);
        bar.upstream_cx_total().add(4);
        foo.upstream_cx_connect_ms().record(7);
        let listener = stats.listener("127.0.0.1:80".parse().unwrap(), None);
        let _active = listener.downstream_cx_active().guard();
        stats.proxy_protocol("").v2_found().inc();
        stats.set_intercept_counter("captured", 5);
        stats.pump().bytes_spliced().add(9);
        assert_eq!(
            print(&stats, &[("usedonly", ""), ("type", "Counters")]),
            "# TYPE envoy_cluster_upstream_cx_total counter\n\
             envoy_cluster_upstream_cx_total{envoy_cluster_name=\"b\\\"ar\"} 4\n\
             envoy_cluster_upstream_cx_total{envoy_cluster_name=\"outbound|80|v1|foo.svc\"} 3\n\
             # TYPE envoy_proxy_proto_found counter\n\
             envoy_proxy_proto_found{envoy_proxy_protocol_version=\"2\"} 1\n\
             # TYPE tidegate_pump_bytes_spliced counter\n\
             tidegate_pump_bytes_spliced 9\n\
             # TYPE tidegate_intercept_captured counter\n\
             tidegate_intercept_captured 5\n"
        );
        assert_eq!(
            print(&stats, &[("filter", "cx_active"), ("filter", "^listener.*cx_active")])
                .lines()
                .filter(|line| line.contains("worker"))
                .collect::<Vec<_>>(),
            [
                "# TYPE envoy_listener_worker_downstream_cx_active gauge",
                "envoy_listener_worker_downstream_cx_active{envoy_worker_id=\"0\",envoy_listener_address=\"127.0.0.1_80\"} 1",
                "envoy_listener_worker_downstream_cx_active{envoy_worker_id=\"1\",envoy_listener_address=\"127.0.0.1_80\"} 0",
            ]
        );
    }

    #[test]
    fn histograms_are_exact_and_cumulative() {
        let stats = Stats::new(1);
        let foo = stats.cluster("foo");
        for millis in [0, 7, 8, 4_000_000] {
            foo.upstream_cx_connect_ms().record(millis);
        }
        let text = print(&stats, &[("filter", "connect_ms")]);
        let name = "envoy_cluster_upstream_cx_connect_ms";
        assert!(text.starts_with(&format!("# TYPE {name} histogram\n")), "{text}");
        for expected in [
            "_bucket{envoy_cluster_name=\"foo\",le=\"0.5\"} 1\n",
            "_bucket{envoy_cluster_name=\"foo\",le=\"5\"} 1\n",
            "_bucket{envoy_cluster_name=\"foo\",le=\"10\"} 3\n",
            "_bucket{envoy_cluster_name=\"foo\",le=\"3600000\"} 3\n",
            "_bucket{envoy_cluster_name=\"foo\",le=\"+Inf\"} 4\n",
            "_sum{envoy_cluster_name=\"foo\"} 4000015\n",
            "_count{envoy_cluster_name=\"foo\"} 4\n",
        ] {
            assert!(text.contains(&format!("{name}{expected}")), "{expected} in {text}");
        }
        let summary = print(&stats, &[("filter", "connect_ms"), ("histogram_buckets", "summary")]);
        assert!(summary.contains("quantile=\"0.995\"}"), "{summary}");
    }

    /// As Envoy 1.40 printed them.
    #[test]
    fn routes_have_two_labels_and_texts_are_gauges() {
        let stats = Stats::new(1);
        let rds = stats.rds("in:gress", "my.ro:ute");
        let vhds = stats.vhds("in:gress", "my.ro:ute");
        rds.update_success().add(6);
        vhds.update_success().add(3);
        rds.version_text().set(&"6".into());
        assert_eq!(
            print(&stats, &[("usedonly", ""), ("filter", "rds"), ("type", "Counters")]),
            "# TYPE envoy_http_rds_update_success counter\n\
             envoy_http_rds_update_success{envoy_rds_route_config=\"my.ro_ute\",envoy_http_conn_manager_prefix=\"in_gress\"} 6\n\
             envoy_http_rds_update_success{envoy_rds_route_config=\"vhds.my.ro_ute\",envoy_http_conn_manager_prefix=\"in_gress\"} 3\n"
        );
        assert_eq!(
            print(&stats, &[("usedonly", ""), ("text_readouts", "")]).lines().collect::<Vec<_>>()[3..],
            [
                "# TYPE envoy_http_rds_version_text gauge",
                "envoy_http_rds_version_text{envoy_rds_route_config=\"my.ro_ute\",envoy_http_conn_manager_prefix=\"in_gress\",text_value=\"6\"} 0",
            ]
        );
        assert!(!print(&stats, &[]).contains("version_text"));
    }
}
