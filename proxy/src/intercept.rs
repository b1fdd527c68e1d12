//! Interception: the agent's half of the eBPF programs in `proxy-ebpf`.
//!
//! [`programs::Interceptor`] loads and attaches them and owns the rules; it lives on the main thread. Workers get
//! [`original_dst::OriginalDstReader`] and, where it is needed, [`original_dst::OwnSocketMarker`].
#![allow(unsafe_code)] // bpf(2), in `bpf` only

mod bpf;
mod bpffs;
pub mod cgroup;
pub mod destinations;
pub mod error;
mod links;
pub mod maps;
pub mod original_dst;
pub mod pods;
pub mod programs;

pub use bpffs::default_pin_dir;
