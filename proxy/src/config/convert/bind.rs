//! What sockets are bound to, and their options by number.

use tidegate_api::core;
use tidegate_api::core::socket_option::{SocketIpVersion, SocketState as State, SocketType, Value};

use super::extension::{Extension, unregistered};
use super::net::ip_address;
use super::{Report, each, enumeration};
use crate::config::proto::FieldPath;
use crate::config::upstream_bind::{BindConfig, UpstreamSource};
use crate::sys::socket::{SocketOption, SocketState};

const DEFAULT_SELECTOR: &str = "envoy.config.upstream.local_address_selector.v3.DefaultLocalAddressSelector";

/// `upstream_bind_config`.
#[expect(deprecated, reason = "deprecated fields are accepted as long as Envoy accepts them")]
pub(super) fn bind_config(
    bind: Option<core::BindConfig>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<BindConfig> {
    let core::BindConfig {
        source_address,
        freebind,
        socket_options,
        extra_source_addresses,
        additional_source_addresses,
        local_address_selector,
        validate_network_namespaces: _, // addresses in other namespaces are refused
    } = bind?;
    let path = path.field("upstream_bind_config");
    if let Some(selector) = local_address_selector {
        let path = path.field("local_address_selector");
        let config = Extension::new(selector.typed_config.unwrap_or_default());
        if config.type_name != DEFAULT_SELECTOR {
            unregistered(&selector.name, config.type_url(), &path, report);
        }
    }
    let has_more = !extra_source_addresses.is_empty() || !additional_source_addresses.is_empty();
    if has_more && source_address.is_none() {
        report
            .invalid(&path, "has extra_source_addresses and no source_address; give the first address there");
    }
    let mut sources = Vec::new();
    if let Some(address) = source_address {
        let address = ip_address(address, &path.field("source_address"), report);
        sources.extend(address.map(|address| UpstreamSource { address, socket_options: None }));
    }
    sources.extend(each(extra_source_addresses, &path, "extra_source_addresses", |extra, path| {
        let core::ExtraSourceAddress { address, socket_options: of_it } = extra;
        let Some(address) = address else {
            report.missing(path, "address");
            return None;
        };
        let address = ip_address(address, &path.field("address"), report)?;
        let socket_options = of_it.map(|options| overriding(options, path, report));
        Some(UpstreamSource { address, socket_options })
    }));
    let has_both = sources.len() > 1 && !additional_source_addresses.is_empty();
    sources.extend(each(additional_source_addresses, &path, "additional_source_addresses", |it, path| {
        Some(UpstreamSource { address: ip_address(it, path, report)?, socket_options: None })
    }));
    if has_both {
        report.invalid(
            &path.field("additional_source_addresses"),
            "can't be given beside extra_source_addresses; put the address there",
        );
    } else if sources.len() > 2 {
        report
            .invalid(&path, "more than one extra source address; one of each family is all that can be used");
    } else if let [one, other] = &sources[..]
        && one.address.is_ipv4() == other.address.is_ipv4()
    {
        report.invalid(
            &path,
            format!(
                "source addresses {} and {} are of one family; only the first would be used",
                one.address.ip(),
                other.address.ip()
            ),
        );
    }
    let socket_options = self::socket_options(socket_options, &path, report);
    Some(BindConfig { sources, freebind, socket_options })
}

/// The field `socket_options`, where it is a `SocketOptionsOverride`.
pub(super) fn overriding(
    options: core::SocketOptionsOverride,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Vec<SocketOption> {
    let core::SocketOptionsOverride { socket_options } = options;
    self::socket_options(socket_options, &path.field("socket_options"), report)
}

/// The field `socket_options`. Those for datagrams are left out.
pub(super) fn socket_options(
    options: Vec<core::SocketOption>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Vec<SocketOption> {
    each(options, path, "socket_options", |option, path| socket_option(option, path, report))
}

fn socket_option(
    option: core::SocketOption,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<SocketOption> {
    let core::SocketOption { description: _, level, name, state, r#type, ip_version, value } = option;
    let mut number = |value: i64, field: &str| {
        let number = i32::try_from(value).ok();
        if number.is_none() {
            report.invalid(
                &path.field(field),
                format!("{value} does not fit a C int, which setsockopt(2) takes"),
            );
        }
        number
    };
    let (level, name) = (number(level, "level"), number(name, "name"));
    let value: Option<Box<[u8]>> = match value {
        Some(Value::IntValue(value)) => number(value, "int_value").map(|value| value.to_ne_bytes().into()),
        Some(Value::BufValue(bytes)) => Some(bytes.into()),
        None => {
            report.missing(path, "int_value or buf_value");
            None
        }
    };
    let state = match enumeration(state, path, "state", report)? {
        State::StatePrebind => SocketState::Prebind,
        State::StateBound => SocketState::Bound,
        State::StateListening => SocketState::Listening,
    };
    let ipv6 = match enumeration(ip_version, path, "ip_version", report)? {
        SocketIpVersion::Unspecified => None,
        SocketIpVersion::Ipv4 => Some(false),
        SocketIpVersion::Ipv6 => Some(true),
    };
    if matches!(r#type, Some(SocketType { stream: None, datagram: Some(_) })) {
        return None;
    }
    Some(SocketOption { level: level?, name: name?, value: value?, state, ipv6 })
}
