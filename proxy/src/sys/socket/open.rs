//! Creating sockets: listening ones, and ones to connect with.

use std::borrow::Cow;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::time::Duration;

use socket2::{Domain, Protocol, SockAddr, Socket, TcpKeepalive, Type};
use thiserror::Error;

use super::option::{SocketOption, SocketState};
use super::set_option;

/// `IP_BIND_ADDRESS_NO_PORT`: choose the port at connect time, so that one port may serve many destinations.
const BIND_ADDRESS_NO_PORT: libc::c_int = libc::IP_BIND_ADDRESS_NO_PORT;

/// How the step of [`OpenError`] begins for a [`SocketOption`].
const OPTION: &str = "set the socket option";

/// TCP keepalive. What is unset has the kernel's default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keepalive {
    /// Idle time before the first probe; whole seconds, 1 to 32767.
    pub time: Option<Duration>,
    /// Between probes; whole seconds, 1 to 32767.
    pub interval: Option<Duration>,
    /// Probes without an answer before the connection is given up; 1 to 127.
    pub probes: Option<u32>,
}

/// How a listening socket is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerOptions<'a> {
    /// Several sockets on one address; the kernel spreads connections over them (`SO_REUSEPORT`).
    pub reuse_port: bool,
    /// Accepts connections to addresses that are not ours (TPROXY). Needs `CAP_NET_ADMIN`.
    pub transparent: bool,
    /// Binds to an address that does not exist yet.
    pub freebind: bool,
    /// An IPv6 wildcard that takes no IPv4 connections; Envoy's `ipv4_compat` is the opposite.
    pub v6_only: bool,
    /// Connections that may wait to be accepted; the kernel caps it at `net.core.somaxconn`.
    pub backlog: u32,
    /// Length of the TCP Fast Open queue; none leaves Fast Open off.
    pub fast_open_queue: Option<u32>,
    /// Takes only what arrives by this interface.
    pub bind_to_device: Option<&'a str>,
    /// For the accepted connections, which inherit it.
    pub keepalive: Option<Keepalive>,
    /// In their order, after all of the above.
    pub socket_options: &'a [SocketOption],
}

impl Default for ListenerOptions<'_> {
    fn default() -> Self {
        Self {
            reuse_port: false,
            transparent: false,
            freebind: false,
            v6_only: true,
            backlog: 4096,
            fast_open_queue: None,
            bind_to_device: None,
            keepalive: None,
            socket_options: &[],
        }
    }
}

/// How a socket to connect with is opened.
#[derive(Clone, Debug, Default)]
pub struct StreamOptions<'a> {
    /// The source address; port 0 is chosen at connect time.
    pub source: Option<SocketAddr>,
    /// The source address need not be ours. Needs `CAP_NET_ADMIN`.
    pub transparent: bool,
    /// The source address need not exist yet.
    pub freebind: bool,
    /// Goes out by this interface.
    pub bind_to_device: Option<&'a str>,
    /// `SO_MARK`. Needs `CAP_NET_ADMIN`.
    pub mark: Option<u32>,
    /// Probes a silent peer.
    pub keepalive: Option<Keepalive>,
    /// Those of state [`SocketState::Prebind`], in their order, after all of the above.
    pub socket_options: &'a [SocketOption],
}

/// A socket could not be opened.
#[derive(Debug, Error)]
#[error("{address}: can't {step}: {source}{remedy}", remedy = self.remedy())]
pub struct OpenError {
    /// The address that was to be bound or connected to.
    pub address: SocketAddr,
    /// What was being done, as in "can't …".
    pub step: Cow<'static, str>,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

impl OpenError {
    /// As one to give to `map_err`.
    pub fn at(address: SocketAddr, step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self { address, step: step.into(), source }
    }

