//! One direction: its state, what it holds, and the system calls that move it on.

use std::cell::Cell;
use std::io;
use std::os::fd::AsFd;
use std::task::{Context, Poll, ready};

use socket2::Socket;

use super::copy::{self, Leftover};
use super::counters::{Counters, Direction, add, count};
use super::half::{Half, Method, Step};
use super::resources::{PooledPipe, Resources};
use super::{Mode, SCRATCH, splice};
use crate::sys::{socket, splice as sys_splice};
use crate::uring::{self, Bytes, Received, Sending, Source};

/// Bytes thrown away per system call.
const DISCARD: usize = 1 << 20;

/// One direction with what it holds.
pub(super) struct Lane<'a> {
    pub(super) half: Half,
    /// What is held in a buffer of the ring.
    sending: Option<Sending<'a>>,
    /// What is held by copy.
    leftover: Leftover,
    /// What is held by splice.
    pipe: Option<PooledPipe<'a>>,
    /// The FIN had nobody to go to.
    pub(super) fin_failed: bool,
    /// Reading is paused because the destination takes nothing.
    paused: bool,
    /// Bytes held at most.
    limit: u32,
}

/// A socket operation of a direction failed.
pub(super) enum Fault {
    Source(io::Error),
    Destination(io::Error),
    /// The destination was reset, but the kernel did not tell which way.
    DestinationVanished,
}

/// What the directions need of the connection while they move bytes.
pub(super) struct Turn<'t, 'a> {
    pub(super) resources: &'a Resources,
    pub(super) counters: &'a Counters,
    /// Those of the direction.
    pub(super) direction: &'a Direction,
    pub(super) source: &'t mut Source<&'a Socket>,
    pub(super) destination: &'t mut Source<&'a Socket>,
    pub(super) budget: usize,
    pub(super) active: bool,
    /// Something is being sent the other way.
    pub(super) answering: bool,
}

impl Turn<'_, '_> {
    fn took(&mut self, n: usize) {
        add(&self.direction.received, n);
        self.budget = self.budget.saturating_sub(n);
        self.active = true;
    }
}

impl<'a> Lane<'a> {
    /// `limit` is how many bytes it may hold; 0 is 1 MiB. `receives`: whether the ring can receive from the source.
    pub(super) fn new(mode: Mode, readable: bool, receives: bool, limit: u32) -> Self {
        Self {
            half: Half::new(mode, readable, receives),
            sending: None,
            leftover: Leftover::default(),
            pipe: None,
            fin_failed: false,
            paused: false,
            limit: if limit == 0 { 1 << 20 } else { limit },
        }
    }

    /// Moves bytes until it has to wait, its budget is spent, or it has ended.
    pub(super) fn run(&mut self, turn: &mut Turn<'_, 'a>, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        loop {
            let step = self.half.next();
            match step {
                Step::Done => return Poll::Ready(Ok(())),
                Step::Fin if turn.answering => return Poll::Pending,
                Step::Fin => {
                    // Fails only when the destination is gone already.
                    self.fin_failed = !socket::send_fin(turn.destination.fd());
                    self.half.fin_sent();
                }
                Step::Write if self.sending.is_some() => ready!(self.sent(turn, cx))?,
                Step::Write if !self.half.writable => {
                    self.pause(turn);
                    if self.half.method() == Method::Receive {
                        self.hoard(turn, cx)?;
                    }
                    let _bulk = self.bulk();
                    ready!(turn.destination.poll_writable(cx)).map_err(Fault::Destination)?;
                    self.half.writable = true;
                }
                Step::Write => self.write(turn)?,
                Step::Read if self.half.method() == Method::Receive => ready!(self.receive(turn, cx))?,
                Step::Discard if self.half.method() == Method::Receive => {
                    ready!(self.discard_received(turn, cx))?;
                }
                Step::Read | Step::Discard if turn.budget == 0 => {
                    let _bulk = self.bulk();
                    self.half.readable = turn.source.give_way(cx).map_err(Fault::Source)?;
                    return Poll::Pending;
                }
                Step::Read | Step::Discard if !self.half.readable => {
                    let _bulk = self.bulk();
                    ready!(turn.source.poll_readable(cx)).map_err(Fault::Source)?;
                    self.half.readable = true;
                }
                Step::Read => self.read(turn)?,
                Step::Discard => self.discard(turn)?,
            }
        }
    }

