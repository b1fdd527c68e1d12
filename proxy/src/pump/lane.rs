//! One direction: its state, what it holds, and the system calls that move it on.

use std::cell::Cell;
use std::io;
use std::net::Shutdown;
use std::task::{Context, Poll, ready};

use socket2::Socket;

use super::copy::{self, Leftover};
use super::counters::{Counters, Direction, add};
use super::half::{Half, Step};
use super::resources::{PooledPipe, Resources};
use super::{Mode, splice};
use crate::sys::{socket, splice as sys_splice};
use crate::uring::Source;

/// Bytes thrown away per system call.
const DISCARD: usize = 1 << 20;

/// One direction with what it holds.
pub(super) struct Lane<'a> {
    pub(super) half: Half,
    /// What is held by copy.
    leftover: Leftover,
    /// What is held by splice.
    pipe: Option<PooledPipe<'a>>,
    counters: &'a Direction,
    /// Reading is paused because the destination takes nothing.
    paused: bool,
    /// Bytes held at most.
    limit: usize,
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
    pub(super) source: &'t mut Source<&'a Socket>,
    pub(super) destination: &'t mut Source<&'a Socket>,
    pub(super) budget: usize,
    pub(super) active: bool,
}

impl<'a> Lane<'a> {
    /// `limit` is how many bytes it may hold; 0 is 1 MiB.
    pub(super) fn new(mode: Mode, readable: bool, limit: u32, counters: &'a Direction) -> Self {
        Self {
            half: Half::new(mode, readable),
            leftover: Leftover::default(),
            pipe: None,
            counters,
            paused: false,
            limit: if limit == 0 { 1 << 20 } else { limit as usize },
        }
    }

    /// Moves bytes until it has to wait, its budget is spent, or it has ended.
    pub(super) fn run(&mut self, turn: &mut Turn<'_, 'a>, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        loop {
            let step = self.half.next();
            match step {
                Step::Done => return Poll::Ready(Ok(())),
                Step::Fin => {
                    // Only ENOTCONN is possible: gone already, which other waits will tell.
                    let _ = socket::shutdown(turn.destination.fd(), Shutdown::Write);
                    self.half.fin_sent();
                }
                Step::Write if !self.half.writable => {
                    self.pause();
                    ready!(turn.destination.poll_writable(cx)).map_err(Fault::Destination)?;
                    self.half.writable = true;
                }
                Step::Write => self.write(turn)?,
                Step::Read | Step::Discard if turn.budget == 0 => {
                    self.half.readable = turn.source.give_way(cx).map_err(Fault::Source)?;
                    return Poll::Pending;
                }
                Step::Read | Step::Discard if !self.half.readable => {
                    ready!(turn.source.poll_readable(cx)).map_err(Fault::Source)?;
                    self.half.readable = true;
                }
                Step::Read => self.read(turn)?,
                Step::Discard => self.discard(turn)?,
            }
        }
    }

    fn read(&mut self, turn: &mut Turn<'_, 'a>) -> Result<(), Fault> {
        let was_splicing = self.half.is_splicing();
        let pipe = if was_splicing { turn.resources.pipe() } else { None };
        let result = match pipe {
            Some(pipe) => self.fill(pipe, turn),
            None => self.copy(turn),
        };
        match (was_splicing, self.half.is_splicing()) {
            (false, true) => add(&self.counters.to_splice, 1),
            (true, false) => add(&self.counters.to_copy, 1),
            _ => {}
        }
        result
    }

    fn fill(&mut self, mut pipe: PooledPipe<'a>, turn: &mut Turn<'_, 'a>) -> Result<(), Fault> {
        let window = Half::window(self.limit, pipe.pipe().capacity());
        match splice::fill(&mut pipe, turn.source.fd(), window) {
            Ok(0) => self.half.source_ended(),
            Ok(n) => {
                self.took(n, turn);
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
        let chunk = Half::chunk(self.limit);
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
        self.took(copied.received, turn);
        self.half.copied_in(copied.received, chunk);
        self.leftover = copied.leftover;
        let sent = copied.sent.map_err(Fault::Destination)?;
        self.gave(sent, &turn.counters.copied);
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
                self.gave(n, by);
                // A splice that has moved something swallows the error that stopped it: the kernel forgets it,
                // and the reset would look like a FIN to the next read.
                if n < held && self.pipe.is_some() && socket::is_hung_up(destination) {
                    let error = socket::error(destination).map_err(Fault::Destination)?;
                    return Err(error.map_or(Fault::DestinationVanished, Fault::Destination));
                }
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.half.writable = false,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if self.pipe.is_some() && sys_splice::is_unsupported(&e) => self.unsplice()?,
            Err(e) => return Err(Fault::Destination(e)),
        }
        Ok(())
    }

    /// The destination can't be spliced to: copies what the pipe holds, and everything after it.
    fn unsplice(&mut self) -> Result<(), Fault> {
        self.half.never_splice();
        add(&self.counters.to_copy, 1);
        if let Some(mut pipe) = self.pipe.take() {
            self.leftover = Leftover::new(splice::take(&mut pipe).map_err(Fault::Source)?);
        }
        Ok(())
    }

    fn discard(&mut self, turn: &mut Turn<'_, 'a>) -> Result<(), Fault> {
        match socket::discard(turn.source.fd(), DISCARD) {
            Ok(0) => self.half.source_ended(),
            Ok(n) => {
                add(&self.counters.received, n);
                add(&self.counters.discarded, n);
                turn.budget = turn.budget.saturating_sub(n);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.half.readable = false,
            Err(e) => return Err(Fault::Source(e)),
        }
        Ok(())
    }

    fn took(&mut self, n: usize, turn: &mut Turn<'_, 'a>) {
        add(&self.counters.received, n);
        turn.budget = turn.budget.saturating_sub(n);
        turn.active = true;
    }

    fn gave(&mut self, n: usize, by: &Cell<u64>) {
        add(&self.counters.sent, n);
        add(by, n);
        self.half.sent(n);
        if self.half.held() == 0 {
            // Back to the pool, now that it is empty.
            self.pipe = None;
            if self.paused {
                self.paused = false;
                add(&self.counters.resumed, 1);
            }
        }
    }

    fn pause(&mut self) {
        if !self.paused {
            self.paused = true;
            add(&self.counters.paused, 1);
        }
    }

    /// The destination is gone, and what is held for it with it.
    pub(super) fn lose(&mut self) {
        add(&self.counters.discarded, self.half.destination_gone());
        self.pipe = None;
        self.leftover = Leftover::default();
    }
}
