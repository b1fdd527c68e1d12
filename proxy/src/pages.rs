//! Numbered values in pages: a table that grows without moving what is in it.
//!
//! For what every connection has. A growing `Vec` would copy megabytes in the middle of accepting, and leave as much free
//! memory behind that nobody has a use for.

use std::ops::{Index, IndexMut};

/// Values per page: some kilobytes of them.
const PAGE: usize = 128;

/// Numbered values. Numbers begin at 0; the number of a value that was removed goes to another one.
#[derive(Debug)]
pub struct Pages<T> {
    pages: Vec<Box<[Option<T>]>>,
    /// Numbers that were ever in use are below it.
    used: u32,
    /// Those of them that are not in use.
    free: Vec<u32>,
}

impl<T> Default for Pages<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Pages<T> {
    /// Without a page.
    pub const fn new() -> Self {
        Self { pages: Vec::new(), used: 0, free: Vec::new() }
    }

    /// Adds a value.
    ///
    /// # Panics
    /// With `u32::MAX` values: no machine has so many.
    pub fn insert(&mut self, value: T) -> u32 {
        let key = self.free.pop().unwrap_or_else(|| {
            assert_ne!(self.used, u32::MAX, "fewer values than that");
            self.used += 1;
            self.used - 1
        });
        let (page, place) = split(key);
        if page == self.pages.len() {
            self.pages.push((0..PAGE).map(|_| None).collect());
        }
        self.pages[page][place] = Some(value);
        key
    }

    /// Takes a value out, if there is one of this number.
    pub fn try_remove(&mut self, key: u32) -> Option<T> {
        let (page, place) = split(key);
        let value = self.pages.get_mut(page)?[place].take()?;
        self.free.push(key);
        Some(value)
    }

    /// Takes a value out.
    ///
    /// # Panics
    /// Without a value of this number.
    pub fn remove(&mut self, key: u32) -> T {
        self.try_remove(key).expect("a value of this number")
    }

    /// A value, if there is one of this number.
    pub fn get_mut(&mut self, key: u32) -> Option<&mut T> {
        let (page, place) = split(key);
        self.pages.get_mut(page)?[place].as_mut()
    }

    /// All values, by number.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.pages.iter().flatten().flatten()
    }

    /// All values, by number.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.pages.iter_mut().flatten().flatten()
    }

    /// How many values there are.
    pub fn len(&self) -> usize {
        self.used as usize - self.free.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<T> Index<u32> for Pages<T> {
    type Output = T;

    fn index(&self, key: u32) -> &T {
        let (page, place) = split(key);
        self.pages[page][place].as_ref().expect("a value of this number")
    }
}

impl<T> IndexMut<u32> for Pages<T> {
    fn index_mut(&mut self, key: u32) -> &mut T {
        self.get_mut(key).expect("a value of this number")
    }
}

/// The page, and the place in it.
fn split(key: u32) -> (usize, usize) {
    (key as usize / PAGE, key as usize % PAGE)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn values_stay_where_they_are() {
        let mut pages = Pages::new();
        let first = pages.insert(0);
        let before = std::ptr::from_ref(&pages[first]);
        let keys: Vec<_> = (1..10 * PAGE as u32).map(|value| pages.insert(value)).collect();
        assert!(std::ptr::eq(before, &raw const pages[first]));
        assert!(keys.iter().all(|key| pages[*key] == *key));
        assert_eq!(pages.pages.len(), 10);
    }

    proptest! {
        #[test]
        fn it_is_a_map(steps in prop::collection::vec((0_u32..4, 0_u32..400), 0..1000)) {
            let (mut pages, mut map) = (Pages::new(), BTreeMap::new());
            for (number, (step, key)) in steps.into_iter().enumerate() {
                if step == 0 {
                    prop_assert_eq!(pages.try_remove(key), map.remove(&key));
                } else {
                    let key = pages.insert(number);
                    prop_assert_eq!(map.insert(key, number), None);
                }
                prop_assert_eq!(pages.get_mut(key).copied(), map.get(&key).copied());
            }
            prop_assert_eq!(pages.len(), map.len());
            prop_assert!(pages.iter().eq(map.values()));
        }
    }
}
