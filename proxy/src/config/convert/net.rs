//! Addresses, prefixes, keepalive.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tidegate_api::core;
use tidegate_api::core::address::Address as Kind;
use tidegate_api::core::socket_address::{PortSpecifier, Protocol};

use super::{Report, enumeration, port};
use crate::addr::Pipe;
use crate::config::endpoint::EndpointAddress;
use crate::config::listener::{Cidr, TcpKeepalive};
use crate::config::proto::FieldPath;

/// An address that a socket can be bound to.
pub(super) fn socket_addr(
    address: Option<core::Address>,
    path: &FieldPath<'_>,
    field: &str,
    report: &mut Report<'_>,
) -> Option<SocketAddr> {
    let field_path = path.field(field);
    match host_and_port(address, path, field, report)? {
        EndpointAddress::Ip(address) => Some(address),
        EndpointAddress::Pipe(_) => {
            report.unsupported(
                &field_path.field("pipe"),
                "nothing listens on unix domain sockets here; use socket_address",
            );
            None
        }
        EndpointAddress::Name(host, _) => {
            let path = field_path.field("socket_address");
            report.invalid(&path.field("address"), format!("{host:?} is not an IP address"));
            None
        }
    }
}

/// An IP address with a port.
pub(super) fn ip_address(
    address: core::SocketAddress,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<SocketAddr> {
    match socket_address(address, path, report)? {
        EndpointAddress::Ip(address) => Some(address),
        EndpointAddress::Name(host, _) => {
            report.invalid(&path.field("address"), format!("{host:?} is not an IP address"));
            None
        }
        EndpointAddress::Pipe(_) => None, // no socket address is one
    }
}

/// An address, or a name that has to be resolved, with a port; or a Unix domain socket.
pub(super) fn host_and_port(
    address: Option<core::Address>,
    path: &FieldPath<'_>,
    field: &str,
    report: &mut Report<'_>,
) -> Option<EndpointAddress> {
    let Some(kind) = address.and_then(|address| address.address) else {
        report.missing(path, field);
        return None;
    };
    let path = path.field(field);
    match kind {
        Kind::SocketAddress(address) => {
            let path = path.field("socket_address");
            socket_address(address, &path, report)
        }
        Kind::Pipe(pipe) => self::pipe(&pipe, &path.field("pipe"), report),
        Kind::EnvoyInternalAddress(_) => {
            report.unsupported(
                &path.field("envoy_internal_address"),
                "internal listeners are not supported; use socket_address",
            );
            None
        }
    }
}

fn pipe(pipe: &core::Pipe, path: &FieldPath<'_>, report: &mut Report<'_>) -> Option<EndpointAddress> {
    // The mode is for a socket that is bound.
    let core::Pipe { path: name, mode } = pipe;
    match Pipe::new(name) {
        Ok(pipe) if pipe.is_abstract() && *mode != 0 => {
            report
                .invalid(&path.field("mode"), "an abstract socket (@…) has no file to set it on; remove it");
            None
        }
        Ok(pipe) => {
            if name.starts_with("unix:") {
                report.warn(
                    &path.field("path"),
                    format!("{name:?} is taken as it is; a path has no \"unix:\""),
                );
            }
            Some(EndpointAddress::Pipe(pipe))
        }
        Err(error) => {
            report.invalid(&path.field("path"), format!("{name:?}: {error}"));
            None
        }
    }
}

fn socket_address(
    address: core::SocketAddress,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<EndpointAddress> {
    let core::SocketAddress {
        protocol,
        address: host,
        resolver_name,
        ipv4_compat,
        network_namespace_filepath,
        port_specifier,
    } = address;
    if enumeration::<Protocol>(protocol, path, "protocol", report)? == Protocol::Udp {
        report.unsupported(&path.field("protocol"), "UDP is not supported; only TCP is");
    }
    if !resolver_name.is_empty() {
        report.unsupported(&path.field("resolver_name"), "custom resolvers are not supported; remove it");
    }
    if ipv4_compat {
        report.inactive("SocketAddress", path, "ipv4_compat");
    }
    if !network_namespace_filepath.is_empty() {
        report.unsupported(
            &path.field("network_namespace_filepath"),
            "sockets in another network namespace are not supported, and opening the port in this one would \
             expose it elsewhere; remove it",
        );
    }
    let number = match port_specifier {
        Some(PortSpecifier::PortValue(value)) => port(value, &path.field("port_value"), report)?,
        Some(PortSpecifier::NamedPort(_)) => {
            report.unsupported(&path.field("named_port"), "named ports are not supported; use port_value");
            return None;
        }
        None => {
            report.missing(path, "port_value");
            return None;
        }
    };
    match host.parse::<IpAddr>() {
        Ok(ip) => Some(EndpointAddress::Ip(SocketAddr::new(ip, number))),
        Err(_) if host.is_empty() => {
            report.missing(path, "address");
            None
        }
        Err(_) => Some(EndpointAddress::Name(Arc::from(host), number)),
    }
}

/// An IP prefix with its host bits cleared, as Envoy does.
pub(super) fn cidr(range: core::CidrRange, path: &FieldPath<'_>, report: &mut Report<'_>) -> Option<Cidr> {
    let core::CidrRange { address_prefix, prefix_len } = range;
    let Ok(address) = address_prefix.parse::<IpAddr>() else {
        report.invalid(&path.field("address_prefix"), format!("{address_prefix:?} is not an IP address"));
        return None;
    };
    let bits: u8 = if address.is_ipv4() { 32 } else { 128 };
    let prefix_len = prefix_len.unwrap_or(0);
    if prefix_len > u32::from(bits) {
        report.warn(
            &path.field("prefix_len"),
            format!("{prefix_len} is too long for {address_prefix}: {bits} is used, as in Envoy"),
        );
    }
    let prefix_len = u8::try_from(prefix_len).unwrap_or(bits).min(bits);
    let address = match address {
        IpAddr::V4(v4) => {
            IpAddr::V4((v4.to_bits() & u32::MAX.checked_shl(u32::from(32 - prefix_len)).unwrap_or(0)).into())
        }
        IpAddr::V6(v6) => IpAddr::V6(
            (v6.to_bits() & u128::MAX.checked_shl(u32::from(128 - prefix_len)).unwrap_or(0)).into(),
        ),
    };
    Some(Cidr { address, prefix_len })
}

/// A 0 in any of the fields turns keepalive off, as in Envoy.
pub(super) fn keepalive(keepalive: core::TcpKeepalive) -> Option<TcpKeepalive> {
    let core::TcpKeepalive { keepalive_probes, keepalive_time, keepalive_interval } = keepalive;
    let is_off = [keepalive_probes, keepalive_time, keepalive_interval].contains(&Some(0));
    (!is_off).then_some(TcpKeepalive {
        probes: keepalive_probes,
        time: keepalive_time,
        interval: keepalive_interval,
    })
}
