//! Playing one side of a dialogue on a socket.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use socket2::SockRef;

use super::{Act, Dialogue, End, Peer, Reading, Side};
use crate::script::{End as Ending, GUARD};

/// Bytes after which the pattern repeats: a prime, so that no lost or doubled buffer goes unnoticed.
const PERIOD: usize = 65_521;

/// What a side has seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Seen {
    /// Bytes that arrived.
    pub received: u64,
    /// The first byte that was not the one sent.
    pub wrong_at: Option<u64>,
    /// In which phase, and how, the other side ended; none if this side did not look.
    pub end: Option<(usize, Ending)>,
    /// The phase in which this side could not write or half-close, and why.
    pub write_failed: Option<(usize, Ending)>,
    /// After the other side's FIN: whether the connection was then reset.
    pub reset_later: bool,
    /// The phase that the other side never finished.
    pub waited_for: Option<usize>,
}

/// Where both sides wait for each other after every phase.
#[derive(Debug, Default)]
pub struct Meeting {
    /// By side.
    progress: Mutex<[Progress; 2]>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    /// Phases.
    finished: usize,
    /// It finishes no more of them.
    left: bool,
}

impl Meeting {
    /// Finishes a phase and waits for the other side. False when it does not come.
    fn finish(&self, side: Side, phase: usize) -> bool {
        self.note(side, Progress { finished: phase + 1, left: false });
        let progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        let other = side.other() as usize;
        let not_yet =
            |progress: &mut [Progress; 2]| progress[other].finished <= phase && !progress[other].left;
        let outcome = self.changed.wait_timeout_while(progress, GUARD * 2, not_yet);
        outcome.is_ok_and(|(progress, _)| progress[other].finished > phase)
    }

    /// For who can't play at all, too: the other side does not wait.
    pub fn leave(&self, side: Side) {
        let finished = self.progress.lock().unwrap_or_else(PoisonError::into_inner)[side as usize].finished;
        self.note(side, Progress { finished, left: true });
    }

    fn note(&self, side: Side, progress: Progress) {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)[side as usize] = progress;
        self.changed.notify_all();
    }
}

impl Peer {
    /// Sets the socket's buffers: before it connects or listens, so that the window is what they say from the start.
    pub fn prepare(&self, socket: &SockRef<'_>) -> io::Result<()> {
        if let Some(size) = self.receive_buffer {
            socket.set_recv_buffer_size(size)?;
        }
        if let Some(size) = self.send_buffer {
            socket.set_send_buffer_size(size)?;
        }
        Ok(())
    }
}

/// Bytes that show when one is missing, doubled or moved.
struct Pattern {
    block: Vec<u8>,
    position: usize,
}

impl Pattern {
    fn new(seed: u64, side: Side) -> Self {
        let mut block = vec![0; PERIOD];
        fastrand::Rng::with_seed(seed.wrapping_mul(2) + side as u64).fill(&mut block);
        Self { block, position: 0 }
    }

    /// The next bytes: as many as there are before the pattern repeats, and no more than `most`.
    fn next(&mut self, most: usize) -> &[u8] {
        let start = self.position;
        let length = most.min(PERIOD - start);
        self.position = (start + length) % PERIOD;
        &self.block[start..start + length]
    }

    /// The first of `bytes` that is not the next one of the pattern.
    fn mismatch(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut checked = 0;
        while checked < bytes.len() {
            let expected = self.next(bytes.len() - checked);
            let actual = &bytes[checked..checked + expected.len()];
            if actual != expected {
                return actual.iter().zip(expected).position(|(a, b)| a != b).map(|at| checked + at);
            }
            checked += expected.len();
        }
        None
    }
}

