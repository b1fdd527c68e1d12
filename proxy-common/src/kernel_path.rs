//! The kernel path: what the programs keep of services, clusters, hosts and connections that no proxy stands in.
//!
//! Index 0 of each table is never used: in a record it says "none". In the tables of clusters and hosts, its `proxied` says
//! whose counts those of the other entries are: a number that the agent at work has chosen; 0: nobody's.

use crate::Addr;

/// Index of the word of the arena that is not 0 while the agent waits to be woken by the next record of a flow. (No block
/// starts at index 0.)
pub const ASLEEP: u32 = 0;

/// Index of the word of the arena that holds the cookie of the socket that the agent ends at this moment; 0: none.
pub const ENDING: u32 = 1;

/// Blocks start here or later.
pub const FIRST_BLOCK: u32 = 2;

/// Counters of a service, a cluster or a host. The programs add to them atomically; nobody ever sets them back, so that a
/// successor of the agent goes on with them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// SYNs sent.
    pub attempts: u64,
    /// Sockets that are connecting or connected.
    pub active: u64,
    /// Handshakes that succeeded.
    pub established: u64,
    /// Handshakes that failed, whatever the reason.
    pub failed: u64,
    /// Of those, the ones that nothing was heard of in time.
    pub timed_out: u64,
    /// Of the failed ones, those that the application gave up before there was an answer.
    pub abandoned: u64,
    /// Connections that were established and that the application ended: with the first FIN, or with a RST.
    pub closed_by_client: u64,
    /// The same of the endpoint.
    pub closed_by_endpoint: u64,
    /// Bytes that applications sent and endpoints acknowledged, over connections that have ended.
    pub sent: u64,
    /// Bytes that endpoints sent, over connections that have ended.
    pub received: u64,
    /// Connects that were refused because there was no usable host.
    pub no_host: u64,
    /// Connects that were refused because the circuit breaker was open.
    pub overflow: u64,
    /// Picks regardless of health.
    pub panics: u64,
}

const _: () = assert!(size_of::<Tally>() == 104 && align_of::<Tally>() == 8);

/// Entry of the services map: a filter chain of a listener on the kernel path, or what chooses one of its chains.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServiceState {
    /// Where the block of its clusters ([`crate::balance::ServiceHead`]) or chains ([`crate::selector`]) starts in the arena;
    /// 0: it has none. Replaced as a whole.
    pub block: u64,
    /// Tells a successor of the agent whose entry this is; 0: nobody's.
    pub key: u64,
    /// What happened. Nothing, where chains are chosen: they count.
    pub tally: Tally,
}

const _: () = assert!(size_of::<ServiceState>() == 120);

/// Entry of the clusters map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClusterState {
    /// Where its block starts in the arena ([`crate::balance`]); 0: it has none. Replaced as a whole.
    pub block: u64,
    /// Tells a successor of the agent whose entry this is; 0: nobody's.
    pub key: u64,
    /// Picks so far.
    pub turn: u64,
    /// Circuit breaker: connects are refused while so many are active, with those through the proxy.
    pub max_connections: u32,
    /// A handshake may take so long, milliseconds; 0: as long as the kernel allows.
    pub connect_timeout_ms: u32,
    /// Connections through the proxy that count now. Written by the agent only.
    pub proxied: u64,
    /// What happened.
    pub tally: Tally,
}

const _: () = assert!(size_of::<ClusterState>() == 144);

/// Entry of the hosts map.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostState {
    /// Where it is.
    pub addr: Addr,
    /// Port, host order.
    pub port: u16,
    /// Zero.
    pub reserved: u16,
    /// Index of its cluster; 0: nobody's entry.
    pub cluster: u32,
    /// Connections through the proxy that count now. Written by the agent only.
    pub proxied: u64,
    /// What happened.
    pub tally: Tally,
}

const _: () = assert!(size_of::<HostState>() == 136 && align_of::<HostState>() == 8);

/// A socket of an application that is connected straight to an endpoint. In a [`FlowSlot`] until the connection has ended, or an SK_STORAGE
/// value, which dies with the socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Service address that the application passed to connect(2), and sees in getpeername(2).
    pub addr: Addr,
    /// Service port, host order.
    pub port: u16,
    /// A [`Phase`].
    pub phase: u16,
    /// TCP_USER_TIMEOUT as the application had set it, milliseconds: given back when the handshake is over.
    pub user_timeout_ms: u32,
    /// Index of the service.
    pub service: u32,
    /// Index of the cluster.
    pub cluster: u32,
    /// Index of the host.
    pub host: u32,
    /// Bits of [`FlowFlag`].
    pub flags: u16,
    /// Not 0: the application has closed its last descriptor. A field of its own: it is written without the socket's lock,
    /// all others with it.
    pub released: u16,
    /// When connect(2) was called, CLOCK_MONOTONIC.
    pub started_ns: u64,
    /// When the handshake was over; 0: it is not.
    pub connected_ns: u64,
    /// Bytes received when the application closed its socket with a FIN, the lower half; FINs count.
    pub bytes_before: u32,
    /// Segments with data that had come by then.
    pub segments_before: u32,
}

