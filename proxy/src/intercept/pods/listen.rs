//! Capture listeners inside a pod, and the pod's own addresses. Everything here acts in the network namespace that
//! the calling thread is in.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use socket2::{Domain, Protocol, SockAddr, SockFilter, Socket, Type};

/// Connections that may wait for a worker. The kernel clamps it to the namespace's net.core.somaxconn.
const BACKLOG: i32 = 4096;

/// Destinations that only ask the routing table: nothing is sent. Documentation prefixes (RFC 5737, RFC 3849), so
/// that no specific route is likely to name them.
const OUTSIDE_V4: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1)), 9);
const OUTSIDE_V6: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)), 9);

/// Takes packets that came in over `lo` and drops others: what another pod sends to the capture port isn't even
/// answered. Classic BPF: `ld [interface index]; jeq #1, take; drop`. SO_BINDTODEVICE can't do it: to the kernel's
/// socket lookup, a connection to the pod's own address arrived at the interface that has the address.
const ONLY_OVER_LOOPBACK: [SockFilter; 4] = [
    SockFilter::new(LOAD_WORD, 0, 0, INTERFACE_INDEX),
    SockFilter::new(JUMP_IF_EQUAL, 0, 1, LOOPBACK_INDEX),
    SockFilter::new(RETURN, 0, 0, u32::MAX),
    SockFilter::new(RETURN, 0, 0, 0),
];
const LOAD_WORD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const JUMP_IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
/// `SKF_AD_OFF + SKF_AD_IFINDEX`: not a place in the packet but what the kernel knows about it.
const INTERFACE_INDEX: u32 = (libc::SKF_AD_OFF + libc::SKF_AD_IFINDEX) as u32;
/// Of `lo`, in every network namespace.
const LOOPBACK_INDEX: u32 = 1;

/// The addresses that a pod connects from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct SourceAddresses {
    pub(super) v4: Option<Ipv4Addr>,
    pub(super) v6: Option<Ipv6Addr>,
}

impl SourceAddresses {
    pub(super) fn is_empty(self) -> bool {
        self.v4.is_none() && self.v6.is_none()
    }
}

/// What matters of the network of this namespace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Network {
    /// Whether `lo` is up. Captured connections travel over it.
    pub(super) loopback_up: bool,
    /// What the kernel picks as the source towards the outside.
    pub(super) source: SourceAddresses,
    /// Whether accepted sockets have their SYN: not where every connection has a SYN cookie.
    pub(super) keeps_syn: bool,
}

/// Looks at the network of this namespace.
pub(super) fn network() -> io::Result<Network> {
    let mut found = Network { keeps_syn: keeps_syn(), ..Network::default() };
    let mut first = SourceAddresses::default();
    for interface in getifaddrs()? {
        let up = interface.flags.contains(InterfaceFlags::IFF_UP);
        if interface.flags.contains(InterfaceFlags::IFF_LOOPBACK) {
            found.loopback_up |= up;
        }
        let Some(address) = interface.address.filter(|_| up) else { continue };
        if let Some(v4) = address.as_sockaddr_in() {
            first.v4 = first.v4.or(Some(v4.ip()).filter(|v4| is_global_v4(*v4)));
        } else if let Some(v6) = address.as_sockaddr_in6() {
            first.v6 = first.v6.or(Some(v6.ip()).filter(is_global_v6));
        }
    }
    // No route towards the outside: the first address that others could reach.
    found.source = SourceAddresses {
        v4: match source_towards(OUTSIDE_V4) {
            Some(IpAddr::V4(v4)) if is_global_v4(v4) => Some(v4),
            _ => first.v4,
        },
        v6: match source_towards(OUTSIDE_V6) {
            Some(IpAddr::V6(v6)) if is_global_v6(&v6) => Some(v6),
            _ => first.v6,
        },
    };
    Ok(found)
}

