//! The kernel path after connect(2): what became of a connection that no proxy stands in.
//!
//! Counters are always right; the record of each connection goes through a ring buffer, and a loss is counted.

use core::ptr::addr_of;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP, BPF_SOCK_OPS_PARSE_ALL_HDR_OPT_CB_FLAG,
        BPF_SOCK_OPS_RTO_CB_FLAG, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_TCP_CLOSE, BPF_TCP_CLOSE_WAIT,
        BPF_TCP_CLOSING, BPF_TCP_ESTABLISHED, BPF_TCP_FIN_WAIT1, BPF_TCP_FIN_WAIT2, BPF_TCP_LAST_ACK,
        BPF_TCP_SYN_SENT, bpf_sock_ops,
    },
    helpers::generated::{
        bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_getsockopt, bpf_ktime_get_ns, bpf_setsockopt,
        bpf_sock_ops_cb_flags_set,
    },
    programs::{SockContext, SockOpsContext},
};
use tidegate_common::{ASLEEP, Addr, ENDING, End, Flow, FlowEvent, FlowFlag, Phase, Reason, Tally};

use crate::{
    balance::{cluster_state, host_state, service_state},
    connect::ALLOW,
    counters::{add, count, subtract},
    maps::{ARENA, ERRORS_PURGE, FLOW_EVENTS, kernel_path},
    record,
    sockops::{addresses, local_port, remote_port},
};

const IPPROTO_TCP: i32 = 6;
const TCP_USER_TIMEOUT: i32 = 18;

/// A field of the kernel's context.
macro_rules! field {
    ($ctx:expr, $($field:tt)+) => {
        // SAFETY: the context is the kernel's, valid while the program runs. Volatile: the verifier wants one load of each
        // field's own size.
        unsafe { addr_of!((*$ctx.ops).$($field)+).read_volatile() }
    };
}

/// Applies the same to the tallies of service, cluster and host.
#[inline(always)]
fn each_tally(flow: &Flow, mut change: impl FnMut(*mut Tally)) {
    if let Some(service) = service_state(flow.service) {
        // SAFETY: map memory; the pointer is only handed to atomic adds.
        change(unsafe { &raw mut (*service).tally });
    }
    if let Some(cluster) = cluster_state(flow.cluster) {
        // SAFETY: as above.
        change(unsafe { &raw mut (*cluster).tally });
    }
    if let Some(host) = host_state(flow.host) {
        // SAFETY: as above.
        change(unsafe { &raw mut (*host).tally });
    }
}

/// The SYN is about to be sent. From here on every end is heard of.
#[inline(always)]
pub fn connecting(ctx: &SockOpsContext, flow: &mut Flow) {
    if flow.phase != Phase::Chosen as u16
        || !ask_for(ctx, BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_RTO_CB_FLAG)
    {
        return;
    }
    flow.phase = Phase::Connecting as u16;
    each_tally(flow, |tally| {
        // SAFETY: map memory.
        unsafe {
            // In this order: whoever reads them in the other one never sees an attempt without its connection.
            add(&raw mut (*tally).active, 1);
            add(&raw mut (*tally).attempts, 1);
        }
    });
}

/// Has the handshake end with the cluster's connect timeout, by TCP_USER_TIMEOUT. The kernel looks at that when it sends the SYN
/// again, so that nothing has to be done for one that is answered before.
#[inline(always)]
fn limit_handshake(ctx: &SockOpsContext, flow: &mut Flow) {
    let limit = connect_timeout_ms(flow);
    if limit == 0 {
        return;
    }
    let own = user_timeout(ctx);
    if own == 0 || own > limit {
        flow.user_timeout_ms = own;
        flow.flags |= FlowFlag::Limited as u16;
        set_user_timeout(ctx, limit);
    }
}

/// The handshake is over.
#[inline(always)]
fn established(ctx: &SockOpsContext, flow: &mut Flow) {
    if flow.phase != Phase::Connecting as u16 {
        return;
    }
    flow.phase = Phase::Established as u16;
    // SAFETY: no preconditions.
    flow.connected_ns = unsafe { bpf_ktime_get_ns() };
    // SAFETY: map memory.
    each_tally(flow, |tally| unsafe { add(&raw mut (*tally).established, 1) });
    if has(flow, FlowFlag::Limited) {
        set_user_timeout(ctx, flow.user_timeout_ms);
    }
}

