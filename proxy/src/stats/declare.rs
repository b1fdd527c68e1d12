//! The macro that declares a block of stats: its names, and a method for each that can change.

use super::block::{FIRST_CELL, Home, Kind, Stat};
use super::histogram;

/// Lists the stats of a block in the order of their names; done by the compiler.
pub(super) const fn sorted<const N: usize>(mut stats: [Stat; N]) -> [Stat; N] {
    let mut i = 1;
    while i < N {
        let mut j = i;
        while j > 0 && less(stats[j].name.as_bytes(), stats[j - 1].name.as_bytes()) {
            let swap = stats[j];
            stats[j] = stats[j - 1];
            stats[j - 1] = swap;
            j -= 1;
        }
        i += 1;
    }
    stats
}

const fn less(a: &[u8], b: &[u8]) -> bool {
    let mut i = 0;
    while i < a.len() && i < b.len() {
        if a[i] != b[i] {
            return a[i] < b[i];
        }
        i += 1;
    }
    a.len() < b.len()
}

/// The cell of the `n`th sharded gauge. Gauges come first, so that one word can note which were ever written.
pub(super) const fn gauge_cell(n: usize) -> u16 {
    (FIRST_CELL + n) as u16
}

/// The cell of the `n`th sharded counter.
pub(super) const fn counter_cell(gauges: usize, n: usize) -> u16 {
    assert!(gauges < 64, "one word notes which gauges were written");
    (FIRST_CELL + gauges + n) as u16
}

/// The first cell of the `n`th histogram.
pub(super) const fn histogram_cell(gauges: usize, counters: usize, n: usize) -> u16 {
    (FIRST_CELL + gauges + counters + n * histogram::CELLS) as u16
}

/// Cells in a shard.
pub(super) const fn shard_cells(gauges: usize, counters: usize, histograms: usize) -> usize {
    FIRST_CELL + gauges + counters + histograms * histogram::CELLS
}

pub(super) const fn stat(name: &'static str, kind: Kind, home: Home) -> Stat {
    Stat { name, kind, home }
}

