//! The command line as `/server_info` shows it.

use serde_json::{Value, json};

use crate::args::{DrainStrategy, Mode, ServeArgs};

/// The flags as Envoy's `CommandLineOptions` message, as JSON. Flags that are accepted without effect show what
/// they were given.
pub fn command_line_options(args: &ServeArgs) -> Value {
    let path = |path: &Option<std::path::PathBuf>| {
        path.as_ref().map(|path| path.display().to_string()).unwrap_or_default()
    };
    let inert = &args.inert;
    json!({
        "base_id": inert.base_id.unwrap_or(0).to_string(),
        "concurrency": args.workers(),
        "config_path": path(&args.config_path),
        "config_yaml": args.config_yaml.as_deref().unwrap_or_default(),
        "allow_unknown_static_fields": args.allow_unknown_static_fields,
        "admin_address_path": path(&args.admin_address_path),
        "local_address_ip_version": inert.local_address_ip_version.as_deref().unwrap_or("v4"),
        "log_level": args.log_level.to_string(),
        "component_log_level": args.component_log_level,
        "log_format": inert.log_format.as_deref().unwrap_or_default(),
        "log_path": path(&args.log_path),
        "service_cluster": args.service_cluster,
        "service_node": args.service_node,
        "service_zone": args.service_zone,
        "file_flush_interval": format!("{}s", args.file_flush_interval_msec as f64 / 1e3),
        "drain_time": format!("{}s", args.drain_time_s),
        "parent_shutdown_time": format!("{}s", args.parent_shutdown_time_s),
        "mode": match args.mode {
            Mode::Serve => "Serve",
            Mode::Validate => "Validate",
            Mode::InitOnly => "InitOnly",
        },
        "disable_hot_restart": inert.disable_hot_restart,
        "enable_mutex_tracing": false,
        "restart_epoch": inert.restart_epoch.unwrap_or(0),
        "cpuset_threads": args.cpuset_threads,
        "reject_unknown_dynamic_fields": args.reject_unknown_dynamic_fields,
        "log_format_escaped": inert.log_format_escaped,
        "disabled_extensions": inert.disable_extensions.iter().collect::<Vec<_>>(),
        "ignore_unknown_dynamic_fields": args.ignore_unknown_dynamic_fields,
        "use_dynamic_base_id": false,
        "base_id_path": "",
        "drain_strategy": match args.drain_strategy {
            DrainStrategy::Gradual => "Gradual",
            DrainStrategy::Immediate => "Immediate",
        },
        "enable_fine_grain_logging": inert.enable_fine_grain_logging,
        "socket_path": inert.socket_path.as_deref().unwrap_or_default(),
        "socket_mode": 0,
        "enable_core_dump": inert.enable_core_dump,
        "stats_tag": inert.stats_tag,
        "skip_hot_restart_on_no_parent": false,
        "skip_hot_restart_parent_stats": false,
        "skip_deprecated_logs": inert.skip_deprecated_logs,
        "file_flush_min_size": args.file_flush_min_size_kb << 10,
        "log_stacktrace_single_entry": false,
    })
}
