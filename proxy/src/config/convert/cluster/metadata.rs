//! Our extensions in a cluster's metadata, which Envoy ignores.

use prost::{Message, Name};
use tidegate_api::cluster_extension as api;
use tidegate_api::core;

use crate::config::cluster::{DataPath, EndpointRemoval};
use crate::config::convert::extension::Extension;
use crate::config::convert::{Report, enumeration, optional_duration};
use crate::config::proto::FieldPath;

/// Where the metadata has them.
const ENDPOINT_REMOVAL: &str = "tidegate.endpoint_removal";
const DATA_PATH: &str = "tidegate.data_path";

/// What a cluster has of them.
#[derive(Default)]
pub(super) struct Extensions {
    pub(super) endpoint_removal: Option<EndpointRemoval>,
    pub(super) data_path: Option<DataPath>,
}

pub(super) fn extensions(
    metadata: Option<core::Metadata>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Extensions {
    let Some(mut metadata) = metadata else { return Extensions::default() };
    let path = path.field("metadata");
    Extensions {
        endpoint_removal: removal(&mut metadata, &path, report),
        data_path: data_path(&mut metadata, &path, report),
    }
}

/// The message under a name, which has to be one of this type. `purpose` says what it is for.
fn typed<M: Message + Name + Default>(
    metadata: &mut core::Metadata,
    name: &str,
    purpose: &str,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<M> {
    if metadata.filter_metadata.contains_key(name) {
        report.invalid(
            &path.field("filter_metadata").key(name),
            format!("{purpose} has to be a {} in typed_filter_metadata", M::full_name()),
        );
    }
    let config = Extension::new(metadata.typed_filter_metadata.remove(name)?);
    let path = path.field("typed_filter_metadata");
    let path = path.key(name);
    if !config.is::<M>() {
        report.invalid(&path, format!("has to be a {}, not a {:?}", M::full_name(), config.type_name));
        return None;
    }
    config.decode(&path, report)
}

/// What becomes of connections to endpoints that are gone.
fn removal(
    metadata: &mut core::Metadata,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<EndpointRemoval> {
    let api::EndpointRemoval { action, deadline, include_unhealthy } =
        typed(metadata, ENDPOINT_REMOVAL, "a policy that ends connections", path, report)?;
    let path = path.field("typed_filter_metadata");
    let path = path.key(ENDPOINT_REMOVAL);
    let deadline = optional_duration(deadline, &path, "deadline", report).unwrap_or_default();
    let reset = match enumeration(action, &path, "action", report)? {
        api::endpoint_removal::Action::Keep => return None,
        api::endpoint_removal::Action::Close => false,
        api::endpoint_removal::Action::Reset => true,
    };
    Some(EndpointRemoval { reset, deadline, include_unhealthy })
}

/// Which way connections take.
fn data_path(
    metadata: &mut core::Metadata,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<DataPath> {
    let data_path: api::DataPath = typed(metadata, DATA_PATH, "a data path", path, report)?;
    data_path_mode(data_path, &path.field("typed_filter_metadata").key(DATA_PATH), report)
}

/// The mode of a data path, wherever it stands.
pub(in crate::config::convert) fn data_path_mode(
    data_path: api::DataPath,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<DataPath> {
    let api::DataPath { mode } = data_path;
    Some(match enumeration(mode, path, "mode", report)? {
        api::data_path::Mode::Auto => DataPath::Auto,
        api::data_path::Mode::Kernel => DataPath::Kernel,
        api::data_path::Mode::Proxy => DataPath::Proxy,
    })
}
