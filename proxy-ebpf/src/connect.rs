//! connect4 and connect6: leave, refuse, capture or balance.

use core::ptr::{addr_of, addr_of_mut};

use aya_ebpf::{
    EbpfContext as _,
    bindings::{bpf_sock, bpf_sock_addr},
    helpers::generated::{bpf_get_netns_cookie, bpf_ktime_get_ns, bpf_set_retval},
    programs::SockAddrContext,
};
use aya_log_ebpf::debug;
use tidegate_common::{
    Addr, Carrier, Destination, End, Enrolment, FailMode, Flow, OriginalDst, Phase, Place, Reason, Role,
    RuleValue, Settings, Verdict,
};

use crate::{
    announce::announce_connect,
    balance::{Choice, balance},
    counters::count,
    flow::report_refusal,
    liveness::listener_waits,
    maps::{
        DESTINATIONS, HAS_SET_RETVAL, NAMESPACES, ORIGINAL_DST, OWN_SOCKET, SETTINGS, discard, is_excluded,
        kernel_path, store, stored,
    },
    record,
};

/// Which hook runs; a constant after inlining.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

/// What a cgroup hook returns to let the call go on.
pub const ALLOW: i32 = 1;
const DENY: i32 = 0;

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
const SOCK_STREAM: u32 = 1;
pub const IPPROTO_TCP: u32 = 6;

/// Decides, counts, acts.
#[inline(always)]
pub fn on_connect(ctx: &SockAddrContext, family: Family, place: Place) -> i32 {
    if !is_tcp(ctx, family) {
        count(Reason::PassedNotTcp);
        return ALLOW;
    }
    // SAFETY: the context is the kernel's, valid while the program runs.
    let sk = unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk };
    let (addr, port) = destination(ctx, family);
    let mut decision = decide(ctx, sk, addr, port, place);
    let mut choice = None;
    if let Decision::Balance { service, enrolment } = decision {
        let refusal = fail(Reason::NoTablePassed, Reason::NoTableRefused);
        let source = Source { ctx, bound: bound_address(sk, family), enrolment, destination: &addr };
        choice = balance(service, &addr, &source, refusal);
        if choice.is_none() {
            // The proxy knows every source, and what to do without a chain.
            decision = match enrolment {
                Some(enrolment) => Decision::capture(enrolment, &addr),
                None => Decision::Leave(fail(Reason::NotEnrolledPassed, Reason::NotEnrolledRefused)),
            };
        }
    }
    // A socket can be connected again (after a refusal, or AF_UNSPEC, which runs no hook): what an earlier connect
    // left behind must not outlive this one.
    let reason = match (decision, choice) {
        (Decision::Balance { .. }, Some(choice)) => {
            discard(&ORIGINAL_DST, sk);
            to_endpoint(ctx, sk, family, addr, port, choice)
        }
        (Decision::Capture { addr: own, port: capture_port, carrier }, _) => {
            record::discard(ctx.as_ptr(), sk);
            capture(ctx, sk, family, (addr, port), (own, capture_port), carrier)
        }
        (Decision::Leave(reason), _) => {
            discard(&ORIGINAL_DST, sk);
            record::discard(ctx.as_ptr(), sk);
            reason
        }
        // Not reached: without a choice it is another decision by now.
        (Decision::Balance { .. }, None) => Reason::NoTablePassed,
    };
    count(reason);
    trace(ctx, addr, port, reason);
    answer(reason)
}

