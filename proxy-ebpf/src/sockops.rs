//! sockops: carries the original destination from the application's socket to the accepted one, in the SYN if it can.
//!
//! Runs for every TCP socket below the attach point, which may be the whole node: each branch first makes the check
//! that sends away strangers cheapest.

use core::ptr::addr_of;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_HDR_OPT_LEN_CB, BPF_SOCK_OPS_PARSE_HDR_OPT_CB,
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_RTO_CB, BPF_SOCK_OPS_STATE_CB,
        BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_SOCK_OPS_WRITE_HDR_OPT_CB,
        BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG, BPF_TCP_CLOSE, BPF_TCP_FIN_WAIT2, BPF_TCP_SYN_RECV,
        BPF_TCP_SYN_SENT, bpf_sock, bpf_sock_ops,
    },
    helpers::generated::{
        bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_load_hdr_opt, bpf_reserve_hdr_opt,
        bpf_sock_ops_cb_flags_set, bpf_store_hdr_opt,
    },
    programs::SockOpsContext,
};
use aya_log_ebpf::debug;
use tidegate_common::{Addr, Carrier, FlowKey, InFlight, OriginalDst, Reason, Role, syn};

use crate::{
    announce::announce,
    counters::count,
    flow,
    maps::{IN_FLIGHT, NAMESPACES, ORIGINAL_DST, store, stored},
    record::{self, Record},
};

const AF_INET: u32 = 2;
/// In a packet's TCP flags.
const TCP_FIN: u32 = 1;
const TCP_SYN: u32 = 2;
/// `BPF_LOAD_HDR_OPT_TCP_SYN`.
const LOAD_FROM_SYN: u64 = 1;

/// Always 1 and the reply untouched: for the kernel this program has no opinion.
#[inline(always)]
pub fn on_event(ctx: &SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(ctx),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => connected(ctx),
        BPF_SOCK_OPS_HDR_OPT_LEN_CB => room(ctx),
        BPF_SOCK_OPS_WRITE_HDR_OPT_CB => write(ctx),
        BPF_SOCK_OPS_STATE_CB => {
            // SAFETY: args of the kernel's context; volatile as in `addresses`.
            let (old, new) = unsafe {
                let args = &raw const (*ctx.ops).__bindgen_anon_1.args;
                (addr_of!((*args)[0]).read_volatile(), addr_of!((*args)[1]).read_volatile())
            };
            // Before the search for whose socket it is: nobody has anything to do then.
            if matches!(new, BPF_TCP_FIN_WAIT2 | BPF_TCP_SYN_SENT | BPF_TCP_SYN_RECV) {
                return 1;
            }
            if let Some(record) = record_of(ctx) {
                flow::state_changed(ctx, record.flow, old, new);
                if new == BPF_TCP_CLOSE {
                    record.free();
                }
            } else if new == BPF_TCP_CLOSE {
                closed(ctx);
            }
        }
        BPF_SOCK_OPS_RTO_CB => {
            if let Some(record) = record_of(ctx) {
                flow::retransmission_timeout(ctx, record.flow);
            }
        }
        BPF_SOCK_OPS_PARSE_HDR_OPT_CB if tcp_flags(ctx) & TCP_FIN != 0 => {
            if let Some(record) = record_of(ctx) {
                flow::endpoint_fin(record.flow);
            }
        }
        _ => {}
    }
    1
}

/// The application's socket has its source port and sends its SYN next. (ACTIVE_ESTABLISHED would be too late for
/// Fast Open.)
#[inline(always)]
fn connecting(ctx: &SockOpsContext) {
    let sk = socket(ctx);
    if sk.is_null() {
        return;
    }
    let Some(original) = stored(&ORIGINAL_DST, sk) else {
        if let Some(record) = record::find(ctx.as_ptr(), sk) {
            flow::connecting(ctx, record.flow);
        }
        return;
    };
    if original.role != Role::Client as u16 {
        return;
    }
    if !Carrier::Map.is_in(original.carrier) && ask_for_option_callbacks(ctx, original) {
        return;
    }
    put_in_flight(ctx, original);
}

/// Before the SYN is built: `room` and `write` are called for it.
#[inline(always)]
fn ask_for_option_callbacks(ctx: &SockOpsContext, original: &mut OriginalDst) -> bool {
    let flags = ctx.cb_flags();
    if flags & BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG != 0 {
        return true;
    }
    original.carrier |= Carrier::Asked as u32;
    set_cb_flags(ctx, flags | BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG)
}

