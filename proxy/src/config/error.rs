//! What is wrong with a configuration: where, what, and the remedy.

use std::fmt;
use std::sync::Arc;

/// Most problems that one error lists; the rest is counted.
const LISTED_PROBLEMS: usize = 100;

/// Longest piece of the configuration that a message quotes, in characters.
const QUOTED_CHARS: usize = 128;

/// Why a configuration was refused: everything that was found, not only the first problem. Displays as one
/// line per problem: `file:line: path: message`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", Lines { problems, omitted: *omitted })]
pub struct ConfigError {
    /// In the order in which they were found; never empty, at most 100.
    problems: Vec<Problem>,
    /// How many more there were.
    omitted: usize,
}

impl ConfigError {
    /// An error of these problems; none when there are none.
    pub fn from_problems(mut problems: Vec<Problem>) -> Option<Self> {
        let omitted = problems.len().saturating_sub(LISTED_PROBLEMS);
        problems.truncate(LISTED_PROBLEMS);
        (!problems.is_empty()).then_some(Self { problems, omitted })
    }

    /// The problems, in the order in which they were found.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }
}

impl From<Problem> for ConfigError {
    fn from(problem: Problem) -> Self {
        Self { problems: vec![problem], omitted: 0 }
    }
}

struct Lines<'a> {
    problems: &'a [Problem],
    omitted: usize,
}

impl fmt::Display for Lines<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            let line_end = if index == 0 { "" } else { "\n" };
            write!(f, "{line_end}{problem}")?;
        }
        match self.omitted {
            0 => Ok(()),
            more => write!(f, "\n... and {more} more problems"),
        }
    }
}

/// One thing that is wrong (or, among the warnings, doubtful) at one place of a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Name of the source: a file, `--config-yaml`, or a resource of a control plane.
    pub file: Arc<str>,
    /// 1-based line and column; none where the source has no lines (binary xDS).
    pub at: Option<Mark>,
    /// Full field path with proto names, through `Any`:
    /// `static_resources.listeners[0].filter_chains[0].filters[1].typed_config.max_connect_attempts`.
    /// Empty for the document itself.
    pub path: String,
    /// What is wrong.
    pub reason: Reason,
}

/// A place in a source text, both 1-based. The column counts characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark {
    /// Line.
    pub line: u32,
    /// Column.
    pub column: u32,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", OneLine(&self.file))?;
        if let Some(at) = self.at {
            write!(f, ":{}", at.line)?;
        }
        if !self.path.is_empty() {
            write!(f, ": {}", OneLine(&self.path))?;
        }
        write!(f, ": {}", OneLine(&self.reason.to_string()))
    }
}

/// What is wrong. [`Reason::label`] is stable: metrics and tests use it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// The text is not YAML (or JSON).
    #[error("{0}")]
    Syntax(String),
    /// The text is nested too deep, or grows too large when its aliases are written out.
    #[error("{0}")]
    Limit(String),
    /// The message has no such field.
    #[error("unknown field {field} in {message}{}", did_you_mean(suggestion.as_deref()))]
    UnknownField {
        /// As written, quoted.
        field: String,
        /// Full name of the message.
        message: String,
        /// The field that was probably meant.
        suggestion: Option<String>,
    },
    /// A field is set twice, perhaps once in each spelling.
    #[error("{0} is set twice; the last one counts")]
    Duplicate(String),
    /// Two members of a oneof are set.
    #[error("only one of {first} and {second} may be set (oneof {oneof}); remove one of them")]
    OneofConflict {
        /// Name of the oneof.
        oneof: String,
        /// The member that came first.
        first: String,
        /// The member that came later.
        second: String,
    },
    /// The `@type` of an `Any` is missing or is not a type URL.
    #[error("{0}")]
    TypeUrl(String),
    /// The `@type` of an `Any` names a type that nothing here knows.
    #[error(
        "unknown type {type_url}{}; no extension of this type is compiled in",
        did_you_mean(suggestion.as_deref())
    )]
    UnknownType {
        /// The type URL, quoted.
        type_url: String,
        /// The type that was probably meant.
        suggestion: Option<String>,
    },
    /// The value has the wrong shape, or can't be read as the type of the field.
    #[error("expected {expected}, found {found}{}", hint.map(|hint| format!("; {hint}")).unwrap_or_default())]
    WrongType {
        /// What the field wants.
        expected: String,
        /// What is there, described.
        found: String,
        /// The remedy, when there is a particular one.
        hint: Option<&'static str>,
    },
    /// The enum has no such value.
    #[error("{value} is not a value of {name}; use one of {allowed}{}", did_you_mean(suggestion.as_deref()))]
    UnknownEnumValue {
        /// As written, quoted.
        value: String,
        /// Full name of the enum.
        name: String,
        /// Its values.
        allowed: String,
        /// The value that was probably meant.
        suggestion: Option<String>,
    },
    /// A rule of Envoy's API (`validate.rules`) is broken.
    #[error("{0}")]
    Constraint(String),
    /// A required field is missing.
    #[error("required field {0} is missing")]
    Missing(String),
    /// Well-formed, but it contradicts itself or something else.
    #[error("{0}")]
    Invalid(String),
    /// Well-formed, but this proxy can't do it.
    #[error("{0}")]
    Unsupported(String),
    /// A deprecated field or enum value is used.
    #[error("{name} is deprecated{}", since.as_deref().map(|since| format!(" since Envoy {since}")).unwrap_or_default())]
    Deprecated {
        /// The field or enum value.
        name: String,
        /// Version of Envoy's API that deprecated it.
        since: Option<String>,
    },
}

