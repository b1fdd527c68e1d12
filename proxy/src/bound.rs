//! How the configuration wants sockets opened; and the listening sockets of bound listeners, which the main thread opens and
//! gives to the workers.

use std::net::SocketAddr;
use std::time::Duration;

use socket2::Socket;

use crate::config::listener::{Listener, TcpKeepalive};
use crate::config::upstream_bind::UpstreamBind;
use crate::sys::socket::{self, Keepalive, ListenerOptions, OpenError, StreamOptions};

/// The listening sockets of one listener: for each address one per worker, or one in all when
/// `enable_reuse_port` is off (worker 0 serves it). The outer index is the worker's.
pub fn bind(listener: &Listener, workers: usize) -> Result<Vec<Vec<Socket>>, OpenError> {
    let mut sockets: Vec<Vec<Socket>> = (0..workers).map(|_| Vec::new()).collect();
    let each = if listener.enable_reuse_port { workers } else { 1 };
    for address in &listener.addresses {
        let options = options(listener, *address);
        let mut address = *address;
        for worker in sockets.iter_mut().take(each) {
            let socket = socket::listen(address, &options)?;
            // Port 0: the kernel chose one for the first socket, the others share it.
            if let Ok(bound) = socket::local_addr(&socket) {
                address.set_port(bound.port());
            }
            worker.push(socket);
        }
    }
    Ok(sockets)
}

/// Whether the listening sockets of one version of a listener also serve another one.
pub fn same_sockets(old: &Listener, new: &Listener) -> bool {
    if !old.bind_to_port || !new.bind_to_port || old.addresses != new.addresses {
        return false;
    }
    if old.addresses.iter().all(|address| options(old, *address) == options(new, *address)) {
        return true;
    }
    // Without SO_REUSEPORT the address can't be bound twice.
    let shareable = old.enable_reuse_port && new.enable_reuse_port;
    if !shareable {
        tracing::warn!(listener = %new.name, "the socket's options stay as they are until the address changes");
    }
    !shareable
}

fn options(listener: &Listener, address: SocketAddr) -> ListenerOptions<'_> {
    let default = ListenerOptions::default();
    let own = listener.overrides.iter().find(|own| own.address == address);
    let (socket_options, tcp_keepalive) = match own {
        Some(own) => (&own.socket_options, own.tcp_keepalive),
        None => (&listener.socket_options, listener.tcp_keepalive),
    };
    ListenerOptions {
        reuse_port: listener.enable_reuse_port,
        transparent: listener.transparent,
        freebind: listener.freebind,
        backlog: listener.tcp_backlog_size.unwrap_or(default.backlog),
        fast_open_queue: listener.tcp_fast_open_queue_length,
        keepalive: tcp_keepalive.map(keepalive),
        socket_options,
        ..default
    }
}

/// How to open a socket to an endpoint of this cluster; none: as the proxy does of itself.
pub fn upstream(bind: Option<&UpstreamBind>, endpoint: SocketAddr) -> StreamOptions<'_> {
    let Some(bind) = bind else { return StreamOptions::default() };
    let (source, socket_options) = bind.for_endpoint(endpoint);
    StreamOptions { source, freebind: bind.freebind, socket_options, ..StreamOptions::default() }
}

/// `TcpKeepalive` in the units of the socket layer.
pub fn keepalive(config: TcpKeepalive) -> Keepalive {
    let seconds = |value: u32| Duration::from_secs(value.into());
    Keepalive {
        time: config.time.map(seconds),
        interval: config.interval.map(seconds),
        probes: config.probes,
    }
}
