//! A chain's criteria as rows: one for each combination that it lists.

use std::fmt;

use crate::config::filter_chain::{FilterChainMatch, SourceType};
use crate::config::listener::Cidr;

/// One combination of the criteria of one chain. `None` is "any" and sorts first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key<'a> {
    pub(super) destination_port: Option<u16>,
    pub(super) destination: Option<Cidr>,
    pub(super) server_name: Option<Name<'a>>,
    pub(super) transport_protocol: Option<&'a str>,
    pub(super) application_protocol: Option<&'a str>,
    pub(super) direct_source: Option<Cidr>,
    pub(super) local_source: Option<bool>,
    pub(super) source: Option<Cidr>,
    pub(super) source_port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Row<'a> {
    pub(super) key: Key<'a>,
    pub(super) chain: u32,
}

/// A server name criterion. `*.example.com` is the suffix `.example.com`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Name<'a> {
    Exact(&'a str),
    Suffix(&'a str),
}

impl<'a> Name<'a> {
    fn parse(name: &'a str) -> Self {
        match name.strip_prefix('*') {
            Some(suffix) => Self::Suffix(suffix),
            None if name.starts_with('.') => Self::Suffix(name),
            None => Self::Exact(name),
        }
    }
}

/// Every combination of a chain's criteria.
pub(super) fn rows_of(matches: &FilterChainMatch, chain: u32) -> Vec<Row<'_>> {
    let any = Key {
        destination_port: matches.destination_port,
        destination: None,
        server_name: None,
        transport_protocol: (!matches.transport_protocol.is_empty()).then_some(&*matches.transport_protocol),
        application_protocol: None,
        direct_source: None,
        local_source: match matches.source_type {
            SourceType::Any => None,
            SourceType::SameIpOrLoopback => Some(true),
            SourceType::External => Some(false),
        },
        source: None,
        source_port: None,
    };
    let mut keys = vec![any];
    multiply(&mut keys, &matches.prefix_ranges, |key, cidr| key.destination = Some(*cidr));
    multiply(&mut keys, &matches.server_names, |key, name| key.server_name = Some(Name::parse(name)));
    multiply(&mut keys, &matches.application_protocols, |key, alpn| key.application_protocol = Some(&**alpn));
    multiply(&mut keys, &matches.direct_source_prefix_ranges, |key, cidr| key.direct_source = Some(*cidr));
    multiply(&mut keys, &matches.source_prefix_ranges, |key, cidr| key.source = Some(*cidr));
    multiply(&mut keys, &matches.source_ports, |key, port| key.source_port = Some(*port));
    keys.into_iter().map(|key| Row { key, chain }).collect()
}

/// Replaces each key by one copy per value; an empty list leaves the criterion at "any".
fn multiply<'a, T>(keys: &mut Vec<Key<'a>>, values: &'a [T], set: impl Fn(&mut Key<'a>, &'a T)) {
    if values.is_empty() {
        return;
    }
    let bases = std::mem::take(keys);
    keys.reserve(bases.len() * values.len());
    for base in bases {
        for value in values {
            let mut key = base.clone();
            set(&mut key, value);
            keys.push(key);
        }
    }
}

impl fmt::Display for Key<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cidr = |c: Cidr| format!("{}/{}", c.address, c.prefix_len);
        let parts = [
            self.destination_port.map(|port| format!("destination_port {port}")),
            self.destination.map(|c| format!("prefix_ranges {}", cidr(c))),
            self.server_name.map(|name| match name {
                Name::Exact(name) => format!("server_names {name}"),
                Name::Suffix(suffix) => format!("server_names *{suffix}"),
            }),
            self.transport_protocol.map(|name| format!("transport_protocol {name}")),
            self.application_protocol.map(|name| format!("application_protocols {name}")),
            self.direct_source.map(|c| format!("direct_source_prefix_ranges {}", cidr(c))),
            self.local_source.map(|local| {
                format!("source_type {}", if local { "SAME_IP_OR_LOOPBACK" } else { "EXTERNAL" })
            }),
            self.source.map(|c| format!("source_prefix_ranges {}", cidr(c))),
            self.source_port.map(|port| format!("source_ports {port}")),
        ];
        let mut parts = parts.into_iter().flatten().peekable();
        if parts.peek().is_none() {
            return f.write_str("every connection");
        }
        f.write_str(&parts.collect::<Vec<_>>().join(", "))
    }
}
