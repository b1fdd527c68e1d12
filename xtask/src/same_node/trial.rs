//! One property, tried once.

use anyhow::Result;
use socket2::Socket;

use super::acceleration::Acceleration;
use super::site::{Options, Pair, Route, Site};

/// Where a property is tried, and how.
pub(super) struct Trial<'a> {
    pub(super) site: &'a Site,
    pub(super) route: Route,
    /// Attached, or not: then connections are plain TCP.
    pub(super) acceleration: Option<Acceleration>,
    /// Whether `left` is the server's socket.
    pub(super) swapped: bool,
    pub(super) seed: u64,
}

impl Trial<'_> {
    /// A connection: the property's left end, and its right.
    pub(super) fn connect(&self) -> Result<(Socket, Socket)> {
        self.connect_with(|_| Ok(()))
    }

    /// A connection whose sockets have these options.
    pub(super) fn connect_with(&self, options: Options) -> Result<(Socket, Socket)> {
        Ok(self.ends(self.site.connect(self.route, options)?))
    }

    fn ends(&self, (client, server): Pair) -> (Socket, Socket) {
        if self.swapped { (server, client) } else { (client, server) }
    }
}

/// Something that applications see of a connection.
pub(super) struct Property {
    pub(super) name: &'static str,
    pub(super) tried: Tried,
    pub(super) run: fn(&mut Trial<'_>) -> Result<String>,
}

/// With which ends and routes a property is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tried {
    /// Each end in each role, on both routes.
    BothWays,
    /// The client's end is left.
    Once,
    /// As that, between two namespaces only.
    Veth,
}

/// A property whose ends change roles.
pub(super) const fn both(name: &'static str, run: fn(&mut Trial<'_>) -> Result<String>) -> Property {
    Property { name, tried: Tried::BothWays, run }
}

/// A property of which one end is the client's.
pub(super) const fn once(name: &'static str, run: fn(&mut Trial<'_>) -> Result<String>) -> Property {
    Property { name, tried: Tried::Once, run }
}

/// A property that needs a link.
pub(super) const fn veth(name: &'static str, run: fn(&mut Trial<'_>) -> Result<String>) -> Property {
    Property { name, tried: Tried::Veth, run }
}
