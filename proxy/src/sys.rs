//! Thin safe wrappers of Linux interfaces that the standard library lacks. No policy, no configuration.
#![allow(unsafe_code)]

pub mod cgroup;
pub mod clock;
#[cfg(test)]
pub(crate) mod counting;
#[cfg(test)]
pub(crate) mod forbid;
pub mod memory;
pub mod mounts;
pub mod netns;
pub mod pipe;
pub mod process;
pub mod socket;
pub mod socket_diag;
pub mod splice;
