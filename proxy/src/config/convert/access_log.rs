//! Access loggers, their filters and formats.

use std::path::PathBuf;

use tidegate_api::accesslog as api;
use tidegate_api::accesslog::access_log::ConfigType;
use tidegate_api::accesslog::access_log_filter::FilterSpecifier;
use tidegate_api::core::{self, data_source, substitution_format_string};
use tidegate_api::envoy::data::accesslog::v3::AccessLogType;
use tidegate_api::envoy_type::{FractionalPercent, fractional_percent::DenominatorType};
use tidegate_api::{file_access_log, stream_access_log, wkt};

use super::extension::{Extension, unregistered};
use super::{Report, each, enumeration, inactive};
use crate::config::access_log::{AccessLog, ComparisonOp, Filter, Format, Sink};
use crate::config::proto::FieldPath;
use crate::response_flag::{ResponseFlag, ResponseFlags};

/// The loggers in the field `access_log`.
pub(super) fn access_logs(
    logs: Vec<api::AccessLog>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Vec<AccessLog> {
    each(logs, path, "access_log", |log, path| access_log(log, path, report))
}

/// A logger with the default format; none for an empty path.
pub(super) fn plain_file(path: String) -> Option<AccessLog> {
    Some(AccessLog { sink: sink(path)?, filter: None, format: Format::Default })
}

/// Opening the standard streams by their paths would fail where they are sockets, as under a service manager.
fn sink(path: String) -> Option<Sink> {
    match path.as_str() {
        "" => None,
        "/dev/stdout" => Some(Sink::Stdout),
        "/dev/stderr" => Some(Sink::Stderr),
        _ => Some(Sink::File(PathBuf::from(path))),
    }
}

fn access_log(log: api::AccessLog, path: &FieldPath<'_>, report: &mut Report<'_>) -> Option<AccessLog> {
    let api::AccessLog { name, filter, config_type } = log;
    let filter = filter.map(|filter| log_filter(filter, &path.field("filter"), report));
    let Some(ConfigType::TypedConfig(any)) = config_type else {
        unregistered(&name, "", path, report);
        return None;
    };
    let config_path = path.field("typed_config");
    let logger = Extension::new(any);
    let (sink, format) = if logger.is::<file_access_log::FileAccessLog>() {
        file(logger.decode(&config_path, report)?, &config_path, report)?
    } else if logger.is::<stream_access_log::StdoutAccessLog>() {
        use stream_access_log::{StdoutAccessLog, stdout_access_log::AccessLogFormat::LogFormat};
        let StdoutAccessLog { access_log_format } = logger.decode(&config_path, report)?;
        (Sink::Stdout, stream(access_log_format.map(|LogFormat(format)| format), &config_path, report)?)
    } else if logger.is::<stream_access_log::StderrAccessLog>() {
        use stream_access_log::{StderrAccessLog, stderr_access_log::AccessLogFormat::LogFormat};
        let StderrAccessLog { access_log_format } = logger.decode(&config_path, report)?;
        (Sink::Stderr, stream(access_log_format.map(|LogFormat(format)| format), &config_path, report)?)
    } else if logger.known {
        report.warn(
            &config_path,
            format!("access logger {} is not active in this version: nothing is written", logger.type_name),
        );
        return None;
    } else {
        unregistered(&name, logger.type_url(), &config_path, report);
        return None;
    };
    let log = AccessLog { sink, filter, format };
    if let Err(error) = crate::access_log::validate(&log) {
        report.invalid(path, error.to_string());
        return None;
    }
    Some(log)
}

#[expect(deprecated, reason = "deprecated fields are accepted as long as Envoy accepts them")]
fn file(
    log: file_access_log::FileAccessLog,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<(Sink, Format)> {
    use file_access_log::file_access_log::AccessLogFormat as F;
    let file_access_log::FileAccessLog { path: file, access_log_format } = log;
    let Some(sink) = sink(file) else {
        report.missing(path, "path");
        return None;
    };
    let format = match access_log_format {
        None => Format::Default,
        Some(F::Format(format)) => text(format, false),
        Some(F::JsonFormat(format) | F::TypedJsonFormat(format)) => json_format(format, false),
        Some(F::LogFormat(format)) => format_string(format, &path.field("log_format"), report)?,
    };
    Some((sink, format))
}

fn stream(
    format: Option<core::SubstitutionFormatString>,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<Format> {
    match format {
        None => Some(Format::Default),
        Some(format) => format_string(format, &path.field("log_format"), report),
    }
}

fn text(format: String, omit_empty_values: bool) -> Format {
    if format.is_empty() { Format::Default } else { Format::Text { format, omit_empty_values } }
}

/// A protobuf value as JSON. Whole numbers are printed as integers.
fn json(kind: wkt::value::Kind) -> serde_json::Value {
    use serde_json::Value;
    use wkt::value::Kind;
    let any = |value: wkt::Value| value.kind.map_or(Value::Null, json);
    match kind {
        Kind::NullValue(_) => Value::Null,
        Kind::BoolValue(value) => value.into(),
        Kind::StringValue(value) => value.into(),
        Kind::NumberValue(value) if value.fract() == 0.0 && value.abs() < 9e15 => (value as i64).into(),
        Kind::NumberValue(value) => value.into(),
        Kind::ListValue(list) => list.values.into_iter().map(any).collect(),
        Kind::StructValue(fields) => {
            Value::Object(fields.fields.into_iter().map(|(key, value)| (key, any(value))).collect())
        }
    }
}

fn json_format(format: wkt::Struct, omit_empty_values: bool) -> Format {
    Format::Json { format: json(wkt::value::Kind::StructValue(format)), omit_empty_values }
}

#[expect(deprecated, reason = "deprecated fields are accepted as long as Envoy accepts them")]
fn format_string(
    format: core::SubstitutionFormatString,
    path: &FieldPath<'_>,
    report: &mut Report<'_>,
) -> Option<Format> {
    use substitution_format_string::Format as F;
    let core::SubstitutionFormatString {
        omit_empty_values,
        // The content type of local HTTP replies.
        content_type: _,
        formatters,
        // Keys are sorted anyway.
        json_format_options: _,
        format,
    } = format;
    inactive!(report, path, "SubstitutionFormatString"; formatters);
    match format {
        None => {
            report.missing(path, "text_format_source or json_format");
            None
        }
        Some(F::TextFormat(format)) => Some(text(format, omit_empty_values)),
        Some(F::JsonFormat(format)) => Some(json_format(format, omit_empty_values)),
        Some(F::TextFormatSource(source)) => {
            let path = path.field("text_format_source");
            Some(text(inline_string(source, &path, report)?, omit_empty_values))
        }
    }
}

fn inline_string(source: core::DataSource, path: &FieldPath<'_>, report: &mut Report<'_>) -> Option<String> {
    use data_source::Specifier as S;
    let core::DataSource { watched_directory: _, specifier } = source;
    match specifier {
        Some(S::InlineString(format)) => Some(format),
        Some(S::InlineBytes(bytes)) => {
            let format = String::from_utf8(bytes).ok();
            if format.is_none() {
                report.invalid(&path.field("inline_bytes"), "not UTF-8");
            }
            format
        }
        Some(S::Filename(_)) => {
            report.unsupported(
                &path.field("filename"),
                "formats from files are not supported; use inline_string",
            );
            None
        }
        Some(S::EnvironmentVariable(_)) => {
            report.unsupported(
                &path.field("environment_variable"),
                "formats from the environment are not supported; use inline_string",
            );
            None
        }
        None => {
            report.missing(path, "inline_string");
            None
        }
    }
}

/// What lets every entry through.
fn always() -> Filter {
    Filter::And(vec![])
}

fn log_filter(filter: api::AccessLogFilter, path: &FieldPath<'_>, report: &mut Report<'_>) -> Filter {
    use FilterSpecifier as F;
    let api::AccessLogFilter { filter_specifier } = filter;
    let mut unsupported = |name: &str| {
        report.warn(
            &path.field(name),
            "this filter can't be evaluated for TCP in this version: it lets every entry through",
        );
        always()
    };
    match filter_specifier {
        None => {
            report.missing(path, "filter_specifier");
            always()
        }
        Some(F::ResponseFlagFilter(filter)) => {
            response_flags(filter, &path.field("response_flag_filter"), report)
        }
        Some(F::DurationFilter(filter)) => duration(filter, &path.field("duration_filter"), report),
        Some(F::RuntimeFilter(filter)) => runtime(&filter, &path.field("runtime_filter"), report),
        Some(F::LogTypeFilter(filter)) => log_types(filter, &path.field("log_type_filter"), report),
        Some(F::AndFilter(api::AndFilter { filters })) => {
            let path = path.field("and_filter");
            Filter::And(each(filters, &path, "filters", |filter, path| {
                Some(log_filter(filter, path, report))
            }))
        }
        Some(F::OrFilter(api::OrFilter { filters })) => {
            let path = path.field("or_filter");
            Filter::Or(each(filters, &path, "filters", |filter, path| Some(log_filter(filter, path, report))))
        }
        // A TCP connection is never marked as a health check.
        Some(F::NotHealthCheckFilter(api::NotHealthCheckFilter {})) => always(),
        Some(F::StatusCodeFilter(_)) => unsupported("status_code_filter"),
        Some(F::TraceableFilter(_)) => unsupported("traceable_filter"),
        Some(F::HeaderFilter(_)) => unsupported("header_filter"),
        Some(F::GrpcStatusFilter(_)) => unsupported("grpc_status_filter"),
        Some(F::MetadataFilter(_)) => unsupported("metadata_filter"),
        Some(F::ExtensionFilter(_)) => unsupported("extension_filter"),
    }
}

fn response_flags(filter: api::ResponseFlagFilter, path: &FieldPath<'_>, report: &mut Report<'_>) -> Filter {
    let api::ResponseFlagFilter { flags } = filter;
    let flags: ResponseFlags = each(flags, path, "flags", |name, path| {
        let flag = ResponseFlag::from_short(&name);
        if flag.is_none() {
            report.invalid(
                path,
                format!("{name:?} is not a response flag; use the short names, such as NR or UF"),
            );
        }
        flag
    })
    .into_iter()
    .collect();
    Filter::ResponseFlag(flags)
}

fn duration(filter: api::DurationFilter, path: &FieldPath<'_>, report: &mut Report<'_>) -> Filter {
    use api::comparison_filter::Op;
    let api::DurationFilter { comparison } = filter;
    let path = path.field("comparison");
    let Some(api::ComparisonFilter { op, value }) = comparison else {
        report.missing(&path, "comparison");
        return always();
    };
    let op = match enumeration(op, &path, "op", report) {
        Some(Op::Eq) | None => ComparisonOp::Eq,
        Some(Op::Ge) => ComparisonOp::Ge,
        Some(Op::Le) => ComparisonOp::Le,
        Some(Op::Ne) => ComparisonOp::Ne,
    };
    // `runtime_key` can't be set anywhere yet, so that the default holds.
    let value = value.map_or(0, |core::RuntimeUInt32 { default_value, runtime_key: _ }| default_value);
    Filter::Duration { op, value: u64::from(value) }
}

fn runtime(filter: &api::RuntimeFilter, path: &FieldPath<'_>, report: &mut Report<'_>) -> Filter {
    let api::RuntimeFilter { runtime_key: _, percent_sampled, use_independent_randomness: _ } = filter;
    // Envoy: without a percentage, and without the key in the runtime, nothing is logged.
    let FractionalPercent { numerator, denominator } = percent_sampled.unwrap_or_default();
    let denominator = match enumeration(denominator, &path.field("percent_sampled"), "denominator", report) {
        Some(DenominatorType::Hundred) | None => 100,
        Some(DenominatorType::TenThousand) => 10_000,
        Some(DenominatorType::Million) => 1_000_000,
    };
    Filter::Runtime { numerator, denominator }
}

fn log_types(filter: api::LogTypeFilter, path: &FieldPath<'_>, report: &mut Report<'_>) -> Filter {
    let api::LogTypeFilter { types, exclude } = filter;
    let types = each(types, path, "types", |value, path| {
        let converted = AccessLogType::try_from(value).ok();
        if converted.is_none() {
            report.invalid(path, format!("{value} is not an access log type"));
        }
        converted.map(|log_type| log_type.as_str_name().to_owned())
    });
    Filter::LogType { types, exclude }
}
