//! sock_diag(7): the TCP connections of a network namespace to some remote address, what an eBPF socket storage holds
//! for each, and an end for the ones that are picked.
//!
//! Everything acts in the network namespace that the calling thread was in at [`SocketDiag::open`].

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

/// Message types (linux/sock_diag.h, linux/netlink.h).
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const ERROR: u16 = libc::NLMSG_ERROR as u16;
const DONE: u16 = libc::NLMSG_DONE as u16;

/// Attributes of requests and answers (linux/inet_diag.h, linux/sock_diag.h).
const REQUEST_STORAGES: u16 = 2;
const REQUEST_STORAGE_MAP: u16 = 1;
const STORAGES: u16 = 20;
const STORAGE: u16 = 1;
const STORAGE_VALUE: u16 = 3;
/// Without the bits for nesting and byte order.
const ATTRIBUTE_TYPE: u16 = 0x3fff;

/// Lengths: nlmsghdr, nlattr, inet_diag_sockid, inet_diag_msg.
const HEADER: usize = 16;
const ATTRIBUTE: usize = 4;
const ID: usize = 48;
/// In an inet_diag_sockid.
const COOKIE: usize = 40;
const MESSAGE: usize = 4 + ID + 20;

/// Every state that has a socket of its own and a peer: not TIME_WAIT (6), CLOSE (7), LISTEN (10), NEW_SYN_RECV (12).
const CONNECTED: u32 = 0xfff & !(1 << 6 | 1 << 7 | 1 << 10);

/// How much the kernel may give at one time; a socket takes a few hundred bytes.
const BUFFER: usize = 1 << 16;

/// A netlink socket.
#[derive(Debug)]
pub struct SocketDiag {
    fd: OwnedFd,
}

/// A TCP connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// Its own end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// What the storage that was asked for holds for it.
    pub stored: Option<Vec<u8>>,
    family: u8,
    /// As the kernel gave it; with the socket's cookie, so that it is never another socket with the same addresses.
    id: [u8; ID],
}

impl SocketDiag {
    /// Of the calling thread's network namespace.
    pub fn open() -> io::Result<Self> {
        let protocol = SockProtocol::NetlinkSockDiag;
        Ok(Self { fd: socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)? })
    }

    /// Connections to this address, also of IPv6 sockets to an IPv4 address; with what `storage`, a
    /// BPF_MAP_TYPE_SK_STORAGE map, holds for each (needs CAP_BPF).
    pub fn connections_to(
        &self,
        remote: SocketAddr,
        storage: Option<BorrowedFd<'_>>,
    ) -> io::Result<Vec<Connection>> {
        let mut found = Vec::new();
        let families: &[i32] =
            if remote.is_ipv4() { &[libc::AF_INET, libc::AF_INET6] } else { &[libc::AF_INET6] };
        for family in families {
            let mut id = [0; ID];
            id[2..4].copy_from_slice(&remote.port().to_be_bytes());
            let mut body = request(*family as u8, &id);
            if let Some(map) = storage {
                let map = attribute(REQUEST_STORAGE_MAP, &map.as_raw_fd().to_ne_bytes());
                body.extend(attribute(REQUEST_STORAGES, &map));
            }
            self.send(SOCK_DIAG_BY_FAMILY, libc::NLM_F_DUMP, &body)?;
            self.receive(|message| {
                found.extend(Connection::parse(message).filter(|connection| connection.remote == remote));
            })?;
        }
        Ok(found)
    }

    /// Ends a connection at once: its owner gets ECONNABORTED, the other end a RST. False when it is over already.
    ///
    /// Errors: EOPNOTSUPP when the kernel was built without INET_DIAG_DESTROY; EPERM without CAP_NET_ADMIN in the namespace.
    pub fn destroy(&self, connection: &Connection) -> io::Result<bool> {
        self.send(SOCK_DESTROY, libc::NLM_F_ACK, &request(connection.family, &connection.id))?;
        match self.receive(|_| {}) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn send(&self, kind: u16, flags: i32, body: &[u8]) -> io::Result<()> {
        let flags = (libc::NLM_F_REQUEST | flags) as u16;
        let mut message = Vec::with_capacity(HEADER + body.len());
        message.extend(((HEADER + body.len()) as u32).to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        // Sequence number and sender: one request at a time, and the kernel knows the sender.
        message.extend([0; 8]);
        message.extend(body);
        send(self.fd.as_raw_fd(), &message, MsgFlags::empty())?;
        Ok(())
    }

    /// Takes the answer to one request. What the kernel cannot mean is passed over.
    fn receive(&self, mut each: impl FnMut(&[u8])) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER];
        loop {
            let len = match recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Err(nix::Error::EINTR) => continue,
                received => received?,
            };
            let mut rest = buffer.get(..len).unwrap_or_default();
            while let Some((kind, body, next)) = next_message(rest) {
                match kind {
                    DONE => return Ok(()),
                    ERROR => return error_of(body),
                    _ => each(body),
                }
                rest = next;
            }
        }
    }
}

impl Connection {
    /// Of its socket (SO_COOKIE).
    pub fn cookie(&self) -> u64 {
        // Two halves, the lower one first.
        let half = |at: usize| u64::from(u32::from_ne_bytes([0, 1, 2, 3].map(|i| self.id[at + i])));
        half(COOKIE) | half(COOKIE + 4) << 32
    }

