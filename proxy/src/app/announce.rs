//! What the log says of interception at the start.

use std::borrow::Cow;

/// How many destinations are listed.
const ANNOUNCED: usize = 100;

/// The first of many destinations, how many were left out, and the last line, which is about everything else.
pub(super) fn lines(destinations: &str) -> Vec<Cow<'_, str>> {
    let all: Vec<&str> = destinations.lines().collect();
    match all.split_last() {
        Some((last, first)) if first.len() > ANNOUNCED => {
            let left_out = format!("and {} more", first.len() - ANNOUNCED);
            let shown = first[..ANNOUNCED].iter().copied().map(Cow::Borrowed);
            shown.chain([left_out.into(), Cow::Borrowed(*last)]).collect()
        }
        _ => all.into_iter().map(Cow::Borrowed).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_is_never_nothing() {
        for (count, expected) in [
            (0, None),
            (1, None),
            (100, None),
            (101, None),
            (102, Some("and 1 more")),
            (300, Some("and 199 more")),
        ] {
            let text = (0..count).map(|n| format!("line {n}")).collect::<Vec<_>>().join("\n");
            let lines = lines(&text);
            assert_eq!(
                lines.last().map(|it| &**it),
                (count > 0).then(|| format!("line {}", count - 1)).as_deref()
            );
            let note = lines.iter().find(|line| line.starts_with("and "));
            assert_eq!(note.map(|it| &**it), expected, "{count}");
            let left_out = expected.map_or(0, |text| text.split(' ').nth(1).unwrap().parse().unwrap());
            assert_eq!(lines.len() - usize::from(note.is_some()) + left_out, count);
        }
    }
}
