//! A response as a whole: what is in it, and what its sender is told.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::SystemTime;

use prost::{Message, Name};
use tidegate_api::{cluster, endpoint, listener, route, tls};

use crate::config::dynamic::{self, Valid};
use crate::config::error::{ConfigError, Problem};
use crate::config::proto;
use crate::xds::tables::{Held, Refused};
use crate::xds::{Kind, MAX_ERROR_DETAIL, Resource, Unreadable, Verdict};

/// Messages that are resources.
pub(super) trait Named: Message + Name + Default {
    /// Number of the field that has their name.
    const NAME_FIELD: u32;
    /// What they call themselves.
    fn name(&self) -> &str;
}

macro_rules! named {
    ($($message:ty: $field:ident = $number:literal;)+) => {
        $(impl Named for $message {
            const NAME_FIELD: u32 = $number;
            fn name(&self) -> &str {
                &self.$field
            }
        })+
    };
}
named! {
    cluster::Cluster: name = 1;
    endpoint::ClusterLoadAssignment: cluster_name = 1;
    listener::Listener: name = 1;
    route::RouteConfiguration: name = 1;
    route::VirtualHost: name = 1;
    tls::Secret: name = 1;
}

/// A resource that follows the rules of the API.
pub(super) struct Checked<M> {
    pub(super) name: Arc<str>,
    /// The name in the wrapper, by which delta servers know it.
    pub(super) wrapper_name: Option<Arc<str>>,
    pub(super) message: Decoded<M>,
    pub(super) held: Held,
    /// Of JSON and YAML.
    pub(super) unknown_fields: Vec<String>,
}

/// The message of a resource.
pub(super) enum Decoded<M> {
    /// There is something to say of it.
    Now(Valid<M>),
    /// It follows every rule. Decoded when it is applied: as messages, a large response takes many times its size.
    Later,
}

impl<M: Named> Decoded<M> {
    /// Fields that nobody knows here.
    pub(super) fn unknown_fields(&self) -> &[Problem] {
        match self {
            Self::Now(valid) => &valid.unknown_fields,
            Self::Later => &[],
        }
    }

    /// The message, of this resource.
    pub(super) fn get(self, held: &Held, label: &Arc<str>) -> Result<Valid<M>, ConfigError> {
        match self {
            Self::Now(valid) => Ok(valid),
            Self::Later => dynamic::decode(&held.body, label),
        }
    }
}

/// The resources of a response, as far as they could be read.
pub(super) struct Contents<M> {
    /// New, or changed.
    pub(super) checked: Vec<Checked<M>>,
    /// Names of those that are byte for byte what was accepted last.
    pub(super) unchanged: Vec<Arc<str>>,
}

impl<M> Default for Contents<M> {
    fn default() -> Self {
        Self { checked: Vec::new(), unchanged: Vec::new() }
    }
}

/// What is wrong with a response.
#[derive(Debug, Default)]
pub(super) struct Rejections {
    /// Wrapper name (or name) and reason.
    refused: Vec<(Arc<str>, String)>,
    nothing_applied: bool,
}

impl Rejections {
    /// Refuses one resource.
    pub(super) fn refuse(&mut self, name: Arc<str>, reason: impl Into<String>) {
        self.refused.push((name, reason.into()));
    }

    /// Refuses everything.
    fn all(mut self) -> Self {
        self.nothing_applied = true;
        self
    }

    /// What goes back. The words are Envoy's.
    pub(super) fn verdict(self, kind: Kind) -> Verdict {
        if self.refused.is_empty() {
            return Verdict::Accept;
        }
        let lines: Vec<_> = self.refused.iter().map(|(name, reason)| format!("{name}: {reason}")).collect();
        let mut message = match kind {
            Kind::Listener => format!("Error adding/updating listener(s) {}", lines.join("\n")),
            Kind::Cluster => format!("Error adding/updating cluster(s) {}", lines.join("\n")),
            _ => lines.join("\n"),
        };
        if message.len() > MAX_ERROR_DETAIL {
            let end = (0..=MAX_ERROR_DETAIL - 3).rev().find(|at| message.is_char_boundary(*at)).unwrap_or(0);
            message.truncate(end);
            message.push_str("...");
        }
        let rejected = if self.nothing_applied {
            Vec::new()
        } else {
            self.refused.into_iter().map(|(name, _)| name).collect()
        };
        Verdict::Reject { message, rejected, nothing_applied: self.nothing_applied }
    }

