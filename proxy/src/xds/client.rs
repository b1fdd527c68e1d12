//! Speaks xDS with control planes; knows no resource's meaning.
