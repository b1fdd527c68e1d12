//! What is compared, by subject.

mod bytes;
mod ending;
mod lifecycle;
mod option;
mod pressure;
mod reader;

use super::trial::Property;

/// Everything that is compared: subject, properties.
pub(super) const ALL: &[(&str, &[Property])] = &[
    ("bytes", bytes::ALL),
    ("endings", ending::ALL),
    ("backpressure", pressure::ALL),
    ("options", option::ALL),
    ("readers and writers", reader::ALL),
    ("life of the programs and processes", lifecycle::ALL),
];