    fn remedy(&self) -> &'static str {
        match (&*self.step, self.source.raw_os_error()) {
            (_, Some(libc::EMFILE)) => " (raise the limit of open files: ulimit -n, LimitNOFILE=)",
            ("bind", Some(libc::EADDRINUSE)) => {
                " (another process has it, or a listener without enable_reuse_port)"
            }
            ("bind", Some(libc::EADDRNOTAVAIL)) => " (no interface has this address; freebind allows that)",
            ("bind", Some(libc::EACCES)) => " (ports below 1024 need CAP_NET_BIND_SERVICE)",
            ("set SO_MARK" | "set transparent", Some(libc::EPERM)) => " (needs CAP_NET_ADMIN)",
            ("bind to the device", Some(libc::ENODEV)) => " (there is no such interface)",
            (step, Some(libc::ENOPROTOOPT | libc::EINVAL | libc::EOPNOTSUPP)) if step.starts_with(OPTION) => {
                " (level and name are the kernel's numbers, as in its headers, and the value is an int unless the option takes \
                 another type)"
            }
            (step, Some(libc::EPERM | libc::EACCES)) if step.starts_with(OPTION) => {
                " (needs a privilege, see socket(7))"
            }
            ("open a socket", Some(libc::EAFNOSUPPORT)) => " (IPv6 is off on this machine)",
            _ => "",
        }
    }
}

/// Opens a listening socket. Accepted connections inherit `TCP_NODELAY` and the keepalive from it.
pub fn listen(address: SocketAddr, options: &ListenerOptions<'_>) -> Result<Socket, OpenError> {
    let at = |step| OpenError::at(address, step);
    let socket = open(address)?;
    // A restart must not wait for old connections in TIME_WAIT.
    socket.set_reuse_address(true).map_err(at("set SO_REUSEADDR"))?;
    if options.reuse_port {
        socket.set_reuse_port(true).map_err(at("set SO_REUSEPORT"))?;
    }
    if address.is_ipv6() {
        socket.set_only_v6(options.v6_only).map_err(at("set IPV6_V6ONLY"))?;
    }
    anywhere(&socket, address, options.transparent, options.freebind)?;
    if let Some(device) = options.bind_to_device {
        socket.bind_device(Some(device.as_bytes())).map_err(at("bind to the device"))?;
    }
    common(&socket, address, options.keepalive)?;
    let set = |state| set_all(options.socket_options, state, &socket, address);
    set(SocketState::Prebind)?;
    socket.bind(&SockAddr::from(address)).map_err(at("bind"))?;
    set(SocketState::Bound)?;
    if let Some(queue) = options.fast_open_queue {
        let queue = queue.min(i32::MAX as u32) as libc::c_int;
        set_option(socket.as_fd(), libc::IPPROTO_TCP, libc::TCP_FASTOPEN, queue)
            .map_err(at("set TCP_FASTOPEN"))?;
    }
    socket.listen(options.backlog.min(i32::MAX as u32) as libc::c_int).map_err(at("listen"))?;
    set(SocketState::Listening)?;
    Ok(socket)
}

/// Opens a socket to connect to `address` with.
pub fn stream(address: SocketAddr, options: &StreamOptions<'_>) -> Result<Socket, OpenError> {
    let at = |step| OpenError::at(address, step);
    let socket = open(address)?;
    anywhere(&socket, address, options.transparent, options.freebind)?;
    if let Some(mark) = options.mark {
        socket.set_mark(mark).map_err(at("set SO_MARK"))?;
    }
    if let Some(device) = options.bind_to_device {
        socket.bind_device(Some(device.as_bytes())).map_err(at("bind to the device"))?;
    }
    common(&socket, address, options.keepalive)?;
    set_all(options.socket_options, SocketState::Prebind, &socket, address)?;
    if let Some(source) = options.source {
        if source.port() == 0 {
            set_option(socket.as_fd(), libc::SOL_IP, BIND_ADDRESS_NO_PORT, 1)
                .map_err(at("set IP_BIND_ADDRESS_NO_PORT"))?;
        }
        socket.bind(&SockAddr::from(source)).map_err(OpenError::at(source, "bind"))?;
    }
    Ok(socket)
}

fn set_all(
    options: &[SocketOption],
    state: SocketState,
    socket: &Socket,
    address: SocketAddr,
) -> Result<(), OpenError> {
    for option in options.iter().filter(|option| option.state == state) {
        let step = || format!("{OPTION} (level {}, name {})", option.level, option.name).into();
        option.set(socket.as_fd(), address).map_err(|source| OpenError { address, step: step(), source })?;
    }
    Ok(())
}