    /// Those that were refused, with what to show.
    pub(super) fn refused(&self) -> impl Iterator<Item = (&Arc<str>, &str)> {
        self.refused.iter().map(|(name, reason)| (name, reason.as_str()))
    }

    /// Whether the whole response was thrown away.
    pub(super) fn are_all(&self) -> bool {
        self.nothing_applied
    }

    /// Whether this resource was refused, or all of them.
    pub(super) fn concern(&self, name: &str) -> bool {
        self.nothing_applied || self.refused.iter().any(|(refused, _)| **refused == *name)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.refused.is_empty()
    }
}

/// Checks the resources of a response by the rules of the API. One that breaks them, or is there twice, spoils them
/// all, as in Envoy. Those that could not be read from text only spoil themselves. `is_known` says of a name and a body
/// whether they are what was accepted last: such a resource is not looked at again. `stale`: they come from the cache on
/// disk.
pub(super) fn check<M: Named>(
    kind: Kind,
    version: &str,
    resources: Vec<Resource>,
    unreadable: Vec<Unreadable>,
    is_known: impl Fn(&str, &[u8]) -> bool,
    stale: bool,
) -> Result<(Contents<M>, Rejections), Rejections> {
    let mut rejections = Rejections::default();
    for Unreadable { name, error } in unreadable {
        rejections.refuse(name.unwrap_or_else(|| "?".into()), error);
    }
    let mut contents = Contents { checked: Vec::with_capacity(resources.len()), unchanged: Vec::new() };
    let mut seen = HashSet::new();
    let of_all = Arc::<str>::from(version);
    let mut spoilt = Rejections::default();
    for resource in resources {
        let Resource { name: wrapper_name, version: own, body, unknown_fields } = resource;
        if let Some(name) = proto::string_field(&body.value, M::NAME_FIELD)
            && wrapper_name.as_deref().is_none_or(|wrapper| wrapper == name)
            && is_known(name, &body.value)
        {
            let name = Arc::<str>::from(name);
            if seen.insert(Arc::clone(&name)) {
                contents.unchanged.push(name);
                continue;
            }
        }
        let message = if proto::holds::<M>(&body.value) {
            Decoded::Later
        } else {
            let label = label(kind, wrapper_name.as_deref().unwrap_or("(unnamed)"));
            match dynamic::check::<M>(&body, &label) {
                Ok(valid) => Decoded::Now(valid),
                Err(error) => {
                    spoilt.refuse(wrapper_name.unwrap_or_else(|| name_of::<M>(&body.value)), reason(&error));
                    continue;
                }
            }
        };
        let own_name = match &message {
            Decoded::Now(valid) => valid.message.name(),
            Decoded::Later => proto::string_field(&body.value, M::NAME_FIELD).unwrap_or_default(),
        };
        let name: Arc<str> = match own_name {
            // Listeners may go without a name; their address is it then.
            "" => wrapper_name.clone().unwrap_or_default(),
            name => name.into(),
        };
        // A delta server would otherwise remove one name and we keep another for ever.
        if let Some(wrapper) = &wrapper_name
            && !wrapper.is_empty()
            && kind != Kind::VirtualHost
            && **wrapper != *name
        {
            spoilt.refuse(Arc::clone(wrapper), format!("the resource inside is named {name:?}"));
            continue;
        }
        let unique = if kind == Kind::VirtualHost {
            wrapper_name.clone().unwrap_or_default()
        } else {
            Arc::clone(&name)
        };
        if !unique.is_empty() && !seen.insert(unique) {
            spoilt.refuse(Arc::clone(&name), "duplicate resource: the name is there twice in one response");
            continue;
        }
        let version = if own.is_empty() { Arc::clone(&of_all) } else { own.into() };
        let held = Held { version, body: body.value.into(), at: SystemTime::now(), stale };
        contents.checked.push(Checked { name, wrapper_name, message, held, unknown_fields });
    }
    if spoilt.is_empty() { Ok((contents, rejections)) } else { Err(spoilt.all()) }
}

