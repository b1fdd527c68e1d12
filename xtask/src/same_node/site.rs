//! Where connections are made: inside one namespace, and between two.

use std::fmt::{self, Display, Formatter};
use std::fs;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{MsgFlags, SockaddrStorage, sendto};
use socket2::{Domain, Protocol, Socket, Type};
use tidegate_tests::cgroup::{self, Cgroup};
use tidegate_tests::netns::Netns;

use super::kernel;

/// How long a blocking call may take that nothing ends: long against a wakeup, short enough to wait for.
pub(super) const PATIENCE: Duration = Duration::from_millis(300);

/// How the two ends reach each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    Loopback,
    Veth,
}

impl Display for Route {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Loopback => "loopback",
            Self::Veth => "veth",
        })
    }
}

/// Two namespaces joined by veth, and the cgroup in which all sockets are made.
#[derive(Debug)]
pub(super) struct Site {
    client: Netns,
    server: Netns,
    membership: Membership,
}

const CLIENT: &str = "10.71.0.1";
const SERVER: &str = "10.71.0.2";

/// Data in a SYN, without cookies: client 1, server 2, client needs none 4, server needs none 0x200.
const FAST_OPEN: &str = "519";

/// What is set on sockets before they connect or listen.
pub(super) type Options = fn(&Socket) -> io::Result<()>;

/// The client's socket and the server's.
pub(super) type Pair = (Socket, Socket);

impl Site {
    pub(super) fn new() -> Result<Self> {
        let (client, server) = (Netns::new("client")?, Netns::new("server")?);
        client.ip(&format!("link add eth0 type veth peer name eth0 netns {}", server.name()))?;
        for (netns, address) in [(&client, CLIENT), (&server, SERVER)] {
            netns.ip(&format!("addr add {address}/24 dev eth0\nlink set eth0 up"))?;
            netns.sysctl("net.ipv4.tcp_fastopen", FAST_OPEN)?;
            // In every kernel, and without pacing: what is compared is the way, not a model of a line.
            netns.sysctl("net.ipv4.tcp_congestion_control", "reno")?;
        }
        Ok(Self { client, server, membership: Membership::new()? })
    }

    /// The cgroup in which all sockets are made.
    pub(super) fn cgroup(&self) -> &Path {
        self.membership.cgroup.path()
    }

    /// Cuts the client's link, or mends it.
    pub(super) fn set_link(&self, up: bool) -> Result<()> {
        self.client.ip(&format!("link set eth0 {}", if up { "up" } else { "down" }))
    }

    /// Limits what the client may send to 8 Mbit/s, as container networks do, and keeps that line busy until the result is
    /// dropped.
    pub(super) fn busy_line(&self) -> Result<BusyLine> {
        let limit = [
            "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", "8mbit", "burst", "4kb", "latency",
            "500ms",
        ];
        let status = self.client.command("tc").args(limit).status().context("run `tc` (Debian: iproute2)")?;
        ensure!(status.success(), "tc qdisc replace: {status}");
        let socket = self.client.enter(|| UdpSocket::bind((CLIENT, 0)))??;
        // 50 ms of the line at once, and then as much as it carries: whatever comes next waits so long.
        for _ in 0..40 {
            socket.send_to(&[0; DATAGRAM], (SERVER, 9))?;
        }
        let over = Arc::new(AtomicBool::new(false));
        let stop = over.clone();
        let filler = thread::spawn(move || {
            let start = Instant::now();
            let mut sent = 0;
            while !stop.load(Ordering::Relaxed) {
                if start.elapsed() > EACH * sent {
                    let _ = socket.send_to(&[0; DATAGRAM], (SERVER, 9));
                    sent += 1;
                }
                thread::sleep(Duration::from_micros(300));
            }
        });
        Ok(BusyLine { netns: self.client.clone(), over, filler: Some(filler) })
    }

    /// A connection.
    pub(super) fn connect(&self, route: Route, options: Options) -> Result<Pair> {
        let (client, listener, address) = self.halves(route, options)?;
        client.connect(&address.into()).context("connect")?;
        Ok((client, accept(&listener)?))
    }

