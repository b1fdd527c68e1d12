//! Listeners: which socket, what listener filters read, which filter chain.

pub mod filter;
pub mod filter_chain;
