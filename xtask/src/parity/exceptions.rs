//! Differences from Envoy that are meant, each with its reason. Keep this short.

/// A fact of some cases that may differ.
#[derive(Debug)]
pub(super) struct Exception {
    /// The case's name, or `*`.
    pub(super) case: &'static str,
    /// The fact's name; a trailing `*` stands for anything.
    pub(super) fact: &'static str,
    /// Why.
    pub(super) reason: &'static str,
}

/// All of them.
pub(super) const ALL: &[Exception] = &[];

/// The exception that covers a fact.
pub(super) fn find(case: &str, fact: &str) -> Option<&'static Exception> {
    ALL.iter().find(|exception| {
        let fact_matches = match exception.fact.strip_suffix('*') {
            Some(start) => fact.starts_with(start),
            None => fact == exception.fact,
        };
        fact_matches && (exception.case == "*" || exception.case == case)
    })
}