/// Plays `side` on `stream` and closes it. Both sides have the same `meeting`.
pub fn play(stream: TcpStream, dialogue: &Dialogue, side: Side, meeting: &Meeting) -> Seen {
    // Options of a connected socket: nothing here fails for a reason of the peer's.
    let _ = stream.set_read_timeout(Some(GUARD));
    let _ = stream.set_write_timeout(Some(GUARD));
    let _ = stream.set_nodelay(true);
    let mut player = Player {
        stream: &stream,
        dialogue,
        side,
        meeting,
        reader: Reader {
            pattern: Pattern::new(dialogue.seed, side.other()),
            reading: dialogue.peers[side as usize].reading,
            seen: Seen::default(),
        },
        writer: Writer {
            pattern: Pattern::new(dialogue.seed, side),
            failed: None,
            told_of_reset: false,
            fin_sent: false,
        },
    };
    let abort = player.phases().and_then(|()| player.last());
    let mut seen = player.reader.seen;
    seen.write_failed = player.writer.failed;
    meeting.leave(side);
    if abort == Some(Abort::Reset) {
        let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
    }
    drop(stream);
    seen
}

/// How the socket is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Abort {
    /// close(2): a FIN if none was sent, a RST if something is unread.
    Close,
    Reset,
}

/// How far a phase is read.
#[derive(Clone, Copy)]
enum Until {
    /// So many bytes.
    Bytes(usize),
    /// So many bytes and a FIN.
    Fin(usize),
    /// Whatever comes before the end.
    End,
}

struct Player<'a> {
    stream: &'a TcpStream,
    dialogue: &'a Dialogue,
    side: Side,
    meeting: &'a Meeting,
    reader: Reader,
    writer: Writer,
}

struct Reader {
    pattern: Pattern,
    reading: Reading,
    seen: Seen,
}

struct Writer {
    pattern: Pattern,
    failed: Option<(usize, Ending)>,
    /// It failed with ECONNRESET. After a FIN that would be EPIPE.
    told_of_reset: bool,
    fin_sent: bool,
}

impl Player<'_> {
    /// None: something went wrong, and is noted.
    fn phases(&mut self) -> Option<()> {
        for phase in 0..self.dialogue.phases.len() {
            let other = self.side.other();
            let bytes = self.dialogue.writes(other, phase);
            let fin = self.dialogue.acts(other, phase).contains(&Act::Fin);
            self.phase(phase, if fin { Until::Fin(bytes) } else { Until::Bytes(bytes) });
            let as_planned = self.writer.failed.is_none()
                && self.reader.seen.wrong_at.is_none()
                && self.reader.seen.end.as_ref().is_none_or(|(_, end)| *end == Ending::Fin);
            if !as_planned {
                return None;
            }
            if !self.meeting.finish(self.side, phase) {
                self.reader.seen.waited_for = Some(phase);
                return None;
            }
        }
        Some(())
    }

    /// Writes and reads at once, so that no dialogue can lock itself up.
    fn phase(&mut self, phase: usize, until: Until) {
        let (stream, reader, writer) = (self.stream, &mut self.reader, &mut self.writer);
        let acts = self.dialogue.acts(self.side, phase);
        std::thread::scope(|scope| {
            scope.spawn(|| reader.read(stream, phase, until));
            for act in acts {
                if !writer.act(stream, phase, *act) {
                    break;
                }
            }
        });
        // The kernel tells a reset once. When the writer was told, the reader sees an end of file.
        if writer.told_of_reset
            && let Some((_, end)) = &mut reader.seen.end
            && *end == Ending::Fin
        {
            *end = Ending::Reset;
        }
    }

    fn last(&mut self) -> Option<Abort> {
        let phase = self.dialogue.phases.len();
        match self.dialogue.end {
            End::Reset(by) if by == self.side => Some(Abort::Reset),
            End::Close(by) if by == self.side => Some(Abort::Close),
            End::Cut(by, bytes) if by == self.side => {
                self.phase(phase, Until::Bytes(bytes));
                Some(Abort::Reset)
            }
            End::CloseUnread(by) if by == self.side => {
                // Waits for the first byte and leaves it where it is.
                let _ = self.stream.peek(&mut [0]);
                Some(Abort::Close)
            }
            End::Fins(first) if first != self.side => self.fin_after_the_other(phase),
            End::Close(_) => {
                // A reset that overtakes the FIN would be another end.
                self.reader.read(self.stream, phase, Until::Fin(0));
                self.fin_after_the_other(phase)
            }
            End::Fins(_) | End::BothFins => {
                self.fin(phase);
                self.phase(phase, Until::End);
                self.hang_up();
                None
            }
            End::Reset(_) | End::Cut(..) | End::CloseUnread(_) => {
                self.phase(phase, Until::End);
                self.hang_up();
                None
            }
        }
    }

    fn fin_after_the_other(&mut self, phase: usize) -> Option<Abort> {
        self.phase(phase, Until::End);
        self.fin(phase);
        self.hang_up();
        None
    }

    fn fin(&mut self, phase: usize) {
        if !self.writer.fin_sent {
            self.writer.act(self.stream, phase, Act::Fin);
        }
    }

    /// After a FIN, waits until the connection is over both ways, and notes whether that was by a reset.
    fn hang_up(&mut self) {
        if self.reader.seen.end.as_ref().is_some_and(|(_, end)| *end == Ending::Fin) {
            self.reader.seen.reset_later = match hung_up(self.stream) {
                Ok(true) => matches!(self.stream.take_error(), Ok(Some(_)) | Err(_)),
                Ok(false) | Err(_) => false,
            };
        }
    }
}

