//! What a reader of stats asks for: the parameters of `/stats` and `/stats/prometheus`.

use regex::Regex;

use super::block::Kind;

/// How stats are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// One `name: value` per line.
    #[default]
    Text,
    /// One object.
    Json,
    /// The Prometheus text format.
    Prometheus,
}

/// How histograms are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Buckets {
    Summary,
    Cumulative,
    Disjoint,
    Detailed,
}

/// Parameters that can't be served. The text is Envoy's.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// `format`.
    #[error("usage: /stats?format=(html|active-html|json|prometheus|text)\n\n")]
    Format,
    /// `type`.
    #[error("invalid &type= param")]
    Type,
    /// `histogram_buckets`.
    #[error("usage: /stats?histogram_buckets=(cumulative|disjoint|detailed|summary|prometheusnative)\n")]
    Buckets,
    /// A mode that exists, but not for Prometheus.
    #[error("unsupported prometheus histogram bucket mode")]
    PrometheusBuckets,
    /// `filter`.
    #[error("Invalid re2 regex: {reason}: {regex}")]
    Filter {
        /// What was given.
        regex: String,
        /// What is wrong with it, on one line.
        reason: String,
    },
}

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Query {
    /// How it is written.
    pub format: Format,
    pub(super) used_only: bool,
    pub(super) kind: Option<Kind>,
    /// `type=TextReadouts`.
    texts_only: bool,
    /// `text_readouts`: Prometheus gets texts too.
    prometheus_texts: bool,
    pub(super) buckets: Buckets,
    filter: Option<Regex>,
    invert_filter: bool,
}

impl Query {
    /// Everything, in this format.
    pub fn all(format: Format) -> Self {
        Self {
            format,
            used_only: false,
            kind: None,
            texts_only: false,
            prometheus_texts: false,
            buckets: if format == Format::Prometheus { Buckets::Cumulative } else { Buckets::Summary },
            filter: None,
            invert_filter: false,
        }
    }

    /// Reads the parameters of a request. `path_format` is what the path asks for; unknown parameters are
    /// ignored, as in Envoy.
    pub fn parse<'a>(
        path_format: Format,
        parameters: impl IntoIterator<Item = (&'a str, &'a str)> + Clone,
    ) -> Result<Self, QueryError> {
        let mut format = path_format;
        if path_format == Format::Text {
            for (_, value) in parameters.clone().into_iter().filter(|(name, _)| *name == "format") {
                format = match value {
                    "text" | "html" | "active-html" | "" => Format::Text,
                    "json" => Format::Json,
                    "prometheus" => Format::Prometheus,
                    _ => return Err(QueryError::Format),
                };
            }
        }
        let mut query = Self::all(format);
        for (name, value) in parameters {
            match name {
                "usedonly" => query.used_only = true,
                "filter" if !value.is_empty() => query.filter = Some(regex(value)?),
                "text_readouts" => query.prometheus_texts = true, // whatever its value, as in Envoy
                "invert_filter" => query.invert_filter = true,
                "histogram_buckets" => query.buckets = buckets(format, value)?,
                "type" => query.set_type(value)?,
                _ => {}
            }
        }
        Ok(query)
    }

    fn set_type(&mut self, value: &str) -> Result<(), QueryError> {
        (self.kind, self.texts_only) = match value.to_ascii_lowercase().as_str() {
            "all" => (None, false),
            "counters" => (Some(Kind::Counter), false),
            "gauges" => (Some(Kind::Gauge), false),
            "histograms" => (Some(Kind::Histogram), false),
            "textreadouts" => (None, true),
            _ => return Err(QueryError::Type),
        };
        Ok(())
    }

    /// Whether stats of this kind are asked for.
    pub(super) fn wants_kind(&self, kind: Kind) -> bool {
        !self.texts_only && self.kind.is_none_or(|wanted| wanted == kind)
    }

    /// Whether texts are asked for.
    pub(super) fn wants_texts(&self) -> bool {
        self.kind.is_none()
    }

    /// Whether texts are asked for in the Prometheus format.
    pub(super) fn wants_prometheus_texts(&self) -> bool {
        self.prometheus_texts && self.wants_texts()
    }

    /// Whether the filter lets this name pass.
    pub(super) fn wants_name(&self, name: &str) -> bool {
        self.filter.as_ref().is_none_or(|filter| filter.is_match(name) != self.invert_filter)
    }
}

fn buckets(format: Format, value: &str) -> Result<Buckets, QueryError> {
    let buckets = match value {
        "" if format == Format::Prometheus => Buckets::Cumulative,
        "" | "none" | "summary" => Buckets::Summary,
        "cumulative" => Buckets::Cumulative,
        "disjoint" => Buckets::Disjoint,
        "detailed" => Buckets::Detailed,
        "prometheusnative" => return Err(QueryError::PrometheusBuckets),
        _ => return Err(QueryError::Buckets),
    };
    if format == Format::Prometheus && matches!(buckets, Buckets::Disjoint | Buckets::Detailed) {
        return Err(QueryError::PrometheusBuckets);
    }
    Ok(buckets)
}

/// Compiles a filter that came from outside; its size is bounded by the crate's limits.
pub(crate) fn regex(text: &str) -> Result<Regex, QueryError> {
    Regex::new(text).map_err(|error| {
        let text_of = error.to_string();
        let reason =
            text_of.lines().last().unwrap_or_default().trim().trim_start_matches("error: ").to_owned();
        QueryError::Filter { regex: text.to_owned(), reason }
    })
}
