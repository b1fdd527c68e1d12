//! `/config_dump`: the bootstrap, and what came from control planes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use serde_json::{Map, Value, json};

use crate::config::proto::Encoded;
use crate::xds::Kind;
use crate::xds::store::KEY_SEPARATOR;
use crate::xds::tables::{All, Held, Record, Refused};

/// The whole dump. `bootstrap` was read at `read`.
pub(super) fn whole(bootstrap: &Value, read: SystemTime, tables: &All, include_eds: bool) -> Value {
    let at = time(read);
    let statics = |field: &str, message: &str, name: &str| -> Vec<Value> {
        let all = bootstrap["static_resources"][field].as_array();
        let dump = |resource: &Value| json!({ name: typed(message, resource), "last_updated": at });
        all.map(|all| all.iter().map(dump).collect()).unwrap_or_default()
    };
    let admin = |name: &str| format!("type.googleapis.com/envoy.admin.v3.{name}");
    let mut configs = vec![
        json!({ "@type": admin("BootstrapConfigDump"), "bootstrap": bootstrap, "last_updated": at }),
        section(
            &admin("ClustersConfigDump"),
            &[
                ("version_info", version(tables, Kind::Cluster)),
                ("static_clusters", statics("clusters", "envoy.config.cluster.v3.Cluster", "cluster").into()),
                ("dynamic_active_clusters", clusters(tables, |record| record.active.as_ref()).into()),
                ("dynamic_warming_clusters", warming_clusters(tables).into()),
            ],
        ),
    ];
    if include_eds {
        let endpoints = flat(tables, Kind::ClusterLoadAssignment, "endpoint_config");
        configs
            .push(section(&admin("EndpointsConfigDump"), &[("dynamic_endpoint_configs", endpoints.into())]));
    }
    let listeners = statics("listeners", "envoy.config.listener.v3.Listener", "listener");
    let routes = routes(tables);
    configs.extend([
        section(
            &admin("ListenersConfigDump"),
            &[
                ("version_info", version(tables, Kind::Listener)),
                ("static_listeners", listeners.into()),
                ("dynamic_listeners", dynamic_listeners(tables).into()),
            ],
        ),
        section(&admin("ScopedRoutesConfigDump"), &[]),
        section(&admin("RoutesConfigDump"), &[("dynamic_route_configs", routes.into())]),
        section(
            &admin("SecretsConfigDump"),
            &[
                ("static_secrets", static_secrets(bootstrap, &at).into()),
                ("dynamic_active_secrets", active_secrets(tables).into()),
                ("dynamic_warming_secrets", waiting_secrets(tables).into()),
            ],
        ),
    ]);
    json!({ "configs": configs })
}

/// A dump without its empty fields.
fn section(type_url: &str, fields: &[(&str, Value)]) -> Value {
    let mut section = Map::new();
    section.insert("@type".into(), type_url.into());
    for (name, value) in fields {
        let empty = value.as_array().is_some_and(Vec::is_empty) || value.as_str().is_some_and(str::is_empty);
        if !empty {
            section.insert((*name).into(), value.clone());
        }
    }
    section.into()
}

/// A message with its type.
fn typed(message: &str, fields: &Value) -> Value {
    let mut typed = Map::new();
    typed.insert("@type".into(), format!("type.googleapis.com/{message}").into());
    if let Some(fields) = fields.as_object() {
        typed.extend(fields.clone());
    }
    typed.into()
}

fn body(kind: Kind, body: &[u8]) -> Value {
    typed(message_of(kind), &fields(kind, body))
}

fn message_of(kind: Kind) -> &'static str {
    kind.type_url().rsplit('/').next().unwrap_or_default()
}

fn fields(kind: Kind, body: &[u8]) -> Value {
    Encoded::from_bytes(message_of(kind), body).to_json()
}

fn time(at: SystemTime) -> String {
    jiff::Timestamp::try_from(at).map(|time| time.to_string()).unwrap_or_default()
}

fn version(tables: &All, kind: Kind) -> Value {
    tables.kind(kind).map(|table| table.version.clone()).unwrap_or_default().into()
}

fn records(tables: &All, kind: Kind) -> impl Iterator<Item = (&Arc<str>, &Record)> {
    static NONE: BTreeMap<Arc<str>, Record> = BTreeMap::new();
    tables.kind(kind).map_or(&NONE, |table| &table.records).iter()
}

/// One state of a resource: its version, itself under `name`, and when it came.
fn state(kind: Kind, held: &Held, name: &str) -> Map<String, Value> {
    let mut state = Map::new();
    state.insert("version_info".into(), (*held.version).into());
    state.insert(name.into(), body(kind, &held.body));
    state.insert("last_updated".into(), time(held.at).into());
    state
}

fn error(kind: Kind, refused: &Refused) -> Value {
    json!({
        "failed_configuration": body(kind, &refused.body),
        "last_update_attempt": time(refused.at),
        "details": refused.details,
        "version_info": &*refused.version,
    })
}

/// Envoy's `client_status`. What comes from the cache on disk was asked for, and not confirmed yet.
fn status(record: &Record) -> &'static str {
    match record {
        Record { error: Some(_), .. } => "NACKED",
        Record { active: Some(held), .. } if held.stale => "REQUESTED",
        Record { active: None, warming: None, .. } => "REQUESTED",
        _ => "ACKED",
    }
}

/// A resource whose states are fields of one message.
fn with_status(mut fields: Map<String, Value>, kind: Kind, record: &Record) -> Value {
    if let Some(refused) = &record.error {
        fields.insert("error_state".into(), error(kind, refused));
    }
    fields.insert("client_status".into(), status(record).into());
    fields.into()
}

