//! tidegate: a node proxy for TCP that reads what Envoy reads, intercepts with eBPF and moves bytes with
//! the least CPU that Linux allows. ARCHITECTURE.md walks through a connection and a configuration update.
#![deny(unsafe_code)]

pub mod access_log;
pub mod addr;
pub mod admin;
pub mod app;
pub mod args;
pub mod bound;
pub mod check;
pub mod cleanup;
pub mod cluster;
pub mod config;
pub mod connection;
pub mod drain;
#[cfg(test)]
mod fuzz;
pub mod intercept;
pub mod kernel_path;
pub mod listener;
pub mod log;
pub mod pages;
pub mod pump;
pub mod response_flag;
pub mod secret;
pub mod signal;
pub mod snapshot;
pub mod stats;
pub mod sys;
pub mod takeover;
pub mod uring;
pub mod worker;
pub mod x509;
pub mod xds;