/// Callbacks, besides those that were asked for before; false if the kernel refuses.
#[inline(always)]
fn ask_for(ctx: &SockOpsContext, flags: u32) -> bool {
    // SAFETY: the context is the kernel's.
    unsafe { bpf_sock_ops_cb_flags_set(ctx.ops, (ctx.cb_flags() | flags) as i32) == 0 }
}

/// The application closes its last descriptor, or has died. The kernel ends the connection next, in this same call: what it
/// sends says whether something was left unread. (A RST of the endpoint's between the two is taken for the application's.)
#[inline(always)]
pub fn released(ctx: &SockContext) -> i32 {
    // SAFETY: the context is the kernel's. Volatile: the verifier wants one load of the field's own size.
    let protocol = unsafe { addr_of!((*ctx.sock).protocol).read_volatile() };
    if kernel_path() && protocol == IPPROTO_TCP as u32 {
        record::released(ctx.sock);
    }
    ALLOW
}

#[inline(always)]
fn is_released(flow: &Flow) -> bool {
    // SAFETY: an aligned field. Volatile: in a storage it is written by a program on another CPU.
    unsafe { addr_of!(flow.released).read_volatile() != 0 }
}

#[inline(always)]
fn has(flow: &Flow, flag: FlowFlag) -> bool {
    flow.flags & flag as u16 != 0
}

/// Nothing was acknowledged in time. The socket tries again, or gives up, which closes it next.
#[inline(always)]
pub fn retransmission_timeout(ctx: &SockOpsContext, flow: &mut Flow) {
    if field!(ctx, __bindgen_anon_1.args[2]) != 0 {
        flow.flags |= FlowFlag::Silent as u16;
    } else if flow.phase == Phase::Connecting as u16 && !has(flow, FlowFlag::Limited) {
        limit_handshake(ctx, flow);
    }
}

/// A FIN has come.
#[inline(always)]
pub fn endpoint_fin(flow: &mut Flow) {
    flow.flags |= FlowFlag::EndpointFin as u16;
}

/// The socket goes from one state to another.
#[inline(always)]
pub fn state_changed(ctx: &SockOpsContext, flow: &mut Flow, old: u32, new: u32) {
    match new {
        BPF_TCP_ESTABLISHED => established(ctx, flow),
        BPF_TCP_FIN_WAIT1 => half_closed(ctx, flow),
        BPF_TCP_CLOSE_WAIT => {
            first(flow, FlowFlag::EndpointFirst);
            endpoint_fin(flow);
        }
        BPF_TCP_CLOSING => endpoint_fin(flow),
        BPF_TCP_LAST_ACK => flow.flags |= FlowFlag::ClientFin as u16,
        BPF_TCP_CLOSE => closed(ctx, flow, old),
        _ => {}
    }
}

/// The application's FIN goes out first.
#[inline(always)]
fn half_closed(ctx: &SockOpsContext, flow: &mut Flow) {
    first(flow, FlowFlag::ClientFirst);
    flow.flags |= FlowFlag::ClientFin as u16;
    if is_released(flow) {
        // Nothing but a FIN is taken from now on.
        flow.flags |= FlowFlag::ClosedWithFin as u16;
        flow.bytes_before = field!(ctx, bytes_received) as u32;
        flow.segments_before = field!(ctx, data_segs_in);
    } else {
        // A FIN and a RST look the same from here. The kernel shows each segment but a RST. (It knows these callbacks, so that
        // it can't refuse.)
        ask_for(ctx, BPF_SOCK_OPS_PARSE_ALL_HDR_OPT_CB_FLAG);
    }
}

#[inline(always)]
fn first(flow: &mut Flow, who: FlowFlag) {
    if !has(flow, FlowFlag::ClientFirst) && !has(flow, FlowFlag::EndpointFirst) {
        flow.flags |= who as u16;
    }
}

