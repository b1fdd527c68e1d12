//! Differences from Envoy that are meant, each with its reason. Keep this short.

/// A fact of some cases that may differ.
#[derive(Debug)]
pub(super) struct Exception {
    /// The case's name; a `*` at one end stands for anything.
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
        case: "bind fails: *",
        fact: "endpoint 0",
        reason: "Envoy connects all the same, from whatever address the kernel chooses, and then closes: the endpoint gets an \
                 empty connection from where none should come",
    },
    Exception {
        case: "bind fails: an option that the kernel refuses",
        fact: "*.upstream_failure",
        reason: "Envoy says only in its own log which option it was",
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
    ALL.iter().find(|exception| matches(exception.fact, fact) && matches(exception.case, case))
}

pub(super) fn matches(pattern: &str, fact: &str) -> bool {
    if let Some(start) = pattern.strip_suffix('*') {
        return fact.starts_with(start);
    }
    pattern.strip_prefix('*').map_or(fact == pattern, |end| fact.ends_with(end))
}