/// Whether the connection is over soon.
fn hung_up(stream: &TcpStream) -> io::Result<bool> {
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    Ok(poll(&mut fds, PollTimeout::from(300_u16))? > 0)
}

impl Reader {
    fn read(&mut self, mut stream: &TcpStream, phase: usize, until: Until) {
        let (mut left, end_wanted) = match until {
            Until::Bytes(bytes) => (bytes, false),
            Until::Fin(bytes) => (bytes, true),
            Until::End => (usize::MAX, true),
        };
        if self.seen.end.is_some() {
            return;
        }
        let mut buffer = vec![0; self.reading.chunk];
        let mut pauses = self.reading.pauses;
        let started = Instant::now();
        while left > 0 || end_wanted {
            if pauses > 0 {
                sleep(Duration::from_micros(self.reading.pause));
                pauses -= 1;
            }
            // A byte more than there should be, so that it would be seen.
            let most = buffer.len().min(left.max(1));
            let end = match stream.read(&mut buffer[..most]) {
                Ok(0) => Ending::Fin,
                Ok(length) => {
                    let wrong = self.pattern.mismatch(&buffer[..length]);
                    self.seen.wrong_at = wrong.map(|at| self.seen.received + at as u64);
                    self.seen.received += length as u64;
                    if self.seen.wrong_at.is_some() {
                        return;
                    }
                    left = left.saturating_sub(length);
                    if started.elapsed() < GUARD {
                        continue;
                    }
                    Ending::TimedOut
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => ending(&error),
            };
            self.seen.end = Some((phase, end));
            return;
        }
    }
}

impl Writer {
    /// False when it failed.
    fn act(&mut self, mut stream: &TcpStream, phase: usize, act: Act) -> bool {
        let outcome = match act {
            Act::Sleep(milliseconds) => {
                sleep(Duration::from_millis(milliseconds));
                Ok(())
            }
            Act::Fin => {
                self.fin_sent = true;
                stream.shutdown(Shutdown::Write)
            }
            Act::Write(length) => {
                let mut left = length;
                let mut outcome = Ok(());
                while left > 0 && outcome.is_ok() {
                    let bytes = self.pattern.next(left);
                    outcome = stream.write_all(bytes);
                    left -= bytes.len();
                }
                outcome
            }
        };
        let Err(error) = outcome else { return true };
        self.told_of_reset = error.kind() == io::ErrorKind::ConnectionReset;
        self.failed = Some((phase, ending(&error)));
        false
    }
}

fn ending(error: &io::Error) -> Ending {
    match error.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::NotConnected => {
            Ending::Reset
        }
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Ending::TimedOut,
        _ => Ending::Error(error.to_string()),
    }
}
