use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::{Addr, Carrier};

/// What happens to a connection to some destination.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// The connection goes on untouched, in the kernel.
    Leave = 0,
    /// To the proxy.
    Capture = 1,
    /// connect(2) fails with ECONNREFUSED.
    Refuse = 2,
    /// Straight to an endpoint of a service: the kernel path.
    Balance = 3,
}

impl Verdict {
    /// The verdict with this number; anything unknown is none.
    #[inline(always)]
    pub const fn from_raw(raw: u32) -> Option<Self> {
        match raw {
            0 => Some(Self::Leave),
            1 => Some(Self::Capture),
            2 => Some(Self::Refuse),
            3 => Some(Self::Balance),
            _ => None,
        }
    }
}

/// Value of the destinations map, one `u32` so that it is replaced as a whole: the verdict, and for
/// [`Verdict::Balance`] the index of the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RuleValue {
    /// What happens.
    pub verdict: Verdict,
    /// Index of the service, at most [`Self::MAX_SERVICE`]; 0 with other verdicts.
    pub service: u32,
}

impl RuleValue {
    /// The highest index of a service.
    pub const MAX_SERVICE: u32 = (1 << 24) - 1;

    /// As it stands in the map.
    #[inline(always)]
    pub const fn encode(self) -> u32 {
        self.verdict as u32 | self.service << 8
    }

    /// From the map; an unknown verdict is none.
    #[inline(always)]
    pub const fn decode(raw: u32) -> Option<Self> {
        match Verdict::from_raw(raw & 0xff) {
            Some(verdict) => Some(Self { verdict, service: raw >> 8 }),
            None => None,
        }
    }
}

impl From<Verdict> for RuleValue {
    fn from(verdict: Verdict) -> Self {
        Self { verdict, service: 0 }
    }
}

/// Key of the destinations map. Lookup order: this address and port, then any address of its family with this port,
/// then [`Settings::catch_all`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Destination {
    /// Service address; [`Addr::ZERO`] when `scope` is not [`Self::ONE`].
    pub addr: Addr,
    /// Service port, host order, never 0.
    pub port: u16,
    /// [`Self::ONE`], [`Self::ANY_V4`] or [`Self::ANY_V6`].
    pub scope: u16,
}

const _: () = assert!(size_of::<Destination>() == 20 && align_of::<Destination>() == 4);

impl Destination {
    /// One address.
    pub const ONE: u16 = 0;
    /// Every IPv4 address (which leaves out loopback, unspecified and the pod's own address: these only match
    /// exactly).
    pub const ANY_V4: u16 = 4;
    /// Every IPv6 address, with the same exceptions and link-local.
    pub const ANY_V6: u16 = 6;

    /// This address and port.
    #[inline(always)]
    pub const fn exact(addr: Addr, port: u16) -> Self {
        Self { addr, port, scope: Self::ONE }
    }

    /// This port of every address of the family of `addr`.
    #[inline(always)]
    pub const fn any_address(addr: &Addr, port: u16) -> Self {
        Self { addr: Addr::ZERO, port, scope: if addr.is_v4() { Self::ANY_V4 } else { Self::ANY_V6 } }
    }
}

/// `0.0.0.0:port` and `[::]:port` are any address of their family; IPv4 in either form is the same destination.
impl From<SocketAddr> for Destination {
    fn from(addr: SocketAddr) -> Self {
        let (ip, port) = (addr.ip().to_canonical(), addr.port());
        if ip.is_unspecified() { Self::any_address(&ip.into(), port) } else { Self::exact(ip.into(), port) }
    }
}

/// What an attach point is for. Each kind has connect programs of its own, so it costs nothing to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// Pods. Processes of the agent's own network namespace (host-network pods) are left alone.
    Pods,
    /// Processes of the host: those of the agent's own network namespace are captured, too.
    Host,
}

/// What a network namespace is to the agent.
#[repr(u16)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EnrolState {
    /// Its connections follow the rules.
    Captured = 1,
    /// Known, and left alone.
    Excluded = 2,
    /// The agent's own namespace: connections of processes in host cgroups follow the rules, others are left alone.
    Host = 3,
}

