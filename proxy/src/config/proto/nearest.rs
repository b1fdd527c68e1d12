//! "Did you mean": the name that a misspelt one was probably meant to be.

/// The candidate with the fewest edits from `name`, when these are few enough to be a slip.
pub(super) fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let name: Vec<char> = normalized(name).collect();
    if name.len() > 256 {
        return None;
    }
    let allowed = match name.len() {
        0..3 => 1,
        3..8 => 2,
        _ => 3,
    };
    candidates
        .filter_map(|candidate| {
            let theirs: Vec<char> = normalized(candidate).collect();
            (name.len().abs_diff(theirs.len()) <= allowed).then(|| (edits(&name, &theirs), candidate))
        })
        .filter(|(edits, _)| *edits <= allowed)
        .min_by_key(|(edits, _)| *edits)
        .map(|(_, candidate)| candidate)
}

/// Spelling and case of JSON names don't matter.
fn normalized(name: &str) -> impl Iterator<Item = char> + '_ {
    name.chars().filter(|c| !matches!(c, '_' | '-')).map(|c| c.to_ascii_lowercase())
}

/// Levenshtein distance.
fn edits(a: &[char], b: &[char]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_slips_only() {
        let fields = ["lb_policy", "load_assignment", "name", "connect_timeout"];
        let nearest = |name| nearest(name, fields.into_iter());
        assert_eq!(nearest("lb_polcy"), Some("lb_policy"));
        assert_eq!(nearest("connectTimout"), Some("connect_timeout"));
        assert_eq!(nearest("LbPolicy"), Some("lb_policy"));
        assert_eq!(nearest("metadata"), None);
        assert_eq!(nearest(""), None);
        assert_eq!(nearest(&"x".repeat(10_000)), None);
    }
}