impl Reason {
    /// The same without what was found: that is not to be shown.
    pub(super) fn without_value(self) -> Self {
        match self {
            Self::WrongType { expected, found: _, hint } => {
                Self::WrongType { expected, found: "something else (not shown)".to_owned(), hint }
            }
            Self::UnknownField { message, .. } => {
                Self::UnknownField { field: "(not shown)".to_owned(), message, suggestion: None }
            }
            other => other,
        }
    }

    /// A stable name for metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Syntax(_) => "syntax",
            Self::Limit(_) => "limit",
            Self::UnknownField { .. } => "unknown_field",
            Self::Duplicate(_) => "duplicate",
            Self::OneofConflict { .. } => "oneof_conflict",
            Self::TypeUrl(_) => "type_url",
            Self::UnknownType { .. } => "unknown_type",
            Self::WrongType { .. } => "wrong_type",
            Self::UnknownEnumValue { .. } => "unknown_enum_value",
            Self::Constraint(_) => "constraint",
            Self::Missing(_) => "missing",
            Self::Invalid(_) => "invalid",
            Self::Unsupported(_) => "unsupported",
            Self::Deprecated { .. } => "deprecated",
        }
    }
}

fn did_you_mean(suggestion: Option<&str>) -> String {
    suggestion.map(|name| format!("; did you mean {name:?}?")).unwrap_or_default()
}

/// A piece of the configuration, quoted, escaped and cut to a bearable length.
pub(crate) fn quoted(text: &str) -> String {
    let mut chars = text.chars();
    let short: String = chars.by_ref().take(QUOTED_CHARS).collect();
    if chars.next().is_some() { format!("{short:?}...") } else { format!("{short:?}") }
}

/// Escapes what would break the rule of one line per problem, or a terminal.
struct OneLine<'a>(&'a str);

impl fmt::Display for OneLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use fmt::Write;
        for c in self.0.chars() {
            if c.is_control() { write!(f, "{}", c.escape_default())? } else { f.write_char(c)? }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(path: &str, reason: Reason) -> Problem {
        Problem {
            file: "envoy.yaml".into(),
            at: Some(Mark { line: 7, column: 3 }),
            path: path.into(),
            reason,
        }
    }

    #[test]
    fn one_line_per_problem() {
        let error = ConfigError::from_problems(vec![
            problem(
                "static_resources.clusters[0]",
                Reason::UnknownField {
                    field: quoted("lb_polcy"),
                    message: "envoy.config.cluster.v3.Cluster".into(),
                    suggestion: Some("lb_policy".into()),
                },
            ),
            Problem { at: None, ..problem("", Reason::Invalid("two\nlines".into())) },
        ])
        .unwrap();
        assert_eq!(
            error.to_string(),
            "envoy.yaml:7: static_resources.clusters[0]: unknown field \"lb_polcy\" in \
             envoy.config.cluster.v3.Cluster; did you mean \"lb_policy\"?\n\
             envoy.yaml: two\\nlines"
        );
    }

    #[test]
    fn the_list_is_bounded_and_never_empty() {
        assert_eq!(ConfigError::from_problems(vec![]), None);
        let many = vec![problem("x", Reason::Missing("y".into())); LISTED_PROBLEMS + 5];
        let error = ConfigError::from_problems(many).unwrap();
        assert_eq!(error.problems().len(), LISTED_PROBLEMS);
        assert!(error.to_string().ends_with("\n... and 5 more problems"));
    }

    #[test]
    fn quotes_are_cut_and_escaped() {
        assert_eq!(quoted("a\u{1b}[31m\n"), "\"a\\u{1b}[31m\\n\"");
        let long = quoted(&"é".repeat(1000));
        assert!(long.ends_with("\"...") && long.chars().count() < 150, "{long}");
    }
}
