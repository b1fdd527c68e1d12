//! Servers on threads inside a namespace.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, Socket, Type};

use crate::netns::Netns;
use crate::script::{self, Step, Transcript};

/// One connection that an upstream served to its end.
#[derive(Clone, Debug)]
pub struct Served {
    /// Who connected.
    pub peer: SocketAddr,
    /// What the upstream saw.
    pub transcript: Transcript,
}

/// A listening server; stops on drop.
#[derive(Debug)]
pub struct Upstream {
    address: SocketAddr,
    accepted: Arc<Mutex<Vec<SocketAddr>>>,
    served: Mutex<Receiver<Served>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Upstream {
    /// Listens on `address` inside `netns` (none: where the caller is) and runs `steps` on every connection.
    pub fn start(netns: Option<&Netns>, address: &str, steps: Vec<Step>) -> Result<Self> {
        Self::start_with(netns, address, move |stream| script::run(stream, &steps))
    }

    /// Echoes until the end of the connection.
    pub fn echo(netns: Option<&Netns>, address: &str) -> Result<Self> {
        Self::start(netns, address, vec![Step::Echo])
    }

    /// Sends its name at once and then echoes.
    pub fn identify(netns: Option<&Netns>, address: &str, name: &str) -> Result<Self> {
        Self::start(netns, address, vec![script::write(&format!("{name}\n")), Step::Echo])
    }

    /// Runs `serve` on every connection.
    pub fn start_with(
        netns: Option<&Netns>,
        address: &str,
        serve: impl Fn(TcpStream) -> Transcript + Clone + Send + 'static,
    ) -> Result<Self> {
        let wanted: SocketAddr = address.parse().with_context(|| format!("address {address}"))?;
        let bind = move || listen(wanted);
        let listener = match netns {
            Some(netns) => netns.enter(bind)?,
            None => bind(),
        }
        .with_context(|| format!("listen on {address}"))?;
        let address = listener.local_addr()?;
        let (sender, served) = channel();
        let accepted: Arc<Mutex<Vec<SocketAddr>>> = Arc::default();
        let stop: Arc<AtomicBool> = Arc::default();
        let thread = {
            let (accepted, stop) = (accepted.clone(), stop.clone());
            thread::spawn(move || {
                while !stop.load(Ordering::Acquire) {
                    let Ok((stream, peer)) = listener.accept() else {
                        thread::sleep(Duration::from_millis(2));
                        continue;
                    };
                    let _ = stream.set_nonblocking(false);
                    accepted.lock().unwrap_or_else(PoisonError::into_inner).push(peer);
                    let (serve, sender) = (serve.clone(), sender.clone());
                    thread::spawn(move || {
                        let transcript = serve(stream);
                        let _ = sender.send(Served { peer, transcript });
                    });
                }
            })
        };
        Ok(Self { address, accepted, served: Mutex::new(served), stop, thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Peers of all connections so far, in order.
    pub fn accepted(&self) -> Vec<SocketAddr> {
        self.accepted.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The connections that have ended and were not asked for before.
    pub fn ended(&self) -> Vec<Served> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner).try_iter().collect()
    }

    /// The next connection that ended; waits for it.
    pub fn served(&self) -> Result<Served> {
        let served = self.served.lock().unwrap_or_else(PoisonError::into_inner);
        served.recv_timeout(script::GUARD * 2).with_context(|| {
            format!("no connection to {} ended ({:?} accepted)", self.address, self.accepted())
        })
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A nonblocking listening socket, so that its thread can be told to stop.
fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(4096)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}