    fn parse(message: &[u8]) -> Option<Self> {
        let (family, id) = (*message.first()?, message.get(4..4 + ID)?);
        let (local, remote) = (endpoint(family, id, 0, 4)?, endpoint(family, id, 2, 20)?);
        let stored = find(message.get(MESSAGE..)?, STORAGES)
            .and_then(|storages| find(storages, STORAGE))
            .and_then(|storage| find(storage, STORAGE_VALUE))
            .map(<[u8]>::to_vec);
        Some(Self { local, remote, stored, family, id: id.try_into().ok()? })
    }
}

/// inet_diag_req_v2.
fn request(family: u8, id: &[u8; ID]) -> Vec<u8> {
    let mut request = vec![family, libc::IPPROTO_TCP as u8, 0, 0];
    request.extend(CONNECTED.to_ne_bytes());
    request.extend(id);
    request
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut attribute = Vec::new();
    attribute.extend(((ATTRIBUTE + value.len()) as u16).to_ne_bytes());
    attribute.extend(kind.to_ne_bytes());
    attribute.extend(value);
    attribute
}

/// Kind and body of the first message, and what follows it.
fn next_message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let len = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let body = bytes.get(HEADER..len)?;
    Some((kind, body, bytes.get(len.next_multiple_of(4)..).unwrap_or_default()))
}

/// The body of an error message begins with a negative errno; 0: it worked.
fn error_of(body: &[u8]) -> io::Result<()> {
    let code = body.get(..4).and_then(|code| code.try_into().ok()).map_or(libc::EPROTO, i32::from_ne_bytes);
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code.wrapping_abs())) }
}

/// The value of the first attribute of this kind.
fn find(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let len = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & ATTRIBUTE_TYPE;
        let value = bytes.get(ATTRIBUTE..len)?;
        if kind == wanted {
            return Some(value);
        }
        bytes = bytes.get(len.next_multiple_of(4)..)?;
    }
}

/// Port and address in an inet_diag_sockid; an IPv4 address in IPv6 is IPv4.
fn endpoint(family: u8, id: &[u8], port: usize, address: usize) -> Option<SocketAddr> {
    let port = u16::from_be_bytes(id.get(port..port + 2)?.try_into().ok()?);
    let bytes: [u8; 16] = id.get(address..address + 16)?.try_into().ok()?;
    let ip = match i32::from(family) {
        libc::AF_INET => IpAddr::V4(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3])),
        libc::AF_INET6 => IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical(),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn connections_are_found_and_the_one_that_is_picked_is_ended() {
        let listener = TcpListener::bind("[::]:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let address = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        let mapped = SocketAddr::new(Ipv4Addr::LOCALHOST.to_ipv6_mapped().into(), port);
        // One of each kind of socket, and one to another address.
        let [mut a, b, _elsewhere] = [address, mapped, SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port)]
            .map(|to| TcpStream::connect(to).unwrap());
        let accepted: Vec<_> = (0..3).map(|_| listener.accept().unwrap()).collect();
        let diag = SocketDiag::open().unwrap();
        let found = diag.connections_to(address, None).unwrap();
        let of = |socket: &TcpStream| {
            let port = socket.local_addr().unwrap().port();
            found.iter().find(|connection| connection.local.port() == port).unwrap()
        };
        assert_eq!(found.len(), 2, "{found:?}");
        assert_eq!((of(&a).local, of(&a).remote), (a.local_addr().unwrap(), address));
        assert_eq!((of(&b).remote, &of(&b).stored), (address, &None));

        assert!(diag.destroy(of(&a)).unwrap());
        assert!(!diag.destroy(of(&a)).unwrap(), "it is over");
        assert_eq!(a.read(&mut [0]).unwrap_err().raw_os_error(), Some(libc::ECONNABORTED));
        let its_peer = accepted.iter().find(|(_, peer)| peer.port() == of(&a).local.port());
        let mut peer = &its_peer.unwrap().0;
        assert_eq!(peer.read(&mut [0]).unwrap_err().raw_os_error(), Some(libc::ECONNRESET));
        assert_eq!(diag.connections_to(address, None).unwrap(), [of(&b).clone()]);
    }

    #[test]
    fn answers_that_are_cut_off_are_not_read_beyond_their_end() {
        let whole = {
            let storage = attribute(STORAGES, &attribute(STORAGE, &attribute(STORAGE_VALUE, &[9; 8])));
            let mut body = vec![libc::AF_INET as u8, 1, 0, 0];
            body.extend([0; ID]);
            body.extend([0; 20]);
            body.extend(storage);
            body
        };
        assert_eq!(Connection::parse(&whole).unwrap().stored, Some(vec![9; 8]));
        for len in 0..whole.len() {
            let parsed = Connection::parse(&whole[..len]);
            assert!(parsed.is_none_or(|connection| connection.stored.is_none()), "{len}");
        }
        assert_eq!(next_message(&[255; 15]), None);
        assert_eq!(next_message(&[255; 64]), None);
        assert_eq!(find(&[0; 16], 1), None);
        assert_eq!(error_of(&[]).unwrap_err().raw_os_error(), Some(libc::EPROTO));
    }
}