/// What to do with a destination.
#[derive(Clone, Copy)]
enum Decision {
    /// Rewrite to this address and port, if the proxy listens there.
    Capture { addr: Addr, port: u16, carrier: u32 },
    /// Rewrite to an endpoint of this service. None: the namespace is not enrolled (yet).
    Balance { service: u32, enrolment: Option<&'static Enrolment> },
    /// Not captured: pass or refuse, as the reason's errno says.
    Leave(Reason),
}

impl Decision {
    /// To the proxy.
    #[inline(always)]
    fn capture(enrolment: &Enrolment, addr: &Addr) -> Self {
        let addr = own_address(enrolment, addr);
        Self::Capture { addr, port: enrolment.capture_port, carrier: enrolment.carrier }
    }
}

/// The proxy's path: rewrites to its capture listener, or says why not.
#[inline(always)]
fn capture(
    ctx: &SockAddrContext,
    sk: *mut bpf_sock,
    family: Family,
    (addr, port): (Addr, u16),
    (own, capture_port): (Addr, u16),
    carrier: u32,
) -> Reason {
    // SAFETY: the verifier knows the socket's type; the field is readable in this hook.
    if unsafe { addr_of!((*sk).bound_dev_if).read_volatile() } != 0 {
        discard(&ORIGINAL_DST, sk);
        return fail(Reason::BoundToDevicePassed, Reason::BoundToDeviceRefused);
    }
    // Last: of all checks the dearest, and only a connection that is captured needs it.
    if !listener_waits(ctx, own, capture_port) {
        discard(&ORIGINAL_DST, sk);
        return fail(Reason::ListenerGonePassed, Reason::ListenerGoneRefused);
    }
    let asked = stored(&ORIGINAL_DST, sk).map_or(0, |former| former.carrier & Carrier::Asked as u32);
    let mut original =
        OriginalDst { addr, port, role: Role::Client as u16, carrier: carrier | asked, client_cookie: 0 };
    if store(&ORIGINAL_DST, sk, &mut original) {
        rewrite(ctx, family, own, capture_port);
        Reason::Captured
    } else {
        fail(Reason::StorageFailedPassed, Reason::StorageFailedRefused)
    }
}

/// What is known of the source that a connection would have at the proxy's capture listener: what the application has
/// bound, else the pod's own address.
pub struct Source<'a> {
    ctx: &'a SockAddrContext,
    bound: Addr,
    enrolment: Option<&'static Enrolment>,
    destination: &'a Addr,
}

impl Source<'_> {
    /// The address; zero: it is not known here.
    #[inline(always)]
    pub fn address(&self) -> Addr {
        match self.enrolment {
            _ if !self.bound.is_unspecified() => self.bound,
            Some(enrolment) => own_address(enrolment, self.destination),
            None => Addr::ZERO,
        }
    }

    /// What the proxy would hash of it. 0: only the proxy knows, since the agent has hashed the pod's own addresses.
    #[inline(always)]
    pub fn hash(&self) -> u64 {
        let Some(enrolment) = self.enrolment else { return 0 };
        if !self.bound.is_unspecified() && !self.bound.same(&own_address(enrolment, self.destination)) {
            return 0;
        }
        if self.destination.is_v4() { enrolment.hash_v4 } else { enrolment.hash_v6 }
    }

    /// Whether the agent lives, as far as is known: it waits for connections from here.
    #[inline(always)]
    pub fn agent_lives(&self) -> bool {
        self.enrolment.is_none_or(|enrolment| {
            listener_waits(self.ctx, own_address(enrolment, self.destination), enrolment.capture_port)
        })
    }
}

/// The address that the application has bound its socket to; unspecified: none.
#[inline(always)]
fn bound_address(sk: *mut bpf_sock, family: Family) -> Addr {
    // SAFETY: as in `capture`.
    unsafe {
        match family {
            Family::V4 => Addr::from_v4_be(addr_of!((*sk).src_ip4).read_volatile()),
            Family::V6 => Addr::from_words([
                addr_of!((*sk).src_ip6[0]).read_volatile(),
                addr_of!((*sk).src_ip6[1]).read_volatile(),
                addr_of!((*sk).src_ip6[2]).read_volatile(),
                addr_of!((*sk).src_ip6[3]).read_volatile(),
            ]),
        }
    }
}

/// The kernel path: rewrites to the chosen endpoint, or says why not.
#[inline(always)]
fn to_endpoint(
    ctx: &SockAddrContext,
    sk: *mut bpf_sock,
    family: Family,
    addr: Addr,
    port: u16,
    choice: Choice,
) -> Reason {
    match choice.outcome {
        Ok(endpoint) => {
            let mut flow = Flow {
                addr,
                port,
                phase: Phase::Chosen as u16,
                user_timeout_ms: 0,
                service: choice.service,
                cluster: choice.cluster,
                host: endpoint.host,
                flags: 0,
                released: 0,
                // SAFETY: no preconditions.
                started_ns: unsafe { bpf_ktime_get_ns() },
                connected_ns: 0,
                bytes_before: 0,
                segments_before: 0,
            };
            if record::make(ctx.as_ptr(), sk, &mut flow) {
                rewrite(ctx, family, endpoint.addr, endpoint.port);
                Reason::Balanced
            } else {
                fail(Reason::StorageFailedPassed, Reason::StorageFailedRefused)
            }
        }
        Err(reason) => {
            record::discard(ctx.as_ptr(), sk);
            let end = match reason {
                Reason::NoHost => End::NoHost,
                Reason::Overflow => End::Overflow,
                _ => return reason,
            };
            // SAFETY: no preconditions.
            let netns_cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
            report_refusal(end, addr, port, choice.service, choice.cluster, netns_cookie);
            reason
        }
    }
}

