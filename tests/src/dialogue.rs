//! Random dialogues: what both ends of a proxied connection do, made from a seed, and what each of them sees.
//!
//! A dialogue is a list of phases, and an end. In a phase both sides write, pause and half-close at once; it is over when
//! everything has arrived: every byte, and every FIN. So what a side has seen after each phase does not depend on timing, and
//! "before which byte" is a matter of phases. Only the end may be abrupt, and [`Dialogue::must`] says what is certain then.

mod play;

use std::fmt;

use serde::Serialize;

pub use self::play::{Meeting, Seen, play};
use crate::script::End as Ending;

/// One of the two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Side {
    /// It connects.
    Client,
    /// It accepts.
    Server,
}

impl Side {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Client, Self::Server];

    /// The opposite one.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }
}

/// One act of one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// So many bytes.
    Write(usize),
    /// Milliseconds.
    Sleep(u64),
    /// A FIN; this side writes nothing after it.
    Fin,
}

/// How a side reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// Bytes per read at most.
    pub chunk: usize,
    /// Before each of the first reads of a phase, in microseconds.
    pub pause: u64,
    /// How many reads of a phase are the first ones.
    pub pauses: u32,
}

/// One side's socket, and how it reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// `SO_RCVBUF` in bytes, set before the handshake; none leaves it to the kernel.
    pub receive_buffer: Option<usize>,
    /// `SO_SNDBUF` likewise.
    pub send_buffer: Option<usize>,
    /// How it reads.
    pub reading: Reading,
}

/// How the last phase, in which `Act`s of [`Dialogue::last`] are played, ends the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Who has sent no FIN yet sends it: this side first, the other when it has seen that.
    Fins(Side),
    /// Both at once.
    BothFins,
    /// Nothing is on its way; this side resets.
    Reset(Side),
    /// Both are writing, and this side resets: when it has written what it has to, and read so much.
    Cut(Side, usize),
    /// The other side writes, this one reads none of it and closes, which is a reset.
    CloseUnread(Side),
    /// Nothing is on its way; this side closes. The other sees that, goes on writing for nobody, then sends its FIN.
    Close(Side),
}

/// What both sides do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dialogue {
    /// What it was made from.
    pub seed: u64,
    /// By side.
    pub peers: [Peer; 2],
    /// What whoever relays may hold for each side, in bytes; none leaves it to its default.
    pub buffer_limit: Option<u32>,
    /// By side, phase by phase.
    pub phases: Vec<[Vec<Act>; 2]>,
    /// By side, what is done in the last phase before the end.
    pub last: [Vec<Act>; 2],
    /// How it ends.
    pub end: End,
}

/// What is certain about what a side has seen when all is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Must {
    /// Bytes that have arrived at least, and at most.
    pub received: [u64; 2],
    /// How the other side ended, and in which phase this was seen; none for who ended the connection itself and so did
    /// not look.
    pub end: Option<(usize, Ending)>,
}

/// Sizes of socket buffers to choose from; the kernel makes 1 its minimum and the largest its maximum.
const BUFFERS: [Option<usize>; 7] = [None, None, None, Some(1), Some(4096), Some(65_536), Some(8 << 20)];

impl Dialogue {
    /// The one that this seed makes.
    pub fn random(seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let rng = &mut rng;
        let mut peers = [Peer::random(rng), Peer::random(rng)];
        // A tiny window lets a few hundred bytes through at a time.
        let most = [most(peers[0], peers[1]), most(peers[1], peers[0])];
        let mut fins = [false; 2];
        let phases = (0..rng.usize(1..4))
            .map(|number| {
                let mut phase = [0, 1].map(|side| acts(rng, most[side], fins[side], number > 0));
                if number == 0 {
                    // When it has arrived, whoever relays knows that it is connected: a reset before that is another subject.
                    phase[Side::Client as usize].insert(0, Act::Write(rng.usize(1..200)));
                }
                for (fin, acts) in fins.iter_mut().zip(&phase) {
                    *fin |= acts.contains(&Act::Fin);
                }
                phase
            })
            .collect();
        let (end, last) = Self::end(rng, most, fins);
        if let End::Cut(..) = end {
            // A reset is sent once. Behind bytes that a tiny buffer had no room for, the kernel may find it outside of the
            // window and drop it, whoever sent it; then nobody tells the reader. The same happens to acknowledgements for who cuts,
            // and reads no more: it can't write any more then.
            for peer in &mut peers {
                peer.receive_buffer = peer.receive_buffer.filter(|bytes| *bytes >= 65_536);
            }
        }
        let buffer_limit = [None, None, Some(4_096), Some(32_768)][rng.usize(0..4)];
        Self { seed, peers, buffer_limit, phases, last, end }
    }

