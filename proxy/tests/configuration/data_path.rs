//! Our extensions that choose the data path: how they are read, and what is refused.

use serde_json::{Value, json};
use tidegate::config::bootstrap::OnExit;
use tidegate::config::cluster::DataPath;

use super::build::*;

const METADATA: &str = "static_resources.clusters[0].metadata";
const INTERCEPTION: &str = "bootstrap_extensions[0].typed_config";

/// `metadata` of a cluster with this data path.
fn data_path(message: &str, fields: Value) -> Value {
    let typed = extension("", message, fields)["typed_config"].clone();
    json!({"metadata": {"typed_filter_metadata": {"tidegate.data_path": typed}}})
}

fn interception(fields: Value) -> Value {
    let extension = extension("i", "tidegate.bootstrap.v1.Interception", fields);
    with(bootstrap(vec![], vec![]), json!({"bootstrap_extensions": [extension]}))
}

#[test]
fn of_a_cluster() {
    let of = |fields: Value| {
        let bootstrap = one_cluster(fields);
        assert_eq!(warnings(&bootstrap), Vec::<String>::new());
        load_json(&bootstrap).unwrap().bootstrap.clusters[0].data_path
    };
    let ours = |fields| of(data_path("tidegate.cluster.v1.DataPath", fields));
    assert_eq!(of(json!({})), None);
    assert_eq!(of(json!({"metadata": {"filter_metadata": {"istio": {"a": "b"}}}})), None);
    assert_eq!(ours(json!({})), Some(DataPath::Auto));
    assert_eq!(ours(json!({"mode": "AUTO"})), Some(DataPath::Auto));
    assert_eq!(ours(json!({"mode": "KERNEL"})), Some(DataPath::Kernel));
    assert_eq!(ours(json!({"mode": "PROXY"})), Some(DataPath::Proxy));
    let in_struct =
        in_struct("", "type.googleapis.com/tidegate.cluster.v1.DataPath", json!({"mode": "KERNEL"}));
    let metadata =
        json!({"metadata": {"typed_filter_metadata": {"tidegate.data_path": in_struct["typed_config"]}}});
    assert_eq!(of(metadata), Some(DataPath::Kernel));
}

#[test]
fn for_all_clusters_and_after_the_end() {
    let of = |fields: Value| {
        let bootstrap = interception(fields);
        assert_eq!(warnings(&bootstrap), Vec::<String>::new());
        let wanted = load_json(&bootstrap).unwrap().bootstrap.interception.unwrap();
        (wanted.data_path, wanted.on_exit)
    };
    assert_eq!(of(json!({})), (DataPath::Proxy, OnExit::Release));
    assert_eq!(of(json!({"data_path": {}})).0, DataPath::Auto);
    assert_eq!(
        of(json!({"data_path": {"mode": "KERNEL"}, "on_exit": "KEEP"})),
        (DataPath::Kernel, OnExit::Keep)
    );
    assert_eq!(of(json!({"on_exit": "RELEASE"})).1, OnExit::Release);
}

#[test]
fn what_is_no_data_path_is_refused() {
    let refused = |bootstrap: Value, path: String, words: &str| {
        let found = problems(&bootstrap);
        let [problem] = &found[..] else { panic!("{found:?}") };
        assert!(problem.starts_with(&format!("{path}: ")) && problem.contains(words), "{path}: {found:?}");
    };
    let key = format!("{METADATA}.typed_filter_metadata[\"tidegate.data_path\"]");
    refused(
        one_cluster(data_path("tidegate.cluster.v1.EndpointRemoval", json!({}))),
        key.clone(),
        "has to be a tidegate.cluster.v1.DataPath, not a \"tidegate.cluster.v1.EndpointRemoval\"",
    );
    refused(
        one_cluster(data_path("tidegate.cluster.v1.DataPath", json!({"mode": 7}))),
        format!("{key}.mode"),
        "7",
    );
    refused(
        one_cluster(data_path("tidegate.cluster.v1.DataPath", json!({"mode": "FAST"}))),
        format!("{key}.mode"),
        "FAST",
    );
    refused(
        one_cluster(json!({"metadata": {"filter_metadata": {"tidegate.data_path": {"mode": "KERNEL"}}}})),
        format!("{METADATA}.filter_metadata[\"tidegate.data_path\"]"),
        "a data path has to be a tidegate.cluster.v1.DataPath in typed_filter_metadata",
    );
    refused(interception(json!({"data_path": {"mode": 9}})), format!("{INTERCEPTION}.data_path.mode"), "9");
    refused(interception(json!({"on_exit": "STAY"})), format!("{INTERCEPTION}.on_exit"), "STAY");
}