#[inline(always)]
fn closed(ctx: &SockOpsContext, flow: &mut Flow, old: u32) {
    let was = flow.phase;
    if was != Phase::Connecting as u16 && was != Phase::Established as u16 {
        return;
    }
    flow.phase = Phase::Ended as u16;
    // SAFETY: no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    let (mut sent, mut received) = (field!(ctx, bytes_acked), field!(ctx, bytes_received));
    let failed = was == Phase::Connecting as u16 || old == BPF_TCP_SYN_SENT;
    let end = if failed {
        (sent, received) = (0, 0);
        failure(ctx, flow)
    } else {
        if has(flow, FlowFlag::ClosedWithFin) && received as u32 != flow.bytes_before {
            endpoint_fin(flow);
        }
        // The kernel counts SYN and FIN as one byte each.
        let fin_is_acknowledged = match old {
            BPF_TCP_FIN_WAIT2 => true,
            BPF_TCP_CLOSING | BPF_TCP_LAST_ACK => field!(ctx, snd_una) == field!(ctx, snd_nxt),
            _ => false,
        };
        sent = sent.saturating_sub(1 + u64::from(fin_is_acknowledged));
        received = received.saturating_sub(has(flow, FlowFlag::EndpointFin).into());
        end_of_established(ctx, flow, old)
    };
    account(flow, end, failed, sent, received);
    report(ctx, flow, end, now, sent, received);
}

/// Why a handshake failed. The programs can't read the socket's error: that takes a program under the GPL. What is
/// known instead is what the application, the timer and the endpoint did before.
#[inline(always)]
fn failure(ctx: &SockOpsContext, flow: &Flow) -> End {
    if is_released(flow) {
        End::Abandoned
    } else if has(flow, FlowFlag::Silent) {
        End::TimedOut
    } else if is_ended_by_agent(ctx) {
        End::Removed
    } else if ERRORS_PURGE.load() != 0 && field!(ctx, packets_out) != 0 {
        // shutdown(2), or connect(2) to AF_UNSPEC.
        End::Abandoned
    } else if field!(ctx, segs_in) != 0 {
        End::Refused
    } else {
        End::Unreachable
    }
}

/// Who ended a connection: `old` is its last state.
///
/// A RST of the endpoint's, and a timer, have the kernel drop what was not acknowledged before it tells; the application's
/// own end comes before that.
#[inline(always)]
fn end_of_established(ctx: &SockOpsContext, flow: &Flow, old: u32) -> End {
    match old {
        // Both FINs were sent: whatever came then, neither side has missed anything.
        BPF_TCP_CLOSING | BPF_TCP_LAST_ACK => End::Closed,
        // Also the application's own RST, after its FIN: a proxy does not call it one.
        BPF_TCP_FIN_WAIT2 if has(flow, FlowFlag::EndpointFin) || is_released(flow) => End::Closed,
        _ if is_ended_by_agent(ctx) => End::Removed,
        _ if field!(ctx, packets_out) != 0 => End::ResetByClient,
        _ if has(flow, FlowFlag::Silent) => End::Silent,
        // The kernel itself answers bytes that nobody will read.
        BPF_TCP_FIN_WAIT1
            if has(flow, FlowFlag::ClosedWithFin) && field!(ctx, data_segs_in) != flow.segments_before =>
        {
            End::ResetByClient
        }
        BPF_TCP_FIN_WAIT1 | BPF_TCP_FIN_WAIT2 => End::ResetByEndpoint,
        _ if is_released(flow) => End::ResetByClient,
        _ => End::ResetByEndpoint,
    }
}

/// Whether the agent's SOCK_DESTROY is what closes the socket: it does so within the agent's system call.
#[inline(always)]
fn is_ended_by_agent(ctx: &SockOpsContext) -> bool {
    let Some(ending) = ARENA.get_ptr_mut(ENDING) else { return false };
    // SAFETY: an aligned word of a map; the helper has no preconditions.
    unsafe {
        let cookie = ending.read_volatile();
        cookie != 0 && cookie == bpf_get_socket_cookie(ctx.as_ptr())
    }
}

#[inline(always)]
fn account(flow: &Flow, end: End, failed: bool, sent: u64, received: u64) {
    let (by_client, by_endpoint) = match end {
        End::Closed => (has(flow, FlowFlag::ClientFirst), has(flow, FlowFlag::EndpointFirst)),
        End::ResetByClient => (true, false),
        End::ResetByEndpoint | End::Silent => (false, true),
        _ => (false, false),
    };
    each_tally(flow, |tally| {
        // SAFETY: map memory.
        unsafe {
            if failed {
                add(&raw mut (*tally).failed, 1);
            } else {
                add(&raw mut (*tally).sent, sent);
                add(&raw mut (*tally).received, received);
            }
            match end {
                End::TimedOut => add(&raw mut (*tally).timed_out, 1),
                End::Abandoned => add(&raw mut (*tally).abandoned, 1),
                End::Removed if failed => add(&raw mut (*tally).abandoned, 1),
                _ => {}
            }
            if by_client {
                add(&raw mut (*tally).closed_by_client, 1);
            } else if by_endpoint {
                add(&raw mut (*tally).closed_by_endpoint, 1);
            }
            // Last: who sees that it is over sees how.
            subtract(&raw mut (*tally).active);
        }
    });
}

