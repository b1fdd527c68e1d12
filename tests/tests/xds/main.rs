//! Configuration that comes while the proxy runs, from control planes.

mod fixture;
mod world;
