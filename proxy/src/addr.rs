//! Addresses that carry their role in the type, so that one can't be passed where another is meant.

use std::fmt;
use std::net::SocketAddr;

macro_rules! role {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub SocketAddr);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

role! {
    /// Where the application meant to connect before anything redirected it.
    OriginalDst
}
role! {
    /// The downstream end that opened the connection (after PROXY protocol, when that is in use).
    PeerAddr
}
role! {
    /// An upstream endpoint.
    EndpointAddr
}

/// `::ffff:a.b.c.d` as the plain IPv4 address that it stands for; everything else unchanged.
pub fn unmapped(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}