/// Value of the namespaces map, keyed by netns cookie (`u64`). Only the agent writes it. A namespace without an
/// entry gets what [`Settings::fail_mode`] says.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Enrolment {
    /// The pod's own IPv4 address; [`Addr::ZERO`] when it has none (127.0.0.1 stands in). Captured connections go
    /// there: so the kernel picks it as their source and getsockname(2) tells the application the truth.
    pub source_v4: Addr,
    /// The same for IPv6 (`::1` stands in).
    pub source_v6: Addr,
    /// Port of the agent's capture listener in this namespace, host order; 0 when excluded.
    pub capture_port: u16,
    /// An [`EnrolState`].
    pub state: u16,
    /// [`crate::Carrier::Syn`], or [`crate::Carrier::Map`].
    pub carrier: u32,
    /// What balancers hash of connections from `source_v4` (or what stands in for it); 0: it is not known here.
    pub hash_v4: u64,
    /// The same of `source_v6`.
    pub hash_v6: u64,
}

const _: () = assert!(size_of::<Enrolment>() == 56 && align_of::<Enrolment>() == 8);

impl Enrolment {
    /// A namespace whose capture listener waits on `capture_port`.
    pub fn captured(capture_port: u16, v4: Option<Ipv4Addr>, v6: Option<Ipv6Addr>) -> Self {
        Self {
            source_v4: v4.map_or(Addr::ZERO, Addr::from),
            source_v6: v6.map_or(Addr::ZERO, Addr::from),
            capture_port,
            state: EnrolState::Captured as u16,
            carrier: Carrier::Syn as u32,
            hash_v4: 0,
            hash_v6: 0,
        }
    }

    /// The same record, with what balancers hash of its addresses.
    #[must_use]
    pub fn hashed(self, hash: impl Fn(IpAddr) -> u64) -> Self {
        let of = |addr: Addr, instead: IpAddr| hash(if addr.is_zero() { instead } else { addr.to_ip() });
        Self {
            hash_v4: of(self.source_v4, Ipv4Addr::LOCALHOST.into()),
            hash_v6: of(self.source_v6, Ipv6Addr::LOCALHOST.into()),
            ..self
        }
    }

    /// The same record for a namespace whose accepted sockets have no SYN.
    #[must_use]
    pub const fn carried_by_map(self) -> Self {
        Self { carrier: Carrier::Map as u32, ..self }
    }

    /// The same record for the agent's own namespace: only processes in host cgroups are captured there.
    #[must_use]
    pub const fn of_host(self) -> Self {
        Self { state: EnrolState::Host as u16, ..self }
    }

    /// A namespace that is left alone.
    pub const fn excluded() -> Self {
        Self {
            source_v4: Addr::ZERO,
            source_v6: Addr::ZERO,
            capture_port: 0,
            state: EnrolState::Excluded as u16,
            carrier: Carrier::Syn as u32,
            hash_v4: 0,
            hash_v6: 0,
        }
    }

    /// Whether there are capture listeners: the rules apply to some process at least.
    #[inline(always)]
    pub const fn is_captured(&self) -> bool {
        self.state == EnrolState::Captured as u16 || self.state == EnrolState::Host as u16
    }

    /// Whether the rules apply to a process below an attach point of this kind.
    #[inline(always)]
    pub const fn is_captured_at(&self, place: Place) -> bool {
        self.state == EnrolState::Captured as u16
            || (self.state == EnrolState::Host as u16 && matches!(place, Place::Host))
    }
}

/// What happens to a connection that should be captured and can't be.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum FailMode {
    /// It passes untouched, and is counted.
    #[default]
    Open = 0,
    /// connect(2) fails with the errno of its [`crate::Reason`], and is counted.
    Closed = 1,
}

/// The one entry of the settings map. Written by the agent, read by every hook.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// [`Verdict`] for a destination that no rule names.
    pub catch_all: u32,
    /// A [`FailMode`].
    pub fail_mode: u32,
}

const _: () = assert!(size_of::<Settings>() == 8 && align_of::<Settings>() == 4);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unspecified_is_any_address_of_its_family() {
        let key = |text: &str| Destination::from(text.parse::<SocketAddr>().unwrap());
        assert_eq!(key("0.0.0.0:80").scope, Destination::ANY_V4);
        assert_eq!(key("[::ffff:0.0.0.0]:80"), key("0.0.0.0:80"));
        assert_eq!(key("[::]:80").scope, Destination::ANY_V6);
        assert_eq!(key("[::ffff:10.0.0.1]:80"), key("10.0.0.1:80"));
        assert_eq!(key("[::1]:80").scope, Destination::ONE);
        // Somebody who connects to the unspecified address means this host, not any address.
        assert_ne!(Destination::exact(Addr::ZERO, 80), key("[::]:80"));
    }
}
