//! Stats that are texts (`?type=TextReadouts`). They are few, and change with the configuration only.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// A text among the stats. Envoy's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Readout {
    /// What the last server that said its name calls itself.
    ControlPlaneIdentifier,
    /// `version_info` of the last accepted response of CDS.
    CdsVersion,
    /// `version_info` of the last accepted response of LDS.
    LdsVersion,
}

impl Readout {
    /// In the order of their names.
    const ALL: [Self; 3] = [Self::CdsVersion, Self::ControlPlaneIdentifier, Self::LdsVersion];

    fn name(self) -> &'static str {
        match self {
            Self::ControlPlaneIdentifier => "control_plane.identifier",
            Self::CdsVersion => "cluster_manager.cds.version_text",
            Self::LdsVersion => "listener_manager.lds.version_text",
        }
    }
}

/// The texts that were set.
#[derive(Debug, Default)]
pub(super) struct Readouts(Mutex<BTreeMap<Readout, String>>);

impl Readouts {
    pub(super) fn set(&self, readout: Readout, text: &str) {
        let mut texts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        text.clone_into(texts.entry(readout).or_default());
    }

    /// All of them by name; none: it was never set.
    pub(super) fn all(&self) -> Vec<(&'static str, Option<String>)> {
        let texts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Readout::ALL.into_iter().map(|readout| (readout.name(), texts.get(&readout).cloned())).collect()
    }
}
