//! One TCP check: connect, send, and wait for what is expected.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use socket2::{SockAddr, Socket};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::bound;
use crate::config::cluster::Cluster;
use crate::config::health_check::{ProxyProtocol, TcpHealthCheck};
use crate::sys::socket::{self, StreamOptions};

/// Marks a socket as the proxy's own before it connects, so that it is not captured.
pub type MarkOwn = Arc<dyn Fn(&Socket) -> io::Result<()> + Send + Sync>;

/// What connecting to a host takes.
pub(super) struct Way<'a> {
    /// Where it is checked.
    pub(super) target: SocketAddr,
    /// Its cluster.
    pub(super) config: &'a Cluster,
    pub(super) mark_own: &'a MarkOwn,
}

/// What is kept of an answer in which the expected blocks have not come yet. A server that talks on and on about
/// something else must not fill our memory.
pub(super) const MAX_UNMATCHED: usize = 1 << 20;

/// A connection that checks one host, perhaps several times.
#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    unmatched: Vec<u8>,
}

impl Connection {
    /// Connects, and sends the PROXY header if something will be sent after it.
    pub(super) async fn open(way: &Way<'_>, check: &TcpHealthCheck) -> io::Result<Self> {
        let mut this = Self { stream: connect(way).await?, unmatched: Vec::new() };
        if let Some(version) = check.proxy_protocol.filter(|_| !check.receive.is_empty()) {
            let header = header(version, this.stream.local_addr()?, way.target);
            this.stream.write_all(&header).await?;
        }
        Ok(this)
    }

    /// Sends, and returns when all that is expected has come.
    pub(super) async fn ask(&mut self, check: &TcpHealthCheck) -> io::Result<()> {
        self.stream.write_all(&check.send).await?;
        self.answer(check).await
    }

    /// Returns when all that is expected has come.
    pub(super) async fn answer(&mut self, check: &TcpHealthCheck) -> io::Result<()> {
        loop {
            if self.stream.read_buf(&mut self.unmatched).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if contains(&self.unmatched, &check.receive) {
                self.unmatched.clear();
                return Ok(());
            }
            if self.unmatched.len() > MAX_UNMATCHED {
                return Err(io::Error::other("too much without what was expected"));
            }
        }
    }
}

/// Connects to an endpoint as clients' connections would, past all interception.
pub(super) async fn connect(way: &Way<'_>) -> io::Result<TcpStream> {
    let Way { target, config, mark_own } = way;
    let options = StreamOptions {
        keepalive: config.upstream_keepalive.map(bound::keepalive),
        ..bound::upstream(config.upstream_bind.as_deref(), *target)
    };
    let socket = socket::stream(*target, &options).map_err(|error| error.source)?;
    mark_own(&socket)?;
    let connected = socket::connect(&socket, &SockAddr::from(*target))?;
    let stream = TcpStream::from_std(socket.into())?;
    if !connected {
        stream.writable().await?;
    }
    match stream.take_error()? {
        Some(error) => Err(error),
        None => Ok(stream),
    }
}

/// Whether all blocks come in this order, one after the end of the other.
pub(super) fn contains(data: &[u8], blocks: &[Vec<u8>]) -> bool {
    let mut rest = data;
    blocks.iter().all(|block| match find(rest, block) {
        Some(end) => {
            rest = &rest[end..];
            true
        }
        None => false,
    })
}

/// Where the first occurrence ends.
fn find(data: &[u8], block: &[u8]) -> Option<usize> {
    if block.is_empty() {
        return Some(0);
    }
    data.windows(block.len()).position(|window| window == block).map(|at| at + block.len())
}

/// The header as the PROXY protocol's specification has it.
fn header(version: ProxyProtocol, source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    match version {
        ProxyProtocol::V1 => {
            let family = if source.is_ipv4() { "TCP4" } else { "TCP6" };
            let (source_port, destination_port) = (source.port(), destination.port());
            let (source, destination) = (source.ip(), destination.ip());
            format!("PROXY {family} {source} {destination} {source_port} {destination_port}\r\n").into_bytes()
        }
        // Signature, version 2 with LOCAL, unspecified family, nothing more.
        ProxyProtocol::V2 => b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0".to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn blocks(blocks: &[&str]) -> Vec<Vec<u8>> {
        blocks.iter().map(|block| block.as_bytes().to_vec()).collect()
    }

    #[test]
    fn blocks_come_in_order_and_do_not_overlap() {
        for (data, expected, found) in [
            ("xxAByy", &["AB"][..], true),
            ("AxB", &["A", "B"], true),
            ("BA", &["A", "B"], false),
            ("A", &["A", "A"], false),
            ("aba", &["ab", "ba"], false),
            ("", &[""], true),
            ("A", &["AB"], false),
        ] {
            assert_eq!(contains(data.as_bytes(), &blocks(expected)), found, "{data} {expected:?}");
        }
    }

    #[test]
    fn headers_are_those_of_the_specification() {
        let address = |text: &str| text.parse().unwrap();
        let v1 = header(ProxyProtocol::V1, address("10.0.0.1:5"), address("10.0.0.2:80"));
        assert_eq!(v1, b"PROXY TCP4 10.0.0.1 10.0.0.2 5 80\r\n");
        let v1 = header(ProxyProtocol::V1, address("[::1]:5"), address("[::2]:80"));
        assert_eq!(v1, b"PROXY TCP6 ::1 ::2 5 80\r\n");
        let v2 = header(ProxyProtocol::V2, address("[::1]:5"), address("[::2]:80"));
        assert_eq!(v2, [13, 10, 13, 10, 0, 13, 10, 81, 85, 73, 84, 10, 0x20, 0, 0, 0]);
    }

    proptest! {
        #[test]
        fn what_was_put_in_between_is_found(
            parts in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..5), prop::collection::vec(any::<u8>(), 1..4)), 0..5),
        ) {
            let data: Vec<u8> = parts.iter().flat_map(|(noise, block)| [noise.clone(), block.clone()].concat()).collect();
            let blocks: Vec<Vec<u8>> = parts.into_iter().map(|(_, block)| block).collect();
            prop_assert!(contains(&data, &blocks));
            let more = [blocks, vec![vec![0; data.len() + 1]]].concat();
            prop_assert!(!contains(&data, &more));
        }
    }
}