    /// A connection whose server socket comes into being with the first data, which is sent at once.
    pub(super) fn connect_deferred(&self, route: Route, first: &[u8]) -> Result<Pair> {
        let (client, listener, address) = self.halves(route, |_| Ok(()))?;
        kernel::set_option(&listener, libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, 10)?;
        client.connect(&address.into()).context("connect")?;
        client.send(first)?;
        Ok((client, accept(&listener)?))
    }

    /// A connection that begins with data in its SYN.
    pub(super) fn connect_fast_open(&self, route: Route, first: &[u8]) -> Result<Pair> {
        let (client, listener, address) = self.halves(route, |_| Ok(()))?;
        kernel::set_option(&listener, libc::IPPROTO_TCP, libc::TCP_FASTOPEN, 16)?;
        let address = SockaddrStorage::from(address);
        sendto(client.as_raw_fd(), first, &address, MsgFlags::from_bits_retain(libc::MSG_FASTOPEN))
            .context("send data in a SYN")?;
        Ok((client, accept(&listener)?))
    }

    /// A socket of the client that is not connected, and a listener with its address.
    pub(super) fn halves(&self, route: Route, options: Options) -> Result<(Socket, Socket, SocketAddr)> {
        let (client, address) = match route {
            Route::Loopback => (&self.server, "127.0.0.1"),
            Route::Veth => (&self.client, SERVER),
        };
        let listener = self.server.enter(|| -> Result<Socket> {
            let listener = socket(options)?;
            listener.bind(&SocketAddr::new(address.parse()?, 0).into())?;
            listener.listen(128)?;
            Ok(listener)
        })??;
        let address = listener.local_addr()?.as_socket().context("the listener has no address")?;
        Ok((client.enter(|| socket(options))??, listener, address))
    }
}

/// Bytes of a datagram, and how long it takes on the line.
const DATAGRAM: usize = 1_200;
const EACH: Duration = Duration::from_micros(1_250);

/// A line with a queue. Dropping it ends both.
#[derive(Debug)]
pub(super) struct BusyLine {
    netns: Netns,
    over: Arc<AtomicBool>,
    filler: Option<JoinHandle<()>>,
}

impl Drop for BusyLine {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let _ = self.filler.take().map(JoinHandle::join);
        let _ = self.netns.command("tc").args(["qdisc", "del", "dev", "eth0", "root"]).status();
    }
}

fn socket(options: Options) -> Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    bound_waits(&socket)?;
    options(&socket)?;
    Ok(socket)
}

/// The next connection, whose calls don't block for ever.
pub(super) fn accept(listener: &Socket) -> Result<Socket> {
    let socket = listener.accept().context("accept")?.0;
    bound_waits(&socket)?;
    Ok(socket)
}

/// No call blocks for ever: what hangs is a finding.
fn bound_waits(socket: &Socket) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))
}

/// This process in a cgroup of its own: sockets belong to the cgroup of the process that makes them.
#[derive(Debug)]
struct Membership {
    cgroup: Cgroup,
}

/// The cgroup that this process came from.
static FORMER: OnceLock<PathBuf> = OnceLock::new();

impl Membership {
    fn new() -> Result<Self> {
        let mount =
            cgroup::mount_point().context("no cgroup2 mount: mount -t cgroup2 none /sys/fs/cgroup")?;
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::"));
        let own = own.context("this process has no cgroup v2")?;
        let cgroup = Cgroup::new("same-node")?;
        FORMER.get_or_init(|| mount.join(own.trim_start_matches('/')));
        enter(cgroup.path())?;
        Ok(Self { cgroup })
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        leave_cgroup();
    }
}

/// Goes back to where this process came from. Whoever removes a cgroup ends what runs in it.
pub(super) fn leave_cgroup() {
    if let Some(former) = FORMER.get()
        && let Err(error) = enter(former)
    {
        eprintln!("{error:#}");
    }
}

fn enter(cgroup: &Path) -> Result<()> {
    let path = cgroup.join("cgroup.procs");
    fs::write(&path, "0").with_context(|| format!("write {}", path.display()))
}
