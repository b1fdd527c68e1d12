//! `cargo xtask gen-api`: regenerates the checked-in code of `tidegate-api` from its .proto files.
//!
//! The generator (prost-build, protox) is behind the cargo feature `gen-api`, because nobody else needs
//! its 40 crates: without the feature this command runs itself again with it.

use anyhow::Result;
use clap::Args;

/// Arguments of `gen-api`.
#[derive(Args, Debug)]
pub(crate) struct GenApi {
    /// Fail when the checked-in files are not what the .proto files give, and write nothing.
    #[arg(long)]
    check: bool,
    /// First copy the .proto files that are needed from these trees (the `proto/*` directories of an
    /// unpacked envoy-types package, and a cncf/xds checkout for typed_struct.proto).
    #[arg(long, value_name = "DIR")]
    vendor_from: Vec<std::path::PathBuf>,
}

impl GenApi {
    #[cfg(feature = "gen-api")]
    pub(crate) fn run(&self) -> Result<()> {
        generate::run(self)
    }

    #[cfg(not(feature = "gen-api"))]
    pub(crate) fn run(&self) -> Result<()> {
        let mut cargo =
            std::process::Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.args(["run", "--quiet", "--package", "xtask", "--features", "gen-api", "--", "gen-api"]);
        if self.check {
            cargo.arg("--check");
        }
        for dir in &self.vendor_from {
            cargo.arg("--vendor-from").arg(dir);
        }
        let status = cargo.status()?;
        anyhow::ensure!(status.success(), "`cargo run -p xtask --features gen-api` failed: {status}");
        Ok(())
    }
}

#[cfg(feature = "gen-api")]
mod generate {
    use std::collections::{BTreeMap, BTreeSet};
    use std::fs;
    use std::path::{Path, PathBuf};

    use anyhow::{Context, Result, bail, ensure};
    use prost_reflect::DescriptorPool;
    use prost_types::FileDescriptorSet;

    use super::GenApi;

