//! Addresses that carry their role in the type, so that one can't be passed where another is meant.

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::net::SocketAddr;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::sync::Arc;

use thiserror::Error;

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

/// An upstream endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EndpointAddr {
    /// A TCP port.
    Ip(SocketAddr),
    /// A Unix domain socket. Only control planes are reached through one.
    Pipe(Pipe),
}

impl EndpointAddr {
    /// The TCP port, if it is one.
    pub fn ip(&self) -> Option<SocketAddr> {
        match self {
            Self::Ip(address) => Some(*address),
            Self::Pipe(_) => None,
        }
    }
}

impl From<SocketAddr> for EndpointAddr {
    fn from(address: SocketAddr) -> Self {
        Self::Ip(address)
    }
}

impl fmt::Display for EndpointAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Pipe(pipe) => pipe.fmt(f),
        }
    }
}

/// A Unix domain socket: the path of a file, relative to the working directory unless it starts with `/`, or after an
/// `@` a name that is no file (abstract).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pipe(Arc<str>);

/// A path that can't be one of a Unix domain socket.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PipeError {
    /// There is none.
    #[error("it is empty")]
    Empty,
    /// `sockaddr_un` has no room for it.
    #[error("{0} bytes are too many for the path of a Unix domain socket; use at most {max}, or a symbolic link to its \
             directory", max = Pipe::MAX_LENGTH)]
    TooLong(usize),
    /// The kernel would take what is before it for the whole.
    #[error("it has a NUL character in it, which only an abstract name (@…) may have")]
    Nul,
}

impl Pipe {
    /// How many bytes a path may have: 108, with the zero at its end.
    pub const MAX_LENGTH: usize = 107;

    /// Checks a path as Envoy does.
    pub fn new(path: &str) -> Result<Self, PipeError> {
        match path.len() {
            0 => return Err(PipeError::Empty),
            length if length > Self::MAX_LENGTH => return Err(PipeError::TooLong(length)),
            _ => {}
        }
        let pipe = Self(Arc::from(path));
        if !pipe.is_abstract() && path.contains('\0') { Err(PipeError::Nul) } else { Ok(pipe) }
    }

    /// Whether it has a name instead of a file.
    pub fn is_abstract(&self) -> bool {
        self.0.starts_with('@')
    }

    /// Whether it does not depend on the working directory.
    pub fn is_absolute(&self) -> bool {
        self.is_abstract() || self.0.starts_with('/')
    }

    /// For `sun_path`, where an abstract name begins with a zero.
    pub fn sun_path(&self) -> Cow<'_, OsStr> {
        match self.0.strip_prefix('@') {
            None => Cow::Borrowed(OsStr::from_bytes(self.0.as_bytes())),
            Some(name) => Cow::Owned(OsString::from_vec([b"\0", name.as_bytes()].concat())),
        }
    }
}

impl fmt::Display for Pipe {
    /// As Envoy prints it: a zero in an abstract name is an `@`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.replace('\0', "@").fmt(f)
    }
}

/// `::ffff:a.b.c.d` as the plain IPv4 address that it stands for; everything else unchanged.
pub fn unmapped(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_pipes_are_those_that_envoy_takes() {
        for path in ["/run/x.sock", "./etc/istio/proxy/XDS", "x", "@", "@name", "@a\0b", &"p".repeat(107)] {
            Pipe::new(path).unwrap();
        }
        // Bytes count, not characters.
        let (long, wide) = ("p".repeat(108), "ä".repeat(54));
        for (path, error) in [
            ("", PipeError::Empty),
            (&*long, PipeError::TooLong(108)),
            (&*wide, PipeError::TooLong(108)),
            (&*format!("@{}", "n".repeat(107)), PipeError::TooLong(108)),
            ("/run/a\0b", PipeError::Nul),
        ] {
            assert_eq!(Pipe::new(path), Err(error), "{path:?}");
        }
        let text = PipeError::TooLong(108).to_string();
        assert!(text.starts_with("108 bytes are too many") && text.contains("at most 107"), "{text}");
    }

    #[test]
    fn abstract_names_begin_with_a_zero_for_the_kernel_and_with_an_at_for_people() {
        let pipe = Pipe::new("@a\0b").unwrap();
        assert_eq!(pipe.sun_path().as_bytes(), b"\0a\0b");
        assert_eq!(pipe.to_string(), "@a@b");
        let file = Pipe::new("./x@y").unwrap();
        assert_eq!((file.sun_path().as_bytes(), &*file.to_string()), (&b"./x@y"[..], "./x@y"));
        assert!(pipe.is_abstract() && !file.is_abstract());
    }

    /// There are hundreds of thousands of endpoints.
    #[test]
    fn an_endpoint_s_address_takes_no_more_memory_than_a_socket_address() {
        assert_eq!(size_of::<EndpointAddr>(), size_of::<SocketAddr>());
    }
}