#[inline(always)]
fn decide(ctx: &SockAddrContext, sk: *mut bpf_sock, addr: Addr, port: u16, place: Place) -> Decision {
    use Decision::Leave;
    if port == 0 {
        return Leave(Reason::PassedPortZero);
    }
    if stored(&OWN_SOCKET, sk).is_some() {
        return Leave(Reason::PassedOwnSocket);
    }
    let (RuleValue { verdict, service }, exact) = rule(addr, port);
    if verdict == Verdict::Leave {
        return Leave(Reason::PassedNoRule);
    }
    // What is meant for this host itself is never taken by a rule that doesn't name it.
    if !exact {
        if addr.is_loopback() || addr.is_unspecified() {
            return Leave(Reason::PassedLoopback);
        }
        if addr.is_v6_link_local() {
            return Leave(Reason::PassedLinkLocal);
        }
    }
    // SAFETY: no preconditions.
    let netns_cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: the agent replaces whole entries; a preallocated entry that is reused while we read it belongs to a
    // namespace that was just forgotten.
    let Some(enrolment) = (unsafe { NAMESPACES.get(netns_cookie) }) else {
        announce_connect(netns_cookie);
        if kernel_path() && verdict == Verdict::Balance && exact {
            // Some pod, since what is excluded is known. This path needs nothing of it but, maybe, its address.
            return Decision::Balance { service, enrolment: None };
        }
        return Leave(fail(Reason::NotEnrolledPassed, Reason::NotEnrolledRefused));
    };
    if !enrolment.is_captured_at(place) {
        return Leave(Reason::PassedExcluded);
    }
    let own = own_address(enrolment, &addr);
    if addr.same(&own) || addr.is_loopback() || addr.is_unspecified() {
        if port == enrolment.capture_port {
            return Leave(Reason::PassedCaptureListener);
        }
        if !exact {
            return Leave(Reason::PassedOwnAddress);
        }
    }
    if verdict == Verdict::Refuse {
        return Leave(Reason::RefusedByRule);
    }
    if verdict == Verdict::Balance {
        if kernel_path() {
            return Decision::Balance { service, enrolment: Some(enrolment) };
        }
        // A rule of a predecessor that had it on.
        return Leave(fail(Reason::NoTablePassed, Reason::NoTableRefused));
    }
    Decision::capture(enrolment, &addr)
}

/// The rule for a destination, and whether it names the address.
#[inline(always)]
fn rule(addr: Addr, port: u16) -> (RuleValue, bool) {
    const NONE: RuleValue = RuleValue { verdict: Verdict::Leave, service: 0 };
    // SAFETY (both): the value is one word, replaced as a whole.
    if let Some(raw) = unsafe { DESTINATIONS.get(Destination::exact(addr, port)) } {
        return (RuleValue::decode(*raw).unwrap_or(NONE), true);
    }
    if is_excluded(addr) {
        return (NONE, false);
    }
    // SAFETY: as above.
    if let Some(raw) = unsafe { DESTINATIONS.get(Destination::any_address(&addr, port)) } {
        return (RuleValue::decode(*raw).unwrap_or(NONE), false);
    }
    (settings().and_then(|s| RuleValue::decode(s.catch_all)).unwrap_or(NONE), false)
}

#[inline(always)]
fn settings() -> Option<&'static Settings> {
    SETTINGS.get(0)
}

/// One of two reasons, by fail mode.
#[inline(always)]
fn fail(open: Reason, closed: Reason) -> Reason {
    if settings().is_some_and(|s| s.fail_mode == FailMode::Closed as u32) { closed } else { open }
}

