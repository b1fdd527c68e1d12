//! The chart: one group of bars for each headline, as SVG.
//!
//! Written by hand: bars and words are a few elements, where a plotting library would bring a dozen crates.

use std::fmt::Write as _;

use super::headline::{self, SHOWN};
use super::report::number;
use super::results::{Results, Series};

const WIDTH: u32 = 860;
const LEFT: u32 = 130;
/// Of the longest bar; what follows is for its figure.
const BAR: f64 = 560.0;
const LINE: u32 = 17;
const COLOURS: &[&str] = &["#0b7285", "#e8590c", "#868e96", "#495057", "#2f9e44", "#ced4da"];

/// The whole picture.
pub(super) fn svg(results: &Results) -> String {
    let mut body = String::new();
    let mut y = 56;
    for (title, series) in headline::of(results) {
        y = group(&mut body, title, series, y);
    }
    let about = &results.about;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{y}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{y}\" fill=\"#ffffff\"/>\n\
         <text x=\"12\" y=\"20\" font-size=\"14\" font-weight=\"bold\">tidegate and its peers, one worker thread each</text>\n\
         <text x=\"12\" y=\"38\" fill=\"#495057\">{}</text>\n{body}</svg>\n",
        escape(&format!(
            "{}: {} CPUs of {}, Linux {}; medians of {} rounds, thin lines from the least to the most",
            about.date,
            about.machine.cpus,
            about.machine.cpu,
            about.machine.kernel.split('-').next().unwrap_or_default(),
            about.settings.rounds
        )),
    )
}

/// One headline; where the next may begin.
fn group(body: &mut String, title: &str, series: &Series, mut y: u32) -> u32 {
    let better = if series.lower_is_better { "less is better" } else { "more is better" };
    y += 18;
    let _ = writeln!(
        body,
        "<text x=\"12\" y=\"{y}\" font-weight=\"bold\">{} <tspan font-weight=\"normal\" fill=\"#495057\">{}, {better}</tspan></text>",
        escape(title),
        escape(&series.unit),
    );
    let longest = SHOWN.iter().filter_map(|(subject, _)| series.of(*subject)).map(|spread| spread.max);
    let scale = BAR / longest.fold(f64::MIN_POSITIVE, f64::max);
    for ((subject, title), colour) in SHOWN.iter().zip(COLOURS) {
        let Some(spread) = series.of(*subject) else { continue };
        let top = y + 5;
        y += LINE;
        let (length, from, to) = (spread.median * scale, spread.min * scale, spread.max * scale);
        let middle = top + 6;
        let left = f64::from(LEFT);
        let _ = writeln!(
            body,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text><rect x=\"{LEFT}\" y=\"{top}\" width=\"{length:.1}\" \
             height=\"12\" fill=\"{colour}\"/><path d=\"M{:.1} {middle}H{:.1}\" stroke=\"#000000\"/><text x=\"{:.1}\" \
             y=\"{}\">{}</text>",
            LEFT - 6,
            top + 11,
            escape(title),
            left + from,
            left + to,
            left + to.max(length) + 6.0,
            top + 11,
            number(spread.median),
        );
    }
    y + 10
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::super::case::Case;
    use super::super::metric::Metric;
    use super::super::results::tests::results;
    use super::super::subject::Subject;
    use super::super::workload::Workload;
    use super::*;

    #[test]
    fn bars_are_as_long_as_figures() {
        let mut results = results();
        results.about.machine.cpu = "a <CPU> & more".to_owned();
        results.add(
            Case::loopback(Workload::Short),
            Metric::ProxyCpu,
            &[(Subject::TIDEGATE, &[50.0, 50.0]), (Subject::ENVOY, &[100.0, 100.0])],
        );
        let svg = svg(&results);
        assert!(svg.contains("a &lt;CPU&gt; &amp; more"));
        assert!(svg.contains("width=\"280.0\"") && svg.contains("width=\"560.0\""), "{svg}");
        assert!(!svg.contains("nginx</text>"), "it was not measured");
    }
}