/// Declares a block. Names that are no identifiers are given after `=`. `zero_*` are names that Envoy prints and
/// that can't change here.
macro_rules! stats_block {
    (
        $(#[$doc:meta])*
        $name:ident: $root:literal, label $label:literal, $(part $part:literal, label $part_label:literal,)?
            per_worker [$($worker:literal),*];
        counters { $($counter:ident $(= $counter_name:literal)?),* $(,)? }
        gauges { $($gauge:ident $(= $gauge_name:literal)?),* $(,)? }
        histograms { $($histogram:ident $(= $histogram_name:literal)?),* $(,)? }
        shared_counters { $($scounter:ident $(= $scounter_name:literal)?),* $(,)? }
        shared_gauges { $($sgauge:ident $(= $sgauge_name:literal)?),* $(,)? }
        zero_counters { $($zcounter:literal),* $(,)? }
        zero_gauges { $($zgauge:literal),* $(,)? }
        $(texts { $($text:ident $(= $text_name:literal)?),* $(,)? })?
    ) => {
        $(#[$doc])*
        ///
        /// A handle: cheap to clone. The stats exist, and are rendered, as long as somebody holds one (or a
        /// guard of a gauge).
        #[derive(Clone)]
        pub struct $name(std::sync::Arc<$crate::stats::block::Block>);

        const _: () = {
            use $crate::stats::block as b;
            use $crate::stats::declare as d;
            use b::{Home, Kind, Stat};

            #[allow(non_camel_case_types, clippy::upper_case_acronyms)]
            enum C { $($counter,)* LEN }
            #[allow(non_camel_case_types, clippy::upper_case_acronyms)]
            enum G { $($gauge,)* LEN }
            #[allow(non_camel_case_types, clippy::upper_case_acronyms)]
            enum H { $($histogram,)* LEN }
            #[allow(non_camel_case_types, clippy::upper_case_acronyms)]
            enum S { $($scounter,)* $($sgauge,)* LEN }
            #[allow(non_camel_case_types, clippy::upper_case_acronyms)]
            enum T { $($($text,)*)? LEN }

            const COUNTERS: usize = C::LEN as usize;
            const GAUGES: usize = G::LEN as usize;
            const HISTOGRAMS: usize = H::LEN as usize;
            const SHARED: usize = S::LEN as usize;
            const _: () = assert!(SHARED <= 64, "one word notes which shared cells were written");

            const ALL: &[Stat] = &d::sorted([
                $(d::stat($crate::stats::declare::name!($counter $($counter_name)?), Kind::Counter,
                    Home::Shard(d::counter_cell(GAUGES, C::$counter as usize))),)*
                $(d::stat($crate::stats::declare::name!($gauge $($gauge_name)?), Kind::Gauge,
                    Home::Shard(d::gauge_cell(G::$gauge as usize))),)*
                $(d::stat($crate::stats::declare::name!($histogram $($histogram_name)?), Kind::Histogram,
                    Home::Shard(d::histogram_cell(GAUGES, COUNTERS, H::$histogram as usize))),)*
                $(d::stat($crate::stats::declare::name!($scounter $($scounter_name)?), Kind::Counter,
                    Home::Shared(S::$scounter as u16)),)*
                $(d::stat($crate::stats::declare::name!($sgauge $($sgauge_name)?), Kind::Gauge,
                    Home::Shared(S::$sgauge as u16)),)*
                $(d::stat($zcounter, Kind::Counter, Home::Zero),)*
                $(d::stat($zgauge, Kind::Gauge, Home::Zero),)*
            ]);

            static LAYOUT: b::Layout = b::Layout {
                root: $root,
                label: $label,
                part: $crate::stats::declare::part!($($part, $part_label)?),
                stats: ALL,
                shard_cells: d::shard_cells(GAUGES, COUNTERS, HISTOGRAMS),
                shared_cells: SHARED,
                per_worker: &[$($worker),*],
                texts: &[$($($crate::stats::declare::name!($text $($text_name)?)),*)?],
            };
            const _: () = assert!(LAYOUT.texts.len() == T::LEN as usize);

            impl std::fmt::Debug for $name {
                fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                    write!(f, "{}({})", stringify!($name), self.0.name())
                }
            }

            #[allow(dead_code)]
            impl $name {
                pub(in $crate::stats) const LAYOUT: &'static b::Layout = &LAYOUT;

                pub(in $crate::stats) fn from_block(block: std::sync::Arc<b::Block>) -> Self {
                    Self(block)
                }

                /// The storage, for rendering and for generic readers.
                pub fn block(&self) -> &std::sync::Arc<b::Block> {
                    &self.0
                }

                /// The name of the scope, for example of the cluster.
                pub fn name(&self) -> &str {
                    self.0.name()
                }

                $(#[doc = concat!("The counter `", $crate::stats::declare::name!($counter $($counter_name)?), "`.")]
                pub fn $counter(&self) -> b::Counter<'_> {
                    b::Counter { block: &self.0, cell: d::counter_cell(GAUGES, C::$counter as usize) }
                })*
                $(#[doc = concat!("The gauge `", $crate::stats::declare::name!($gauge $($gauge_name)?), "`.")]
                pub fn $gauge(&self) -> b::Gauge<'_> {
                    b::Gauge { block: &self.0, cell: d::gauge_cell(G::$gauge as usize) }
                })*
                $(#[doc = concat!("The histogram `", $crate::stats::declare::name!($histogram $($histogram_name)?), "`.")]
                pub fn $histogram(&self) -> $crate::stats::Histogram<'_> {
                    let cell = d::histogram_cell(GAUGES, COUNTERS, H::$histogram as usize);
                    $crate::stats::Histogram { block: &self.0, cell }
                })*
                $(#[doc = concat!("The counter `", $crate::stats::declare::name!($scounter $($scounter_name)?), "`.")]
                pub fn $scounter(&self) -> b::SharedCounter<'_> {
                    b::SharedCounter { block: &self.0, cell: S::$scounter as u16 }
                })*
                $(#[doc = concat!("The gauge `", $crate::stats::declare::name!($sgauge $($sgauge_name)?), "`.")]
                pub fn $sgauge(&self) -> b::SharedGauge<'_> {
                    b::SharedGauge { block: &self.0, cell: S::$sgauge as u16 }
                })*
                $($(#[doc = concat!("The text `", $crate::stats::declare::name!($text $($text_name)?), "`.")]
                pub fn $text(&self) -> b::Text<'_> {
                    b::Text { block: &self.0, index: T::$text as usize }
                })*)?
            }
        };
    };
}

/// The dotted name of a stat: what was given after `=`, else the identifier.
macro_rules! name {
    ($ident:ident) => {
        stringify!($ident)
    };
    ($ident:ident $name:literal) => {
        $name
    };
}

/// What stands in the middle of the scopes' names, and its label.
macro_rules! part {
    () => {
        None
    };
    ($part:literal, $label:literal) => {
        Some(($part, $label))
    };
}

pub(super) use {name, part, stats_block};
