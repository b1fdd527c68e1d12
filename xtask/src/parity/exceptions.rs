//! Differences from Envoy that are meant, each with its reason. Keep this short.

/// A fact of some cases that may differ.
#[derive(Debug)]
pub(super) struct Exception {
    /// The case's name, or `*`.
    pub(super) case: &'static str,
    /// The fact's name; a `*` at one end stands for anything.
    pub(super) fact: &'static str,
    /// Why.
    pub(super) reason: &'static str,
}

/// All of them.
pub(super) const ALL: &[Exception] = &[
    Exception {
        case: "*",
        fact: "*.downstream_failure",
        reason: "the text of BoringSSL's error for bytes that are no ClientHello; tidegate links no TLS library",
    },
    Exception {
        case: "client leaves while the upstream is being connected",
        fact: "*",
        reason: "Envoy does not look at the client while it connects, and goes on until the connect timeout; \
                 tidegate sees the reset and stops",
    },
];

/// The exception that covers a fact.
pub(super) fn find(case: &str, fact: &str) -> Option<&'static Exception> {
    ALL.iter()
        .find(|exception| matches(exception.fact, fact) && (exception.case == "*" || exception.case == case))
}

pub(super) fn matches(pattern: &str, fact: &str) -> bool {
    if let Some(start) = pattern.strip_suffix('*') {
        return fact.starts_with(start);
    }
    pattern.strip_prefix('*').map_or(fact == pattern, |end| fact.ends_with(end))
}