fn clusters(tables: &All, pick: impl Fn(&Record) -> Option<&Held>) -> Vec<Value> {
    let dump = |(_, record): (_, &Record)| {
        let fields = state(Kind::Cluster, pick(record)?, "cluster");
        Some(with_status(fields, Kind::Cluster, record))
    };
    records(tables, Kind::Cluster).filter_map(dump).collect()
}

/// Those that warm, and those that were never accepted.
fn warming_clusters(tables: &All) -> Vec<Value> {
    let mut all = clusters(tables, |record| record.warming.as_deref());
    let never = |record: &&Record| record.active.is_none() && record.warming.is_none();
    all.extend(
        records(tables, Kind::Cluster)
            .map(|(_, record)| record)
            .filter(never)
            .map(|record| with_status(Map::new(), Kind::Cluster, record)),
    );
    all
}

fn dynamic_listeners(tables: &All) -> Vec<Value> {
    let dump = |(name, record): (&Arc<str>, &Record)| {
        let mut fields = Map::new();
        fields.insert("name".into(), (**name).into());
        for (field, held) in
            [("active_state", record.active.as_ref()), ("warming_state", record.warming.as_deref())]
        {
            if let Some(held) = held {
                fields.insert(field.into(), state(Kind::Listener, held, "listener").into());
            }
        }
        with_status(fields, Kind::Listener, record)
    };
    records(tables, Kind::Listener).map(dump).collect()
}

/// `static_resources.secrets`. What the bootstrap is shown from has no keys any more.
fn static_secrets(bootstrap: &Value, at: &str) -> Vec<Value> {
    let all = bootstrap["static_resources"]["secrets"].as_array();
    let dump = |secret: &Value| {
        json!({
            "name": secret["name"],
            "last_updated": at,
            "secret": typed("envoy.extensions.transport_sockets.tls.v3.Secret", secret),
        })
    };
    all.map(|all| all.iter().map(dump).collect()).unwrap_or_default()
}

fn secret(key: &str, state: Map<String, Value>, record: &Record) -> Value {
    let name = secret_name(key);
    let mut fields = Map::new();
    fields.insert("name".into(), name.into());
    fields.extend(state);
    with_status(fields, Kind::Secret, record)
}

/// Several sources may have one of the same name: each is shown.
fn secret_name(key: &str) -> &str {
    key.split_once(KEY_SEPARATOR).map_or(key, |(name, _)| name)
}

/// Those that came.
fn active_secrets(tables: &All) -> Vec<Value> {
    let dump = |(name, record): (&Arc<str>, &Record)| {
        let held = record.active.as_ref()?;
        Some(secret(name, state(Kind::Secret, held, "secret"), record))
    };
    records(tables, Kind::Secret).filter_map(dump).collect()
}

/// Those that are wanted and did not come, in Envoy's words.
fn waiting_secrets(tables: &All) -> Vec<Value> {
    let dump = |(name, record): (&Arc<str>, &Record)| {
        let mut state = Map::new();
        state.insert("version_info".into(), "uninitialized".into());
        let message = "envoy.extensions.transport_sockets.tls.v3.Secret";
        state.insert("secret".into(), typed(message, &json!({ "name": secret_name(name) })));
        secret(name, state, record)
    };
    records(tables, Kind::Secret).filter(|(_, record)| record.active.is_none()).map(dump).collect()
}

/// Route configurations, as Envoy shows them: with the virtual hosts that came by VHDS, and the version of what came last.
fn routes(tables: &All) -> Vec<Value> {
    let dump = |(name, record): (&Arc<str>, &Record)| {
        let Some(held) = &record.active else {
            return with_status(Map::new(), Kind::RouteConfiguration, record);
        };
        let mut state = state(Kind::RouteConfiguration, held, "route_config");
        if state["route_config"].get("vhds").is_some() {
            add_hosts(tables, name, held.at, &mut state);
        }
        with_status(state, Kind::RouteConfiguration, record)
    };
    records(tables, Kind::RouteConfiguration).map(dump).collect()
}

/// Adds the virtual hosts of a route configuration that came at `at`.
fn add_hosts(tables: &All, route: &str, at: SystemTime, state: &mut Map<String, Value>) {
    let is_of = |host: &str| host.strip_prefix(route).is_some_and(|rest| rest.starts_with('/'));
    let hosts = records(tables, Kind::VirtualHost).filter(|(name, _)| is_of(name));
    let hosts: Vec<&Held> = hosts.filter_map(|(_, record)| record.active.as_ref()).collect();
    if let Some(last) = hosts.iter().map(|held| held.at).max().filter(|last| *last > at) {
        state.insert("version_info".into(), version(tables, Kind::VirtualHost));
        state.insert("last_updated".into(), time(last).into());
    }
    if hosts.is_empty() {
        return;
    }
    let all = state["route_config"]["virtual_hosts"].take();
    let mut all = all.as_array().cloned().unwrap_or_default();
    all.extend(hosts.iter().map(|held| fields(Kind::VirtualHost, &held.body)));
    state["route_config"]["virtual_hosts"] = all.into();
}

/// Kinds that do not warm.
fn flat(tables: &All, kind: Kind, field: &str) -> Vec<Value> {
    let dump = |(_, record): (_, &Record)| {
        let fields = record.active.as_ref().map(|held| state(kind, held, field)).unwrap_or_default();
        with_status(fields, kind, record)
    };
    records(tables, kind).map(dump).collect()
}