fn open(address: SocketAddr) -> Result<Socket, OpenError> {
    // socket2 sets close-on-exec; SOCK_NONBLOCK comes with the type.
    Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))
        .map_err(OpenError::at(address, "open a socket"))
}

fn anywhere(
    socket: &Socket,
    address: SocketAddr,
    transparent: bool,
    freebind: bool,
) -> Result<(), OpenError> {
    let at = |step| OpenError::at(address, step);
    if transparent {
        let set =
            if address.is_ipv4() { Socket::set_ip_transparent_v4 } else { Socket::set_ip_transparent_v6 };
        set(socket, true).map_err(at("set transparent"))?;
    }
    if freebind {
        let set = if address.is_ipv4() { Socket::set_freebind_v4 } else { Socket::set_freebind_v6 };
        set(socket, true).map_err(at("set freebind"))?;
    }
    Ok(())
}

fn common(socket: &Socket, address: SocketAddr, keepalive: Option<Keepalive>) -> Result<(), OpenError> {
    let at = |step| OpenError::at(address, step);
    socket.set_tcp_nodelay(true).map_err(at("set TCP_NODELAY"))?;
    let Some(keepalive) = keepalive else { return Ok(()) };
    let mut wanted = TcpKeepalive::new();
    if let Some(time) = keepalive.time {
        wanted = wanted.with_time(time);
    }
    if let Some(interval) = keepalive.interval {
        wanted = wanted.with_interval(interval);
    }
    if let Some(probes) = keepalive.probes {
        wanted = wanted.with_retries(probes);
    }
    socket.set_tcp_keepalive(&wanted).map_err(at("set keepalive"))
}

#[cfg(test)]
mod tests {
    use super::super::{accept, connect, local_addr, peer_addr};
    use super::*;
    use std::net::TcpStream;
    use std::os::fd::AsRawFd;

    fn any4() -> SocketAddr {
        "127.0.0.1:0".parse().unwrap()
    }

    fn accept_soon(listener: &Socket) -> (Socket, SocketAddr) {
        for _ in 0..5_000 {
            match accept(listener) {
                Ok(accepted) => return accepted,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(e) => panic!("{e}"),
            }
        }
        panic!("nobody came within 5 s");
    }