/// The SYN is over, or carries nothing.
#[inline(always)]
fn end_option_callbacks(ctx: &SockOpsContext, original: &mut OriginalDst) {
    if Carrier::Asked.is_in(original.carrier) {
        original.carrier &= !(Carrier::Asked as u32);
        set_cb_flags(ctx, ctx.cb_flags() & !BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
    }
}

/// How much room does the packet's option take? The other options of the SYN have theirs already.
#[inline(always)]
fn room(ctx: &SockOpsContext) {
    let Some(original) = of_syn(ctx) else { return };
    // SAFETY: the context is the kernel's.
    if unsafe { bpf_reserve_hdr_opt(ctx.ops, syn::length(&original.addr), 0) } == 0 {
        // Not again when the SYN is sent again.
        if !Carrier::Reserved.is_in(original.carrier) {
            original.carrier |= Carrier::Reserved as u32;
            count(Reason::InSyn);
        }
    } else {
        original.carrier |= Carrier::Map as u32;
        end_option_callbacks(ctx, original);
        put_in_flight(ctx, original);
    }
}

/// Into the room that was reserved.
#[inline(always)]
fn write(ctx: &SockOpsContext) {
    let Some(original) = of_syn(ctx) else { return };
    if Carrier::Reserved.is_in(original.carrier) {
        let option = syn::encode(&original.addr, original.port);
        // SAFETY: the option is on the program's stack and no shorter than said. If the kernel has no room after all, the
        // connection arrives without an original destination, which is counted there.
        unsafe { bpf_store_hdr_opt(ctx.ops, option.as_ptr().cast(), syn::length(&original.addr), 0) };
    }
}

/// The original destination, if the packet that is made is an application's SYN that is to carry it.
#[inline(always)]
fn of_syn(ctx: &SockOpsContext) -> Option<&'static mut OriginalDst> {
    if tcp_flags(ctx) & TCP_SYN == 0 {
        return None;
    }
    let sk = socket(ctx);
    if sk.is_null() {
        return None;
    }
    stored(&ORIGINAL_DST, sk).filter(|it| it.role == Role::Client as u16 && !Carrier::Map.is_in(it.carrier))
}

/// The map carries it.
#[inline(always)]
fn put_in_flight(ctx: &SockOpsContext, original: &mut OriginalDst) {
    // SAFETY: no preconditions.
    original.client_cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let value = InFlight { original_dst: *original };
    let (local, remote) = addresses(ctx);
    let key = key(ctx, local, local_port(ctx), remote, remote_port(ctx));
    // The flag first: an entry without it would have nobody to delete it.
    if set_cb_flags(ctx, ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG)
        && IN_FLIGHT.insert(key, value, 0).is_ok()
    {
        count(Reason::InFlight);
    } else {
        count(Reason::InFlightFull);
        debug!(ctx, "in-flight map is full: source port {} will be reset", key.client_port);
    }
}

/// The handshake of an application's socket is over. (On the kernel path that is a change of state.)
#[inline(always)]
fn connected(ctx: &SockOpsContext) {
    if ctx.cb_flags() & BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG == 0 {
        return;
    }
    let sk = socket(ctx);
    if sk.is_null() {
        return;
    }
    if let Some(original) = stored(&ORIGINAL_DST, sk)
        && original.role == Role::Client as u16
    {
        end_option_callbacks(ctx, original);
    }
}

/// The handshake is over and the child socket exists; nobody has accepted it yet.
#[inline(always)]
fn accepted(ctx: &SockOpsContext) {
    // Servers of pods have kept no SYN.
    if syn_carries(ctx) {
        count(Reason::HandedOver);
        return;
    }
    let local_port = local_port(ctx);
    // SAFETY: no preconditions.
    let netns_cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: as in connect.rs.
    let capture_port = match unsafe { NAMESPACES.get(netns_cookie) } {
        Some(enrolment) if enrolment.is_captured() => enrolment.capture_port,
        _ => return,
    };
    let sk = socket(ctx);
    if sk.is_null() {
        return;
    }
    let (local, remote) = addresses(ctx);
    let key = key(ctx, remote, remote_port(ctx), local, local_port);
    // SAFETY: only the connection with this key writes the entry, and that was before its SYN.
    let Some(mut original) = (unsafe { IN_FLIGHT.get(key) }).map(|entry| entry.original_dst) else {
        // On other ports: a server of the pod, or the listener of a predecessor, which was the capture port when this
        // connection began. Stored already: a predecessor's program that is attached here too was first.
        if local_port == capture_port && stored(&ORIGINAL_DST, sk).is_none() {
            count(Reason::NoOriginalDestination);
            // Has it become one whose SYNs are not kept?
            announce(netns_cookie, 0, 0);
            debug!(ctx, "no original destination: source port {}", key.client_port);
        }
        return;
    };
    original.role = Role::Accepted as u16;
    original.carrier = 0;
    let stored = store(&ORIGINAL_DST, sk, &mut original);
    let _ = IN_FLIGHT.remove(key);
    count(if stored { Reason::HandedOver } else { Reason::AcceptedStorageFailed });
}