    /// Files whose messages the proxy reads by name: they and what they import become Rust types.
    const TYPED: &[&str] = &[
        "envoy/admin/v3/certs.proto",
        "envoy/admin/v3/clusters.proto",
        "envoy/admin/v3/config_dump.proto",
        "envoy/admin/v3/init_dump.proto",
        "envoy/admin/v3/listeners.proto",
        "envoy/admin/v3/memory.proto",
        "envoy/admin/v3/server_info.proto",
        "envoy/config/accesslog/v3/accesslog.proto",
        "envoy/config/bootstrap/v3/bootstrap.proto",
        "envoy/config/cluster/v3/cluster.proto",
        "envoy/config/core/v3/substitution_format_string.proto",
        "envoy/config/endpoint/v3/endpoint.proto",
        "envoy/config/listener/v3/listener.proto",
        "envoy/config/rbac/v3/rbac.proto",
        "envoy/config/route/v3/route.proto",
        "envoy/config/upstream/local_address_selector/v3/default_local_address_selector.proto",
        "envoy/data/core/v3/health_check_event.proto",
        "envoy/data/core/v3/tlv_metadata.proto",
        "envoy/data/cluster/v3/outlier_detection_event.proto",
        "envoy/extensions/access_loggers/file/v3/file.proto",
        "envoy/extensions/access_loggers/grpc/v3/als.proto",
        "envoy/extensions/access_loggers/open_telemetry/v3/logs_service.proto",
        "envoy/extensions/access_loggers/stream/v3/stream.proto",
        "envoy/extensions/bootstrap/internal_listener/v3/internal_listener.proto",
        "envoy/extensions/clusters/aggregate/v3/cluster.proto",
        "envoy/extensions/clusters/dns/v3/dns_cluster.proto",
        "envoy/extensions/clusters/original_dst/v3/original_dst.proto",
        "envoy/extensions/filters/http/router/v3/router.proto",
        "envoy/extensions/filters/listener/http_inspector/v3/http_inspector.proto",
        "envoy/extensions/filters/listener/local_ratelimit/v3/local_ratelimit.proto",
        "envoy/extensions/filters/listener/original_dst/v3/original_dst.proto",
        "envoy/extensions/filters/listener/original_src/v3/original_src.proto",
        "envoy/extensions/filters/listener/proxy_protocol/v3/proxy_protocol.proto",
        "envoy/extensions/filters/listener/tls_inspector/v3/tls_inspector.proto",
        "envoy/extensions/filters/network/connection_limit/v3/connection_limit.proto",
        "envoy/extensions/filters/network/direct_response/v3/config.proto",
        "envoy/extensions/filters/network/echo/v3/echo.proto",
        "envoy/extensions/filters/network/http_connection_manager/v3/http_connection_manager.proto",
        "envoy/extensions/filters/network/local_ratelimit/v3/local_rate_limit.proto",
        "envoy/extensions/filters/network/rbac/v3/rbac.proto",
        "envoy/extensions/filters/network/set_filter_state/v3/set_filter_state.proto",
        "envoy/extensions/filters/network/sni_cluster/v3/sni_cluster.proto",
        "envoy/extensions/filters/network/tcp_proxy/v3/tcp_proxy.proto",
        "envoy/extensions/health_check/event_sinks/file/v3/file.proto",
        "envoy/extensions/load_balancing_policies/cluster_provided/v3/cluster_provided.proto",
        "envoy/extensions/load_balancing_policies/least_request/v3/least_request.proto",
        "envoy/extensions/load_balancing_policies/maglev/v3/maglev.proto",
        "envoy/extensions/load_balancing_policies/override_host/v3/override_host.proto",
        "envoy/extensions/load_balancing_policies/pick_first/v3/pick_first.proto",
        "envoy/extensions/load_balancing_policies/random/v3/random.proto",
        "envoy/extensions/load_balancing_policies/ring_hash/v3/ring_hash.proto",
        "envoy/extensions/load_balancing_policies/round_robin/v3/round_robin.proto",
        "envoy/extensions/load_balancing_policies/subset/v3/subset.proto",
        "envoy/extensions/load_balancing_policies/wrr_locality/v3/wrr_locality.proto",
        "envoy/extensions/network/dns_resolver/cares/v3/cares_dns_resolver.proto",
        "envoy/extensions/network/dns_resolver/getaddrinfo/v3/getaddrinfo_dns_resolver.proto",
        "envoy/extensions/network/socket_interface/v3/default_socket_interface.proto",
        "envoy/extensions/resource_monitors/downstream_connections/v3/downstream_connections.proto",
        "envoy/extensions/resource_monitors/fixed_heap/v3/fixed_heap.proto",
        "envoy/extensions/transport_sockets/internal_upstream/v3/internal_upstream.proto",
        "envoy/extensions/transport_sockets/proxy_protocol/v3/upstream_proxy_protocol.proto",
        "envoy/extensions/transport_sockets/raw_buffer/v3/raw_buffer.proto",
        "envoy/extensions/transport_sockets/starttls/v3/starttls.proto",
        "envoy/extensions/transport_sockets/tcp_stats/v3/tcp_stats.proto",
        "envoy/extensions/transport_sockets/tls/v3/secret.proto",
        "envoy/extensions/transport_sockets/tls/v3/tls.proto",
        "envoy/extensions/transport_sockets/tls/v3/tls_spiffe_validator_config.proto",
        "envoy/extensions/upstreams/http/v3/http_protocol_options.proto",
        "envoy/extensions/upstreams/tcp/v3/tcp_protocol_options.proto",
        "envoy/service/cluster/v3/cds.proto",
        "envoy/service/discovery/v3/ads.proto",
        "envoy/service/discovery/v3/discovery.proto",
        "envoy/service/endpoint/v3/eds.proto",
        "envoy/service/extension/v3/config_discovery.proto",
        "envoy/service/listener/v3/lds.proto",
        "envoy/service/load_stats/v3/lrs.proto",
        "envoy/service/route/v3/rds.proto",
        "envoy/service/route/v3/srds.proto",
        "envoy/service/runtime/v3/rtds.proto",
        "envoy/service/secret/v3/sds.proto",
        "envoy/service/status/v3/csds.proto",
        "google/rpc/status.proto",
        "tidegate/bootstrap/v1/interception.proto",
        "tidegate/cluster/v1/data_path.proto",
        "tidegate/cluster/v1/endpoint_removal.proto",
        "udpa/type/v1/typed_struct.proto",
        "xds/type/v3/typed_struct.proto",
    ];

