//! The control plane of the measurement, and the servers behind what it serves.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use prost::Message as _;
use tidegate_api::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use tidegate_tests::control_plane::{ControlPlane, Kind, Method, Stream, delta_response, resource, wrapped};
use tidegate_tests::load::Server;

use super::node::Node;
use super::world::{PROBE, World};

/// How long a proxy may take for anything.
const PATIENCE: Duration = Duration::from_mins(3);

/// Between two changes of the probe's endpoint.
const PAUSE: Duration = Duration::from_millis(3);

/// Responses that are encoded already.
pub(super) type Prepared = BTreeMap<Kind, Message>;

/// One of them.
#[derive(Debug)]
pub(super) struct Message {
    nonce: u64,
    /// Resources in it.
    count: usize,
    message: Vec<u8>,
}

/// Serves a [`World`] to one proxy.
#[derive(Debug)]
pub(super) struct Plane<'w> {
    world: &'w World,
    server: ControlPlane,
    stream: Option<Stream>,
    generation: u32,
    nonce: u64,
    /// The last nonce of each kind that was accepted.
    accepted: BTreeMap<Kind, u64>,
    echo: Server,
    marks: [Mark; 2],
    /// Where the probe's endpoint is.
    at: usize,
}

impl<'w> Plane<'w> {
    pub(super) fn start(world: &'w World) -> Result<Self> {
        Ok(Self {
            world,
            server: ControlPlane::start(None)?,
            stream: None,
            generation: 0,
            nonce: 0,
            accepted: BTreeMap::new(),
            echo: Server::echo(address(0))?,
            marks: [Mark::start(address(1), b'0')?, Mark::start(address(2), b'1')?],
            at: 0,
        })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.server.address()
    }

    pub(super) fn echo(&self) -> SocketAddr {
        self.echo.address()
    }

    /// Gets ready for [`Plane::serve_start`]: encodes what the proxy will ask for.
    pub(super) fn prepare(&mut self) -> Result<Prepared> {
        let kinds = [Kind::Cluster, Kind::Endpoints, Kind::Listener];
        kinds
            .into_iter()
            .map(|kind| {
                let mut resources = self.world.resources(kind, self.generation)?;
                if kind == Kind::Endpoints {
                    resources.push(self.probe("start")?);
                }
                let count = resources.len();
                let (nonce, message) = self.encode(kind, resources);
                Ok((kind, Message { nonce, count, message }))
            })
            .collect()
    }

