//! `layered_runtime`: the static layers, merged, as far as a key has an effect here.

use tidegate_api::bootstrap as api;
use tidegate_api::bootstrap::runtime_layer::LayerSpecifier;
use tidegate_api::wkt::value::Kind;

use super::{Report, inactive};
use crate::config::proto::FieldPath;
use crate::config::runtime::{HEALTH_KEYS, Runtime};

const PREFIX: &str = "envoy.resource_limits.listener.";
const SUFFIX: &str = ".connection_limit";

pub(super) fn runtime(
    layered: Option<api::LayeredRuntime>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Runtime {
    let mut runtime = Runtime::default();
    let api::LayeredRuntime { layers } = layered.unwrap_or_default();
    let path = path.field("layered_runtime");
    let layers_path = path.field("layers");
    let mut names = Vec::new();
    for (index, layer) in layers.into_iter().enumerate() {
        let path = layers_path.index(index);
        let api::RuntimeLayer { name, layer_specifier } = layer;
        if names.contains(&name) {
            report.invalid(&path.field("name"), format!("duplicate layer name {name:?}"));
        }
        names.push(name);
        match layer_specifier {
            None => report.missing(&path, "static_layer"),
            Some(LayerSpecifier::StaticLayer(fields)) => {
                add(&mut runtime, "", Kind::StructValue(fields), &path.field("static_layer"), report);
            }
            Some(LayerSpecifier::AdminLayer(admin_layer)) => {
                let admin_layer = Some(admin_layer);
                inactive!(report, &path, "RuntimeLayer"; admin_layer);
            }
            Some(LayerSpecifier::DiskLayer(disk_layer)) => {
                let disk_layer = Some(disk_layer);
                inactive!(report, &path, "RuntimeLayer"; disk_layer);
            }
            Some(LayerSpecifier::RtdsLayer(rtds_layer)) => {
                let rtds_layer = Some(rtds_layer);
                inactive!(report, &path, "RuntimeLayer"; rtds_layer);
            }
        }
    }
    runtime
}

/// A key is written with dots, as nested objects, or as a mixture of both.
fn add(runtime: &mut Runtime, key: &str, value: Kind, path: &FieldPath<'_>, report: &mut Report<'_>) {
    let number = match value {
        Kind::StructValue(fields) => {
            for (name, value) in fields.fields {
                let nested = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                let path = path.key(&name);
                if let Some(kind) = value.kind {
                    add(runtime, &nested, kind, &path, report);
                }
            }
            return;
        }
        Kind::NumberValue(value) if value >= 0.0 && value.fract() == 0.0 => Some(value as u64),
        Kind::StringValue(text) => text.parse().ok(),
        _ => None,
    };
    if HEALTH_KEYS.contains(&key) {
        match number {
            Some(number) => {
                runtime.numbers.insert(key.to_owned(), number);
            }
            None => report.invalid(path, format!("runtime key {key:?} must be a whole number")),
        }
        return;
    }
    let Some(listener) = key.strip_prefix(PREFIX).and_then(|rest| rest.strip_suffix(SUFFIX)) else {
        report.warn_once(
            "runtime key".into(),
            path,
            format!("runtime key {key:?} has no effect in this version"),
        );
        return;
    };
    match number {
        Some(limit) => {
            runtime.connection_limits.insert(listener.to_owned(), limit);
        }
        None => {
            report.invalid(path, format!("runtime key {key:?} must be a whole number of connections"));
        }
    }
}