    fn end(rng: &mut fastrand::Rng, most: [usize; 2], fins: [bool; 2]) -> (End, [Vec<Act>; 2]) {
        let side = Side::BOTH[rng.usize(0..2)];
        let none = [Vec::new(), Vec::new()];
        if fins == [true; 2] {
            return (End::Fins(side), none);
        }
        let other = side.other() as usize;
        let mut last = none.clone();
        match rng.u32(0..12) {
            0..=2 => (End::Fins(side), none),
            3 => (End::BothFins, none),
            // Who has sent its FIN writes no more, and cutting is only different when something is on its way.
            6..=8 if !fins[other] => {
                last = [0, 1].map(|side| acts(rng, most[side], fins[side], false));
                let size = rng.usize(1..=most[other]);
                last[other].push(Act::Write(size));
                (End::Cut(side, rng.usize(0..size)), last)
            }
            9..=10 if !fins[other] => {
                last[other].push(Act::Write(rng.usize(1..=1000)));
                (End::CloseUnread(side), last)
            }
            11 if !fins[other] => {
                last[other] = (0..rng.usize(1..4))
                    .flat_map(|_| [Act::Write(rng.usize(1..=1000)), Act::Sleep(20)])
                    .collect();
                (End::Close(side), last)
            }
            _ => (End::Reset(side), none),
        }
    }

    /// Bytes that a side writes in a phase; the last one has the number of phases.
    pub fn writes(&self, side: Side, phase: usize) -> usize {
        written(self.acts(side, phase))
    }

    fn acts(&self, side: Side, phase: usize) -> &[Act] {
        &self.phases.get(phase).unwrap_or(&self.last)[side as usize]
    }

    /// The phase before the last one in which a side sends its FIN.
    pub fn fin(&self, side: Side) -> Option<usize> {
        self.phases.iter().position(|phase| phase[side as usize].contains(&Act::Fin))
    }

    /// Whether the client's FIN follows bytes of the same phase, and is the last FIN or one of two at once.
    pub fn ends_with_bytes(&self) -> bool {
        let [client, server] = Side::BOTH.map(|side| self.fin(side));
        server.is_some() && client >= server
    }

    /// What a side is certain to see, whoever relays.
    pub fn must(&self, side: Side) -> Must {
        let other = side.other();
        let last = self.phases.len();
        let before: usize = (0..last).map(|phase| self.writes(other, phase)).sum();
        let (before, all) = (before as u64, (before + self.writes(other, last)) as u64);
        if let Some(phase) = self.fin(other) {
            return Must { received: [before; 2], end: Some((phase, Ending::Fin)) };
        }
        let exactly = |end| Must { received: [before; 2], end: Some((last, end)) };
        match self.end {
            End::Fins(_) | End::BothFins => exactly(Ending::Fin),
            End::Close(by) if by == other => exactly(Ending::Fin),
            End::Reset(by) | End::CloseUnread(by) if by == other => exactly(Ending::Reset),
            End::Cut(by, _) if by == other => {
                Must { received: [before, all], end: Some((last, Ending::Reset)) }
            }
            // Who ends the connection itself looks no further.
            End::Cut(_, read) => Must { received: [before + read as u64; 2], end: None },
            End::Close(_) | End::Reset(_) | End::CloseUnread(_) => Must { received: [before; 2], end: None },
        }
    }

    /// What is wrong with what a side has seen; none if all is as it must be.
    pub fn judge(&self, side: Side, seen: &Seen) -> Option<String> {
        let must = self.must(side);
        if let Some(at) = seen.wrong_at {
            return Some(format!("{side:?}: byte {at} is not what was sent"));
        }
        let [least, most] = must.received;
        if !(least..=most).contains(&seen.received) {
            return Some(format!("{side:?}: {} bytes arrived, not {least} to {most}", seen.received));
        }
        (seen.end != must.end)
            .then(|| format!("{side:?}: saw {:?} (phase, end), not {:?}", seen.end, must.end))
    }
}

/// One line: `seed 7: client …`.
impl fmt::Display for Dialogue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, peers, buffer_limit, phases, last, end } = self;
        write!(f, "seed {seed}: [client, server] {peers:?}, ")?;
        write!(f, "limit {buffer_limit:?}, phases {phases:?}, last {last:?}, {end:?}")
    }
}

impl Peer {
    fn random(rng: &mut fastrand::Rng) -> Self {
        let mut buffer = || BUFFERS[rng.usize(0..BUFFERS.len())];
        let (receive_buffer, send_buffer) = (buffer(), buffer());
        let reading = match rng.u32(0..4) {
            0 => Reading { chunk: 1 << 16, pause: rng.u64(1..500), pauses: 40 },
            1 => Reading { chunk: rng.usize(1..5000), pause: rng.u64(1..5000), pauses: 8 },
            _ => Reading { chunk: 1 << 16, pause: 0, pauses: 0 },
        };
        Self { receive_buffer, send_buffer, reading }
    }
}

