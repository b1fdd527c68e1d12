use crate::Addr;

/// Whose socket an [`OriginalDst`] is stored on.
#[repr(u16)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The application's socket, written by connect4/6. getpeername answers from it.
    Client = 1,
    /// The proxy's accepted socket, written by sockops. getpeername is left alone: the proxy wants the real peer.
    Accepted = 2,
}

/// How an original destination gets from the application's socket to the accepted one; bits of [`OriginalDst::carrier`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// In the SYN ([`crate::syn`]), if there is room. The bit of no other is set.
    Syn = 0,
    /// In the map of connections in flight. In a namespace where every connection has a SYN cookie
    /// (`net.ipv4.tcp_syncookies` = 2) the kernel keeps no SYN, and another option (Fast Open's over IPv6) may need the room.
    Map = 1,
    /// In the SYN: the room is reserved.
    Reserved = 2,
    /// The option callbacks were asked for by us and not by another program: they are turned off when the handshake is over.
    /// It stays when a connect fails and the socket is connected again.
    Asked = 4,
}

impl Carrier {
    /// Whether it is among these.
    #[inline(always)]
    pub const fn is_in(self, bits: u32) -> bool {
        bits & self as u32 != 0
    }
}

/// What a socket of the agent is for. Value of its entry in the map of own sockets (as `u32`).
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnSocket {
    /// Connects to endpoints: never captured.
    Upstream = 1,
    /// Waits for captured connections. Where none is found at connect time, the agent is dead: the mark goes with the
    /// socket, and nobody else can set it, whoever takes the port.
    CaptureListener = 2,
}

/// Where an application meant to connect to. SK_STORAGE value, on the application's socket from connect(2) on, and, if the
/// map carries it, on the proxy's accepted socket from the end of the handshake on. It dies with the socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OriginalDst {
    /// Service address.
    pub addr: Addr,
    /// Service port, host order.
    pub port: u16,
    /// A [`Role`].
    pub role: u16,
    /// Bits of [`Carrier`]; 0 on the accepted socket.
    pub carrier: u32,
    /// Socket cookie of the application's socket, where the map carries it: tells a connection from a later one with the
    /// same 4-tuple. Otherwise 0.
    pub client_cookie: u64,
}

const _: () = assert!(size_of::<OriginalDst>() == 32 && align_of::<OriginalDst>() == 8);

/// Key of a connection between the application's SYN and the proxy's accepted socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// Cookie of the network namespace that both ends live in.
    pub netns_cookie: u64,
    /// The application's own address.
    pub client: Addr,
    /// The address that the destination was rewritten to.
    pub capture: Addr,
    /// The application's source port, host order.
    pub client_port: u16,
    /// Port of the capture listener, host order.
    pub capture_port: u16,
    /// Zero.
    pub reserved: u32,
}

const _: () = assert!(size_of::<FlowKey>() == 48 && align_of::<FlowKey>() == 8);

/// Value of the in-flight map.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InFlight {
    /// What the accepted socket will get.
    pub original_dst: OriginalDst,
}

const _: () = assert!(size_of::<InFlight>() == 32);
