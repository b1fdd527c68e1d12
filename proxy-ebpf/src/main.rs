//! tidegate's eBPF programs. Entry points only; each hook's work is in its module.
//!
//! A captured connection: `connect` rewrites the destination and leaves the original one on the application's
//! socket → `sockops` puts it into the SYN, which the kernel keeps with the socket that the proxy accepts → userspace reads
//! it from there. `getpeername` keeps the application from noticing.
//!
//! A connection on the kernel path: `connect` has `balance` choose an endpoint, rewrites the destination to it and leaves
//! a record on the application's socket → `sockops` hears what becomes of it, `sock_release` that the application has closed it,
//! `flow` counts and reports.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![allow(internal_features, reason = "one atomic add, see counters.rs")]

mod announce;
mod balance;
mod connect;
mod counters;
mod flow;
mod getpeername;
mod liveness;
mod maps;
mod record;
mod sockops;

use aya_ebpf::{
    macros::{cgroup_sock, cgroup_sock_addr, sock_ops},
    programs::{SockAddrContext, SockContext, SockOpsContext},
};
use tidegate_common::Place;

/// IPv4 connect(2) below a cgroup of pods.
#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    connect::on_connect(&ctx, connect::Family::V4, Place::Pods)
}

/// IPv6 connect(2) below a cgroup of pods, and IPv4 on an IPv6 socket (`::ffff:a.b.c.d` never runs connect4).
#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    connect::on_connect(&ctx, connect::Family::V6, Place::Pods)
}

/// IPv4 connect(2) below a cgroup of the host.
#[cgroup_sock_addr(connect4)]
pub fn connect4_host(ctx: SockAddrContext) -> i32 {
    connect::on_connect(&ctx, connect::Family::V4, Place::Host)
}

/// IPv6 connect(2) below a cgroup of the host.
#[cgroup_sock_addr(connect6)]
pub fn connect6_host(ctx: SockAddrContext) -> i32 {
    connect::on_connect(&ctx, connect::Family::V6, Place::Host)
}

/// IPv4 getpeername(2).
#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    getpeername::on_getpeername(&ctx, connect::Family::V4)
}

/// IPv6 getpeername(2).
#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    getpeername::on_getpeername(&ctx, connect::Family::V6)
}

/// The last descriptor of any IPv4 or IPv6 socket is closed, by its owner or with it. Attached only where there is a kernel path.
#[cgroup_sock(sock_release)]
pub fn sock_release(ctx: SockContext) -> i32 {
    flow::released(&ctx)
}

/// TCP events of every socket below the attach point. (Not named `sockops`: the linker refuses a symbol with the name
/// of its section.)
#[sock_ops]
pub fn tcp_events(ctx: SockOpsContext) -> u32 {
    sockops::on_event(&ctx)
}

/// The verifier proves that nothing panics: a panic that is still in the object can't be loaded.
#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

// The kernel wants to know. None of the helpers in use is for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 11] = *b"Apache-2.0\0";
