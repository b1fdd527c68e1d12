//! From a field path back to the place in the text.

use std::sync::Arc;

use super::path::{self, FieldPath, ParsedStep};
use super::tree::{NodeId, Tree, Value};
use crate::config::error::{Mark, Problem, Reason};

/// The texts behind a message, for errors that are found after it was parsed. It keeps the parsed texts, and
/// so costs nothing per field.
#[derive(Debug, Default)]
pub struct SourceMap {
    /// Merged in this order: a later one overrides fields and appends elements.
    layers: Vec<Layer>,
}

#[derive(Debug)]
struct Layer {
    file: Arc<str>,
    tree: Tree,
}

impl SourceMap {
    /// The map of a message that did not come as text; `name` stands where the file name would.
    pub fn unplaced(name: Arc<str>) -> Self {
        Self::new(name, Tree::default())
    }

    /// The map of one text.
    pub(super) fn new(file: Arc<str>, tree: Tree) -> Self {
        Self { layers: vec![Layer { file, tree }] }
    }

    /// Appends the layers of a text that was merged over this one.
    pub(super) fn merge(&mut self, later: Self) {
        self.layers.extend(later.layers);
    }

    /// Name and tree of the first layer.
    pub(super) fn first(&self) -> Option<(&Arc<str>, &Tree)> {
        self.layers.first().map(|layer| (&layer.file, &layer.tree))
    }

    /// Where this path is in the text: the place of its value, or else of the nearest thing around it.
    pub fn place(&self, path: &str) -> Option<(Arc<str>, Mark)> {
        let mut here: Vec<(&Layer, NodeId)> =
            self.layers.iter().filter_map(|layer| Some((layer, layer.tree.root()?))).collect();
        // Of the layers that have a place, the last one has overridden the others.
        let mut found = here.last().copied()?;
        for step in path::parse(path) {
            here = match step {
                ParsedStep::Field(name) => here
                    .iter()
                    .filter_map(|(layer, id)| Some((*layer, field(&layer.tree, *id, &name)?)))
                    .collect(),
                ParsedStep::Key(key) => here
                    .iter()
                    .filter_map(|(layer, id)| Some((*layer, entry(&layer.tree, *id, &key)?)))
                    .collect(),
                ParsedStep::Index(index) => element(&here, index).into_iter().collect(),
            };
            match here.last() {
                Some(last) => found = *last,
                None => break,
            }
        }
        let (layer, id) = found;
        Some((layer.file.clone(), layer.tree.node(id).mark))
    }

    /// A problem at this path.
    pub fn problem(&self, path: &FieldPath<'_>, reason: Reason) -> Problem {
        let path = path.to_string();
        let (file, at) = match self.place(&path) {
            Some((file, mark)) => (file, Some(mark)),
            None => (self.first().map_or_else(|| "configuration".into(), |(file, _)| file.clone()), None),
        };
        Problem { file, at: at.filter(|mark| mark.line > 0), path, reason }
    }
}

fn field(tree: &Tree, id: NodeId, name: &str) -> Option<NodeId> {
    let by_either_spelling = |id: NodeId| {
        let Value::Map(entries) = &tree.node(id).value else { return None };
        let same = |key: &str| key == name || is_json_name_of(key, name);
        entries.iter().rev().find(|entry| same(&entry.key)).map(|entry| entry.value)
    };
    // Inside `Any`, a well-known type or the content of a TypedStruct is one step further in.
    by_either_spelling(id).or_else(|| by_either_spelling(entry(tree, id, "value")?))
}

fn entry(tree: &Tree, id: NodeId, key: &str) -> Option<NodeId> {
    let Value::Map(entries) = &tree.node(id).value else { return None };
    entries.iter().rev().find(|entry| &*entry.key == key).map(|entry| entry.value)
}

/// Elements are counted through the layers; a single value in place of a list is its only element.
fn element<'a>(here: &[(&'a Layer, NodeId)], mut index: usize) -> Option<(&'a Layer, NodeId)> {
    for (layer, id) in here {
        match &layer.tree.node(*id).value {
            Value::List(items) if index < items.len() => return Some((*layer, items[index])),
            Value::List(items) => index -= items.len(),
            Value::Null => {}
            _ if index == 0 => return Some((*layer, *id)),
            _ => index -= 1,
        }
    }
    None
}

