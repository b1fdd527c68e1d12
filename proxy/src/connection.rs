//! One connection, from accept to its log line.

pub mod record;
