//! What changes inside pods: a rtnetlink socket in each namespace says when an interface, an address or a route does.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

use crate::sys::netns::NetNsId;

/// Interfaces (`lo` comes up), addresses, and routes, which choose between addresses.
const GROUPS: i32 = libc::RTMGRP_LINK
    | libc::RTMGRP_IPV4_IFADDR
    | libc::RTMGRP_IPV6_IFADDR
    | libc::RTMGRP_IPV4_ROUTE
    | libc::RTMGRP_IPV6_ROUTE;

/// One socket for each namespace. It keeps its namespace alive.
#[derive(Debug, Default)]
pub(super) struct Changes {
    sockets: HashMap<NetNsId, OwnedFd>,
}

impl Changes {
    /// Listens in the namespace that the calling thread is in, which is `id`. What changes after this returns is heard.
    pub(super) fn listen_here(&mut self, id: NetNsId) -> io::Result<()> {
        if self.sockets.contains_key(&id) {
            return Ok(());
        }
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, GROUPS.cast_unsigned()))?;
        self.sockets.insert(id, fd);
        Ok(())
    }

    /// Lets go of a namespace.
    pub(super) fn forget(&mut self, id: NetNsId) {
        self.sockets.remove(&id);
    }

    /// Poll these for readability.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.sockets.values().map(OwnedFd::as_fd)
    }

    /// Namespaces in which something has changed since the last call. Never blocks.
    pub(super) fn drain(&self) -> Vec<NetNsId> {
        self.sockets.iter().filter(|(_, socket)| has_news(socket)).map(|(id, _)| *id).collect()
    }
}

/// Takes every message that waits. What they say is read from the interfaces themselves.
fn has_news(socket: &OwnedFd) -> bool {
    let (mut buffer, mut any) = ([0; 64], false);
    loop {
        // A message that is longer is cut off.
        match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_TRUNC) {
            // ENOBUFS: messages were lost.
            Ok(_) | Err(nix::Error::ENOBUFS) => any = true,
            Err(nix::Error::EINTR) => {}
            Err(_) => return any,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::sys::netns::testing::new_namespace;

    #[test]
    fn addresses_interfaces_and_routes_are_heard_and_each_once() {
        let (ours, other) = (new_namespace(), new_namespace());
        let mut changes = Changes::default();
        for ns in [&ours, &other] {
            let _inside = ns.enter().unwrap();
            changes.listen_here(ns.id()).unwrap();
            changes.listen_here(ns.id()).unwrap();
        }
        assert_eq!(changes.descriptors().count(), 2);
        let commands = ["link set lo up", "addr add 10.1.2.3/32 dev lo", "route add 10.3.0.0/16 dev lo"];
        for command in commands {
            {
                let _inside = ours.enter().unwrap();
                let status = Command::new("ip").args(command.split(' ')).status().unwrap();
                assert!(status.success(), "ip {command}");
            }
            assert_eq!(changes.drain(), [ours.id()], "{command}");
            assert_eq!(changes.drain(), []);
        }
        changes.forget(ours.id());
        assert_eq!(changes.descriptors().count(), 1);
    }
}