/// Whether the SYN of the accepted socket carries an original destination. Capture listeners keep their SYNs, and take them
/// from their own pod only. (A server of a pod that keeps its SYNs can be sent one by a stranger: that makes a counter wrong,
/// and nothing else.)
#[inline(always)]
fn syn_carries(ctx: &SockOpsContext) -> bool {
    // Its kind, and 0 for its length: any. The kernel writes the option over it.
    let mut option = [syn::KIND, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    // SAFETY: the option is on the program's stack and as long as said.
    unsafe { bpf_load_hdr_opt(ctx.ops, option.as_mut_ptr().cast(), syn::LENGTH_V6, LOAD_FROM_SYN) > 0 }
}

/// Replaces the socket's set of wanted callbacks; false if the kernel refuses.
#[inline(always)]
fn set_cb_flags(ctx: &SockOpsContext, flags: u32) -> bool {
    // SAFETY: the context is the kernel's.
    unsafe { bpf_sock_ops_cb_flags_set(ctx.ops, flags as i32) == 0 }
}

/// An application's socket that asked for state changes is gone.
#[inline(always)]
fn closed(ctx: &SockOpsContext) {
    let (local, remote) = addresses(ctx);
    let key = key(ctx, local, local_port(ctx), remote, remote_port(ctx));
    // SAFETY: as in `accepted`.
    let Some(client_cookie) = (unsafe { IN_FLIGHT.get(key) }).map(|entry| entry.original_dst.client_cookie)
    else {
        return;
    };
    // The cookie: a TIME_WAIT socket's 4-tuple may be in use again already.
    // SAFETY: no preconditions.
    if client_cookie == unsafe { bpf_get_socket_cookie(ctx.as_ptr()) } && IN_FLIGHT.remove(key).is_ok() {
        count(Reason::HandshakeAbandoned);
    }
}

#[inline(always)]
fn key(ctx: &SockOpsContext, client: Addr, client_port: u16, capture: Addr, capture_port: u16) -> FlowKey {
    // SAFETY: no preconditions.
    let netns_cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    FlowKey { netns_cookie, client, capture, client_port, capture_port, reserved: 0 }
}

/// The socket's record of the kernel path.
#[inline(always)]
fn record_of(ctx: &SockOpsContext) -> Option<Record> {
    let sk = socket(ctx);
    if sk.is_null() { None } else { record::find(ctx.as_ptr(), sk) }
}

/// Those of the packet that is made, or that has come.
#[inline(always)]
fn tcp_flags(ctx: &SockOpsContext) -> u32 {
    // SAFETY: as in `addresses`.
    unsafe { addr_of!((*ctx.ops).skb_tcp_flags).read_volatile() }
}

/// Null for a request socket.
#[inline(always)]
fn socket(ctx: &SockOpsContext) -> *mut bpf_sock {
    // SAFETY: the context is the kernel's, valid while the program runs.
    unsafe { (*ctx.ops).__bindgen_anon_2.sk }
}

/// Local port; the kernel gives it in host order.
#[inline(always)]
pub fn local_port(ctx: &SockOpsContext) -> u16 {
    // SAFETY: as in `addresses`.
    unsafe { addr_of!((*ctx.ops).local_port).read_volatile() as u16 }
}

/// Remote port; the kernel gives it as a 32-bit number in network order.
#[inline(always)]
pub fn remote_port(ctx: &SockOpsContext) -> u16 {
    // SAFETY: as in `addresses`.
    u32::from_be(unsafe { addr_of!((*ctx.ops).remote_port).read_volatile() }) as u16
}

/// Local and remote address. IPv4 on an IPv6 socket has both forms; the mapped one is made from the IPv4 fields, so
/// that both ends of a connection come to the same key whatever kind of socket they have.
#[inline(always)]
pub fn addresses(ctx: &SockOpsContext) -> (Addr, Addr) {
    let o: *mut bpf_sock_ops = ctx.ops;
    // SAFETY: fields of the kernel's context. Volatile: the verifier wants one load of each field's own size.
    unsafe {
        if addr_of!((*o).family).read_volatile() != AF_INET {
            let remote = Addr::from_words([
                addr_of!((*o).remote_ip6[0]).read_volatile(),
                addr_of!((*o).remote_ip6[1]).read_volatile(),
                addr_of!((*o).remote_ip6[2]).read_volatile(),
                addr_of!((*o).remote_ip6[3]).read_volatile(),
            ]);
            if !remote.is_v4() {
                let local = Addr::from_words([
                    addr_of!((*o).local_ip6[0]).read_volatile(),
                    addr_of!((*o).local_ip6[1]).read_volatile(),
                    addr_of!((*o).local_ip6[2]).read_volatile(),
                    addr_of!((*o).local_ip6[3]).read_volatile(),
                ]);
                return (local, remote);
            }
        }
        (
            Addr::from_v4_be(addr_of!((*o).local_ip4).read_volatile()),
            Addr::from_v4_be(addr_of!((*o).remote_ip4).read_volatile()),
        )
    }
}
