//! The eBPF programs on the running kernel: they need root, cgroup2 and bpffs, and fail without.
#![allow(unsafe_code, reason = "raw sockets options and a forked helper")]

mod capture;
mod ends;
mod kernel_path;
mod lab;
mod policy;
mod records;
mod slots;
mod takeover;