    /// Waits that begin while this lives: is it bulk that is waited for?
    fn bulk(&self) -> Option<uring::Bulk> {
        (self.half.method() == Method::Splice).then(uring::Bulk::begin)
    }

    /// Gives on what the ring has received.
    fn receive(&mut self, turn: &mut Turn<'_, 'a>, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        if turn.budget == 0 {
            // The ring is entered between the rounds of its executor, however many tasks are awake.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        match ready!(turn.source.poll_receive(cx)).map_err(Fault::Source)? {
            Received::Bytes(bytes) if bytes.is_full() => self.leave_receiving(&bytes, turn, cx)?,
            // The last before the direction changes its method, or ends.
            Received::Bytes(bytes) if turn.source.is_stopping() => {
                bytes.with(|bytes| self.pass_on(bytes, turn))?;
            }
            Received::Bytes(bytes) => {
                turn.took(bytes.len());
                self.half.received(bytes.len());
                let destination: &'a Socket = turn.destination.file();
                self.sending = Some(bytes.send(destination.as_fd()));
                turn.source.receive_on(cx);
            }
            Received::End => self.half.source_ended(),
            Received::Stopped => self.half.receiving_stopped(),
        }
        Poll::Ready(Ok(()))
    }

    /// The end of a send through the ring.
    fn sent(&mut self, turn: &mut Turn<'_, 'a>, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        let Some(sending) = &mut self.sending else { return Poll::Ready(Ok(())) };
        let polled = sending.poll(cx);
        if polled.is_pending() && turn.source.has_more() {
            uring::hurry_sends();
        }
        let n = match ready!(polled) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => 0,
            result => result.map_err(Fault::Destination)?,
        };
        if n < sending.bytes().len() {
            self.leftover = Leftover::new(sending.bytes().with(|bytes| bytes[n..].to_vec()));
            turn.source.stop_receiving();
        }
        self.sending = None;
        self.gave(n, turn.direction, &turn.counters.copied);
        self.half.writable = self.half.held() == 0;
        Poll::Ready(Ok(()))
    }

    /// Whether something is on its way that [`crate::uring::flush_sends`] brings to an end.
    pub(super) fn is_sending(&self) -> bool {
        self.sending.is_some()
    }

    /// More has come than small messages: gives on what the ring has, together, and has it receive no more.
    fn leave_receiving(
        &mut self,
        first: &Bytes,
        turn: &mut Turn<'_, 'a>,
        cx: &mut Context<'_>,
    ) -> Result<(), Fault> {
        turn.source.stop_receiving();
        let resources = turn.resources;
        let mut scratch = resources.scratch.borrow_mut();
        let mut filled = 0;
        let mut fill = |bytes: &[u8]| {
            scratch[filled..filled + bytes.len()].copy_from_slice(bytes);
            filled += bytes.len();
            filled + first.len() <= SCRATCH
        };
        let mut more = first.with(&mut fill);
        let mut end = None;
        while more {
            match turn.source.poll_receive(cx) {
                Poll::Ready(Ok(Received::Bytes(bytes))) => more = bytes.with(&mut fill),
                Poll::Ready(other) => {
                    more = false;
                    end = Some(other);
                }
                Poll::Pending => more = false,
            }
        }
        self.pass_on(&scratch[..filled], turn)?;
        match end {
            Some(Ok(Received::End)) => self.half.source_ended(),
            Some(Ok(_)) => self.half.receiving_stopped(),
            Some(Err(error)) => return Err(Fault::Source(error)),
            None => {}
        }
        Ok(())
    }

    fn pass_on(&mut self, bytes: &[u8], turn: &mut Turn<'_, 'a>) -> Result<(), Fault> {
        turn.took(bytes.len());
        self.half.received(bytes.len());
        let (sent, leftover) = copy::give(bytes, turn.destination.fd());
        self.leftover = leftover;
        self.gave(sent.map_err(Fault::Destination)?, turn.direction, &turn.counters.copied);
        self.half.writable = self.half.held() == 0;
        Ok(())
    }

    /// The destination takes nothing: what the ring has received by now is kept here, and its buffers serve others.
    pub(super) fn hoard(&mut self, turn: &mut Turn<'_, 'a>, cx: &mut Context<'_>) -> Result<(), Fault> {
        turn.source.stop_receiving();
        while let Poll::Ready(received) = turn.source.poll_receive(cx) {
            match received.map_err(Fault::Source)? {
                Received::Bytes(bytes) => {
                    bytes.with(|bytes| self.leftover.push(bytes));
                    turn.took(bytes.len());
                    self.half.received(bytes.len());
                }
                Received::End => {
                    self.half.source_ended();
                    break;
                }
                Received::Stopped => {
                    self.half.receiving_stopped();
                    break;
                }
            }
        }
        Ok(())
    }

    /// What the ring has received has nobody to go to.
    fn discard_received(&mut self, turn: &mut Turn<'_, 'a>, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        turn.source.stop_receiving();
        loop {
            match ready!(turn.source.poll_receive(cx)).map_err(Fault::Source)? {
                Received::Bytes(bytes) => {
                    add(&turn.direction.received, bytes.len());
                    turn.direction.discard(bytes.len() as u64);
                }
                Received::End => {
                    self.half.source_ended();
                    return Poll::Ready(Ok(()));
                }
                Received::Stopped => {
                    self.half.receiving_stopped();
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }

    fn read(&mut self, turn: &mut Turn<'_, 'a>) -> Result<(), Fault> {
        let was_splicing = self.half.method() == Method::Splice;
        let pipe = if was_splicing { turn.resources.pipe() } else { None };
        let result = match pipe {
            Some(pipe) => self.fill(pipe, turn),
            None => self.copy(turn),
        };
        match (was_splicing, self.half.method() == Method::Splice) {
            (false, true) => {
                let to_splice = &turn.direction.note().to_splice;
                if to_splice.get() == 0 {
                    turn.resources.nearby.bulk_begins(turn.source.fd());
                }
                count(to_splice);
            }
            (true, false) => count(&turn.direction.note().to_copy),
            _ => {}
        }
        result
    }

    fn fill(&mut self, mut pipe: PooledPipe<'a>, turn: &mut Turn<'_, 'a>) -> Result<(), Fault> {
        let window = Half::window(self.limit as usize, pipe.pipe().capacity());
        match splice::fill(&mut pipe, turn.source.fd(), window) {
            Ok(0) => self.half.source_ended(),
            Ok(n) => {
                turn.took(n);
                self.half.spliced_in(n);
                self.pipe = Some(pipe);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.half.readable = false,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if sys_splice::is_unsupported(&e) => self.half.never_splice(),
            Err(e) => return Err(Fault::Source(e)),
        }
        Ok(())
    }

    fn copy(&mut self, turn: &mut Turn<'_, 'a>) -> Result<(), Fault> {
        let chunk = Half::chunk(self.limit as usize);
        let mut scratch = turn.resources.scratch.borrow_mut();
        let copied = match copy::step(&mut scratch[..chunk], turn.source.fd(), turn.destination.fd()) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.half.readable = false;
                return Ok(());
            }
            result => result.map_err(Fault::Source)?,
        };
        if copied.received == 0 {
            self.half.source_ended();
            return Ok(());
        }
        turn.took(copied.received);
        self.half.copied_in(copied.received, chunk);
        self.leftover = copied.leftover;
        let sent = copied.sent.map_err(Fault::Destination)?;
        self.gave(sent, turn.direction, &turn.counters.copied);
        self.half.writable = self.half.held() == 0;
        Ok(())
    }

    fn write(&mut self, turn: &mut Turn<'_, 'a>) -> Result<(), Fault> {
        let destination = turn.destination.fd();
        let (result, by) = match &mut self.pipe {
            Some(pipe) => (splice::drain(pipe, destination), &turn.counters.spliced),
            None => (self.leftover.send(destination), &turn.counters.copied),
        };
        let held = self.half.held();
        match result {
            Ok(n) => {
                turn.active = true;
                self.gave(n, turn.direction, by);
                // A splice that has moved something swallows the error that stopped it: the kernel forgets it,
                // and the reset would look like a FIN to the next read.
                if n < held && self.pipe.is_some() && socket::is_hung_up(destination) {
                    let error = socket::error(destination).map_err(Fault::Destination)?;
                    return Err(error.map_or(Fault::DestinationVanished, Fault::Destination));
                }
                if n < held && self.pipe.is_some() {
                    // It is full. Waiting first lets it take more at once than it would now.
                    self.half.writable = false;
                    self.top_up(turn)?;
                }
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.half.writable = false,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if self.pipe.is_some() && sys_splice::is_unsupported(&e) => self.unsplice(turn)?,
            Err(e) => return Err(Fault::Destination(e)),
        }
        Ok(())
    }

    /// Refills a pipe that was not emptied, while its destination has to be waited for: one splice then gives it more.
    fn top_up(&mut self, turn: &mut Turn<'_, 'a>) -> Result<(), Fault> {
        let Some(pipe) = &mut self.pipe else { return Ok(()) };
        let window = Half::window(self.limit as usize, pipe.pipe().capacity());
        if turn.budget == 0 || !self.half.wants_more(window) {
            return Ok(());
        }
        match splice::add(pipe, turn.source.fd(), window) {
            Ok(0) => self.half.source_ended(),
            Ok(n) => {
                turn.took(n);
                self.half.topped_up(n);
            }
            // Nothing there, or no slot is left in the pipe: a wait tells them apart.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.half.readable = false,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Fault::Source(e)),
        }
        Ok(())
    }

    /// The destination can't be spliced to: copies what the pipe holds, and everything after it.
    fn unsplice(&mut self, turn: &Turn<'_, 'a>) -> Result<(), Fault> {
        self.half.never_splice();
        count(&turn.direction.note().to_copy);
        if let Some(mut pipe) = self.pipe.take() {
            self.leftover = Leftover::new(splice::take(&mut pipe).map_err(Fault::Source)?);
        }
        Ok(())
    }

    fn discard(&mut self, turn: &mut Turn<'_, 'a>) -> Result<(), Fault> {
        match socket::discard(turn.source.fd(), DISCARD) {
            Ok(0) => self.half.source_ended(),
            Ok(n) => {
                add(&turn.direction.received, n);
                turn.direction.discard(n as u64);
                turn.budget = turn.budget.saturating_sub(n);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.half.readable = false,
            Err(e) => return Err(Fault::Source(e)),
        }
        Ok(())
    }

    fn gave(&mut self, n: usize, direction: &Direction, by: &Cell<u64>) {
        add(&direction.sent, n);
        add(by, n);
        self.half.sent(n);
        if self.half.held() == 0 {
            // Back to the pool, now that it is empty.
            self.pipe = None;
            if self.paused {
                self.paused = false;
                count(&direction.note().resumed);
            }
        }
    }

    fn pause(&mut self, turn: &Turn<'_, 'a>) {
        if !self.paused {
            self.paused = true;
            count(&turn.direction.note().paused);
        }
    }

    /// The destination is gone, and what is held for it with it.
    pub(super) fn lose(&mut self, direction: &Direction) {
        direction.discard(self.half.destination_gone() as u64);
        self.sending = None;
        self.pipe = None;
        self.leftover = Leftover::default();
    }
}
