//! One direction, without its sockets: what is to be done next, and by which method.

use super::{Mode, SCRATCH};

/// A splice that brings less than this does not pay.
const SMALL: usize = 32 * 1024;
/// A copy that brings less than this, and all there is, could as well have been received by the ring.
const TINY: usize = 2 * 1024;
/// So many small splices in a row change a direction back to copying, so many tiny copies to receiving.
const SMALL_IN_A_ROW: u8 = 4;

/// How the next bytes are taken from the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    /// The ring receives them, without a system call.
    Receive,
    /// Through the worker's scratch buffer.
    Copy,
    /// Through a pipe.
    Splice,
}

/// Where a direction is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The source may send more.
    Open,
    /// The source has sent its FIN, and it was not forwarded yet.
    Draining,
    /// The FIN was forwarded.
    Closed,
    /// The destination is gone; what the source sends is thrown away.
    Discarding,
    /// The destination is gone, and the source has ended as well.
    Gone,
}

/// What a direction has to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Take from the source. Nothing is held.
    Read,
    /// Give what is held to the destination.
    Write,
    /// Forward the FIN. Nothing is held.
    Fin,
    /// Take from the source and throw away.
    Discard,
    /// Nothing, ever again.
    Done,
}

/// The state of one direction.
#[derive(Debug)]
pub(super) struct Half {
    phase: Phase,
    /// The destination is to be reset at the end, so the FIN must not be forwarded.
    no_fin: bool,
    /// Bytes taken and not given yet: a pipe's or a few buffers' worth, far from 4 GiB.
    held: u32,
    method: Method,
    mode: Mode,
    /// Whether [`Method::Receive`] is to be had.
    receives: bool,
    small_in_a_row: u8,
    /// Reading is believed to bring something.
    pub(super) readable: bool,
    /// Writing is believed to take something.
    pub(super) writable: bool,
}

impl Half {
    /// `receives`: whether the ring can receive from the source.
    pub(super) fn new(mode: Mode, readable: bool, receives: bool) -> Self {
        let receives = receives && mode == Mode::Adaptive;
        Self {
            phase: Phase::Open,
            no_fin: false,
            held: 0,
            method: match mode {
                Mode::SpliceOnly => Method::Splice,
                Mode::Adaptive if receives => Method::Receive,
                Mode::Adaptive | Mode::CopyOnly => Method::Copy,
            },
            mode,
            receives,
            small_in_a_row: 0,
            readable,
            writable: true,
        }
    }

    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    pub(super) fn held(&self) -> usize {
        self.held as usize
    }

    pub(super) fn method(&self) -> Method {
        self.method
    }

    pub(super) fn next(&self) -> Step {
        match self.phase {
            Phase::Open | Phase::Draining if self.held > 0 => Step::Write,
            Phase::Open => Step::Read,
            Phase::Draining if self.no_fin => Step::Done,
            Phase::Draining => Step::Fin,
            Phase::Discarding => Step::Discard,
            Phase::Closed | Phase::Gone => Step::Done,
        }
    }

    /// The ring has received `n` bytes.
    pub(super) fn received(&mut self, n: usize) {
        self.held += n as u32;
    }

    /// The ring receives no more; what comes next is read by copy.
    pub(super) fn receiving_stopped(&mut self) {
        self.method = Method::Copy;
        self.small_in_a_row = 0;
        self.readable = true;
    }

    /// `n` of at most `chunk` bytes were read by copy. Less than was asked for means that no more is there.
    pub(super) fn copied_in(&mut self, n: usize, chunk: usize) {
        self.held += n as u32;
        self.readable = n == chunk;
        if self.mode != Mode::Adaptive {
            return;
        }
        if n == chunk {
            self.method = Method::Splice;
            self.small_in_a_row = 0;
        } else if n >= TINY {
            self.small_in_a_row = 0;
        } else if self.receives && self.one_more_small() {
            self.method = Method::Receive;
        }
    }

    /// Counts one. True when there were enough of them in a row.
    fn one_more_small(&mut self) -> bool {
        self.small_in_a_row += 1;
        let enough = self.small_in_a_row == SMALL_IN_A_ROW;
        if enough {
            self.small_in_a_row = 0;
        }
        enough
    }

    /// `n` bytes were spliced into the pipe. It may have run out of slots, so there may be more.
    pub(super) fn spliced_in(&mut self, n: usize) {
        self.held += n as u32;
        if n >= SMALL || self.mode != Mode::Adaptive {
            self.small_in_a_row = 0;
            return;
        }
        if self.one_more_small() {
            self.method = Method::Copy;
        }
    }

    /// Whether the source is to be asked for more although something is held: it may have some, and half of `window` is
    /// free.
    pub(super) fn wants_more(&self, window: usize) -> bool {
        self.phase == Phase::Open && self.readable && self.held() <= window / 2
    }

    /// `n` bytes were added to those in the pipe.
    pub(super) fn topped_up(&mut self, n: usize) {
        self.held += n as u32;
    }

    /// Splicing turned out to be impossible on one of the sockets.
    pub(super) fn never_splice(&mut self) {
        self.mode = Mode::CopyOnly;
        self.method = Method::Copy;
    }

    /// `n` of the held bytes were given to the destination.
    pub(super) fn sent(&mut self, n: usize) {
        self.held -= n as u32;
    }

    /// The source has sent its FIN.
    pub(super) fn source_ended(&mut self) {
        self.phase = match self.phase {
            Phase::Discarding => Phase::Gone,
            _ => Phase::Draining,
        };
    }