const _: () = assert!(size_of::<Flow>() == 64 && align_of::<Flow>() == 8);

/// Where a socket's [`Flow`] is, if it was nobody's at connect(2).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowSlot {
    /// Cookie of its socket, and [`Self::RELEASED`]; 0: nobody's. Changed by compare-and-exchange, but freed with a plain one.
    pub owner: u64,
    /// The record, when somebody owns it.
    pub flow: Flow,
}

impl FlowSlot {
    /// In `owner`: the application has closed its last descriptor. (Cookies are counted from 1 on.)
    pub const RELEASED: u64 = 1 << 63;
}

const _: () = assert!(size_of::<FlowSlot>() == 72);

/// How far a [`Flow`] is.
#[repr(u16)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// connect(2) was rewritten; nothing is counted yet.
    Chosen = 0,
    /// The SYN was sent; it counts as active.
    Connecting = 1,
    /// The handshake is over.
    Established = 2,
    /// It has ended, and does not count any more.
    Ended = 3,
}

/// What was seen of a [`Flow`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowFlag {
    /// The application's FIN came first.
    ClientFirst = 1,
    /// The endpoint's FIN came first.
    EndpointFirst = 2,
    /// The endpoint has sent a FIN.
    EndpointFin = 4,
    /// The application has sent one.
    ClientFin = 8,
    /// It closed its socket with that FIN, and did not only say that it has nothing more to send.
    ClosedWithFin = 16,
    /// The endpoint has acknowledged nothing for so long that the kernel gave up.
    Silent = 32,
    /// `user_timeout_ms` is not in force: the cluster's `connect_timeout` is, while the handshake lasts.
    Limited = 64,
}

/// How a connection of the kernel path ended.
#[repr(u16)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// There was no usable host: connect(2) failed (UH).
    NoHost = 1,
    /// The circuit breaker was open: connect(2) failed (UO).
    Overflow = 2,
    /// The endpoint answered the SYN with a RST (UF).
    Refused = 3,
    /// The endpoint did not answer within the connect timeout, or a shorter limit of the application's (UF).
    TimedOut = 4,
    /// The network said that the endpoint can't be reached (UF).
    Unreachable = 5,
    /// The application closed its socket before there was an answer.
    Abandoned = 6,
    /// Both directions ended with a FIN; or the application closed its socket after its FIN was acknowledged, and what the
    /// endpoint did then is not known.
    Closed = 7,
    /// The endpoint sent a RST (UR, unless its FIN came before).
    ResetByEndpoint = 8,
    /// The application's socket sent a RST: it was closed with unread bytes or with SO_LINGER 0, or got bytes after that.
    ResetByClient = 9,
    /// The endpoint stopped to answer.
    Silent = 10,
    /// The agent ended it, established or not.
    Removed = 11,
}

impl End {
    /// The end with this number; anything unknown is none.
    pub const fn from_raw(raw: u16) -> Option<Self> {
        Some(match raw {
            1 => Self::NoHost,
            2 => Self::Overflow,
            3 => Self::Refused,
            4 => Self::TimedOut,
            5 => Self::Unreachable,
            6 => Self::Abandoned,
            7 => Self::Closed,
            8 => Self::ResetByEndpoint,
            9 => Self::ResetByClient,
            10 => Self::Silent,
            11 => Self::Removed,
            _ => return None,
        })
    }
}

/// Record of the ring buffer of flows: a connection has ended, or was refused.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowEvent {
    /// An [`End`].
    pub end: u16,
    /// Service port, host order.
    pub port: u16,
    /// Port of the endpoint, host order; 0: none was chosen.
    pub endpoint_port: u16,
    /// The application's own port, host order; 0: not known yet.
    pub client_port: u16,
    /// Index of the service.
    pub service: u32,
    /// Index of the cluster.
    pub cluster: u32,
    /// Index of the host; 0: none was chosen.
    pub host: u32,
    /// Bits of [`FlowFlag`].
    pub flags: u32,
    /// Segments that were sent again.
    pub retransmits: u32,
    /// Smoothed round-trip time, microseconds; 0: never measured.
    pub srtt_us: u32,
    /// Service address.
    pub addr: Addr,
    /// Address of the endpoint; [`Addr::ZERO`]: none was chosen.
    pub endpoint: Addr,
    /// The application's own address; [`Addr::ZERO`]: not known yet.
    pub client: Addr,
    /// Network namespace of the application.
    pub netns_cookie: u64,
    /// When connect(2) was called, CLOCK_MONOTONIC.
    pub started_ns: u64,
    /// When the handshake was over; 0: never.
    pub connected_ns: u64,
    /// When it ended.
    pub ended_ns: u64,
    /// Bytes that the application sent and the endpoint acknowledged.
    pub sent: u64,
    /// Bytes that the endpoint sent.
    pub received: u64,
}

const _: () = assert!(size_of::<FlowEvent>() == 128 && align_of::<FlowEvent>() == 8);
