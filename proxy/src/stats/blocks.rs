//! Every block of stats, with Envoy's names. This file is one big table.

use super::declare::stats_block;

stats_block! {
    /// `cluster.<name>.*`
    ClusterStats: "cluster", label "envoy_cluster_name", per_worker [];
    counters {
        bind_errors,
        lb_healthy_panic,
        original_dst_host_invalid,
        default_total_match_count = "default.total_match_count",
        upstream_cx_connect_attempts_exceeded,
        upstream_cx_connect_fail,
        upstream_cx_connect_timeout,
        upstream_cx_destroy,
        upstream_cx_destroy_local,
        upstream_cx_destroy_local_with_active_rq,
        upstream_cx_destroy_remote,
        upstream_cx_destroy_remote_with_active_rq,
        upstream_cx_destroy_with_active_rq,
        upstream_cx_idle_timeout,
        upstream_cx_max_duration_reached,
        upstream_cx_none_healthy,
        upstream_cx_overflow,
        upstream_cx_pool_overflow,
        upstream_cx_rx_bytes_total,
        upstream_cx_total,
        upstream_cx_tx_bytes_total,
        upstream_flow_control_backed_up_total,
        upstream_flow_control_drained_total,
        upstream_flow_control_paused_reading_total,
        upstream_flow_control_resumed_reading_total,
        upstream_rq_cancelled,
        upstream_rq_pending_failure_eject,
        upstream_rq_pending_overflow,
        upstream_rq_pending_total,
        upstream_rq_total,
    }
    gauges {
        upstream_cx_active,
        upstream_cx_rx_bytes_buffered,
        upstream_cx_tx_bytes_buffered,
        upstream_rq_active,
        upstream_rq_pending_active,
    }
    histograms { upstream_cx_connect_ms, upstream_cx_length_ms }
    shared_counters {
        membership_change,
        update_attempt,
        update_empty,
        update_failure,
        init_fetch_timeout,
        update_no_rebuild,
        update_rejected,
        update_success,
    }
    shared_gauges {
        circuit_breakers_default_cx_open = "circuit_breakers.default.cx_open",
        circuit_breakers_default_rq_open = "circuit_breakers.default.rq_open",
        circuit_breakers_default_rq_pending_open = "circuit_breakers.default.rq_pending_open",
        max_host_weight,
        membership_degraded,
        membership_excluded,
        membership_healthy,
        membership_total,
        update_time,
        version,
        warming_state,
    }
    zero_counters {
        "assignment_stale",
        "assignment_timeout_received",
        "assignment_use_cached",
        "lb_local_cluster_not_ok",
        "lb_recalculate_zone_structures",
        "lb_subsets_created",
        "lb_subsets_fallback",
        "lb_subsets_fallback_panic",
        "lb_subsets_removed",
        "lb_subsets_selected",
        "lb_zone_cluster_too_small",
        "lb_zone_no_capacity_left",
        "lb_zone_routing_all_directly",
        "lb_zone_routing_cross_zone",
        "lb_zone_routing_sampled",
        "retry_or_shadow_abandoned",
        "upstream_cx_close_notify",
        "upstream_cx_connect_with_0_rtt",
        "upstream_cx_http1_total",
        "upstream_cx_http2_total",
        "upstream_cx_http3_total",
        "upstream_cx_max_requests",
        "upstream_cx_preconnect_skipped",
        "upstream_cx_protocol_error",
        "upstream_http3_broken",
        "upstream_internal_redirect_failed_total",
        "upstream_internal_redirect_succeeded_total",
        "upstream_rq_0rtt",
        "upstream_rq_active_overflow",
        "upstream_rq_completed",
        "upstream_rq_maintenance_mode",
        "upstream_rq_max_duration_reached",
        "upstream_rq_per_try_idle_timeout",
        "upstream_rq_per_try_timeout",
        "upstream_rq_retry",
        "upstream_rq_retry_backoff_exponential",
        "upstream_rq_retry_backoff_ratelimited",
        "upstream_rq_retry_limit_exceeded",
        "upstream_rq_retry_overflow",
        "upstream_rq_retry_success",
        "upstream_rq_rx_reset",
        "upstream_rq_rx_reset_no_error",
        "upstream_rq_timeout",
        "upstream_rq_tx_reset",
    }
    zero_gauges {
        "circuit_breakers.default.cx_pool_open",
        "circuit_breakers.default.rq_retry_open",
        "circuit_breakers.high.cx_open",
        "circuit_breakers.high.cx_pool_open",
        "circuit_breakers.high.rq_open",
        "circuit_breakers.high.rq_pending_open",
        "circuit_breakers.high.rq_retry_open",
        "lb_subsets_active",
        "upstream_queue_overloaded",
    }
    texts { version_text }
}