    /// Answers what a proxy asks for at its start, until it says that it is ready.
    pub(super) fn serve_start(&mut self, node: &Node, mut prepared: Prepared) -> Result<()> {
        let begun = Instant::now();
        self.stream = Some(self.server.stream(Method::DELTA_ADS)?);
        while !self.accepted.contains_key(&Kind::Listener) {
            let request = self.request().with_context(|| node.log())?;
            self.answer(&request, &mut prepared)?;
        }
        while !node.is_ready() {
            ensure!(begun.elapsed() < PATIENCE, "not ready after {PATIENCE:?}; {}", node.log());
            sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Moves the endpoint of the probe's cluster. How long until the proxy has accepted it, and until a connection
    /// reached the new one.
    pub(super) fn move_probe(&mut self, node: &Node, number: usize) -> Result<(Duration, Duration)> {
        sleep(PAUSE);
        self.at = 1 - self.at;
        let wanted = self.marks[self.at].mark;
        let resource = self.probe(&format!("move-{number}"))?;
        let probe = node.probe;
        thread::scope(|scope| {
            let begun = Instant::now();
            let effective = scope.spawn(move || {
                while read_mark(probe)? != wanted {
                    ensure!(begun.elapsed() < PATIENCE, "the new endpoint never got a connection");
                }
                Ok(begun.elapsed())
            });
            let nonce = self.send(Kind::Endpoints, vec![resource])?;
            self.acknowledged(Kind::Endpoints, nonce)?;
            let acked = begun.elapsed();
            let effective =
                effective.join().map_err(|_| anyhow::anyhow!("the probing thread panicked"))??;
            Ok((acked, effective))
        })
    }

    /// Every resource, changed.
    pub(super) fn prepare_change(&mut self) -> Result<Prepared> {
        self.generation += 1;
        self.prepare()
    }

    /// Sends everything at once; until the proxy has accepted it.
    pub(super) fn change_everything(&mut self, prepared: Prepared) -> Result<()> {
        let stream = self.stream.as_ref().context("no stream")?;
        for kind in [Kind::Cluster, Kind::Endpoints, Kind::Listener] {
            stream.send_message(&prepared[&kind].message);
        }
        for (kind, message) in prepared {
            self.acknowledged(kind, message.nonce)?;
        }
        Ok(())
    }

    fn request(&self) -> Result<DeltaDiscoveryRequest> {
        self.stream.as_ref().context("no stream yet")?.delta_request_within(PATIENCE)
    }

    fn acknowledged(&mut self, kind: Kind, nonce: u64) -> Result<()> {
        while self.accepted.get(&kind).is_none_or(|accepted| *accepted < nonce) {
            let request = self.request()?;
            self.answer(&request, &mut Prepared::new())?;
        }
        Ok(())
    }

    /// Notes an ACK; sends what is asked for.
    fn answer(&mut self, request: &DeltaDiscoveryRequest, prepared: &mut Prepared) -> Result<()> {
        let Some(kind) = Kind::of(&request.type_url) else { bail!("a request for {:?}", request.type_url) };
        if let Some(error) = &request.error_detail {
            bail!("{kind:?} rejected: {}", error.message);
        }
        if let Ok(nonce) = request.response_nonce.parse() {
            self.accepted.insert(kind, nonce);
            return Ok(());
        }
        let wanted = &request.resource_names_subscribe;
        match prepared.remove(&kind) {
            Some(ready) if kind != Kind::Endpoints || ready.count == wanted.len() => {
                self.stream.as_ref().context("no stream")?.send_message(&ready.message);
            }
            _ if kind == Kind::Endpoints && !wanted.is_empty() => {
                let resources = self.endpoints(wanted)?;
                self.send(kind, resources)?;
            }
            _ => {}
        }
        Ok(())
    }

    fn endpoints(&self, names: &[String]) -> Result<Vec<Resource>> {
        let mut resources = Vec::with_capacity(names.len());
        for name in names {
            if name == PROBE {
                resources.push(self.probe("start")?);
            } else {
                resources.extend(self.world.endpoints(name, self.generation)?);
            }
        }
        Ok(resources)
    }

    fn probe(&self, version: &str) -> Result<Resource> {
        let address = self.marks[self.at].address.to_string();
        Ok(wrapped(version, &resource::endpoints(PROBE, &[&address])?))
    }

    fn send(&mut self, kind: Kind, resources: Vec<Resource>) -> Result<u64> {
        let (nonce, message) = self.encode(kind, resources);
        self.stream.as_ref().context("no stream")?.send_message(&message);
        Ok(nonce)
    }

    fn encode(&mut self, kind: Kind, resources: Vec<Resource>) -> (u64, Vec<u8>) {
        self.nonce += 1;
        let response: DeltaDiscoveryResponse = delta_response(kind, &self.nonce.to_string(), resources, &[]);
        (self.nonce, response.encode_to_vec())
    }
}

fn address(offset: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, 21_000 + offset))
}

/// A server that says one byte to everybody and closes.
#[derive(Debug)]
struct Mark {
    address: SocketAddr,
    mark: u8,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Mark {
    fn start(address: SocketAddr, mark: u8) -> Result<Self> {
        let listener = TcpListener::bind(address).with_context(|| format!("bind {address}"))?;
        let stop: Arc<AtomicBool> = Arc::default();
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new().name("mark".to_owned()).spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                if let Ok(mut stream) = stream {
                    let _ = stream.write_all(&[mark]);
                }
            }
        })?;
        Ok(Self { address, mark, stop, thread: Some(thread) })
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address); // wakes it
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn read_mark(address: SocketAddr) -> Result<u8> {
    let mut stream = TcpStream::connect(address).context("connect to the probe")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut mark = [0];
    stream.read_exact(&mut mark).context("read from the probe")?;
    Ok(mark[0])
}
