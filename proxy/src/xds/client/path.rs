//! Not written yet.

use std::sync::Arc;

use super::Task;
use crate::config::config_source::PathSource;

pub(super) async fn run(_source: Arc<PathSource>, task: Task) {
    let reason = "not available yet".to_owned();
    task.events.send(crate::xds::Event::Failed { keys: vec![task.key], reason }).ok();
}