stats_block! {
    /// `cluster.<name>.client_ssl_socket_factory.*`, of clusters with TLS.
    ClientTlsStats: "cluster", label "envoy_cluster_name", per_worker [];
    counters {}
    gauges {}
    histograms {}
    shared_counters {
        ssl_context_update_by_sds = "client_ssl_socket_factory.ssl_context_update_by_sds",
        upstream_context_secrets_not_ready = "client_ssl_socket_factory.upstream_context_secrets_not_ready",
    }
    shared_gauges {}
    zero_counters { "client_ssl_socket_factory.downstream_context_secrets_not_ready" }
    zero_gauges {}
}

stats_block! {
    /// `cluster.<name>.ring_hash_lb.*`, of clusters with RING_HASH.
    RingHashStats: "cluster", label "envoy_cluster_name", per_worker [];
    counters {}
    gauges {}
    histograms {}
    shared_counters {}
    shared_gauges {
        max_hashes_per_host = "ring_hash_lb.max_hashes_per_host",
        min_hashes_per_host = "ring_hash_lb.min_hashes_per_host",
        size = "ring_hash_lb.size",
    }
    zero_counters {}
    zero_gauges {}
}

stats_block! {
    /// `cluster.<name>.maglev_lb.*`, of clusters with MAGLEV.
    MaglevStats: "cluster", label "envoy_cluster_name", per_worker [];
    counters {}
    gauges {}
    histograms {}
    shared_counters {}
    shared_gauges {
        max_entries_per_host = "maglev_lb.max_entries_per_host",
        min_entries_per_host = "maglev_lb.min_entries_per_host",
    }
    zero_counters {}
    zero_gauges {}
}

stats_block! {
    /// `cluster.<name>.health_check.*`, of clusters with active health checks.
    HealthCheckStats: "cluster", label "envoy_cluster_name", per_worker [];
    counters {}
    gauges {}
    histograms {}
    shared_counters {
        attempt = "health_check.attempt",
        failure = "health_check.failure",
        network_failure = "health_check.network_failure",
        success = "health_check.success",
        verify_cluster = "health_check.verify_cluster",
    }
    shared_gauges { degraded = "health_check.degraded", healthy = "health_check.healthy" }
    // Only a HTTP filter of Envoy's makes some.
    zero_counters { "health_check.passive_failure" }
    zero_gauges {}
}

stats_block! {
    /// `cluster.<name>.tcp_stats.*`, of clusters on the kernel path: those of Envoy's `tcp_stats` transport socket that the
    /// programs know of the applications' sockets.
    TcpStats: "cluster", label "envoy_cluster_name", per_worker [];
    counters { cx_tx_retransmitted_segments = "tcp_stats.cx_tx_retransmitted_segments" }
    gauges {}
    histograms { cx_rtt_us = "tcp_stats.cx_rtt_us" }
    shared_counters {}
    shared_gauges {}
    zero_counters {}
    zero_gauges {}
}

