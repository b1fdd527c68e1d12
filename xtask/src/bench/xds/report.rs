//! Figures of `bench xds`, for people and for bench-xds.json.

use serde_json::{Map, Value, json};

use super::super::results::median;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_of_the_same_round() {
        assert_eq!(ratio_text(&[1.0, 10.0, 1.0], &[2.0, 20.0, 2.0]), "0.50");
        assert_eq!(ratio_text(&[], &[2.0]), "-");
    }
}
