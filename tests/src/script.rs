//! What one end of a TCP connection does, and what it saw. Clients and upstreams use the same steps.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use socket2::SockRef;

/// No read or write of a script waits longer: a hang becomes [`End::TimedOut`].
pub const GUARD: Duration = Duration::from_secs(20);

/// How many received bytes a transcript keeps.
const HEAD: usize = 4096;

/// One step.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Step {
    /// Send these bytes.
    Write(Vec<u8>),
    /// Send these many bytes of [`Pattern`].
    WritePattern(u64),
    /// Send this text one byte at a time.
    WriteBytewise(Vec<u8>),
    /// Do nothing for so many milliseconds.
    Pause(u64),
    /// Read this many bytes.
    Read(u64),
    /// Read until FIN or RST.
    ReadToEnd,
    /// Read until FIN or RST, at most this many bytes per 10 ms.
    ReadSlowly(usize),
    /// Send back whatever arrives until FIN or RST.
    Echo,
    /// Half-close: send a FIN, go on reading.
    ShutdownWrite,
    /// Abort: send a RST.
    Reset,
}

/// Text to send.
pub fn write(text: &str) -> Step {
    Step::Write(text.as_bytes().to_vec())
}

/// How the other side ended the connection, as far as the script has seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// The script ended first, or never read that far.
    Open,
    /// End of file.
    Fin,
    /// Connection reset.
    Reset,
    /// Nothing happened for [`GUARD`].
    TimedOut,
    /// Any other error.
    Error(String),
}

/// What one end saw.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transcript {
    /// Bytes received.
    pub received: u64,
    /// Bytes sent (accepted by the kernel).
    pub sent: u64,
    /// SHA-256 of the received bytes, hexadecimal.
    pub sha256: String,
    /// The first 4,096 received bytes.
    pub head: Vec<u8>,
    /// How it ended.
    pub end: End,
}

impl Transcript {
    /// The first received bytes as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.head).into_owned()
    }
}

/// Runs the steps, then closes the connection.
pub fn run(stream: TcpStream, steps: &[Step]) -> Transcript {
    let mut end = Endpoint::new(stream);
    for step in steps {
        if let Err(error) = end.step(step) {
            end.failed(&error);
            break;
        }
    }
    end.finish()
}

/// Runs the steps on a thread of its own.
pub fn spawn(stream: TcpStream, steps: Vec<Step>) -> std::thread::JoinHandle<Transcript> {
    std::thread::spawn(move || run(stream, &steps))
}

/// A point at which one side of a test waits for the other.
pub fn gate() -> (Sender<()>, Receiver<()>) {
    channel()
}

/// One end of a connection while a script (or a test by hand) runs on it.
#[derive(Debug)]
pub struct Endpoint {
    stream: Option<TcpStream>,
    digest: Sha256,
    transcript: Transcript,
    buffer: Vec<u8>,
}

impl Endpoint {
    /// Takes over a connected socket.
    pub fn new(stream: TcpStream) -> Self {
        let _ = stream.set_read_timeout(Some(GUARD));
        let _ = stream.set_write_timeout(Some(GUARD));
        let _ = stream.set_nodelay(true);
        let transcript =
            Transcript { received: 0, sent: 0, sha256: String::new(), head: Vec::new(), end: End::Open };
        Self { stream: Some(stream), digest: Sha256::new(), transcript, buffer: vec![0; 256 << 10] }
    }

    /// Runs one step.
    pub fn step(&mut self, step: &Step) -> io::Result<()> {
        match step {
            Step::Write(bytes) => self.write(bytes),
            Step::WritePattern(length) => self.write_pattern(*length),
            Step::WriteBytewise(bytes) => bytes.iter().try_for_each(|&byte| self.write(&[byte])),
            Step::Pause(milliseconds) => {
                std::thread::sleep(Duration::from_millis(*milliseconds));
                Ok(())
            }
            Step::Read(length) => self.read(*length),
            Step::ReadToEnd => self.drain(|_, _| Ok(())),
            Step::ReadSlowly(most) => self.read_slowly(*most),
            Step::Echo => self.drain(Endpoint::write),
            Step::ShutdownWrite => self.stream()?.shutdown(Shutdown::Write),
            Step::Reset => self.reset(),
        }
    }

