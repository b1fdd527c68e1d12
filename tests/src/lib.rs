//! Fixtures for whatever needs a whole machine: namespaces, pods, upstreams, clients, proxies.
//!
//! Everything made here carries the process id and start time of its maker in its name, is removed on drop,
//! and is removed by the next run when its maker died without doing so ([`run::sweep`]). So tests run in
//! parallel, twice, and after a kill. All of it needs root.

pub mod admin;
pub mod cgroup;
pub mod client;
pub mod config;
pub mod control_plane;
pub mod dialogue;
pub mod far;
pub mod load;
pub mod netns;
pub mod network;
pub mod node;
pub mod pod;
pub mod program;
pub mod proxy;
pub mod run;
pub mod script;
pub mod sovereign;
pub mod tool;
pub mod upstream;
pub mod workload;
