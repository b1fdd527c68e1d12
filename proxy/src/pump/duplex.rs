//! Both directions of one connection, and the ways in which it ends.

use std::io;
use std::num::NonZeroU64;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use socket2::Socket;

use super::half::{Phase, Step};
use super::lane::{Fault, Lane, Turn};
use super::{Cause, Counters, Options, Outcome, Resources, Side};
use crate::connection::record::CloseType;
use crate::drain::Open;
use crate::sys::{clock, socket};
use crate::uring::time::Sleep;
use crate::uring::{self, PendingHangUp, Source};

/// Bytes that one direction moves per poll of the task; then others have their turn. A wait for readiness
/// that is there already costs two system calls, which is little for a megabyte.
const TURN: usize = 1 << 20;
/// How often to look whether a flushed side has acknowledged everything: the kernel has no event for it. The
/// wait doubles from the first to the last.
const LINGER: [Duration; 2] = [Duration::from_millis(10), Duration::from_secs(1)];

/// A moment on the coarse clock, in nanoseconds since boot: half of what a `Duration` takes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Moment(NonZeroU64);

impl Moment {
    fn now() -> Self {
        Self::of(clock::coarse())
    }

    fn of(since_boot: Duration) -> Self {
        // What does not fit is in 584 years; the clock is never at 0.
        let nanos = u64::try_from(since_boot.as_nanos()).unwrap_or(u64::MAX);
        Self(NonZeroU64::new(nanos).unwrap_or(NonZeroU64::MIN))
    }

    fn after(self, duration: Duration) -> Self {
        Self::of(Duration::from_nanos(self.0.get()).saturating_add(duration))
    }

    fn until(self, later: Self) -> Duration {
        Duration::from_nanos(later.0.get().saturating_sub(self.0.get()))
    }
}

/// The side that is gone while what it had sent is flushed to the other.
#[derive(Clone, Copy)]
struct Flush {
    gone: Side,
    cause: Cause,
    /// The gone side's FIN was not seen, so the other must not see one either, but a reset.
    reset: bool,
    /// When to look next whether everything was acknowledged; none until everything was sent.
    look_at: Option<Moment>,
    wait: Duration,
    unacknowledged: usize,
}

