//! Which entries a log takes.

use crate::config::access_log::{ComparisonOp, Filter};
use crate::connection::record::{LogType, Record};
use crate::response_flag::ResponseFlags;

use super::{AccessLogError, Now};

/// A filter, ready to be asked.
#[derive(Debug)]
pub(super) enum Matcher {
    /// Any of the flags; none given: any flag at all.
    ResponseFlag(ResponseFlags),
    /// Bit per [`LogType`].
    LogTypes(u8),
    Duration {
        op: ComparisonOp,
        millis: u64,
    },
    Runtime {
        numerator: u32,
        denominator: u32,
    },
    And(Vec<Matcher>),
    Or(Vec<Matcher>),
}

impl Matcher {
    pub(super) fn build(filter: &Filter) -> Result<Self, AccessLogError> {
        let all = |filters: &[Filter]| filters.iter().map(Self::build).collect::<Result<Vec<_>, _>>();
        Ok(match filter {
            Filter::ResponseFlag(flags) => Self::ResponseFlag(*flags),
            Filter::LogType { types, exclude } => {
                let mut set = 0;
                for name in types {
                    // HTTP's types exist in Envoy and never match here.
                    match LogType::from_name(name) {
                        Some(log_type) => set |= bit(log_type),
                        None if LogType::is_http(name) => {}
                        None => return Err(AccessLogError::UnknownLogType(name.clone())),
                    }
                }
                Self::LogTypes(if *exclude { !set } else { set })
            }
            Filter::Duration { op, value } => Self::Duration { op: *op, millis: *value },
            Filter::Runtime { numerator, denominator } => {
                Self::Runtime { numerator: *numerator, denominator: *denominator }
            }
            Filter::And(filters) => Self::And(all(filters)?),
            Filter::Or(filters) => Self::Or(all(filters)?),
        })
    }

    pub(super) fn passes(&self, record: &Record, log_type: LogType, now: Now) -> bool {
        match self {
            Self::ResponseFlag(flags) if flags.is_empty() => !record.flags.is_empty(),
            Self::ResponseFlag(flags) => record.flags.intersects(*flags),
            Self::LogTypes(set) => set & bit(log_type) != 0,
            Self::Duration { op, millis } => {
                let lasted = record.lasted(now.monotonic).as_millis() as u64;
                match op {
                    ComparisonOp::Eq => lasted == *millis,
                    ComparisonOp::Ge => lasted >= *millis,
                    ComparisonOp::Le => lasted <= *millis,
                    ComparisonOp::Ne => lasted != *millis,
                }
            }
            Self::Runtime { numerator, denominator } => fastrand::u32(0..(*denominator).max(1)) < *numerator,
            Self::And(filters) => filters.iter().all(|filter| filter.passes(record, log_type, now)),
            Self::Or(filters) => filters.iter().any(|filter| filter.passes(record, log_type, now)),
        }
    }
}

fn bit(log_type: LogType) -> u8 {
    1 << log_type as u8
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::tests::record;
    use super::*;
    use crate::response_flag::ResponseFlag;

    fn passes(filter: &Filter, record: &Record, log_type: LogType) -> bool {
        Matcher::build(filter).unwrap().passes(record, log_type, Now::read())
    }

    #[test]
    fn response_flags() {
        let mut flagged = record();
        flagged.flags.set(ResponseFlag::DurationTimeout);
        let any = Filter::ResponseFlag(ResponseFlags::default());
        let uh = Filter::ResponseFlag([ResponseFlag::NoHealthyUpstream].into_iter().collect());
        let both = [ResponseFlag::NoHealthyUpstream, ResponseFlag::DurationTimeout].into_iter().collect();
        assert!(!passes(&any, &record(), LogType::NotSet));
        assert!(passes(&any, &flagged, LogType::NotSet));
        assert!(!passes(&uh, &flagged, LogType::NotSet));
        assert!(passes(&Filter::ResponseFlag(both), &flagged, LogType::NotSet));
    }

    #[test]
    fn log_types() {
        let end = || vec!["TcpConnectionEnd".to_owned(), "DownstreamEnd".to_owned()];
        let only = Filter::LogType { types: end(), exclude: false };
        let not = Filter::LogType { types: end(), exclude: true };
        assert!(passes(&only, &record(), LogType::TcpConnectionEnd));
        assert!(!passes(&only, &record(), LogType::TcpPeriodic));
        assert!(!passes(&not, &record(), LogType::TcpConnectionEnd));
        assert!(passes(&not, &record(), LogType::NotSet));
        let wrong = Filter::LogType { types: vec!["TcpEnd".into()], exclude: false };
        assert!(Matcher::build(&wrong).unwrap_err().to_string().contains("TcpEnd"));
    }

    #[test]
    fn durations_and_combinations() {
        let mut slow = record();
        slow.duration = Some(Duration::from_millis(500));
        let ge = |value| Filter::Duration { op: ComparisonOp::Ge, value };
        let le = |value| Filter::Duration { op: ComparisonOp::Le, value };
        assert!(passes(&ge(500), &slow, LogType::NotSet));
        assert!(!passes(&ge(501), &slow, LogType::NotSet));
        assert!(passes(&Filter::And(vec![ge(400), le(600)]), &slow, LogType::NotSet));
        assert!(!passes(&Filter::And(vec![ge(400), le(450)]), &slow, LogType::NotSet));
        assert!(passes(&Filter::Or(vec![ge(900), le(600)]), &slow, LogType::NotSet));
        assert!(!passes(&Filter::Runtime { numerator: 0, denominator: 100 }, &slow, LogType::NotSet));
        assert!(passes(&Filter::Runtime { numerator: 100, denominator: 100 }, &slow, LogType::NotSet));
    }
}
