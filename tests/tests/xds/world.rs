//! What the tests of xDS stand on: a namespace with upstreams, a control plane and a proxy between them.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Protocol, Socket, Type};
use tidegate_tests::netns::Netns;
use tidegate_tests::proxy::{PATIENCE, Proxy};
use tidegate_tests::script::GUARD;
use tidegate_tests::upstream::Upstream;

/// Where [`World`]'s listeners are.
pub(crate) const LISTENER: &str = "127.0.0.1:10000";

/// A namespace with two upstreams that say their names: `a` and `b`.
pub(crate) struct World {
    /// Everything is in here.
    pub(crate) netns: Netns,
    _upstreams: [Upstream; 2],
}

impl World {
    pub(crate) fn new() -> Result<Self> {
        let netns = Netns::new("xds")?;
        let a = Upstream::identify(Some(&netns), "127.0.0.1:8001", "a")?;
        let b = Upstream::identify(Some(&netns), "127.0.0.1:8002", "b")?;
        Ok(Self { netns, _upstreams: [a, b] })
    }

    /// The address of `a`.
    pub(crate) const A: &str = "127.0.0.1:8001";
    /// The address of `b`.
    pub(crate) const B: &str = "127.0.0.1:8002";

    /// Connects to a listener.
    pub(crate) fn connect(&self, address: &str) -> Result<Live> {
        let address: SocketAddr = address.parse()?;
        let stream = self
            .netns
            .enter(|| TcpStream::connect_timeout(&address, GUARD))?
            .with_context(|| format!("connect to {address}"))?;
        stream.set_read_timeout(Some(GUARD))?;
        stream.set_nodelay(true)?;
        Ok(Live { stream })
    }

    /// Connects to a listener from this local port.
    pub(crate) fn connect_from(&self, port: u16, address: &str) -> Result<Live> {
        let address: SocketAddr = address.parse()?;
        let stream = self.netns.enter(|| -> std::io::Result<TcpStream> {
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
            socket.set_reuse_address(true)?;
            socket.bind(&SocketAddr::from(([127, 0, 0, 1], port)).into())?;
            socket.connect_timeout(&address.into(), GUARD)?;
            Ok(socket.into())
        })??;
        stream.set_read_timeout(Some(GUARD))?;
        stream.set_nodelay(true)?;
        Ok(Live { stream })
    }

    /// The name that the upstream behind a listener says to a new connection.
    pub(crate) fn ask(&self, address: &str) -> Result<String> {
        self.connect(address)?.name()
    }

    /// Waits until a new connection to the listener reaches the upstream of this name.
    pub(crate) fn reaches(&self, address: &str, name: &str) -> Result<()> {
        self.becomes(address, |answer| answer.as_ref().is_ok_and(|found| found == name))
    }

    /// Waits until connections to the listener are refused.
    pub(crate) fn refused(&self, address: &str) -> Result<()> {
        self.becomes(address, |answer| {
            let error = answer.as_ref().err().map(|error| format!("{error:#}")).unwrap_or_default();
            error.contains("refused")
        })
    }

    fn becomes(&self, address: &str, wanted: impl Fn(&Result<String>) -> bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = self.ask(address);
            if wanted(&answer) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{address} stays {answer:?}");
            sleep(Duration::from_millis(20));
        }
    }
}

/// A connection that a test keeps open.
pub(crate) struct Live {
    stream: TcpStream,
}

/// How a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Bytes go through and come back.
    Open,
    /// The proxy has sent a FIN.
    Fin,
    /// The proxy has reset it.
    Reset,
}

impl Live {
    /// The upstream's first line.
    pub(crate) fn name(&mut self) -> Result<String> {
        let mut line = Vec::new();
        let mut byte = [0];
        while self.stream.read(&mut byte).context("read the upstream's name")? == 1 {
            if byte[0] == b'\n' {
                return Ok(String::from_utf8(line)?);
            }
            line.push(byte[0]);
        }
        anyhow::bail!("the connection ended after {:?}", String::from_utf8_lossy(&line))
    }

    /// Sends a word and waits for its echo.
    pub(crate) fn state(&mut self) -> Result<State> {
        let reset = |error: &std::io::Error| {
            matches!(error.kind(), std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe)
        };
        match self.stream.write_all(b"ping") {
            Ok(()) => {}
            Err(error) if reset(&error) => return Ok(State::Reset),
            Err(error) => return Err(error.into()),
        }
        let mut echo = [0; 4];
        match self.stream.read_exact(&mut echo) {
            Ok(()) => {
                ensure!(&echo == b"ping", "the echo is {echo:?}");
                Ok(State::Open)
            }
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(State::Fin),
            Err(error) if reset(&error) => Ok(State::Reset),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for the end of the connection without sending anything.
    pub(crate) fn end(&mut self) -> Result<State> {
        let mut buffer = [0; 64];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return Ok(State::Fin),
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(State::Reset),
                Err(error) => return Err(error).context("the connection did not end"),
            }
        }
    }
}

/// The proxy's log with an error, for whoever reads the failure.
pub(crate) fn with_log<T>(result: Result<T>, proxy: &Proxy) -> Result<T> {
    result.with_context(|| proxy.log_tail())
}
