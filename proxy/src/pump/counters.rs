//! What a connection has moved so far.

use std::cell::{Cell, OnceCell};

use super::Side;

/// The counters of one connection. Only its task writes them; anything on the same thread may read them while
/// the connection lives (`access_log_flush_interval`).
#[derive(Debug, Default)]
pub struct Counters {
    /// From the downstream to the upstream.
    pub downstream: Direction,
    /// From the upstream to the downstream.
    pub upstream: Direction,
    /// Bytes that were delivered by copying, in both directions.
    pub copied: Cell<u64>,
    /// Bytes that were delivered by splicing, in both directions.
    pub spliced: Cell<u64>,
    /// The side that is or was flushed to after the other was gone (Envoy counts these as `upstream_flush_*`).
    pub flushed: Cell<Option<Side>>,
    /// That was counted, by whoever counts it.
    pub flush_counted: Cell<bool>,
}

/// The counters of one direction, named after the side it comes from.
#[derive(Debug, Default)]
pub struct Direction {
    /// Bytes taken from this side's socket.
    pub received: Cell<u64>,
    /// Bytes given to the other side's socket.
    pub sent: Cell<u64>,
    events: OnceCell<Box<Events>>,
}

/// What happens to few connections: idle ones have no room for it.
#[derive(Debug, Default)]
pub struct Events {
    /// Received bytes that had nobody to go to any more.
    pub discarded: Cell<u64>,
    /// How often reading from this side was paused because the other took no more.
    pub paused: Cell<u32>,
    /// How often it was resumed.
    pub resumed: Cell<u32>,
    /// How often the direction changed from copying to splicing.
    pub to_splice: Cell<u32>,
    /// How often it changed back.
    pub to_copy: Cell<u32>,
}

impl Counters {
    /// The direction that comes from `side`.
    pub fn from(&self, side: Side) -> &Direction {
        match side {
            Side::Downstream => &self.downstream,
            Side::Upstream => &self.upstream,
        }
    }
}

impl Direction {
    /// Bytes received and neither sent nor discarded yet.
    pub fn buffered(&self) -> u64 {
        self.received.get() - self.sent.get() - self.discarded()
    }

    /// Received bytes that had nobody to go to any more.
    pub fn discarded(&self) -> u64 {
        self.events().map_or(0, |events| events.discarded.get())
    }

    /// Counts such bytes.
    pub fn discard(&self, n: u64) {
        if n > 0 {
            let discarded = &self.note().discarded;
            discarded.set(discarded.get() + n);
        }
    }

    /// What has happened; none when nothing has.
    pub fn events(&self) -> Option<&Events> {
        self.events.get().map(|events| &**events)
    }

    /// The same, to count something in it.
    pub(super) fn note(&self) -> &Events {
        self.events.get_or_init(Box::default)
    }
}

/// Counts one. It wraps: what is looked at is by how much it has grown.
pub(super) fn count(counter: &Cell<u32>) {
    counter.set(counter.get().wrapping_add(1));
}

/// Adds to a counter.
pub(super) fn add(counter: &Cell<u64>, n: usize) {
    counter.set(counter.get() + n as u64);
}
