//! Microbenches of the pure core.
