//! The acceleration: both programs attached, with their maps, until it is dropped.

use std::fs::File;
use std::net::{SocketAddr, SocketAddrV4};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result, bail};
use socket2::Socket;

use super::kernel::{self, Kind};
use super::program;

/// Sockets that the map has room for.
const SOCKETS: u32 = 4096;

/// Messages that were handed from socket to socket, and messages that went through TCP.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) redirected: u64,
    pub(super) passed: u64,
}

impl Counts {
    pub(super) fn add(&mut self, other: Self) {
        self.redirected += other.redirected;
        self.passed += other.passed;
    }
}

/// Both programs, attached. Dropping it closes the last descriptors of all of it: what happens when the process that
/// loaded them is killed and nothing was pinned.
#[derive(Debug)]
pub(super) struct Acceleration {
    sockets: OwnedFd,
    counters: OwnedFd,
    redirect: OwnedFd,
    _insert: OwnedFd,
}

impl Acceleration {
    /// Takes every connection whose sockets are made in this cgroup from now on.
    pub(super) fn attach(cgroup: &Path) -> Result<Self> {
        let sockets = kernel::create_sockhash(program::KEY, SOCKETS).context("create a SOCKHASH")?;
        let counters = kernel::create_counters(2).context("create the counters")?;
        let redirect = program::redirect(sockets.as_raw_fd(), counters.as_raw_fd());
        let redirect = kernel::load(Kind::SkMsg, &redirect)?;
        kernel::attach(&redirect, &sockets).context("attach sk_msg")?;
        let insert = kernel::load(Kind::SockOps, &program::insert(sockets.as_raw_fd()))?;
        let cgroup = OwnedFd::from(File::open(cgroup)?);
        let insert = kernel::link(&insert, &cgroup).context("attach sockops")?;
        Ok(Self { sockets, counters, redirect, _insert: insert })
    }

    /// What has become of messages so far.
    pub(super) fn counts(&self) -> Result<Counts> {
        let count = |index| kernel::counter(&self.counters, index).context("read a counter");
        Ok(Counts { redirected: count(program::REDIRECTED)?, passed: count(program::PASSED)? })
    }

    /// Takes one socket out of the map.
    pub(super) fn remove(&self, socket: &Socket) -> Result<()> {
        kernel::delete(&self.sockets, &key(socket)?).context("delete a socket from the map")
    }

    /// Takes the program away that hands over; the sockets stay in the map.
    pub(super) fn stop(&self) -> Result<()> {
        kernel::detach(&self.redirect, &self.sockets).context("detach sk_msg")
    }

    /// Puts another copy of the program in place.
    pub(super) fn replace(&mut self) -> Result<()> {
        let redirect = program::redirect(self.sockets.as_raw_fd(), self.counters.as_raw_fd());
        let redirect = kernel::load(Kind::SkMsg, &redirect)?;
        kernel::attach(&redirect, &self.sockets).context("replace sk_msg")?;
        self.redirect = redirect;
        Ok(())
    }
}

/// The key of a socket, as `program::insert` makes it.
fn key(socket: &Socket) -> Result<[u8; program::KEY as usize]> {
    let (local, remote) = (v4(&socket.local_addr()?)?, v4(&socket.peer_addr()?)?);
    let mut key = [0; program::KEY as usize];
    key[..4].copy_from_slice(&local.ip().octets());
    key[4..8].copy_from_slice(&remote.ip().octets());
    key[8..12].copy_from_slice(&u32::from(local.port()).to_ne_bytes());
    key[12..].copy_from_slice(&u32::from(remote.port()).to_ne_bytes());
    Ok(key)
}

fn v4(address: &socket2::SockAddr) -> Result<SocketAddrV4> {
    match address.as_socket() {
        Some(SocketAddr::V4(address)) => Ok(address),
        other => bail!("{other:?} is not an IPv4 address"),
    }
}
