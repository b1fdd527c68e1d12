//! Listeners: which socket, which filter chain.

pub mod filter_chain;