/// `/proc/sys/net` is that of the reading thread's namespace. Unknown: no.
fn keeps_syn() -> bool {
    const SETTING: &str = "/proc/sys/net/ipv4/tcp_syncookies";
    match std::fs::read_to_string(SETTING) {
        Ok(value) => matches!(value.trim(), "0" | "1"),
        // A kernel without SYN cookies.
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

fn source_towards(outside: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr =
        if outside.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(outside).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

fn is_global_v4(address: Ipv4Addr) -> bool {
    !address.is_loopback() && !address.is_link_local() && !address.is_unspecified()
}

fn is_global_v6(address: &Ipv6Addr) -> bool {
    !address.is_loopback() && !address.is_unicast_link_local() && !address.is_unspecified()
}

/// Opens `count` listening sockets on one port of this namespace, `wanted` if it is free, else one that the kernel
/// chooses, and says which. Dual stack where IPv6 is on. Only what arrives over `lo` reaches them: from outside the
/// pod the port is closed.
pub(super) fn capture_listeners(wanted: u16, count: usize) -> io::Result<(Vec<Socket>, u16)> {
    for any in [IpAddr::V6(Ipv6Addr::UNSPECIFIED), IpAddr::V4(Ipv4Addr::UNSPECIFIED)] {
        let bound = match group(SocketAddr::new(any, wanted), count) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => group(SocketAddr::new(any, 0), count),
            other => other,
        };
        match bound {
            Err(error) if any.is_ipv6() && is_without_ipv6(&error) => {}
            other => return other,
        }
    }
    Err(io::ErrorKind::AddrNotAvailable.into())
}

fn is_without_ipv6(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL | libc::EPROTONOSUPPORT))
}

/// One SO_REUSEPORT group, all of it ours. The first socket binds without SO_REUSEPORT, which fails when anybody has
/// the port; with it, the socket would join a group of the same user (an application run by root, or the tidegate
/// that is being replaced) and share its connections. From then on the others may join.
fn group(address: SocketAddr, count: usize) -> io::Result<(Vec<Socket>, u16)> {
    let first = socket(address)?;
    first.bind(&SockAddr::from(address))?;
    first.set_reuse_port(true)?;
    let port = first.local_addr()?.as_socket().map_or(0, |address| address.port());
    let mut sockets = vec![first];
    while sockets.len() < count {
        let next = socket(address)?;
        next.set_reuse_port(true)?;
        next.bind(&SockAddr::from(SocketAddr::new(address.ip(), port)))?;
        sockets.push(next);
    }
    // Listening only when all are bound: a connection can't arrive before the group is complete.
    sockets.iter().try_for_each(|socket| socket.listen(BACKLOG))?;
    Ok((sockets, port))
}