pub(super) struct Duplex<'a> {
    resources: &'a Resources,
    /// In nanoseconds.
    idle_timeout: Option<NonZeroU64>,
    /// Few connections have one.
    deadline: Option<Box<Instant>>,
    killed: Option<&'a Open>,
    counters: &'a Counters,
    /// By side.
    sources: [Source<&'a Socket>; 2],
    /// By the side that a direction comes from.
    lanes: [Lane<'a>; 2],
    /// A hang-up of this side was seen that was no error; there is nothing more to wait for.
    hung_up: [bool; 2],
    flush: Option<Box<Flush>>,
    first_fin: Option<Side>,
    last_activity: Moment,
    /// When the timer fires; none while it does not run.
    timer_at: Option<Moment>,
}

impl<'a> Duplex<'a> {
    pub(super) fn new(
        resources: &'a Resources,
        [downstream, upstream]: [&'a Socket; 2],
        hang_up: Option<PendingHangUp>,
        options: &Options<'a>,
        counters: &'a Counters,
    ) -> Self {
        let mut sources = [Source::new(downstream), Source::new(upstream)];
        sources[Side::Downstream as usize].adopt(hang_up);
        // A client has often sent something by now. An endpoint has just been connected to: wait first.
        let receives = uring::can_receive();
        let lane = |limit, readable| Lane::new(options.mode, readable, receives, limit);
        Self {
            resources,
            idle_timeout: options.idle_timeout.map(|timeout| Moment::of(timeout).0),
            deadline: options.deadline.map(Box::new),
            killed: options.killed,
            counters,
            sources,
            lanes: [lane(options.upstream_buffer_limit, true), lane(options.downstream_buffer_limit, false)],
            hung_up: [false; 2],
            flush: None,
            first_fin: None,
            last_activity: Moment::now(),
            timer_at: None,
        }
    }

    pub(super) fn poll(&mut self, timer: &mut Sleep, cx: &mut Context<'_>) -> Poll<Outcome> {
        if let Some(open) = self.killed
            && let Poll::Ready(ending) = open.poll_killed(cx)
        {
            return Poll::Ready(self.cut(Cause::Killed, ending.resets()));
        }
        loop {
            let mut changed = false;
            for side in [Side::Downstream, Side::Upstream] {
                if let Err((from, fault)) = self.advance(side, cx) {
                    match self.faulted(from, fault, cx) {
                        Some(outcome) => return Poll::Ready(outcome),
                        None => changed = true,
                    }
                }
            }
            if self.both_closed() && self.flush.is_none() {
                // A reset before the last FIN must not look like one.
                match Side::both().into_iter().find(|side| self.was_gone(*side)) {
                    None => return Poll::Ready(self.finished()),
                    Some(side) => match self.hung_up(side) {
                        Some(outcome) => return Poll::Ready(outcome),
                        None => continue,
                    },
                }
            }
            for side in [Side::Downstream, Side::Upstream] {
                if self.only_a_hang_up_counts(side) && self.source(side).poll_hang_up(cx).is_ready() {
                    match self.hung_up(side) {
                        Some(outcome) => return Poll::Ready(outcome),
                        None => changed = true,
                    }
                }
            }
            if let Some(outcome) = self.ended() {
                return Poll::Ready(outcome);
            }
            if !changed {
                return self.poll_timer(timer, cx);
            }
        }
    }

    fn source(&mut self, side: Side) -> &mut Source<&'a Socket> {
        &mut self.sources[side as usize]
    }

    fn lane(&mut self, from: Side) -> &mut Lane<'a> {
        &mut self.lanes[from as usize]
    }

    /// What was held of a direction has nobody to go to.
    fn lose(&mut self, from: Side) {
        let direction = self.counters.from(from);
        self.lane(from).lose(direction);
    }

    fn phase(&self, from: Side) -> Phase {
        self.lanes[from as usize].half.phase()
    }

    /// Gives a direction its turn. A fault may be the other's.
    fn advance(&mut self, from: Side, cx: &mut Context<'_>) -> Result<(), (Side, Fault)> {
        if let Poll::Ready(Err(fault)) = self.turn(from, TURN, cx) {
            return Err((from, fault));
        }
        if self.lane(from).half.next() == Step::Fin {
            // The kernel tells of a reset once. If that was the send in the other direction, this end looks like a FIN.
            let back = from.other();
            uring::flush_sends();
            if let Poll::Ready(Err(fault)) = self.turn(back, 0, cx) {
                return Err((back, fault));
            }
            if let Poll::Ready(Err(fault)) = self.turn(from, TURN, cx) {
                return Err((from, fault));
            }
        }
        Ok(())
    }

    /// Moves bytes of one direction until it has to wait, has had its turn, or has ended. The FIN waits while something is being sent
    /// the other way.
    fn turn(&mut self, from: Side, budget: usize, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        self.with_turn(from, budget, |lane, turn| lane.run(turn, cx))
    }

    fn with_turn<T>(
        &mut self,
        from: Side,
        budget: usize,
        act: impl FnOnce(&mut Lane<'a>, &mut Turn<'_, 'a>) -> T,
    ) -> T {
        let [downstream, upstream] = &mut self.sources;
        let (source, destination) = match from {
            Side::Downstream => (downstream, upstream),
            Side::Upstream => (upstream, downstream),
        };
        let mut turn = Turn {
            resources: self.resources,
            counters: self.counters,
            direction: self.counters.from(from),
            source,
            destination,
            budget,
            active: false,
            answering: self.lanes[from.other() as usize].is_sending(),
        };
        let lane = &mut self.lanes[from as usize];
        let was_open = lane.half.phase() == Phase::Open;
        let result = act(lane, &mut turn);
        if turn.active {
            self.last_activity = Moment::now();
        }
        if was_open && lane.half.phase() != Phase::Open {
            turn.source.peer_has_sent_fin();
            self.first_fin.get_or_insert(from);
        }
        result
    }

    /// A direction failed. Either that is the end, or what a gone side had sent is flushed first.
    fn faulted(&mut self, from: Side, fault: Fault, cx: &mut Context<'_>) -> Option<Outcome> {
        let side = match fault {
            Fault::Source(_) => from,
            Fault::Destination(_) | Fault::DestinationVanished => from.other(),
        };
        if let Some(flush) = self.flushing() {
            return Some(self.flush_failed(flush, side));
        }
        let cause = match fault {
            Fault::Source(error) => {
                self.settle(side.other());
                return Some(self.abort(side, cause(side, &error)));
            }
            Fault::Destination(error) => {
                let cause = cause(side, &error);
                // Writing to a side that has sent its FIN fails otherwise: an end that was read is that of the reset.
                let no_fin = error.raw_os_error() == Some(libc::ECONNRESET);
                if !no_fin && self.has_sent_fin(side, &error) {
                    self.flush(side, cause, false);
                    return None;
                }
                cause
            }
            Fault::DestinationVanished => {
                let fin_unseen = self.phase(side) == Phase::Open;
                self.flush(side, Cause::Reset { by: side }, fin_unseen);
                return None;
            }
        };
        // It may have answered before it reset. What of that is here, and goes out without waiting, does.
        self.lose(side.other());
        self.source(side).settle_receiving();
        if self.lane(side).is_sending() {
            uring::flush_sends();
        }
        let half = &mut self.lane(side).half;
        half.forward_no_fin();
        (half.readable, half.writable) = (true, true);
        let _ = self.turn(side, usize::MAX, cx);
        Some(self.abort(side, cause))
    }

    /// What the ring has already sent of a direction counts as sent, whatever comes next.
    fn settle(&mut self, from: Side) {
        if self.lane(from).is_sending() {
            uring::flush_sends();
            let _ = self.turn(from, 0, &mut Context::from_waker(Waker::noop()));
        }
    }

    /// What the ring has received of a direction, and nobody has looked at, is held by it. The rest of the stream stays in
    /// the socket, as the kernel's reason for a reset.
    fn take_received(&mut self, from: Side) {
        if !self.source(from).is_receiving() || !self.source(from).has_more() {
            return;
        }
        // What failed ends the connection, which ends anyway.
        let _ =
            self.with_turn(from, 0, |lane, turn| lane.hoard(turn, &mut Context::from_waker(Waker::noop())));
    }

    /// A side is gone for both directions while nothing was read from or written to it.
    fn hung_up(&mut self, side: Side) -> Option<Outcome> {
        let error = match socket::error(self.source(side).fd()) {
            Ok(None) => {
                // Both FINs have been exchanged; what it sent may still be in the receive queue.
                self.hung_up[side as usize] = true;
                return None;
            }
            Ok(Some(error)) | Err(error) => error,
        };
        let cause = cause(side, &error);
        if let Some(flush) = self.flushing() {
            return Some(self.flush_failed(flush, side));
        }
        if self.has_sent_fin(side, &error) {
            self.flush(side, cause, false);
            return None;
        }
        Some(self.abort(side, cause))
    }

    /// After a FIN the kernel reports a RST as `EPIPE`, also when the FIN is still behind unread bytes.
    fn has_sent_fin(&self, side: Side, error: &io::Error) -> bool {
        self.phase(side) != Phase::Open || error.raw_os_error() == Some(libc::EPIPE)
    }

    fn flush(&mut self, gone: Side, cause: Cause, reset: bool) {
        self.lose(gone.other());
        if reset {
            self.lane(gone).half.forward_no_fin();
        }
        let wait = LINGER[0];
        let flush = Flush { gone, cause, reset, look_at: None, wait, unacknowledged: usize::MAX };
        self.flush = Some(Box::new(flush));
        self.note_flush();
    }

    /// Whether nothing else would tell that this side is gone.
    fn only_a_hang_up_counts(&self, side: Side) -> bool {
        let (from, to) = (&self.lanes[side as usize], &self.lanes[side.other() as usize]);
        !self.hung_up[side as usize]
            && self.flush.as_ref().is_none_or(|flush| flush.gone != side)
            && !matches!(from.half.next(), Step::Read | Step::Discard)
            && to.half.next() != Step::Write
            // A send ends with the turn, and what is received in the meantime tells.
            && !(from.is_sending() && self.sources[side as usize].is_receiving())
    }

    /// It is a flush only while something is held: of a side that is gone, or of a downstream that has sent its FIN and got the
    /// upstream's.
    fn note_flush(&self) {
        let gone = match &self.flush {
            Some(flush) => flush.gone,
            None if self.phase(Side::Upstream) == Phase::Closed
                && self.phase(Side::Downstream) == Phase::Draining =>
            {
                Side::Downstream
            }
            None => return,
        };
        // What the ring has yet to send, it sends at the end of the turn. What it could not send is held then.
        let lane = &self.lanes[gone as usize];
        if lane.half.held() > 0 && !lane.is_sending() {
            self.counters.flushed.set(Some(gone.other()));
        }
    }

    fn flushing(&self) -> Option<Flush> {
        self.flush.as_deref().copied()
    }

    /// Whether a side could not be sent the other's FIN, and nobody has looked why.
    fn was_gone(&self, side: Side) -> bool {
        self.lanes[side.other() as usize].fin_failed && !self.hung_up[side as usize]
    }

    fn both_closed(&self) -> bool {
        Side::both().iter().all(|side| self.phase(*side) == Phase::Closed)
    }

    /// The end, if both directions are done, or the flush is.
    fn ended(&mut self) -> Option<Outcome> {
        self.note_flush();
        let Some(flush) = self.flushing() else {
            return self.both_closed().then(|| self.finished());
        };
        let kept = flush.gone.other();
        if self.lane(flush.gone).half.next() != Step::Done {
            return None;
        }
        // Closing while bytes are on their way would lose them if the other side sends anything more.
        let now = Moment::now();
        if flush.look_at.is_some_and(|at| now < at) {
            return None;
        }
        let unacknowledged = socket::unacknowledged(self.source(kept).fd()).unwrap_or(0);
        if unacknowledged == 0 {
            return Some(self.flushed(flush));
        }
        if unacknowledged < flush.unacknowledged {
            self.last_activity = now;
        }
        let wait = (flush.wait * 2).min(LINGER[1]);
        self.flush =
            Some(Box::new(Flush { look_at: Some(now.after(flush.wait)), wait, unacknowledged, ..flush }));
        None
    }

    /// Arms the timer for what comes next, and ends the connection when it is time.
    fn poll_timer(&mut self, timer: &mut Sleep, cx: &mut Context<'_>) -> Poll<Outcome> {
        loop {
            let now = Moment::now();
            let idle_at = self
                .idle_timeout
                .map(|timeout| self.last_activity.after(Duration::from_nanos(timeout.get())));
            if idle_at.is_some_and(|at| now >= at) {
                return Poll::Ready(self.cut(Cause::IdleTimeout, false));
            }
            // The deadline is on the exact clock. It is read only when the timer is armed, not on every wake-up.
            let look_at = self.flush.as_ref().and_then(|flush| flush.look_at);
            if self.timer_at.is_none() || look_at < self.timer_at && look_at.is_some() {
                let left = self.deadline.as_ref().map(|at| at.saturating_duration_since(Instant::now()));
                if left == Some(Duration::ZERO) {
                    return Poll::Ready(self.cut(Cause::MaxDuration, false));
                }
                let ends_at = left.map(|left| now.after(left));
                let Some(next) = [idle_at, ends_at, look_at].into_iter().flatten().min() else {
                    return Poll::Pending;
                };
                // The coarse clock lags by up to a tick: never spin on the difference.
                let wait = now.until(next).max(Duration::from_millis(1));
                timer.reset(Instant::now() + wait);
                self.timer_at = Some(next);
            }
            ready!(Pin::new(&mut *timer).poll(cx));
            self.timer_at = None;
            if let Some(outcome) = self.ended() {
                return Poll::Ready(outcome);
            }
        }
    }

    /// Both FINs were forwarded.
    fn finished(&mut self) -> Outcome {
        for source in &mut self.sources {
            if source.needs_shutdown() {
                uring::close_gracefully(source.fd());
                source.release();
            }
        }
        let first = self.first_fin.unwrap_or(Side::Downstream);
        Outcome {
            cause: Cause::Finished { first },
            downstream: CloseType::Normal,
            upstream: CloseType::Normal,
        }
    }

    /// Everything that a gone side had sent was acknowledged.
    fn flushed(&mut self, flush: Flush) -> Outcome {
        let closes = Side::both().map(|side| self.close(side, flush.reset, flush.gone == side));
        Outcome { cause: flush.cause, downstream: closes[0], upstream: closes[1] }
    }

    /// A side is gone: reset the other.
    fn abort(&mut self, gone: Side, cause: Cause) -> Outcome {
        let mut closes = Side::both().map(|side| self.close(side, side != gone, side == gone));
        if matches!(cause, Cause::Error { .. }) {
            // It went silent (ETIMEDOUT, EHOSTUNREACH). Envoy calls only a RST a reset. It would send a FIN to the other side,
            // as if the stream were complete: we don't.
            closes[gone as usize] = CloseType::Normal;
        }
        Outcome { cause, downstream: closes[0], upstream: closes[1] }
    }

    /// The side that was flushed to is gone too, or what the gone one had sent can't be had after all.
    fn flush_failed(&mut self, flush: Flush, side: Side) -> Outcome {
        let kept = flush.gone.other();
        if let Some(flush) = &mut self.flush
            && side == flush.gone
        {
            // Reading it tells of a reset: the EPIPE of a write came of that, and not of a FIN.
            flush.reset = true;
        }
        let closes =
            Side::both().map(|each| self.close(each, each == kept, each == flush.gone || side == kept));
        Outcome { cause: flush.cause, downstream: closes[0], upstream: closes[1] }
    }

    /// We end it: with a FIN, or with a RST where that is wanted or bytes are lost that the side would not miss
    /// otherwise.
    fn cut(&mut self, cause: Cause, reset: bool) -> Outcome {
        for side in Side::both() {
            self.settle(side);
            self.take_received(side);
        }
        let closes = Side::both().map(|side| {
            let loses = self.lanes[side.other() as usize].half.held() > 0;
            let gone = self.flush.as_ref().is_some_and(|flush| flush.gone == side);
            self.close(side, reset || loses, gone)
        });
        Outcome { cause, downstream: closes[0], upstream: closes[1] }
    }

    fn close(&mut self, side: Side, reset: bool, gone: bool) -> CloseType {
        self.lose(side.other());
        let source = self.source(side);
        let settled = if reset && !gone {
            uring::reset(source.fd())
        } else {
            uring::close_gracefully(source.fd());
            true
        };
        if settled {
            source.release();
        }
        let after_fin = self.flush.as_ref().is_some_and(|flush| flush.gone == side && !flush.reset);
        match (gone, reset) {
            // A reset after the FIN only ends what was half closed: Envoy does not call it one.
            (true, _) if after_fin => CloseType::Normal,
            (true, _) => CloseType::RemoteReset,
            (false, true) => CloseType::LocalReset,
            (false, false) => CloseType::Normal,
        }
    }
}

impl Side {
    fn both() -> [Self; 2] {
        [Self::Downstream, Self::Upstream]
    }
}

fn cause(side: Side, error: &io::Error) -> Cause {
    match error.raw_os_error() {
        Some(libc::ECONNRESET | libc::EPIPE) | None => Cause::Reset { by: side },
        Some(errno) => Cause::Error { side, errno },
    }
}

#[cfg(test)]
mod tests;
