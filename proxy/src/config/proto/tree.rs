//! The parsed text before it has a type: nodes with their line and column.

use std::collections::HashMap;

use crate::config::error::Mark;

/// Deepest nesting of lists and mappings. Protobuf itself stops at 100 messages; a list between two
/// messages counts here too.
pub(super) const MAX_DEPTH: u32 = 200;

/// Most nodes that aliases may add. Ten lines of aliases to aliases can stand for billions of nodes; a
/// configuration of a thousand listeners that share an access log stays far below.
const MAX_ALIASED_NODES: u64 = 1_000_000;

/// A parsed document. An alias shares the node of its anchor.
#[derive(Debug, Default)]
pub(super) struct Tree {
    nodes: Vec<Node>,
    root: Option<NodeId>,
}

/// Index of a node in its [`Tree`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NodeId(u32);

/// One value.
#[derive(Debug)]
pub(super) struct Node {
    /// Where it starts.
    pub(super) mark: Mark,
    /// What it is.
    pub(super) value: Value,
    /// 1 for a scalar, one more than the deepest child for a collection.
    depth: u32,
    /// Nodes below and including this one, with every alias counted in full.
    weight: u64,
}

/// The value of a node. Numbers keep their digits, since only the field says what to make of them.
#[derive(Debug)]
pub(super) enum Value {
    Null,
    Bool(bool),
    Number(Box<str>),
    String(Box<str>),
    List(Vec<NodeId>),
    Map(Vec<Entry>),
}

/// A key and its value.
#[derive(Debug)]
pub(super) struct Entry {
    /// The text of the key, whatever its type.
    pub(super) key: Box<str>,
    /// Where the key starts.
    pub(super) mark: Mark,
    /// The value.
    pub(super) value: NodeId,
}

impl Value {
    /// For messages: `the number 5`, `a list`, …
    pub(super) fn describe(&self) -> String {
        match self {
            Self::Null => "null".into(),
            Self::Bool(value) => format!("the boolean {value}"),
            Self::Number(digits) => format!("the number {digits}"),
            Self::String(text) => format!("the string {}", crate::config::error::quoted(text)),
            Self::List(_) => "a list".into(),
            Self::Map(_) => "a mapping".into(),
        }
    }
}

impl Tree {
    /// The outermost node; none for an empty document.
    pub(super) fn root(&self) -> Option<NodeId> {
        self.root
    }

    /// The node behind an id of this tree.
    pub(super) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0 as usize]
    }

    /// Adds a scalar.
    pub(super) fn scalar(&mut self, mark: Mark, value: Value) -> NodeId {
        self.push(Node { mark, value, depth: 1, weight: 1 })
    }

    /// Adds a collection whose children are in the tree already.
    pub(super) fn collection(&mut self, mark: Mark, value: Value) -> Result<NodeId, &'static str> {
        let (mut depth, mut weight) = (0, 1_u64);
        let mut child = |id: NodeId| {
            let node = &self.nodes[id.0 as usize];
            depth = depth.max(node.depth);
            weight = weight.saturating_add(node.weight);
        };
        match &value {
            Value::List(items) => items.iter().copied().for_each(&mut child),
            Value::Map(entries) => entries.iter().map(|entry| entry.value).for_each(&mut child),
            _ => {}
        }
        if depth >= MAX_DEPTH {
            return Err("nested too deep: more than 200 lists and mappings inside each other");
        }
        if weight > self.nodes.len() as u64 + MAX_ALIASED_NODES {
            return Err("too large: with its aliases written out it has a million more values");
        }
        Ok(self.push(Node { mark, value, depth: depth + 1, weight }))
    }

    /// Makes a node the outermost one.
    pub(super) fn set_root(&mut self, root: NodeId) {
        self.root = Some(root);
    }

    fn push(&mut self, node: Node) -> NodeId {
        let id = NodeId(u32::try_from(self.nodes.len()).expect("a source text is shorter than 4 GiB"));
        self.nodes.push(node);
        id
    }
}