fn socket(address: SocketAddr) -> io::Result<Socket> {
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // Connections of a former process that linger in TIME_WAIT don't hold the port.
    socket.set_reuse_address(true)?;
    socket.attach_filter(&ONLY_OVER_LOOPBACK)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::net::{TcpListener, TcpStream};
    use std::process::Command;

    use super::*;
    use crate::sys::netns::NetNs;
    use crate::sys::netns::testing::new_namespace;

    fn ip(args: &str) {
        let status = Command::new("ip").args(args.split(' ')).status().expect("ip(8)");
        assert!(status.success(), "ip {args}");
    }

    fn inside<R>(ns: &NetNs, run: impl FnOnce() -> R) -> R {
        let _inside = ns.enter().unwrap();
        run()
    }

    #[test]
    fn the_wanted_port_and_no_other_when_it_is_free() {
        let ns = new_namespace();
        inside(&ns, || {
            assert!(!network().unwrap().loopback_up);
            ip("link set lo up");
            let (sockets, port) = capture_listeners(15001, 3).unwrap();
            assert_eq!((sockets.len(), port), (3, 15001));
            for address in ["127.0.0.1", "::1", "::ffff:127.0.0.1"] {
                let address: IpAddr = address.parse().unwrap();
                TcpStream::connect((address, port)).unwrap();
            }
            let accepted: usize =
                sockets.iter().map(|socket| std::iter::from_fn(|| socket.accept().ok()).count()).sum();
            assert_eq!(accepted, 3);
            assert!(network().unwrap().loopback_up);
        });
    }

    #[test]
    fn a_taken_port_is_left_to_its_owner() {
        let ns = new_namespace();
        inside(&ns, || {
            ip("link set lo up");
            let (ours, first) = capture_listeners(15001, 2).unwrap();
            // A second process of the same user: it must not join the group of the first.
            let (others, second) = capture_listeners(15001, 2).unwrap();
            assert_eq!(first, 15001);
            assert_ne!(second, first);
            drop(ours);
            let application = TcpListener::bind("0.0.0.0:15001").unwrap();
            let (_sockets, third) = capture_listeners(15001, 2).unwrap();
            assert!(![first, second, 0].contains(&third));
            drop((application, others));
        });
    }

    #[test]
    fn lingering_connections_of_a_former_process_do_not_hold_the_port() {
        let ns = new_namespace();
        inside(&ns, || {
            ip("link set lo up");
            let (sockets, port) = capture_listeners(15001, 1).unwrap();
            let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
            let (accepted, _) = sockets[0].accept().unwrap();
            drop(accepted); // closes first, so its end goes to TIME_WAIT
            assert_eq!(client.read(&mut [0]).unwrap(), 0);
            drop((client, sockets));
            assert_eq!(capture_listeners(15001, 1).unwrap().1, 15001);
        });
    }

    #[test]
    fn unreachable_from_outside_the_pod() {
        let (pod, outside) = (new_namespace(), new_namespace());
        inside(&outside, || {
            ip("link set lo up");
            ip("link add v0 type veth peer name v1");
            let target = format!("/proc/{}/fd/{}", std::process::id(), {
                use std::os::fd::{AsFd as _, AsRawFd as _};
                pod.as_fd().as_raw_fd()
            });
            ip(&format!("link set v1 netns {target}"));
            ip("addr add 10.9.9.1/24 dev v0");
            ip("link set v0 up");
        });
        let (sockets, _) = inside(&pod, || {
            ip("link set lo up");
            ip("addr add 10.9.9.2/24 dev v1");
            ip("link set v1 up");
            let sockets = capture_listeners(15001, 1).unwrap();
            // Its own address is reached over lo. Data passes the filter as well.
            let mut stream = TcpStream::connect("10.9.9.2:15001").unwrap();
            std::io::Write::write_all(&mut stream, b"x").unwrap();
            assert_eq!(network().unwrap().source.v4, Some(Ipv4Addr::new(10, 9, 9, 2)));
            sockets
        });
        inside(&outside, || {
            let address = "10.9.9.2:15001".parse().unwrap();
            // The pod answers on other ports …
            let closed = TcpStream::connect("10.9.9.2:15002").unwrap_err();
            assert_eq!(closed.kind(), io::ErrorKind::ConnectionRefused);
            // … and says nothing on this one.
            let silent =
                TcpStream::connect_timeout(&address, std::time::Duration::from_millis(300)).unwrap_err();
            assert_eq!(silent.kind(), io::ErrorKind::TimedOut);
        });
        assert_eq!(std::iter::from_fn(|| sockets[0].accept().ok()).count(), 1, "the pod's own only");
    }

    #[test]
    fn a_pod_without_ipv6() {
        let ns = new_namespace();
        inside(&ns, || {
            ip("link set lo up");
            ip("link add d0 type veth peer name d1");
            ip("addr add 10.1.2.3/24 dev d0");
            ip("link set d0 up");
            // /proc/sys/net shows the namespace of the reading thread.
            std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
            let (_sockets, port) = capture_listeners(15001, 2).unwrap();
            TcpStream::connect(("127.0.0.1", port)).unwrap();
            let found = network().unwrap();
            assert_eq!(found.source, SourceAddresses { v4: Some(Ipv4Addr::new(10, 1, 2, 3)), v6: None });
        });
    }

    #[test]
    fn the_source_is_what_the_route_says() {
        let ns = new_namespace();
        inside(&ns, || {
            ip("link set lo up");
            assert!(network().unwrap().source.is_empty());
            ip("link add d0 type veth peer name d1");
            ip("addr add 169.254.7.7/16 dev d0");
            ip("addr add 10.1.0.1/24 dev d0");
            ip("addr add 10.2.0.1/24 dev d0");
            ip("addr add 2001:db8:7::1/64 dev d0 nodad");
            ip("link set d0 up");
            let source = network().unwrap().source;
            assert_eq!(
                source.v4,
                Some(Ipv4Addr::new(10, 1, 0, 1)),
                "no route: the first that others can reach"
            );
            assert_eq!(source.v6, Some("2001:db8:7::1".parse().unwrap()));
            ip("route add default via 10.2.0.254");
            assert_eq!(network().unwrap().source.v4, Some(Ipv4Addr::new(10, 2, 0, 1)));
        });
    }
}
