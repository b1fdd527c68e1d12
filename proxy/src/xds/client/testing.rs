//! For the tests of polls and files.

use std::rc::Rc;
use std::sync::Arc;

use prost::Message;
use tidegate_api::core;
use tokio::sync::mpsc;

use super::{Alpn, Ask, DialError, Dialer, Dialing, Task};
use crate::config::config_source::{PathSource, Source};
use crate::xds::{Event, Key, Kind, Resource, Wanted};

/// A task with its far ends.
pub(super) fn task(
    kind: Kind,
    dialer: Rc<dyn Dialer>,
) -> (Task, mpsc::UnboundedSender<(Kind, Ask)>, mpsc::UnboundedReceiver<Event>) {
    let (asker, asks) = mpsc::unbounded_channel();
    let (sender, events) = mpsc::unbounded_channel();
    // Which source it is does not matter: it comes back in events only.
    let source = Source::Path(Arc::new(PathSource { path: "test".into(), watched_directory: None }));
    let node = core::Node { id: "n".into(), cluster: "c".into(), ..Default::default() };
    let task = Task { key: Key { source, kind }, node: Rc::new(node), dialer, events: sender, asks };
    (task, asker, events)
}

/// Everything.
pub(super) fn wildcard() -> Wanted {
    Wanted { wildcard: true, ..Wanted::default() }
}

/// Names of resources: field 1 of every kind.
pub(super) fn names(resources: &[Resource]) -> Vec<String> {
    let name =
        |resource: &Resource| tidegate_api::cluster::Cluster::decode(&resource.body.value[..]).unwrap().name;
    resources.iter().map(name).collect()
}

/// Reaches no control plane.
pub(super) struct Nowhere;

impl Dialer for Nowhere {
    fn dial<'a>(&'a self, cluster: &'a str, _: Alpn) -> Dialing<'a> {
        Box::pin(async { Err(DialError::UnknownCluster(cluster.to_owned())) })
    }
}
