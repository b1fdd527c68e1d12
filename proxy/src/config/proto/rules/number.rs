//! Rules of numbers and durations.

use std::fmt::{self, Debug, Display};

use prost_reflect::DynamicMessage;
use tidegate_api::validate::DurationRules;
use tidegate_api::wkt::Duration;

use crate::config::error::Reason;

/// Zero of this type, for `ignore_empty`.
pub(super) fn is_zero<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// The rules of every kind of number.
pub(super) struct NumberRules<'a, T> {
    pub(super) r#const: Option<T>,
    pub(super) lt: Option<T>,
    pub(super) lte: Option<T>,
    pub(super) gt: Option<T>,
    pub(super) gte: Option<T>,
    pub(super) r#in: &'a [T],
    pub(super) not_in: &'a [T],
}

impl<T: PartialOrd + Display + Debug + Copy> NumberRules<'_, T> {
    /// How a value breaks them.
    pub(super) fn broken(&self, value: &T) -> Option<String> {
        let low = match (self.gt, self.gte) {
            (Some(gt), _) => Some((*value > gt, "greater than", gt)),
            (None, Some(gte)) => Some((*value >= gte, "at least", gte)),
            (None, None) => None,
        };
        let high = match (self.lt, self.lte) {
            (Some(lt), _) => Some((*value < lt, "less than", lt)),
            (None, Some(lte)) => Some((*value <= lte, "at most", lte)),
            (None, None) => None,
        };
        let range = match (low, high) {
            // Bounds that cross name the range that is forbidden.
            (Some((above, over, low)), Some((below, under, high))) if self.crossed() => {
                (!(above || below)).then(|| format!("{over} {low} or {under} {high}"))
            }
            (Some((above, over, low)), Some((below, under, high))) => {
                (!(above && below)).then(|| format!("{over} {low} and {under} {high}"))
            }
            (Some((false, text, bound)), None) | (None, Some((false, text, bound))) => {
                Some(format!("{text} {bound}"))
            }
            _ => None,
        };
        if let Some(range) = range {
            return Some(format!("must be {range}, is {value}"));
        }
        if let Some(wanted) = self.r#const.filter(|wanted| wanted != value) {
            return Some(format!("must be {wanted}, is {value}"));
        }
        if !self.r#in.is_empty() && !self.r#in.contains(value) {
            return Some(format!("must be one of {:?}, is {value}", self.r#in));
        }
        self.not_in.contains(value).then(|| format!("must not be {value}"))
    }

    fn crossed(&self) -> bool {
        let low = self.gt.or(self.gte);
        let high = self.lt.or(self.lte);
        low.zip(high).is_some_and(|(low, high)| low > high)
    }
}

/// How a duration breaks its rules.
pub(super) fn duration(message: &DynamicMessage, rules: &DurationRules) -> Option<Reason> {
    let field = |number| message.get_field_by_number(number);
    let value = nanoseconds(
        field(1).and_then(|value| value.as_i64()).unwrap_or_default(),
        field(2).and_then(|value| value.as_i32()).unwrap_or_default(),
    );
    nanoseconds_broken(value, rules).map(Reason::Constraint)
}

/// All of a duration.
pub(super) fn nanoseconds(seconds: i64, nanos: i32) -> i128 {
    i128::from(seconds) * 1_000_000_000 + i128::from(nanos)
}

/// How so many nanoseconds break the rules.
pub(super) fn nanoseconds_broken(value: i128, rules: &DurationRules) -> Option<String> {
    let seconds = |d: &Duration| Seconds(nanoseconds(d.seconds, d.nanos));
    let bound = |bound: &Option<Duration>| bound.as_ref().map(seconds);
    let list = |list: &[Duration]| list.iter().map(seconds).collect::<Vec<_>>();
    NumberRules {
        r#const: bound(&rules.r#const),
        lt: bound(&rules.lt),
        lte: bound(&rules.lte),
        gt: bound(&rules.gt),
        gte: bound(&rules.gte),
        r#in: &list(&rules.r#in),
        not_in: &list(&rules.not_in),
    }
    .broken(&Seconds(value))
}

/// Nanoseconds that print as seconds: `0.25s`.
#[derive(Clone, Copy, PartialEq, PartialOrd)]
pub(super) struct Seconds(pub(super) i128);

impl Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = self.0.unsigned_abs();
        let text = format!("{}.{:09}", nanos / 1_000_000_000, nanos % 1_000_000_000);
        let sign = if self.0 < 0 { "-" } else { "" };
        write!(f, "{sign}{}s", text.trim_end_matches('0').trim_end_matches('.'))
    }
}

impl Debug for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Display::fmt(self, f)
    }
}
