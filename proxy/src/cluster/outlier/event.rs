//! The outlier event log: one JSON line for each ejection and each return, as Envoy prints
//! `envoy.data.cluster.v3.OutlierDetectionEvent`.

use std::time::SystemTime;

use serde_json::{Map, Value, json};

use super::Reason;
use crate::access_log::timestamp;

/// What happened to a host.
#[derive(Clone, Debug)]
pub(super) enum Action {
    /// It was detected, and ejected if that is enforced.
    Eject { reason: Reason, enforced: bool, details: Details },
    /// It is back.
    Uneject,
}

/// What led to it; percent.
#[derive(Clone, Copy, Debug)]
pub(super) enum Details {
    Consecutive,
    SuccessRate { host: f64, average: f64, threshold: f64 },
    FailurePercentage { host: f64 },
}

/// One line, without its end.
pub(super) struct Event<'a> {
    pub(super) at: SystemTime,
    /// Whole seconds since the last event of the opposite kind.
    pub(super) since_last: Option<u64>,
    pub(super) cluster: &'a str,
    pub(super) address: String,
    pub(super) ejections: u32,
    pub(super) action: Action,
}

impl Event<'_> {
    pub(super) fn json(&self) -> String {
        let (reason, action, enforced) = match &self.action {
            Action::Eject { reason, enforced, .. } => (*reason, "EJECT", *enforced),
            // The first value of each enum.
            Action::Uneject => (Reason::Consecutive5xx, "UNEJECT", false),
        };
        let mut event = Map::new();
        event.insert("type".into(), reason.name().into());
        event.insert("timestamp".into(), timestamp(self.at).into());
        if let Some(seconds) = self.since_last {
            event.insert("secs_since_last_action".into(), seconds.to_string().into());
        }
        event.insert("cluster_name".into(), self.cluster.into());
        event.insert("upstream_url".into(), self.address.as_str().into());
        event.insert("action".into(), action.into());
        event.insert("num_ejections".into(), self.ejections.into());
        event.insert("enforced".into(), enforced.into());
        if let Action::Eject { details, .. } = &self.action {
            let (name, details) = details.json();
            event.insert(name.into(), details);
        }
        Value::Object(event).to_string()
    }
}

impl Details {
    fn json(self) -> (&'static str, Value) {
        // As in Envoy, a fraction is cut off.
        let whole = |percent: f64| percent.max(0.0) as u32;
        match self {
            Self::Consecutive => ("eject_consecutive_event", json!({})),
            Self::SuccessRate { host, average, threshold } => (
                "eject_success_rate_event",
                json!({
                    "host_success_rate": whole(host),
                    "cluster_average_success_rate": whole(average),
                    "cluster_success_rate_ejection_threshold": whole(threshold),
                }),
            ),
            Self::FailurePercentage { host } => {
                ("eject_failure_percentage_event", json!({"host_success_rate": whole(host)}))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    fn event(since_last: Option<u64>, action: Action) -> String {
        let at = UNIX_EPOCH + Duration::from_millis(1_795_359_437_128);
        let address = "127.0.0.1:29991".to_owned();
        Event { at, since_last, cluster: "c", address, ejections: 1, action }.json()
    }

    /// Lines of a real Envoy 1.40.
    #[test]
    fn lines_are_envoys() {
        let ejected =
            Action::Eject { reason: Reason::Consecutive5xx, enforced: true, details: Details::Consecutive };
        assert_eq!(
            event(None, ejected),
            r#"{"type":"CONSECUTIVE_5XX","timestamp":"2026-11-22T14:57:17.128Z","cluster_name":"c","upstream_url":"127.0.0.1:29991","action":"EJECT","num_ejections":1,"enforced":true,"eject_consecutive_event":{}}"#
        );
        assert_eq!(
            event(Some(2), Action::Uneject),
            r#"{"type":"CONSECUTIVE_5XX","timestamp":"2026-11-22T14:57:17.128Z","secs_since_last_action":"2","cluster_name":"c","upstream_url":"127.0.0.1:29991","action":"UNEJECT","num_ejections":1,"enforced":false}"#
        );
    }
}
