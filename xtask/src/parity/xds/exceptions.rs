//! Differences from what Envoy says that are meant, each with its reason. One that occurs no more fails the run.

/// Facts that may differ, for one reason.
#[derive(Debug)]
pub(super) struct Exception {
    /// Script and fact; `*` stands for anything.
    facts: &'static [(&'static str, &'static str)],
    /// Why.
    pub(super) reason: &'static str,
}

/// One entry of [`Exception::facts`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Use {
    exception: usize,
    fact: usize,
}

/// All of them.
pub(super) const ALL: &[Exception] = &[
    Exception {
        facts: &[("*", "*.message")],
        reason: "the words of a NACK. Envoy prints the whole resource in its debug format, or says nothing of the \
                 place; tidegate names resource, field and rule. That it is a NACK, for which response, is compared",
    },
    Exception {
        facts: &[
            ("ADS: endpoints come and go*", "04 another cluster/Cluster 1"),
            ("ADS: endpoints come and go*", "05 the endpoints of both/Cluster 1"),
            ("ADS: several responses at once*", "03 of two kinds/Cluster 1"),
            ("ADS: a cluster changes*", "04 it changes/Cluster 1"),
            ("ADS: a cluster changes*", "05 its endpoints again/Cluster 1"),
            ("delta ADS: start-up*", "06 a cluster more/Cluster 1"),
            ("delta ADS: removals*", "06 one comes back, one goes/Cluster 1"),
        ],
        reason: "once started, Envoy keeps the ACK of clusters back until those that warm have their endpoints, so \
                 that a control plane that waits for it before it sends endpoints waits for ever; tidegate \
                 acknowledges what it has accepted",
    },
    Exception {
        facts: &[("delta ADS: removals*", "07 the server is back/Cluster 1")],
        reason: "for the same reason Envoy does not even ask for clusters after a reconnect while one warms",
    },
    Exception {
        facts: &[("ADS: a cluster changes*", "04 it changes/Endpoints 1")],
        reason: "Envoy asks again for the endpoints of a cluster that changes, and waits for them, although it has \
                 them; tidegate uses those that it has, and servers answer only what is news to them",
    },
    Exception {
        facts: &[
            ("delta ADS: the server dies*", "05 the server is back/Listener 1.initial"),
            ("delta ADS: the server dies*", "07 UNAVAILABLE/Listener 1.initial"),
        ],
        reason: "of a response that was accepted in part, Envoy uses the good resources and forgets their versions; \
                 initial_resource_versions is what the client has",
    },
    Exception {
        facts: &[("delta ADS: broken responses*", "06 a wrapper of another name/Cluster 1.code")],
        reason: "a wrapper of another name than the resource inside is rejected: a server that removes one name \
                 later would leave the other for ever",
    },
];

/// Every entry.
pub(super) fn uses() -> Vec<Use> {
    let facts = |exception: usize| (0..ALL[exception].facts.len()).map(move |fact| Use { exception, fact });
    (0..ALL.len()).flat_map(facts).collect()
}

impl Use {
    /// Script and fact.
    pub(super) fn pattern(self) -> (&'static str, &'static str) {
        ALL[self.exception].facts[self.fact]
    }
}

/// The entry that covers a fact.
pub(super) fn find(script: &str, fact: &str) -> Option<Use> {
    uses().into_iter().find(|entry| {
        let pattern = entry.pattern();
        matches(pattern.0, script) && matches(pattern.1, fact)
    })
}

fn matches(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((start, rest)) => text.strip_prefix(start).is_some_and(|left| {
            (0..=left.len()).any(|at| left.is_char_boundary(at) && matches(rest, &left[at..]))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn a_star_stands_for_anything() {
        for (pattern, text, wanted) in [
            ("a", "a", true),
            ("a", "ab", false),
            ("a*", "ab", true),
            ("*b", "ab", true),
            ("*b", "ba", false),
            ("a*c*e", "abcde", true),
            ("*", "", true),
        ] {
            assert_eq!(matches(pattern, text), wanted, "{pattern} {text}");
        }
    }
}