stats_block! {
    /// `cluster.<name>.outlier_detection.*`, of clusters with outlier detection.
    OutlierStats: "cluster", label "envoy_cluster_name", per_worker [];
    counters {}
    gauges {}
    histograms {}
    shared_counters {
        ejections_consecutive_5xx = "outlier_detection.ejections_consecutive_5xx",
        ejections_detected_consecutive_5xx = "outlier_detection.ejections_detected_consecutive_5xx",
        ejections_detected_consecutive_gateway_failure = "outlier_detection.ejections_detected_consecutive_gateway_failure",
        ejections_detected_consecutive_local_origin_failure = "outlier_detection.ejections_detected_consecutive_local_origin_failure",
        ejections_detected_failure_percentage = "outlier_detection.ejections_detected_failure_percentage",
        ejections_detected_local_origin_failure_percentage = "outlier_detection.ejections_detected_local_origin_failure_percentage",
        ejections_detected_local_origin_success_rate = "outlier_detection.ejections_detected_local_origin_success_rate",
        ejections_detected_success_rate = "outlier_detection.ejections_detected_success_rate",
        ejections_enforced_consecutive_5xx = "outlier_detection.ejections_enforced_consecutive_5xx",
        ejections_enforced_consecutive_gateway_failure = "outlier_detection.ejections_enforced_consecutive_gateway_failure",
        ejections_enforced_consecutive_local_origin_failure = "outlier_detection.ejections_enforced_consecutive_local_origin_failure",
        ejections_enforced_failure_percentage = "outlier_detection.ejections_enforced_failure_percentage",
        ejections_enforced_local_origin_failure_percentage = "outlier_detection.ejections_enforced_local_origin_failure_percentage",
        ejections_enforced_local_origin_success_rate = "outlier_detection.ejections_enforced_local_origin_success_rate",
        ejections_enforced_success_rate = "outlier_detection.ejections_enforced_success_rate",
        ejections_enforced_total = "outlier_detection.ejections_enforced_total",
        ejections_overflow = "outlier_detection.ejections_overflow",
        ejections_success_rate = "outlier_detection.ejections_success_rate",
        ejections_total = "outlier_detection.ejections_total",
    }
    shared_gauges { ejections_active = "outlier_detection.ejections_active" }
    zero_counters { "outlier_detection.ejections_detected_degradation" }
    zero_gauges {}
}

stats_block! {
    /// `sds.<name>.*`: a secret.
    SdsStats: "sds", label "envoy_xds_resource_name", per_worker [];
    counters {}
    gauges {}
    histograms { update_duration }
    shared_counters {
        init_fetch_timeout,
        key_rotation_failed,
        update_attempt,
        update_failure,
        update_rejected,
        update_success,
    }
    shared_gauges { update_time, version }
    zero_counters {}
    zero_gauges {}
    texts { version_text }
}

stats_block! {
    /// `tcp.<stat_prefix>.*`
    TcpProxyStats: "tcp", label "envoy_tcp_prefix", per_worker [];
    counters {
        downstream_cx_no_route,
        downstream_cx_overload_close,
        downstream_cx_rx_bytes_total,
        downstream_cx_total,
        downstream_cx_tx_bytes_total,
        downstream_flow_control_paused_reading_total,
        downstream_flow_control_resumed_reading_total,
        early_data_received_count_total,
        idle_timeout,
        max_downstream_connection_duration,
        upstream_flush_total,
    }
    gauges { downstream_cx_rx_bytes_buffered, downstream_cx_tx_bytes_buffered, upstream_flush_active }
    histograms {}
    shared_counters {}
    shared_gauges {}
    zero_counters { "downstream_cx_drain_close", "route_delayed_total" }
    zero_gauges {}
}

stats_block! {
    /// `listener.<address or stat_prefix>.*`, and per worker `listener.<…>.worker_N.*`.
    ListenerStats: "listener", label "envoy_listener_address",
        per_worker ["downstream_cx_active", "downstream_cx_total"];
    counters {
        downstream_cx_destroy,
        downstream_cx_overflow,
        downstream_cx_overload_reject,
        downstream_cx_total,
        downstream_cx_transport_socket_connect_timeout,
        downstream_global_cx_overflow,
        downstream_listener_filter_error,
        downstream_listener_filter_remote_close,
        downstream_pre_cx_timeout,
        no_filter_chain_match,
    }
    gauges { downstream_cx_active, downstream_pre_cx_active }
    histograms { connections_accepted_per_socket_event, downstream_cx_length_ms }
    shared_counters {}
    shared_gauges {}
    zero_counters { "extension_config_missing", "network_extension_config_missing" }
    zero_gauges {}
}

stats_block! {
    /// `http.<stat_prefix>.*` of HTTP listeners that are served as L4: connections only.
    HttpStats: "http", label "envoy_http_conn_manager_prefix", per_worker [];
    counters {
        downstream_cx_destroy,
        downstream_cx_destroy_local,
        downstream_cx_destroy_remote,
        downstream_cx_idle_timeout,
        downstream_cx_max_duration_reached,
        downstream_cx_rx_bytes_total,
        downstream_cx_total,
        downstream_cx_tx_bytes_total,
    }
    gauges { downstream_cx_active }
    histograms { downstream_cx_length_ms }
    shared_counters {}
    shared_gauges {}
    zero_counters {}
    zero_gauges {}
}