    #[test]
    fn accepted_sockets_inherit_what_the_listener_says() {
        let keepalive = Keepalive {
            time: Some(Duration::from_secs(77)),
            interval: Some(Duration::from_secs(7)),
            probes: Some(3),
        };
        let listener =
            listen(any4(), &ListenerOptions { keepalive: Some(keepalive), ..Default::default() }).unwrap();
        assert_eq!(accept(&listener).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let client = TcpStream::connect(local_addr(&listener).unwrap()).unwrap();
        let (socket, peer) = accept_soon(&listener);
        assert_eq!(peer, client.local_addr().unwrap());
        assert!(socket.tcp_nodelay().unwrap());
        assert!(socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(77));
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), Duration::from_secs(7));
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), 3);
        assert!(socket.nonblocking().unwrap());
        // SAFETY: F_GETFD has no argument and stores nothing.
        let flags = unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_GETFD) };
        assert_ne!(flags & libc::FD_CLOEXEC, 0);
    }

    #[test]
    fn options_by_number_are_set_for_whom_they_are() {
        let priority = |value: libc::c_int, ipv6| SocketOption {
            level: libc::SOL_SOCKET,
            name: libc::SO_PRIORITY,
            value: value.to_ne_bytes().into(),
            state: SocketState::Prebind,
            ipv6,
        };
        let socket_options = &[priority(3, None), priority(5, Some(true))];
        let value = |socket: &Socket| {
            super::super::option::<libc::c_int>(socket.as_fd(), libc::SOL_SOCKET, libc::SO_PRIORITY).unwrap()
        };
        let listener = listen(any4(), &ListenerOptions { socket_options, ..Default::default() }).unwrap();
        assert_eq!(value(&listener), 3);
        let options = StreamOptions { socket_options, ..Default::default() };
        assert_eq!(value(&stream(any4(), &options).unwrap()), 3);
        assert_eq!(value(&stream("[::1]:1".parse().unwrap(), &options).unwrap()), 5);
    }

    #[test]
    fn an_option_that_the_kernel_refuses_is_named() {
        for state in [SocketState::Prebind, SocketState::Bound, SocketState::Listening] {
            let value = [0; 4].into();
            let socket_options =
                &[SocketOption { level: libc::SOL_SOCKET, name: 9999, value, state, ipv6: None }];
            let error =
                listen(any4(), &ListenerOptions { socket_options, ..Default::default() }).unwrap_err();
            assert_eq!(
                error.to_string(),
                "127.0.0.1:0: can't set the socket option (level 1, name 9999): Protocol not available (os error 92) \
                 (level and name are the kernel's numbers, as in its headers, and the value is an int unless the option \
                 takes another type)"
            );
            // What is to be connected is never listening.
            let options = StreamOptions { socket_options, ..Default::default() };
            assert_eq!(stream(any4(), &options).is_err(), state == SocketState::Prebind);
        }
    }

    #[test]
    fn dual_stack_addresses_come_unmapped() {
        let options = ListenerOptions { v6_only: false, ..Default::default() };
        let listener = listen("[::]:0".parse().unwrap(), &options).unwrap();
        let port = local_addr(&listener).unwrap().port();
        let client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (socket, peer) = accept_soon(&listener);
        assert_eq!(peer, client.local_addr().unwrap());
        assert_eq!(local_addr(&socket).unwrap(), client.peer_addr().unwrap());
        assert_eq!(peer_addr(&socket).unwrap(), peer);

        let only = listen("[::]:0".parse().unwrap(), &ListenerOptions::default()).unwrap();
        let port = local_addr(&only).unwrap().port();
        assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
    }

    #[test]
    fn reuse_port_shares_and_its_absence_refuses_with_a_remedy() {
        let shared = ListenerOptions { reuse_port: true, ..Default::default() };
        let first = listen(any4(), &shared).unwrap();
        let address = local_addr(&first).unwrap();
        let _second = listen(address, &shared).unwrap();
        let error = listen(address, &ListenerOptions::default()).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with(&format!("{address}: can't bind: Address already in use")), "{text}");
        assert!(text.contains("enable_reuse_port"), "{text}");
    }

    #[test]
    fn freebind_takes_an_address_that_is_nowhere() {
        let nowhere: SocketAddr = "192.0.2.1:0".parse().unwrap();
        let text = listen(nowhere, &ListenerOptions::default()).unwrap_err().to_string();
        assert!(text.contains("freebind"), "{text}");
        listen(nowhere, &ListenerOptions { freebind: true, ..Default::default() }).unwrap();
    }

    #[test]
    fn transparent_fast_open_and_device() {
        let options = ListenerOptions {
            transparent: true,
            fast_open_queue: Some(16),
            bind_to_device: Some("lo"),
            ..Default::default()
        };
        let listener = listen(any4(), &options).unwrap();
        assert!(listener.ip_transparent_v4().unwrap());
        let wrong = ListenerOptions { bind_to_device: Some("nosuch0"), ..Default::default() };
        assert!(listen(any4(), &wrong).unwrap_err().to_string().contains("no such interface"));
    }

    #[test]
    fn a_stream_keeps_its_source_address() {
        for (at, source) in [("127.0.0.1:0", "127.0.0.9:0"), ("[::1]:0", "[::1]:0")] {
            let listener = listen(at.parse().unwrap(), &ListenerOptions::default()).unwrap();
            let address = local_addr(&listener).unwrap();
            let source: SocketAddr = source.parse().unwrap();
            let options = StreamOptions { source: Some(source), mark: Some(7), ..Default::default() };
            let socket = stream(address, &options).unwrap();
            assert_eq!(local_addr(&socket).unwrap().port(), 0, "chosen at connect time");
            connect(&socket, &address.into()).unwrap();
            let (_accepted, peer) = accept_soon(&listener);
            assert_eq!(peer.ip(), source.ip());
            assert_eq!(socket.mark().unwrap(), 7);
            assert!(socket.tcp_nodelay().unwrap());
        }
    }
}
