//! Listening sockets of bound listeners: opened by the main thread, given to the workers.

use std::sync::Arc;
use std::time::Duration;

use socket2::Socket;

use crate::config::listener::{Listener, TcpKeepalive};
use crate::sys::socket::{self, Keepalive, ListenerOptions, OpenError};

/// Why a listener can't be bound.
#[derive(Debug, thiserror::Error)]
#[error("listener '{listener}': {source}")]
pub struct BindError {
    /// Its name.
    pub listener: Arc<str>,
    /// Which address, and why.
    pub source: OpenError,
}

/// The listening sockets of one listener: for each address one per worker, or one in all when
/// `enable_reuse_port` is off (worker 0 serves it). The outer index is the worker's.
pub fn bind(listener: &Listener, workers: usize) -> Result<Vec<Vec<Socket>>, BindError> {
    let failed = |source| BindError { listener: Arc::clone(&listener.name), source };
    let mut sockets: Vec<Vec<Socket>> = (0..workers).map(|_| Vec::new()).collect();
    let each = if listener.enable_reuse_port { workers } else { 1 };
    let options = options(listener);
    for address in &listener.addresses {
        let mut address = *address;
        for worker in sockets.iter_mut().take(each) {
            let socket = socket::listen(address, &options).map_err(failed)?;
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
    if options(old) == options(new) {
        return true;
    }
    // Without SO_REUSEPORT the address can't be bound twice.
    let shareable = old.enable_reuse_port && new.enable_reuse_port;
    if !shareable {
        tracing::warn!(listener = %new.name, "the socket's options stay as they are until the address changes");
    }
    !shareable
}

fn options(listener: &Listener) -> ListenerOptions<'static> {
    let default = ListenerOptions::default();
    ListenerOptions {
        reuse_port: listener.enable_reuse_port,
        transparent: listener.transparent,
        freebind: listener.freebind,
        backlog: listener.tcp_backlog_size.unwrap_or(default.backlog),
        fast_open_queue: listener.tcp_fast_open_queue_length,
        keepalive: listener.tcp_keepalive.map(keepalive),
        ..default
    }
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