    /// Sends all bytes.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let written = self.stream()?.write(rest)?;
            self.transcript.sent += written as u64;
            rest = &rest[written..];
        }
        Ok(())
    }

    /// Reads until FIN, handing over what arrives.
    fn drain(&mut self, mut on_bytes: impl FnMut(&mut Self, &[u8]) -> io::Result<()>) -> io::Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let outcome = loop {
            match self.receive(&mut buffer) {
                Ok(0) => break Ok(()),
                Ok(length) => {
                    if let Err(error) = on_bytes(self, &buffer[..length]) {
                        break Err(error);
                    }
                }
                Err(error) => break Err(error),
            }
        };
        self.buffer = buffer;
        outcome
    }

    fn read(&mut self, length: u64) -> io::Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut left = length;
        while left > 0 {
            let most = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            match self.receive(&mut buffer[..most])? {
                0 => break,
                length => left -= length as u64,
            }
        }
        self.buffer = buffer;
        Ok(())
    }

    fn read_slowly(&mut self, most: usize) -> io::Result<()> {
        let mut buffer = vec![0; most];
        while self.receive(&mut buffer)? > 0 {
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.stream()?.read(buffer)?;
        if length == 0 {
            self.transcript.end = End::Fin;
        }
        let received = &buffer[..length];
        self.digest.update(received);
        self.transcript.received += length as u64;
        let room = HEAD.saturating_sub(self.transcript.head.len()).min(length);
        self.transcript.head.extend_from_slice(&received[..room]);
        Ok(length)
    }

    fn write_pattern(&mut self, length: u64) -> io::Result<()> {
        let mut pattern = Pattern::new();
        let mut buffer = vec![0; 256 << 10];
        let mut left = length;
        while left > 0 {
            let chunk = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            pattern.fill(&mut buffer[..chunk]);
            self.write(&buffer[..chunk])?;
            left -= chunk as u64;
        }
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        let stream = self.stream.take().ok_or(io::ErrorKind::NotConnected)?;
        SockRef::from(&stream).set_linger(Some(Duration::ZERO))
    }

    fn stream(&mut self) -> io::Result<&mut TcpStream> {
        self.stream.as_mut().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// Notes why a step failed.
    pub fn failed(&mut self, error: &io::Error) {
        self.transcript.end = match error.kind() {
            // shutdown(2) after a RST has arrived says "not connected".
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::NotConnected => {
                End::Reset
            }
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => End::TimedOut,
            _ => End::Error(error.to_string()),
        };
    }

    /// Closes the connection and gives what was seen.
    pub fn finish(mut self) -> Transcript {
        self.transcript.sha256 = hex(&self.digest.finalize());
        self.transcript
    }
}

/// A reproducible stream of bytes that no compression or reordering survives unnoticed.
#[derive(Debug)]
pub struct Pattern {
    state: u64,
}

impl Pattern {
    /// From its start.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Self { state: 0x9e37_79b9_7f4a_7c15 }
    }

    /// The next bytes. The chunking does not change the stream as long as chunks are multiples of eight.
    pub fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            chunk.copy_from_slice(&self.state.to_le_bytes()[..chunk.len()]);
        }
    }

    /// SHA-256 of the first `length` bytes, hexadecimal.
    pub fn sha256(length: u64) -> String {
        let mut pattern = Self::new();
        let mut digest = Sha256::new();
        let mut buffer = vec![0; 256 << 10];
        let mut left = length;
        while left > 0 {
            let chunk = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            pattern.fill(&mut buffer[..chunk]);
            digest.update(&buffer[..chunk]);
            left -= chunk as u64;
        }
        hex(&digest.finalize())
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