    /// Files of which the descriptors are enough: what control planes put next to TCP configuration, and
    /// the proxy checks and shows, but does not act on.
    const DESCRIPTORS_ONLY: &[&str] = &[
        "envoy/config/metrics/v3/metrics_service.proto",
        "envoy/config/trace/v3/opentelemetry.proto",
        "envoy/config/trace/v3/zipkin.proto",
        "envoy/extensions/access_loggers/filters/cel/v3/cel.proto",
        "envoy/extensions/filters/http/buffer/v3/buffer.proto",
        "envoy/extensions/filters/http/compressor/v3/compressor.proto",
        "envoy/extensions/filters/http/cors/v3/cors.proto",
        "envoy/extensions/filters/http/csrf/v3/csrf.proto",
        "envoy/extensions/filters/http/ext_authz/v3/ext_authz.proto",
        "envoy/extensions/filters/http/fault/v3/fault.proto",
        "envoy/extensions/filters/http/grpc_http1_bridge/v3/config.proto",
        "envoy/extensions/filters/http/grpc_stats/v3/config.proto",
        "envoy/extensions/filters/http/grpc_web/v3/grpc_web.proto",
        "envoy/extensions/filters/http/header_mutation/v3/header_mutation.proto",
        "envoy/extensions/filters/http/health_check/v3/health_check.proto",
        "envoy/extensions/filters/http/jwt_authn/v3/config.proto",
        "envoy/extensions/filters/http/local_ratelimit/v3/local_rate_limit.proto",
        "envoy/extensions/filters/http/lua/v3/lua.proto",
        "envoy/extensions/filters/http/on_demand/v3/on_demand.proto",
        "envoy/extensions/filters/http/ratelimit/v3/rate_limit.proto",
        "envoy/extensions/filters/http/rbac/v3/rbac.proto",
        "envoy/extensions/filters/http/set_filter_state/v3/set_filter_state.proto",
        "envoy/extensions/filters/http/stateful_session/v3/stateful_session.proto",
        "envoy/extensions/filters/http/wasm/v3/wasm.proto",
        "envoy/extensions/filters/network/ext_authz/v3/ext_authz.proto",
        "envoy/extensions/filters/network/ratelimit/v3/rate_limit.proto",
        "envoy/extensions/filters/network/wasm/v3/wasm.proto",
        "envoy/extensions/formatter/metadata/v3/metadata.proto",
        "envoy/extensions/formatter/req_without_query/v3/req_without_query.proto",
        "envoy/extensions/http/original_ip_detection/xff/v3/xff.proto",
        "envoy/extensions/matching/common_inputs/network/v3/network_inputs.proto",
        "envoy/extensions/matching/common_inputs/ssl/v3/ssl_inputs.proto",
        "envoy/extensions/matching/common_inputs/transport_socket/v3/transport_socket_inputs.proto",
        "envoy/extensions/matching/input_matchers/ip/v3/ip.proto",
        "envoy/extensions/rbac/audit_loggers/stream/v3/stream.proto",
        "envoy/extensions/rbac/matchers/upstream_ip_port/v3/upstream_ip_port_matcher.proto",
        "envoy/extensions/regex_engines/v3/google_re2.proto",
        "envoy/extensions/request_id/uuid/v3/uuid.proto",
        "envoy/extensions/resource_monitors/cpu_utilization/v3/cpu_utilization.proto",
        "envoy/extensions/resource_monitors/injected_resource/v3/injected_resource.proto",
        "envoy/extensions/retry/host/omit_canary_hosts/v3/omit_canary_hosts.proto",
        "envoy/extensions/retry/host/omit_host_metadata/v3/omit_host_metadata_config.proto",
        "envoy/extensions/retry/host/previous_hosts/v3/previous_hosts.proto",
        "envoy/extensions/retry/priority/previous_priorities/v3/previous_priorities_config.proto",
        "envoy/extensions/stat_sinks/open_telemetry/v3/open_telemetry.proto",
        "envoy/extensions/transport_sockets/quic/v3/quic_transport.proto",
        "google/protobuf/field_mask.proto",
    ];

    /// Domain in front of every type name in an `Any`.
    const TYPE_URL_DOMAIN: &str = "type.googleapis.com";

    pub(super) fn run(args: &GenApi) -> Result<()> {
        let api = Path::new(env!("CARGO_MANIFEST_DIR")).join("../proxy/api");
        let proto = api.join("proto");
        if !args.vendor_from.is_empty() {
            ensure!(!args.check, "--check and --vendor-from exclude each other");
            vendor(&proto, &args.vendor_from)?;
        }
        let files = render(&proto)?;
        let out = api.join("src/generated");
        if args.check { compare(&out, &files) } else { write(&out, &files) }
    }