/// Whether `key` is the lowerCamelCase spelling of the proto name.
fn is_json_name_of(key: &str, name: &str) -> bool {
    let mut key = key.chars();
    let mut upper = false;
    for c in name.chars() {
        if c == '_' {
            upper = true;
            continue;
        }
        let expected = if upper { c.to_ascii_uppercase() } else { c };
        upper = false;
        if key.next() != Some(expected) {
            return false;
        }
    }
    key.next().is_none()
}

/// Collects what is wrong while a parsed message is given its meaning: each problem gets the line of its
/// field.
#[derive(Debug)]
pub struct Diagnostics<'s> {
    source: &'s SourceMap,
    problems: Vec<Problem>,
    warnings: Vec<Problem>,
}

impl<'s> Diagnostics<'s> {
    /// Nothing is wrong yet.
    pub fn new(source: &'s SourceMap) -> Self {
        Self { source, problems: Vec::new(), warnings: Vec::new() }
    }

    /// The configuration must be refused for this.
    pub fn error(&mut self, path: &FieldPath<'_>, reason: Reason) {
        self.problems.push(self.source.problem(path, reason));
    }

    /// The configuration contradicts itself: [`Reason::Invalid`].
    pub fn invalid(&mut self, path: &FieldPath<'_>, message: impl Into<String>) {
        self.error(path, Reason::Invalid(message.into()));
    }

    /// The configuration is accepted, but not all of it does what it says.
    pub fn warn(&mut self, path: &FieldPath<'_>, reason: Reason) {
        self.warnings.push(self.source.problem(path, reason));
    }

    /// Whether [`Diagnostics::error`] was called.
    pub fn has_errors(&self) -> bool {
        !self.problems.is_empty()
    }

    /// The warnings; or every problem, when there are any.
    pub fn finish(self) -> Result<Vec<Problem>, crate::config::error::ConfigError> {
        crate::config::error::ConfigError::from_problems(self.problems).map_or(Ok(self.warnings), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::super::yaml;
    use super::*;

    fn map(file: &str, text: &str) -> SourceMap {
        SourceMap::new(file.into(), yaml::parse(text).unwrap().tree)
    }

    #[test]
    fn finds_both_spellings_keys_elements_and_what_is_around() {
        let map = map(
            "a.yaml",
            "static_resources:\n  listeners:\n  - name: l\n    filterChains:\n    - filters:\n      - typedConfig:\n          '@type': x\n          \
             value:\n            statPrefix: s\nmetadata:\n  a.b:\n    c: d\n",
        );
        let line = |path| map.place(path).unwrap().1.line;
        assert_eq!(line("static_resources.listeners[0].name"), 3);
        assert_eq!(
            line("static_resources.listeners[0].filter_chains[0].filters[0].typed_config.stat_prefix"),
            9
        );
        assert_eq!(line("static_resources.listeners[0].filter_chains[0].filters[0].typed_config.missing"), 7);
        assert_eq!(line("metadata[\"a.b\"].c"), 12);
        assert_eq!(line("nowhere"), 1);
        assert_eq!(line(""), 1);
    }

    #[test]
    fn later_layers_override_and_append() {
        let mut merged = map("a.yaml", "x: 1\nlist: [1, 2]\n");
        merged.merge(map("b", "\nlist:\n- 3\nx: 2\n"));
        let place = |path| merged.place(path).map(|(file, mark)| (file.to_string(), mark.line)).unwrap();
        assert_eq!(place("x"), ("b".to_owned(), 4));
        assert_eq!(place("list[1]"), ("a.yaml".to_owned(), 2));
        assert_eq!(place("list[2]"), ("b".to_owned(), 3));
        assert_eq!(place("list[9]"), ("b".to_owned(), 3));
    }

    #[test]
    fn diagnostics_carry_the_line() {
        let map = map("a.yaml", "name: l\naddress:\n  x: y\n");
        let mut diagnostics = Diagnostics::new(&map);
        let root = FieldPath::ROOT;
        diagnostics.warn(&root.field("name"), Reason::Unsupported("not active".into()));
        assert!(!diagnostics.has_errors());
        diagnostics.invalid(&root.field("address"), "needs a socket_address");
        assert_eq!(
            diagnostics.finish().unwrap_err().to_string(),
            "a.yaml:3: address: needs a socket_address"
        );
    }
}