/// The longest write from one peer to the other, in bytes.
fn most(from: Peer, to: Peer) -> usize {
    match (from.send_buffer, to.receive_buffer) {
        (_, Some(..4096)) => 2_000,
        // Little is on its way at a time, and each time the kernel may put off the acknowledgement for 40 ms.
        (Some(..4096), _) | (_, Some(..65_536)) => 60_000,
        _ => 1_500_000,
    }
}

fn acts(rng: &mut fastrand::Rng, most: usize, fin_sent: bool, may_end: bool) -> Vec<Act> {
    if fin_sent {
        return Vec::new();
    }
    let size = |rng: &mut fastrand::Rng, from: usize, to: usize| rng.usize(from..to).min(most);
    let mut acts: Vec<_> = (0..rng.usize(0..6))
        .map(|_| match rng.u32(0..12) {
            0..=5 => Act::Write(size(rng, 1, 200)),
            6..=8 => Act::Write(size(rng, 1_000, 100_000)),
            9 => Act::Write(size(rng, 100_000, 1_500_000)),
            _ => Act::Sleep(rng.u64(0..3)),
        })
        .collect();
    if may_end && rng.u32(0..4) == 0 {
        acts.push(Act::Fin);
    }
    acts
}

fn written(acts: &[Act]) -> usize {
    let sizes = acts.iter().map(|act| match act {
        Act::Write(size) => *size,
        Act::Sleep(_) | Act::Fin => 0,
    });
    sizes.sum()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// Without a proxy between, everything is as it must be.
    fn direct(dialogue: &Dialogue) -> [Seen; 2] {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let client = TcpStream::connect(listener.local_addr().expect("bound")).expect("connect");
        let server = listener.accept().expect("accept").0;
        let meeting = Meeting::default();
        std::thread::scope(|scope| {
            let client = scope.spawn(|| play(client, dialogue, Side::Client, &meeting));
            let server = play(server, dialogue, Side::Server, &meeting);
            [client.join().expect("no panic"), server]
        })
    }

    #[test]
    fn a_connection_without_a_proxy_passes() {
        for seed in 0..40 {
            let dialogue = Dialogue::random(seed);
            for (side, seen) in Side::BOTH.into_iter().zip(direct(&dialogue)) {
                assert_eq!(dialogue.judge(side, &seen), None, "{dialogue}: {seen:?}");
            }
        }
    }

    #[test]
    fn every_end_comes_up() {
        let dialogues: Vec<_> = (0..500).map(Dialogue::random).collect();
        let name = |end: &End| format!("{end:?}").split('(').next().map(str::to_owned);
        let ends: BTreeSet<_> = dialogues.iter().filter_map(|dialogue| name(&dialogue.end)).collect();
        assert_eq!(ends.len(), 6, "{ends:?}");
        assert!(dialogues.iter().any(|dialogue| Side::BOTH.iter().all(|side| dialogue.fin(*side).is_some())));
        assert_eq!(dialogues[7], Dialogue::random(7), "a seed is all it takes");
    }

    #[test]
    fn what_is_not_as_it_must_be_is_seen() {
        let mut dialogue = Dialogue::random(1);
        dialogue.phases = vec![[vec![Act::Write(10)], vec![Act::Write(20)]]];
        dialogue.last = Default::default();
        dialogue.end = End::Reset(Side::Server);
        let good = Seen { received: 20, end: Some((1, Ending::Reset)), ..Seen::default() };
        let judge = |seen: &Seen| dialogue.judge(Side::Client, seen);
        assert_eq!(judge(&good), None);
        assert!(judge(&Seen { received: 19, ..good.clone() }).is_some(), "a byte is missing");
        assert!(judge(&Seen { wrong_at: Some(3), ..good.clone() }).is_some(), "another byte");
        assert!(judge(&Seen { end: Some((1, Ending::Fin)), ..good.clone() }).is_some(), "a reset like a FIN");
        assert!(judge(&Seen { end: Some((0, Ending::Reset)), ..good.clone() }).is_some(), "too early");
        assert!(judge(&Seen { end: None, ..good }).is_some(), "never");
        // Who resets has read what there was, and looks no further.
        let seen = Seen { received: 10, ..Seen::default() };
        assert_eq!(dialogue.judge(Side::Server, &seen), None);
        dialogue.end = End::Cut(Side::Server, 5);
        dialogue.last = [vec![Act::Write(8)], vec![Act::Write(4)]];
        assert_eq!(dialogue.must(Side::Server).received, [15, 15]);
        assert_eq!(dialogue.must(Side::Client).received, [20, 24]);
    }
}