/// The entries that count: of equal keys the last one, as in Envoy. The others are given to `superseded`.
pub(super) fn last_of_each<'a>(
    entries: &'a [Entry],
    mut superseded: impl FnMut(&'a Entry),
) -> impl Iterator<Item = &'a Entry> {
    // Nearly every mapping is small, so that comparing is cheaper than hashing.
    let by_key: Option<HashMap<&str, usize>> = (entries.len() > 16)
        .then(|| entries.iter().enumerate().map(|(index, entry)| (&*entry.key, index)).collect());
    entries.iter().enumerate().filter_map(move |(index, entry)| {
        let last = match &by_key {
            Some(last) => last.get(&*entry.key) == Some(&index),
            None => !entries[index + 1..].iter().any(|later| later.key == entry.key),
        };
        if !last {
            superseded(entry);
        }
        last.then_some(entry)
    })
}

/// Builds a [`Tree`] from a stream of events, without recursion.
#[derive(Default)]
pub(super) struct Builder {
    tree: Tree,
    open: Vec<Open>,
}

struct Open {
    mark: Mark,
    anchor: usize,
    content: OpenContent,
}

enum OpenContent {
    List(Vec<NodeId>),
    Map(Vec<Entry>, Option<(Box<str>, Mark)>),
}

impl Builder {
    /// Whether the next node is a key.
    pub(super) fn wants_key(&self) -> bool {
        matches!(self.open.last(), Some(Open { content: OpenContent::Map(_, None), .. }))
    }

    /// The tree under construction, for look-ups of finished nodes.
    pub(super) fn tree(&self) -> &Tree {
        &self.tree
    }

    /// How many collections are open.
    pub(super) fn open_collections(&self) -> usize {
        self.open.len()
    }

    /// The key of the next node. Only after [`Builder::wants_key`].
    pub(super) fn key(&mut self, text: Box<str>, mark: Mark) {
        if let Some(Open { content: OpenContent::Map(_, key), .. }) = self.open.last_mut() {
            *key = Some((text, mark));
        }
    }

    /// A scalar value.
    pub(super) fn scalar(&mut self, mark: Mark, value: Value) -> NodeId {
        let id = self.tree.scalar(mark, value);
        self.place(id);
        id
    }

    /// A list starts.
    pub(super) fn start_list(&mut self, mark: Mark, anchor: usize) -> Result<(), &'static str> {
        self.start(Open { mark, anchor, content: OpenContent::List(Vec::new()) })
    }

    /// A mapping starts.
    pub(super) fn start_map(&mut self, mark: Mark, anchor: usize) -> Result<(), &'static str> {
        self.start(Open { mark, anchor, content: OpenContent::Map(Vec::new(), None) })
    }

    fn start(&mut self, open: Open) -> Result<(), &'static str> {
        if self.open.len() >= MAX_DEPTH as usize {
            return Err("nested too deep: more than 200 lists and mappings inside each other");
        }
        self.open.push(open);
        Ok(())
    }

    /// The innermost collection ends. Gives its node and its anchor (0: none).
    pub(super) fn end(&mut self) -> Result<Option<(NodeId, usize)>, &'static str> {
        let Some(open) = self.open.pop() else { return Ok(None) };
        let value = match open.content {
            OpenContent::List(items) => Value::List(items),
            OpenContent::Map(entries, _) => Value::Map(entries),
        };
        let id = self.tree.collection(open.mark, value)?;
        self.place(id);
        Ok(Some((id, open.anchor)))
    }

    /// Puts a finished node (or, for an alias, an earlier one) where the text has it.
    pub(super) fn place(&mut self, id: NodeId) {
        match self.open.last_mut() {
            None => self.tree.set_root(id),
            Some(Open { content: OpenContent::List(items), .. }) => items.push(id),
            Some(Open { content: OpenContent::Map(entries, key), .. }) => {
                if let Some((key, mark)) = key.take() {
                    entries.push(Entry { key, mark, value: id });
                }
            }
        }
    }

    /// The finished tree.
    pub(super) fn finish(self) -> Tree {
        self.tree
    }
}
