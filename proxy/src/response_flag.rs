//! Envoy's response flags: why a connection ended the way it did.

/// A set of response flags. They accumulate over connect attempts and are never cleared, as in Envoy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ResponseFlags(u32);

/// One flag; `short` and `long` names are Envoy's (`%RESPONSE_FLAGS%`, `%RESPONSE_FLAGS_LONG%`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ResponseFlag {
    /// LH: a local health check failed (HTTP only).
    FailedLocalHealthCheck,
    /// UH: the cluster has no healthy upstream endpoint.
    NoHealthyUpstream,
    /// UT: upstream request timeout (HTTP only).
    UpstreamRequestTimeout,
    /// LR: local reset (HTTP only).
    LocalReset,
    /// UR: the upstream reset the connection.
    UpstreamRemoteReset,
    /// UF: connecting to the upstream failed.
    UpstreamConnectionFailure,
    /// UC: the upstream ended the connection (HTTP only).
    UpstreamConnectionTermination,
    /// UO: a circuit breaker was full.
    UpstreamOverflow,
    /// NR: no listener or filter chain matched.
    NoRouteFound,
    /// DI: a fault filter delayed (HTTP only).
    DelayInjected,
    /// FI: a fault filter aborted (HTTP only).
    FaultInjected,
    /// RL: rate limited.
    RateLimited,
    /// UAEX: external authorization refused.
    UnauthorizedExternalService,
    /// RLSE: the rate limit service failed.
    RateLimitServiceError,
    /// DC: the downstream ended the connection (HTTP only).
    DownstreamConnectionTermination,
    /// URX: connect attempts are exhausted.
    UpstreamRetryLimitExceeded,
    /// SI: stream idle timeout (HTTP only).
    StreamIdleTimeout,
    /// IH: invalid request headers (HTTP only).
    InvalidEnvoyRequestHeaders,
    /// DPE: downstream protocol error (HTTP only).
    DownstreamProtocolError,
    /// UMSDR: maximum stream duration reached upstream (HTTP only).
    UpstreamMaxStreamDurationReached,
    /// RFCF: response from the cache (HTTP only).
    ResponseFromCacheFilter,
    /// NFCF: no filter configuration.
    NoFilterConfigFound,
    /// DT: the maximum connection duration was reached.
    DurationTimeout,
    /// UPE: upstream protocol error (HTTP only).
    UpstreamProtocolError,
    /// NC: the cluster does not exist.
    NoClusterFound,
    /// OM: the overload manager ended it.
    OverloadManager,
    /// DF: DNS resolution failed.
    DnsResolutionFailed,
    /// DO: load was shed.
    DropOverLoad,
    /// DR: the downstream reset the connection.
    DownstreamRemoteReset,
    /// UDO: load was shed without a condition.
    UnconditionalDropOverload,
}

impl ResponseFlag {
    /// Every flag, in Envoy's print order.
    pub const ALL: [(ResponseFlag, &'static str, &'static str); 30] = {
        use ResponseFlag as F;
        [
            (F::FailedLocalHealthCheck, "LH", "FailedLocalHealthCheck"),
            (F::NoHealthyUpstream, "UH", "NoHealthyUpstream"),
            (F::UpstreamRequestTimeout, "UT", "UpstreamRequestTimeout"),
            (F::LocalReset, "LR", "LocalReset"),
            (F::UpstreamRemoteReset, "UR", "UpstreamRemoteReset"),
            (F::UpstreamConnectionFailure, "UF", "UpstreamConnectionFailure"),
            (F::UpstreamConnectionTermination, "UC", "UpstreamConnectionTermination"),
            (F::UpstreamOverflow, "UO", "UpstreamOverflow"),
            (F::NoRouteFound, "NR", "NoRouteFound"),
            (F::DelayInjected, "DI", "DelayInjected"),
            (F::FaultInjected, "FI", "FaultInjected"),
            (F::RateLimited, "RL", "RateLimited"),
            (F::UnauthorizedExternalService, "UAEX", "UnauthorizedExternalService"),
            (F::RateLimitServiceError, "RLSE", "RateLimitServiceError"),
            (F::DownstreamConnectionTermination, "DC", "DownstreamConnectionTermination"),
            (F::UpstreamRetryLimitExceeded, "URX", "UpstreamRetryLimitExceeded"),
            (F::StreamIdleTimeout, "SI", "StreamIdleTimeout"),
            (F::InvalidEnvoyRequestHeaders, "IH", "InvalidEnvoyRequestHeaders"),
            (F::DownstreamProtocolError, "DPE", "DownstreamProtocolError"),
            (F::UpstreamMaxStreamDurationReached, "UMSDR", "UpstreamMaxStreamDurationReached"),
            (F::ResponseFromCacheFilter, "RFCF", "ResponseFromCacheFilter"),
            (F::NoFilterConfigFound, "NFCF", "NoFilterConfigFound"),
            (F::DurationTimeout, "DT", "DurationTimeout"),
            (F::UpstreamProtocolError, "UPE", "UpstreamProtocolError"),
            (F::NoClusterFound, "NC", "NoClusterFound"),
            (F::OverloadManager, "OM", "OverloadManagerTerminated"),
            (F::DnsResolutionFailed, "DF", "DnsResolutionFailed"),
            (F::DropOverLoad, "DO", "DropOverload"),
            (F::DownstreamRemoteReset, "DR", "DownstreamRemoteReset"),
            (F::UnconditionalDropOverload, "UDO", "UnconditionalDropOverload"),
        ]
    };

    /// The flag with this short name, as `response_flag_filter` spells it.
    pub fn from_short(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, short, _)| *short == name).map(|(flag, _, _)| *flag)
    }
}

impl ResponseFlags {
    /// Adds a flag.
    pub fn set(&mut self, flag: ResponseFlag) {
        self.0 |= 1 << flag as u32;
    }

    /// Whether the flag is set.
    pub fn has(self, flag: ResponseFlag) -> bool {
        self.0 & (1 << flag as u32) != 0
    }

    /// Whether no flag is set (printed as `-`).
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether the sets share a flag.
    pub fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// The flags that are set, in Envoy's print order.
    pub fn iter(self) -> impl Iterator<Item = (ResponseFlag, &'static str, &'static str)> {
        ResponseFlag::ALL.into_iter().filter(move |(flag, _, _)| self.has(*flag))
    }
}

impl FromIterator<ResponseFlag> for ResponseFlags {
    fn from_iter<I: IntoIterator<Item = ResponseFlag>>(flags: I) -> Self {
        let mut set = Self::default();
        flags.into_iter().for_each(|flag| set.set(flag));
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flag_is_found_by_its_short_name() {
        for (flag, short, _) in ResponseFlag::ALL {
            assert_eq!(ResponseFlag::from_short(short), Some(flag));
        }
        assert_eq!(ResponseFlag::from_short("XX"), None);
    }

    #[test]
    fn flags_print_in_envoys_order() {
        let set: ResponseFlags =
            [ResponseFlag::UpstreamRetryLimitExceeded, ResponseFlag::UpstreamConnectionFailure]
                .into_iter()
                .collect();
        assert_eq!(set.iter().map(|(_, short, _)| short).collect::<Vec<_>>(), ["UF", "URX"]);
    }
}