/// What stands where a file's name would in messages about a resource.
pub(super) fn label(kind: Kind, name: &str) -> Arc<str> {
    format!("{} {name}", kind.service()).into()
}

/// The name of a resource that may break rules, as far as it can be decoded.
fn name_of<M: Named>(body: &[u8]) -> Arc<str> {
    M::decode(body).map_or_else(|_| "(undecodable)".into(), |message| message.name().into())
}

/// For `/config_dump`.
pub(super) fn refused(version: &Arc<str>, details: &str, body: &Arc<[u8]>) -> Refused {
    Refused {
        version: Arc::clone(version),
        details: details.to_owned(),
        body: Arc::clone(body),
        at: SystemTime::now(),
    }
}

/// Says what was accepted but is not acted on.
pub(super) fn log_warnings(name: &str, warnings: &[Problem]) {
    for warning in warnings {
        tracing::warn!(target: "tidegate::config", resource = name, "{warning}");
    }
}

/// The problems of one resource, without its name before each.
pub(super) fn reason(error: &ConfigError) -> String {
    let line = |problem: &Problem| match problem.path.as_str() {
        "" => problem.reason.to_string(),
        path => format!("{path}: {}", problem.reason),
    };
    error.problems().iter().map(line).collect::<Vec<_>>().join("; ")
}

/// What the store would say of resources by themselves, for fuzzing: no socket is opened, no log written.
#[cfg(test)]
pub(crate) fn judge(
    kind: Kind,
    version: &str,
    resources: Vec<Resource>,
    unreadable: Vec<Unreadable>,
) -> Verdict {
    use dynamic::Converted;
    fn each<M: Named, T>(
        (kind, version): (Kind, &str),
        (resources, unreadable): (Vec<Resource>, Vec<Unreadable>),
        convert: impl Fn(Valid<M>, &Arc<str>) -> Result<Option<Converted<T>>, ConfigError>,
    ) -> Verdict {
        let rejections = match check::<M>(kind, version, resources, unreadable, |_, _| false, false) {
            Err(rejections) => rejections,
            Ok((contents, mut rejections)) => {
                for Checked { name, message, held, .. } in contents.checked {
                    let label = label(kind, &name);
                    let converted = message.get(&held, &label).and_then(|valid| convert(valid, &label));
                    if let Err(error) = converted {
                        rejections.refuse(name, reason(&error));
                    }
                }
                rejections
            }
        };
        rejections.verdict(kind)
    }
    let (about, what) = ((kind, version), (resources, unreadable));
    match kind {
        Kind::Cluster => each::<cluster::Cluster, _>(about, what, |valid, label| {
            dynamic::cluster(valid, None, label).map(Some)
        }),
        Kind::Listener => each::<listener::Listener, _>(about, what, |valid, label| {
            let runtime = crate::config::runtime::Runtime::default();
            let around =
                dynamic::Surroundings { is_cluster: &|_| true, has_pipes: &|_| false, runtime: &runtime };
            dynamic::listener(valid, label, &around).map(Some)
        }),
        Kind::ClusterLoadAssignment => {
            each::<endpoint::ClusterLoadAssignment, ()>(about, what, |_, _| Ok(None))
        }
        Kind::RouteConfiguration => each::<route::RouteConfiguration, ()>(about, what, |_, _| Ok(None)),
        Kind::VirtualHost => each::<route::VirtualHost, ()>(about, what, |_, _| Ok(None)),
        Kind::Secret => {
            each::<tls::Secret, _>(about, what, |valid, label| dynamic::secret(valid, label).map(Some))
        }
    }
}
