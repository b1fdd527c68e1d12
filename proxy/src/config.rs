//! Plain validated configuration: what Envoy's messages mean, with every default applied. No I/O, no async.
//!
//! Each type is built from its proto message by `TryFrom`-like functions that destructure the message
//! exhaustively, so that a new field is a compile error, and report problems with the full field path.

pub mod access_log;
pub mod bootstrap;
pub mod cluster;
pub mod endpoint;
pub mod error;
pub mod filter_chain;
pub mod listener;
pub mod proto;
pub mod route;
pub mod tcp_proxy;