    /// Copies the import closure of the entry files, and nothing else, over what is there.
    fn vendor(proto: &Path, trees: &[PathBuf]) -> Result<()> {
        let mut includes = trees.to_vec();
        includes.push(proto.to_path_buf()); // our own messages
        let mut needed = BTreeMap::new();
        for entry in TYPED.iter().chain(DESCRIPTORS_ONLY) {
            for file in compile(&includes, entry)?.files() {
                // protox has google/protobuf/*.proto built in: those have no path.
                if let Some(from) = file.path().filter(|path| !path.starts_with(proto)) {
                    let content = fs::read(from).with_context(|| format!("read {}", from.display()))?;
                    needed.insert(file.name().to_owned(), content);
                }
            }
        }
        for old in fs::read_dir(proto)? {
            let old = old?;
            if old.file_type()?.is_dir() && old.file_name() != "tidegate" {
                fs::remove_dir_all(old.path())?;
            }
        }
        for (name, content) in &needed {
            let to = proto.join(name);
            fs::create_dir_all(to.parent().context("a .proto file without a directory")?)?;
            fs::write(&to, content).with_context(|| format!("write {}", to.display()))?;
        }
        println!("vendored {} .proto files", needed.len());
        Ok(())
    }

    /// One compiler per entry file. A compiler that sees all of them resolves `config.core.v3.X` inside
    /// `envoy.extensions` to the package `envoy.extensions.config`, once any file defines that package.
    fn compile(includes: &[PathBuf], entry: &str) -> Result<protox::Compiler> {
        let mut compiler = protox::Compiler::new(includes)?;
        compiler.include_imports(true).include_source_info(false);
        compiler.open_file(entry).with_context(|| format!("compile {entry}"))?;
        Ok(compiler)
    }

    /// Everything that belongs into `src/generated`, by file name.
    fn render(proto: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
        let includes = [proto.to_path_buf()];
        let mut pool = DescriptorPool::new();
        let mut typed = FileDescriptorSet::default();
        let mut seen = BTreeSet::new();
        for entry in TYPED {
            let compiler = compile(&includes, entry)?;
            pool.decode_file_descriptor_set(&compiler.encode_file_descriptor_set()[..])?;
            let files = compiler.file_descriptor_set().file;
            typed.file.extend(files.into_iter().filter(|file| seen.insert(file.name().to_owned())));
        }
        for entry in DESCRIPTORS_ONLY {
            pool.decode_file_descriptor_set(&compile(&includes, entry)?.encode_file_descriptor_set()[..])?;
        }

        let scratch = tempfile::tempdir()?;
        prost_build::Config::new()
            .btree_map(["."]) // equal messages encode to equal bytes: resources are compared by hash
            .enable_type_names()
            .type_name_domain(["."], TYPE_URL_DOMAIN)
            .disable_comments(["."]) // they are reStructuredText; the vendored .proto files keep them
            .out_dir(scratch.path())
            .include_file("mod.rs")
            .compile_fds(code_only(typed))?;

        let mut files = BTreeMap::new();
        for entry in fs::read_dir(scratch.path())? {
            let entry = entry?;
            let name = entry.file_name().into_string().ok().context("a file name that is not UTF-8")?;
            files.insert(name, fs::read(entry.path())?);
        }
        // Not from prost_types::FileDescriptorSet, which loses the extension options (validate.rules).
        files.insert("descriptors.bin".into(), pool.encode_to_vec());
        Ok(files)
    }

    /// Leaves out the files that hold nothing but option definitions: they are needed as descriptors only.
    fn code_only(mut set: FileDescriptorSet) -> FileDescriptorSet {
        set.file.retain(|file| {
            let package = file.package();
            let options_only = package.ends_with(".annotations")
                || package.ends_with(".annotations.v3")
                || package == "google.api";
            !options_only
        });
        set
    }

    fn write(out: &Path, files: &BTreeMap<String, Vec<u8>>) -> Result<()> {
        fs::create_dir_all(out)?;
        for stale in names(out)?.iter().filter(|name| !files.contains_key(*name)) {
            fs::remove_file(out.join(stale))?;
        }
        for (name, content) in files {
            fs::write(out.join(name), content)?;
        }
        println!("wrote {} files to {}", files.len(), out.display());
        Ok(())
    }

    fn compare(out: &Path, files: &BTreeMap<String, Vec<u8>>) -> Result<()> {
        let there = names(out)?;
        let differs: Vec<_> = files
            .iter()
            .filter(|(name, content)| fs::read(out.join(name)).ok().as_ref() != Some(*content))
            .map(|(name, _)| name)
            .chain(there.iter().filter(|name| !files.contains_key(*name)))
            .collect();
        if !differs.is_empty() {
            bail!(
                "not what the .proto files give: {differs:?}; run `cargo xtask gen-api` and commit the result"
            );
        }
        Ok(())
    }

    fn names(dir: &Path) -> Result<BTreeSet<String>> {
        fs::read_dir(dir)?
            .map(|entry| entry?.file_name().into_string().ok().context("a file name that is not UTF-8"))
            .collect()
    }
}
