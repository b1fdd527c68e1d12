/// Defines [`Reason`] together with its table, so that a reason can't lack a label.
macro_rules! reasons {
    ($( $(#[doc = $doc:literal])+ $name:ident = $label:literal $(, errno $errno:literal)?; )+) => {
        /// What happened to a connection. Index of the counters map, and a metric label.
        ///
        /// Every path through the programs that ends a decision counts exactly one of these.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Reason { $( $(#[doc = $doc])+ $name, )+ }

        impl Reason {
            /// All of them, by index.
            pub const ALL: &'static [Self] = &[ $( Self::$name, )+ ];

            /// Stable name, for metrics.
            pub const fn label(self) -> &'static str {
                match self { $( Self::$name => $label, )+ }
            }

            /// What connect(2) fails with (a positive errno); 0 for a reason that refuses nothing. Kernels before
            /// 5.18 can only say EPERM.
            #[inline(always)]
            pub const fn errno(self) -> i32 {
                match self { $( Self::$name => reasons!(@errno $($errno)?), )+ }
            }
        }
    };
    (@errno) => { 0 };
    (@errno $errno:literal) => { $errno };
}

reasons! {
    // --- connect4/6
    /// Destination rewritten to the capture listener.
    Captured = "captured";
    /// Not TCP.
    PassedNotTcp = "passed_not_tcp";
    /// Port 0: the kernel refuses these itself.
    PassedPortZero = "passed_port_zero";
    /// No rule names the destination and there is no catch-all, or the rule says to leave it.
    PassedNoRule = "passed_no_rule";
    /// The agent's own upstream socket.
    PassedOwnSocket = "passed_own_socket";
    /// Loopback or unspecified destination that no exact rule names.
    PassedLoopback = "passed_loopback";
    /// IPv6 link-local destination that no exact rule names: its scope would be lost on the way.
    PassedLinkLocal = "passed_link_local";
    /// The pod's own address, and no exact rule names it.
    PassedOwnAddress = "passed_own_address";
    /// Straight to the capture listener: never rewritten onto itself. The proxy resets it.
    PassedCaptureListener = "passed_capture_listener";
    /// The namespace is enrolled as excluded.
    PassedExcluded = "passed_excluded";
    /// The rule says to refuse. ECONNREFUSED.
    RefusedByRule = "refused_by_rule", errno 111;
    /// The namespace is not enrolled, fail mode open.
    NotEnrolledPassed = "not_enrolled_passed";
    /// The namespace is not enrolled, fail mode closed. EHOSTUNREACH.
    NotEnrolledRefused = "not_enrolled_refused", errno 113;
    /// The socket is bound to an interface, so replies over `lo` can't reach it; fail mode open.
    BoundToDevicePassed = "bound_to_device_passed";
    /// The same, fail mode closed. ENETUNREACH.
    BoundToDeviceRefused = "bound_to_device_refused", errno 101;
    /// No capture listener of tidegate waits in the namespace: the process that enrolled it was killed. Fail mode open.
    ListenerGonePassed = "listener_gone_passed";
    /// The same, fail mode closed. ENETDOWN.
    ListenerGoneRefused = "listener_gone_refused", errno 100;
    /// No memory for the socket's storage, fail mode open.
    StorageFailedPassed = "storage_failed_passed";
    /// The same, fail mode closed. ENOBUFS.
    StorageFailedRefused = "storage_failed_refused", errno 105;
    // --- connect4/6, kernel path
    /// Destination rewritten to an endpoint.
    Balanced = "balanced";
    /// The cluster has no usable host (UH). EHOSTUNREACH.
    NoHost = "no_host", errno 113;
    /// The cluster's circuit breaker is open (UO). ECONNREFUSED.
    Overflow = "overflow", errno 111;
    /// The service has no table, or a broken one; fail mode open.
    NoTablePassed = "no_table_passed";
    /// The same, fail mode closed. EHOSTUNREACH.
    NoTableRefused = "no_table_refused", errno 113;
    /// A connection that ended was not reported, because the ring buffer was full. Its counters are right.
    FlowEventLost = "flow_event_lost";
    // --- events
    /// A namespace was announced to the agent.
    Announced = "announced";
    /// An announcement was lost because the ring buffer was full (the next connect announces again).
    AnnouncementLost = "announcement_lost";
    // --- sockops
    /// The SYN carries the original destination.
    InSyn = "in_syn";
    /// The in-flight map carries it: there is no room in the SYN, or the namespace keeps none.
    InFlight = "in_flight";
    /// The in-flight map is full. Too late to refuse: the proxy resets the connection (`no_original_destination`).
    InFlightFull = "in_flight_full";
    /// The accepted socket has it.
    HandedOver = "handed_over";
    /// A connection to a capture listener that no captured connect belongs to. The proxy resets it.
    NoOriginalDestination = "no_original_destination";
    /// No memory for the accepted socket's storage. The proxy resets it.
    AcceptedStorageFailed = "accepted_storage_failed";
    /// The application's socket closed before the handshake was over (refused, timed out, aborted). Only those in the
    /// in-flight map are counted.
    HandshakeAbandoned = "handshake_abandoned";
}

impl Reason {
    /// How many there are.
    pub const COUNT: usize = Self::ALL.len();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indexes_and_labels_are_unique() {
        for (i, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, i);
            assert!(Reason::ALL[..i].iter().all(|other| other.label() != reason.label()));
        }
    }

    #[test]
    fn refusals_and_only_they_have_an_errno() {
        let refusals = [
            (Reason::RefusedByRule, 111),
            (Reason::NotEnrolledRefused, 113),
            (Reason::BoundToDeviceRefused, 101),
            (Reason::ListenerGoneRefused, 100),
            (Reason::StorageFailedRefused, 105),
            (Reason::NoHost, 113),
            (Reason::Overflow, 111),
            (Reason::NoTableRefused, 113),
        ];
        for reason in Reason::ALL {
            let errno = refusals.iter().find(|(refusal, _)| refusal == reason).map_or(0, |(_, errno)| *errno);
            assert_eq!(reason.errno(), errno, "{reason:?}");
        }
    }
}
