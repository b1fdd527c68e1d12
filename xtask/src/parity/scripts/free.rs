//! Facts that are left free, by how the dialogue ends, each with its reason. Keep this short.

use tidegate_tests::dialogue::{Dialogue, End};

use super::super::exceptions;

/// Facts that TCP, or the sizes of a proxy's buffers, leave open for some ends.
struct Free {
    when: fn(&Dialogue) -> bool,
    /// A `*` at one end stands for anything.
    facts: &'static [&'static str],
    reason: &'static str,
}

const ALL: &[Free] = &[
    Free {
        when: |dialogue| matches!(dialogue.end, End::Cut(..)),
        facts: &[
            "client.received",
            "server.received",
            "*.rx",
            "*.tx",
            "*_wire_rx",
            "*_wire_tx",
            "*_bytes_total",
        ],
        reason: "a reset overtakes what waits in sockets and buffers: how much had left them by then is chance (what \
                 arrived is a piece of what was sent all the same, from its beginning)",
    },
    Free {
        when: |dialogue| matches!(dialogue.end, End::Close(_)),
        facts: &["*.rx", "*.tx", "*_wire_rx", "*_wire_tx", "*_bytes_total"],
        reason: "what is written to a side that has closed is lost; Envoy learns that by writing to it, tidegate when the \
                 reset comes, so they have taken more or less of it by then",
    },
    Free {
        when: |dialogue| matches!(dialogue.end, End::Cut(..) | End::Close(_)),
        facts: &["*.reset_later", "*.write_failed"],
        reason: "a proxy that ends the connection with unread bytes resets it, as kernels do, and whether there are any is \
                 chance; so is whether a writer or a reader is told of a reset",
    },
    Free {
        when: Dialogue::ends_with_bytes,
        facts: &["tcp.upstream_flush_total"],
        reason: "counts connections whose last FIN the proxy has read before it has sent the bytes before it: Envoy reads \
                 ahead, tidegate reads a FIN only when it holds nothing",
    },
];

/// Whether a fact of this dialogue is not compared.
pub(super) fn is_free(dialogue: &Dialogue, fact: &str) -> bool {
    ALL.iter().any(|free| {
        (free.when)(dialogue) && free.facts.iter().any(|pattern| exceptions::matches(pattern, fact))
    })
}

/// Why facts are left free, a line each.
pub(super) fn reasons() -> impl Iterator<Item = &'static str> {
    ALL.iter().map(|free| free.reason)
}