stats_block! {
    /// `http.<stat_prefix>.rds.<route configuration>.*`, and `http.<stat_prefix>.rds.vhds.<route configuration>.*` of its
    /// virtual hosts.
    RdsStats: "http", label "envoy_http_conn_manager_prefix", part "rds", label "envoy_rds_route_config",
        per_worker [];
    counters {}
    gauges {}
    histograms { update_duration }
    shared_counters {
        config_reload,
        init_fetch_timeout,
        update_attempt,
        update_empty,
        update_failure,
        update_rejected,
        update_success,
    }
    shared_gauges { config_reload_time_ms, update_time, version }
    zero_counters {}
    zero_gauges {}
    texts { version_text }
}

stats_block! {
    /// `listener_manager.*`
    ListenerManagerStats: "listener_manager", label "", per_worker [];
    counters {}
    gauges {}
    histograms { lds_update_duration = "lds.update_duration" }
    shared_counters {
        listener_added,
        listener_create_failure,
        listener_create_success,
        listener_in_place_updated,
        listener_modified,
        listener_removed,
        listener_stopped,
        lds_init_fetch_timeout = "lds.init_fetch_timeout",
        lds_update_attempt = "lds.update_attempt",
        lds_update_failure = "lds.update_failure",
        lds_update_rejected = "lds.update_rejected",
        lds_update_success = "lds.update_success",
    }
    shared_gauges {
        total_filter_chains_draining,
        total_listeners_active,
        total_listeners_draining,
        total_listeners_warming,
        workers_started,
        lds_update_time = "lds.update_time",
        lds_version = "lds.version",
    }
    zero_counters {}
    zero_gauges { "workers_pinned" }
    texts { lds_version_text = "lds.version_text" }
}

stats_block! {
    /// `cluster_manager.*`
    ClusterManagerStats: "cluster_manager", label "", per_worker [];
    counters {}
    gauges {}
    histograms { cds_update_duration = "cds.update_duration" }
    shared_counters {
        cluster_added,
        cluster_modified,
        cluster_removed,
        cluster_updated,
        cds_config_reload = "cds.config_reload",
        cds_init_fetch_timeout = "cds.init_fetch_timeout",
        cds_update_attempt = "cds.update_attempt",
        cds_update_failure = "cds.update_failure",
        cds_update_rejected = "cds.update_rejected",
        cds_update_success = "cds.update_success",
    }
    shared_gauges {
        active_clusters,
        warming_clusters,
        cds_config_reload_time_ms = "cds.config_reload_time_ms",
        cds_update_time = "cds.update_time",
        cds_version = "cds.version",
    }
    zero_counters { "cluster_updated_via_merge", "update_merge_cancelled", "update_out_of_merge_window" }
    zero_gauges {}
    texts { cds_version_text = "cds.version_text" }
}

stats_block! {
    /// `control_plane.*`
    ControlPlaneStats: "control_plane", label "", per_worker [];
    counters {}
    gauges {}
    histograms {}
    shared_counters { rate_limit_enforced }
    shared_gauges { connected_state, pending_requests }
    zero_counters {}
    zero_gauges {}
    texts { identifier }
}

stats_block! {
    /// `server.*`
    ServerStats: "server", label "", per_worker [];
    counters {}
    gauges { total_connections }
    histograms { initialization_time_ms }
    shared_counters { dynamic_unknown_fields, static_unknown_fields }
    shared_gauges {
        concurrency,
        hot_restart_epoch,
        hot_restart_generation,
        live,
        memory_allocated,
        memory_heap_size,
        memory_physical_size,
        parent_connections,
        state,
        uptime,
        version,
    }
    zero_counters {
        "debug_assertion_failures",
        "dropped_stat_flushes",
        "envoy_bug_failures",
        "envoy_notifications",
        "wip_protos",
    }
    zero_gauges {
        "compilation_settings.fips_mode",
        "seconds_until_first_ocsp_response_expiring",
        "stats_recent_lookups",
    }
}

stats_block! {
    /// `tls_inspector.*`
    TlsInspectorStats: "tls_inspector", label "", per_worker [];
    counters {
        alpn_found,
        alpn_not_found,
        client_hello_too_large,
        sni_found,
        sni_not_found,
        tls_found,
        tls_not_found,
    }
    gauges {}
    histograms { bytes_processed }
    shared_counters {}
    shared_gauges {}
    zero_counters {}
    zero_gauges {}
}

