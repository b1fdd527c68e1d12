//! `envoy.config.core.v3.ConfigSource`: where a kind of resource comes from.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// A place to subscribe to. Equal sources are one source: they share a stream.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// The one ADS stream of `dynamic_resources.ads_config`.
    Ads,
    /// `api_config_source`.
    Api(Arc<ApiSource>),
    /// `path_config_source`: a file with a DiscoveryResponse.
    Path(Arc<PathSource>),
}

/// `ConfigSource`, with every default applied.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ConfigSource {
    /// From where.
    pub source: Source,
    /// Start-up and warming go on without the resource after so long. `None`: they wait for ever (`0s`). Envoy's
    /// default is 15 s.
    pub initial_fetch_timeout: Option<Duration>,
}

/// `ApiConfigSource`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ApiSource {
    /// How the server is spoken to.
    pub protocol: Protocol,
    /// Name of the cluster through which the server is reached.
    pub cluster: Arc<str>,
    /// `:authority` of gRPC calls; none: the cluster's name.
    pub authority: Option<Arc<str>>,
    /// Added to each gRPC call.
    pub initial_metadata: Vec<(String, String)>,
    /// The node goes out with the first request of a stream only.
    pub set_node_on_first_message_only: bool,
    /// Limits requests on a stream; none: unlimited but for rejections, which are always limited.
    pub rate_limit: Option<RateLimit>,
    /// REST only: shortest time between polls.
    pub refresh_delay: Duration,
    /// REST only. Default 1 s.
    pub request_timeout: Duration,
}

/// `api_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// JSON over HTTP/1.1, polled.
    Rest,
    /// One stream of one kind of resource, state of the world.
    Grpc,
    /// One stream of one kind of resource, incremental.
    DeltaGrpc,
    /// The ADS stream, state of the world.
    AggregatedGrpc,
    /// The ADS stream, incremental.
    AggregatedDeltaGrpc,
}

/// `rate_limit_settings`: a token bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RateLimit {
    /// Size of the bucket. Default 100.
    pub max_tokens: u32,
    /// Tokens a second, in thousandths. Default 10,000 (10 a second).
    pub fill_rate_milli: u64,
}

/// `PathConfigSource`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PathSource {
    /// The file.
    pub path: PathBuf,
    /// The directory whose changes count; none: the file's own, for renames onto the file.
    pub watched_directory: Option<PathBuf>,
}
