//! Many indexes of few things.

/// A list of indexes, as narrow as they allow: a table of Maglev has 65,537 of them for what are usually a few hosts.
#[derive(Debug)]
pub enum Indexes {
    /// Of at most 256 things.
    Bytes(Box<[u8]>),
    /// Of at most 65,536.
    Shorts(Box<[u16]>),
    /// Of more.
    Words(Box<[u32]>),
}

impl Indexes {
    /// `indexes` are below `of`.
    pub(super) fn new(indexes: &[u32], of: usize) -> Self {
        match of {
            0..=0x100 => Self::Bytes(indexes.iter().map(|index| *index as u8).collect()),
            0x101..=0x1_0000 => Self::Shorts(indexes.iter().map(|index| *index as u16).collect()),
            _ => Self::Words(indexes.into()),
        }
    }

    /// The index at a place. `None`: there is no such place.
    pub fn at(&self, place: usize) -> Option<usize> {
        match self {
            Self::Bytes(indexes) => indexes.get(place).map(|index| usize::from(*index)),
            Self::Shorts(indexes) => indexes.get(place).map(|index| usize::from(*index)),
            Self::Words(indexes) => indexes.get(place).map(|index| *index as usize),
        }
    }

    /// Whether there is no place.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many places there are.
    pub fn len(&self) -> usize {
        match self {
            Self::Bytes(indexes) => indexes.len(),
            Self::Shorts(indexes) => indexes.len(),
            Self::Words(indexes) => indexes.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_index_of_each_width_survives() {
        for of in [1, 256, 257, 65_536, 65_537] {
            let last = of as u32 - 1;
            let indexes = Indexes::new(&[0, last], of);
            assert_eq!((indexes.at(0), indexes.at(1), indexes.at(2)), (Some(0), Some(of - 1), None), "{of}");
        }
    }
}