stats_block! {
    /// `http_inspector.*`
    HttpInspectorStats: "http_inspector", label "", per_worker [];
    counters { http10_found, http11_found, http2_found, http_not_found, read_error }
    gauges {}
    histograms {}
    shared_counters {}
    shared_gauges {}
    zero_counters {}
    zero_gauges {}
}

stats_block! {
    /// Names without a first part.
    RootStats: "", label "", per_worker [];
    counters { downstream_cx_proxy_proto_error }
    gauges {}
    histograms {}
    shared_counters {}
    shared_gauges {}
    zero_counters {}
    zero_gauges {}
}

stats_block! {
    /// `listener.admin.*`
    AdminListenerStats: "listener.admin", label "", per_worker [];
    counters {
        downstream_cx_destroy,
        downstream_cx_total,
        main_thread_downstream_cx_total = "main_thread.downstream_cx_total",
    }
    gauges { downstream_cx_active, main_thread_downstream_cx_active = "main_thread.downstream_cx_active" }
    histograms { downstream_cx_length_ms }
    shared_counters {}
    shared_gauges {}
    zero_counters {
        "downstream_cx_overflow",
        "downstream_cx_overload_reject",
        "downstream_cx_transport_socket_connect_timeout",
        "downstream_global_cx_overflow",
        "downstream_listener_filter_error",
        "downstream_listener_filter_remote_close",
        "downstream_pre_cx_timeout",
        "no_filter_chain_match",
    }
    zero_gauges { "downstream_pre_cx_active" }
}

stats_block! {
    /// `runtime.*`: only what the bootstrap says, which is looked up once.
    RuntimeStats: "runtime", label "", per_worker [];
    counters {}
    gauges {}
    histograms {}
    shared_counters { load_success }
    shared_gauges { num_keys, num_layers }
    zero_counters {
        "deprecated_feature_use",
        "load_error",
        "override_dir_exists",
        "override_dir_not_exists",
    }
    zero_gauges { "admin_overrides_active", "deprecated_feature_seen_since_process_start" }
}

stats_block! {
    /// `proxy_proto.*`, or `proxy_proto.<stat_prefix>.*`
    ProxyProtocolStats: "proxy_proto", label "envoy_proxy_protocol_prefix", per_worker [];
    counters {
        not_found_allowed,
        not_found_disallowed,
        v1_disallowed = "versions.v1.disallowed",
        v1_error = "versions.v1.error",
        v1_found = "versions.v1.found",
        v2_disallowed = "versions.v2.disallowed",
        v2_error = "versions.v2.error",
        v2_found = "versions.v2.found",
    }
    gauges {}
    histograms {}
    shared_counters {}
    shared_gauges {}
    zero_counters {}
    zero_gauges {}
}

stats_block! {
    /// `filesystem.*`: the files that access logs are written to.
    FilesystemStats: "filesystem", label "", per_worker [];
    counters { write_buffered }
    gauges { write_total_buffered }
    histograms {}
    shared_counters { flushed_by_timer, reopen_failed, write_completed, write_failed }
    shared_gauges {}
    zero_counters {}
    zero_gauges {}
}

stats_block! {
    /// `tidegate.access_log.*`: what Envoy's `filesystem.*` does not tell.
    AccessLogStats: "tidegate.access_log", label "", per_worker [];
    counters { entries_written, entries_dropped }
    gauges {}
    histograms {}
    shared_counters { flushes, reopened, bytes_lost }
    shared_gauges { files }
    zero_counters {}
    zero_gauges {}
}

stats_block! {
    /// `tidegate.pump.*`: which data path the bytes took.
    PumpStats: "tidegate.pump", label "", per_worker [];
    counters {
        bytes_copied,
        bytes_spliced,
        switches_to_copy,
        switches_to_splice,
        pipes_created,
        pipe_budget_exhausted,
    }
    gauges { pipes_in_use, pipes_pooled }
    histograms {}
    shared_counters {}
    shared_gauges {}
    zero_counters {}
    zero_gauges {}
}

stats_block! {
    /// `tidegate.config.*`: what was accepted but is not active.
    ConfigStats: "tidegate.config", label "", per_worker [];
    counters {}
    gauges {}
    histograms {}
    shared_counters { ignored_filters, warnings }
    shared_gauges { stale_resources }
    zero_counters {}
    zero_gauges {}
}
