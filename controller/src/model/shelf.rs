//! [`Shelf`]: an ordered map whose copies share what neither of them has changed.
//!
//! Every state that is published is a copy of the one before, and readers hold on to theirs. A copy of a [`Shelf`] costs a pointer
//! for each entry; an entry itself is copied when it is changed while another copy has it. So two states can also be compared by
//! what is shared: [`Shelf::changed`].
//!
//! Written as the map that it is.

use std::cmp::Ordering;
use std::collections::{BTreeMap, btree_map};
use std::iter::Map;
use std::ops::Index;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shelf<K, V>(BTreeMap<K, Arc<V>>);

impl<K, V> Default for Shelf<K, V> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<K: Ord, V> Shelf<K, V> {
    /// The entry of this key.
    pub fn get(&self, key: &K) -> Option<&V> {
        self.0.get(key).map(Arc::as_ref)
    }

    /// Is there an entry of this key?
    pub fn contains_key(&self, key: &K) -> bool {
        self.0.contains_key(key)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Is there none?
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All, by key.
    pub fn iter(&self) -> Iter<'_, K, V> {
        self.into_iter()
    }

    /// All keys, in order.
    pub fn keys(&self) -> impl DoubleEndedIterator<Item = &K> {
        self.0.keys()
    }

    /// All entries, by key.
    pub fn values(&self) -> impl DoubleEndedIterator<Item = &V> {
        self.0.values().map(Arc::as_ref)
    }

    /// Puts an entry in; what was there is gone.
    pub fn insert(&mut self, key: K, value: V) {
        self.0.insert(key, Arc::new(value));
    }

    /// Takes an entry out. Was there one?
    pub fn remove(&mut self, key: &K) -> bool {
        self.0.remove(key).is_some()
    }

    /// Keeps only these.
    pub fn retain(&mut self, keep: impl Fn(&K, &V) -> bool) {
        self.0.retain(|key, value| keep(key, value));
    }

    /// What is not the same in `before`: each entry as it was and as it is, without looking into what both share.
    pub fn changed<'a>(&'a self, before: &'a Self) -> Vec<Change<'a, K, V>> {
        let (mut old, mut new) = (before.0.iter().peekable(), self.0.iter().peekable());
        let mut changed = vec![];
        loop {
            let next = match (old.peek(), new.peek()) {
                (None, None) => return changed,
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some((was, _)), Some((is, _))) => was.cmp(is),
            };
            let was = if next.is_le() { old.next() } else { None };
            let is = if next.is_ge() { new.next() } else { None };
            match (was, is) {
                (Some((_, was)), Some((_, is))) if Arc::ptr_eq(was, is) => {}
                (was, is) => changed.push((was.map(shown), is.map(shown))),
            }
        }
    }
}

impl<K: Ord, V: Clone> Shelf<K, V> {
    /// The entry of this key, to be changed.
    pub fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        self.0.get_mut(key).map(Arc::make_mut)
    }

    /// Those that `wanted` says, to be changed.
    pub fn select_mut(&mut self, wanted: impl Fn(&V) -> bool) -> impl Iterator<Item = &mut V> {
        self.0.values_mut().filter(move |value| wanted(value)).map(Arc::make_mut)
    }
}

/// An entry as it was and as it is.
pub type Change<'a, K, V> = (Option<(&'a K, &'a V)>, Option<(&'a K, &'a V)>);

fn shown<'a, K, V>((key, value): (&'a K, &'a Arc<V>)) -> (&'a K, &'a V) {
    (key, value)
}

/// Of [`Shelf::iter`].
pub type Iter<'a, K, V> = Map<btree_map::Iter<'a, K, Arc<V>>, Shown<'a, K, V>>;
/// Looks through what is shared.
type Shown<'a, K, V> = fn((&'a K, &'a Arc<V>)) -> (&'a K, &'a V);

impl<K: Ord, V> Index<&K> for Shelf<K, V> {
    type Output = V;

    /// The entry of this key. Panics when there is none.
    fn index(&self, key: &K) -> &V {
        &self.0[key]
    }
}

impl<'a, K, V> IntoIterator for &'a Shelf<K, V> {
    type Item = (&'a K, &'a V);
    type IntoIter = Iter<'a, K, V>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter().map(shown as Shown<'a, K, V>)
    }
}

impl<K: Ord, V: Clone> IntoIterator for Shelf<K, V> {
    type Item = (K, V);
    type IntoIter = std::vec::IntoIter<(K, V)>;

    fn into_iter(self) -> Self::IntoIter {
        let all: Vec<_> = self.0.into_iter().map(|(key, value)| (key, Arc::unwrap_or_clone(value))).collect();
        all.into_iter()
    }
}

impl<K: Ord, V> FromIterator<(K, V)> for Shelf<K, V> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        Self(entries.into_iter().map(|(key, value)| (key, Arc::new(value))).collect())
    }
}

impl<K: Ord, V, const N: usize> From<[(K, V); N]> for Shelf<K, V> {
    fn from(entries: [(K, V); N]) -> Self {
        entries.into_iter().collect()
    }
}

impl<K: Serialize, V: Serialize> Serialize for Shelf<K, V> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self)
    }
}

impl<'de, K: Deserialize<'de> + Ord, V: Deserialize<'de>> Deserialize<'de> for Shelf<K, V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(BTreeMap::<K, V>::deserialize(deserializer)?.into_iter().collect())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_changed_alone_and_only_where_it_is_changed() {
        let before = Shelf::from([(1, "one".to_owned()), (2, "two".to_owned()), (3, "three".to_owned())]);
        let mut after = before.clone();
        assert_eq!(after.changed(&before), []);
        after.get_mut(&2).unwrap().push('!');
        after.remove(&1);
        after.insert(4, "four".to_owned());
        let [one, two, changed, four] = ["one", "two", "two!", "four"].map(str::to_owned);
        let expected = [(Some((&1, &one)), None), (Some((&2, &two)), Some((&2, &changed))), (None, Some((&4, &four)))];
        assert_eq!(after.changed(&before), expected);
        assert_eq!(before.get(&2), Some(&two));
        assert!(Arc::ptr_eq(&before.0[&3], &after.0[&3]), "what did not change is shared");
    }

    #[test]
    fn those_that_are_not_selected_stay_shared() {
        let before = Shelf::from([(1, 10), (2, 20)]);
        let mut after = before.clone();
        after.select_mut(|value| *value > 10).for_each(|value| *value += 1);
        assert_eq!(after.changed(&before), [(Some((&2, &20)), Some((&2, &21)))]);
    }

    #[test]
    fn it_is_written_and_read_as_a_map() {
        let shelf = Shelf::from([("a".to_owned(), 1), ("b".to_owned(), 2)]);
        let text = serde_json::to_string(&shelf).unwrap();
        assert_eq!(text, r#"{"a":1,"b":2}"#);
        assert_eq!(serde_json::from_str::<Shelf<String, i32>>(&text).unwrap(), shelf);
    }
}