    /// The FIN was forwarded.
    pub(super) fn fin_sent(&mut self) {
        self.phase = Phase::Closed;
    }

    /// The destination will be reset, so it must not see a FIN.
    pub(super) fn forward_no_fin(&mut self) {
        self.no_fin = true;
    }

    /// The destination is gone. Returns how many held bytes are lost.
    pub(super) fn destination_gone(&mut self) -> usize {
        self.phase = match self.phase {
            Phase::Open | Phase::Discarding => Phase::Discarding,
            Phase::Draining | Phase::Closed | Phase::Gone => Phase::Gone,
        };
        if self.method == Method::Splice {
            self.method = Method::Copy;
        }
        std::mem::take(&mut self.held) as usize
    }

    /// How much a read by copy may take, in bytes, when `limit` may be held.
    pub(super) fn chunk(limit: usize) -> usize {
        limit.min(SCRATCH)
    }

    /// How much a splice may take, in bytes, when `limit` may be held.
    pub(super) fn window(limit: usize, capacity: usize) -> usize {
        limit.max(SCRATCH).min(capacity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_fin_comes_after_the_bytes() {
        let mut half = Half::new(Mode::Adaptive, true, false);
        assert_eq!(half.next(), Step::Read);
        half.copied_in(10, SCRATCH);
        assert!(!half.readable, "a short read has taken everything");
        half.sent(4);
        assert_eq!(half.next(), Step::Write);
        half.sent(6);
        half.source_ended();
        assert_eq!(half.next(), Step::Fin);
        half.fin_sent();
        assert_eq!((half.next(), half.phase()), (Step::Done, Phase::Closed));
    }

    #[test]
    fn bulk_splices_and_trickles_copy() {
        let mut half = Half::new(Mode::Adaptive, true, false);
        half.copied_in(SCRATCH - 1, SCRATCH);
        assert_eq!(half.method(), Method::Copy);
        half.copied_in(SCRATCH, SCRATCH);
        assert_eq!(half.method(), Method::Splice);
        for n in [1, 1, 1, SMALL, 1, 1, 1] {
            half.spliced_in(n);
            assert_eq!(half.method(), Method::Splice);
        }
        half.spliced_in(1);
        assert_eq!(half.method(), Method::Copy);
        half.copied_in(SCRATCH, SCRATCH);
        assert_eq!(half.method(), Method::Splice);
        half.never_splice();
        half.copied_in(SCRATCH, SCRATCH);
        assert_eq!(half.method(), Method::Copy);
    }

    #[test]
    fn tiny_messages_are_received_until_one_is_not() {
        let mut half = Half::new(Mode::Adaptive, true, true);
        assert_eq!(half.method(), Method::Receive);
        half.received(10);
        half.sent(10);
        half.receiving_stopped();
        assert!(half.readable, "the rest is in the socket");
        for n in [1, 1, 1, TINY, 1, 1, 1] {
            assert_eq!(half.method(), Method::Copy);
            half.copied_in(n, SCRATCH);
        }
        assert_eq!(half.method(), Method::Copy);
        half.copied_in(1, SCRATCH);
        assert_eq!(half.method(), Method::Receive);
        let mut half = Half::new(Mode::CopyOnly, true, true);
        assert_eq!(half.method(), Method::Copy, "the mode wins");
        half.copied_in(1, SCRATCH);
    }

    #[test]
    fn a_gone_destination_loses_what_is_held_and_nothing_later() {
        let mut half = Half::new(Mode::CopyOnly, true, false);
        half.copied_in(10, SCRATCH);
        half.sent(3);
        assert_eq!(half.destination_gone(), 7);
        assert_eq!(half.next(), Step::Discard);
        half.source_ended();
        assert_eq!((half.next(), half.phase()), (Step::Done, Phase::Gone));
    }

    #[test]
    fn no_fin_before_a_reset() {
        let mut half = Half::new(Mode::CopyOnly, true, false);
        half.forward_no_fin();
        half.copied_in(1, SCRATCH);
        half.source_ended();
        assert_eq!(half.next(), Step::Write);
        half.sent(1);
        assert_eq!(half.next(), Step::Done);
    }

    proptest! {
        /// Whatever happens: bytes are conserved, the FIN is sent once, with nothing held, and last.
        #[test]
        fn conserves_bytes(events in prop::collection::vec((0_usize..6, 1_usize..2 * SCRATCH), 0..200)) {
            let mut half = Half::new(Mode::Adaptive, true, false);
            let (mut taken, mut given, mut lost, mut fins) = (0, 0, 0, 0);
            for (event, n) in events {
                match (half.next(), event) {
                    (Step::Read, 0..=1) if half.method() == Method::Splice => { half.spliced_in(n); taken += n; }
                    (Step::Read, 0..=1) => { half.copied_in(n.min(SCRATCH), SCRATCH); taken += n.min(SCRATCH); }
                    (Step::Read | Step::Discard, 2) | (Step::Write, 3) => half.source_ended(),
                    (Step::Write, 5) if half.wants_more(SCRATCH) => { half.topped_up(n); taken += n; }
                    (Step::Write, 0..=2) => { let n = n.min(half.held()); half.sent(n); given += n; }
                    (Step::Fin, _) => { prop_assert_eq!(half.held(), 0); half.fin_sent(); fins += 1; }
                    (_, 4) if n == 1 => lost += half.destination_gone(),
                    _ => {}
                }
                prop_assert_eq!(taken, given + lost + half.held());
                prop_assert!(fins <= 1);
                prop_assert!(fins == 0 || half.next() == Step::Done);
            }
        }
    }
}