/// The record of a connection that has ended.
#[inline(always)]
fn report(ctx: &SockOpsContext, flow: &Flow, end: End, now: u64, sent: u64, received: u64) {
    let (client, endpoint) = addresses(ctx);
    write(FlowEvent {
        end: end as u16,
        port: flow.port,
        endpoint_port: remote_port(ctx),
        client_port: local_port(ctx),
        service: flow.service,
        cluster: flow.cluster,
        host: flow.host,
        flags: flow.flags.into(),
        retransmits: field!(ctx, total_retrans),
        // Held in eighths.
        srtt_us: field!(ctx, srtt_us) >> 3,
        addr: flow.addr,
        endpoint,
        client,
        // SAFETY: no preconditions.
        netns_cookie: unsafe { bpf_get_netns_cookie(ctx.as_ptr()) },
        started_ns: flow.started_ns,
        connected_ns: flow.connected_ns,
        ended_ns: now,
        sent,
        received,
    });
}

/// The record of a connect that was refused.
#[inline(always)]
pub fn report_refusal(end: End, addr: Addr, port: u16, service: u32, cluster: u32, netns_cookie: u64) {
    // SAFETY: no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    write(FlowEvent {
        end: end as u16,
        port,
        endpoint_port: 0,
        client_port: 0,
        service,
        cluster,
        host: 0,
        flags: 0,
        retransmits: 0,
        srtt_us: 0,
        addr,
        endpoint: Addr::ZERO,
        client: Addr::ZERO,
        netns_cookie,
        started_ns: now,
        connected_ns: 0,
        ended_ns: now,
        sent: 0,
        received: 0,
    });
}

/// Wakes the agent only when it has said that it sleeps: a wake-up costs the application more than everything else here,
/// and an agent that is awake looks at the buffer several times a second.
#[inline(always)]
fn write(event: FlowEvent) {
    match FLOW_EVENTS.reserve(0) {
        Some(mut entry) => {
            entry.write(event);
            let wakeup = if wakes_agent() { BPF_RB_FORCE_WAKEUP } else { BPF_RB_NO_WAKEUP };
            entry.submit(wakeup.into());
        }
        None => count(Reason::FlowEventLost),
    }
}

/// Whether the agent sleeps; from now on it doesn't.
#[inline(always)]
fn wakes_agent() -> bool {
    let Some(asleep) = ARENA.get_ptr_mut(ASLEEP) else { return false };
    // SAFETY: an aligned word of a map. Two programs at one moment may both wake it: no harm.
    unsafe {
        let is_asleep = asleep.read_volatile() != 0;
        if is_asleep {
            asleep.write_volatile(0);
        }
        is_asleep
    }
}

#[inline(always)]
fn connect_timeout_ms(flow: &Flow) -> u32 {
    // SAFETY: map memory, an aligned word.
    cluster_state(flow.cluster)
        .map_or(0, |cluster| unsafe { addr_of!((*cluster).connect_timeout_ms).read_volatile() })
}

/// 0 when it was never set, or can't be read.
#[inline(always)]
fn user_timeout(ctx: &SockOpsContext) -> u32 {
    let mut value = 0_u32;
    // SAFETY: the context is the kernel's; the value is on the stack and as long as said.
    let failed = unsafe {
        bpf_getsockopt(
            ctx.ops.cast(),
            IPPROTO_TCP,
            TCP_USER_TIMEOUT,
            (&raw mut value).cast(),
            size_of::<u32>() as i32,
        )
    } != 0;
    if failed { 0 } else { value }
}

#[inline(always)]
fn set_user_timeout(ctx: &SockOpsContext, mut millis: u32) {
    // SAFETY: as in `user_timeout`.
    unsafe {
        bpf_setsockopt(
            ctx.ops.cast::<bpf_sock_ops>().cast(),
            IPPROTO_TCP,
            TCP_USER_TIMEOUT,
            (&raw mut millis).cast(),
            size_of::<u32>() as i32,
        )
    };
}