/// Where a connection to `addr` is sent: the pod's own address of that family. The kernel then picks the same
/// address as source, without bpf_bind, which would lock the source address beyond AF_UNSPEC.
#[inline(always)]
fn own_address(enrolment: &Enrolment, addr: &Addr) -> Addr {
    if addr.is_v4() {
        if enrolment.source_v4.is_zero() {
            Addr::from_v4_be(0x7f00_0001_u32.to_be())
        } else {
            enrolment.source_v4
        }
    } else if enrolment.source_v6.is_zero() {
        Addr::LOOPBACK_V6
    } else {
        enrolment.source_v6
    }
}

/// Turns a reason into what the hook returns.
#[inline(always)]
fn answer(reason: Reason) -> i32 {
    let errno = reason.errno();
    if errno == 0 {
        return ALLOW;
    }
    if HAS_SET_RETVAL.load() != 0 {
        // SAFETY: no preconditions; the branch only exists where the kernel has the helper.
        unsafe { bpf_set_retval(-errno) };
    }
    DENY
}

/// TCP, and an address of the family that this hook reads (the kernel refuses others after the hook).
#[inline(always)]
fn is_tcp(ctx: &SockAddrContext, family: Family) -> bool {
    let a: *mut bpf_sock_addr = ctx.sock_addr;
    let wanted = if family == Family::V4 { AF_INET } else { AF_INET6 };
    // SAFETY: fields of the kernel's context. Volatile: the verifier wants one load of each field's own size.
    unsafe {
        addr_of!((*a).user_family).read_volatile() == wanted
            && addr_of!((*a).type_).read_volatile() == SOCK_STREAM
            && addr_of!((*a).protocol).read_volatile() == IPPROTO_TCP
    }
}

/// The address and port that the application passed.
#[inline(always)]
fn destination(ctx: &SockAddrContext, family: Family) -> (Addr, u16) {
    let a: *mut bpf_sock_addr = ctx.sock_addr;
    // SAFETY: as in `is_tcp`. user_port holds a 16-bit port in network order.
    unsafe {
        let port = u16::from_be(addr_of!((*a).user_port).read_volatile() as u16);
        let addr = match family {
            Family::V4 => Addr::from_v4_be(addr_of!((*a).user_ip4).read_volatile()),
            Family::V6 => Addr::from_words([
                addr_of!((*a).user_ip6[0]).read_volatile(),
                addr_of!((*a).user_ip6[1]).read_volatile(),
                addr_of!((*a).user_ip6[2]).read_volatile(),
                addr_of!((*a).user_ip6[3]).read_volatile(),
            ]),
        };
        (addr, port)
    }
}

/// Writes an address and port into the context: the destination in connect, the answer in getpeername.
#[inline(always)]
pub fn rewrite(ctx: &SockAddrContext, family: Family, addr: Addr, port: u16) {
    let a: *mut bpf_sock_addr = ctx.sock_addr;
    // SAFETY: as in `is_tcp`; these fields are writable in these hooks.
    unsafe {
        match family {
            Family::V4 => addr_of_mut!((*a).user_ip4).write_volatile(addr.v4_be()),
            Family::V6 => {
                let words = addr.words();
                addr_of_mut!((*a).user_ip6[0]).write_volatile(words[0]);
                addr_of_mut!((*a).user_ip6[1]).write_volatile(words[1]);
                addr_of_mut!((*a).user_ip6[2]).write_volatile(words[2]);
                addr_of_mut!((*a).user_ip6[3]).write_volatile(words[3]);
            }
        }
        addr_of_mut!((*a).user_port).write_volatile(u32::from(port.to_be()));
    }
}

/// One debug line per decision; not in the program at all unless debugging was on when it was loaded.
#[inline(always)]
fn trace(ctx: &SockAddrContext, addr: Addr, port: u16, reason: Reason) {
    // SAFETY: four words are sixteen bytes.
    let ip: [u8; 16] = unsafe { core::mem::transmute(addr.words()) };
    match reason {
        Reason::Captured => debug!(ctx, "connect [{:i}]:{} captured", ip, port),
        Reason::Balanced => debug!(ctx, "connect [{:i}]:{} balanced", ip, port),
        Reason::RefusedByRule => debug!(ctx, "connect [{:i}]:{} refused by rule", ip, port),
        _ => debug!(ctx, "connect [{:i}]:{} not captured, reason {}", ip, port, reason as u32),
    }
}
