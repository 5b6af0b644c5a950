//! What has changed since a watcher was told last: so that one stream can carry everything without saying it all each time.
//!
//! Guarantees: whoever applies every message in order knows what the controller knew; the first message is everything, even
//! when that is nothing. Does not compare what was never told.

use std::collections::BTreeMap;

use pageport_proto::v1;

use super::watch::View;

/// What one watcher has been told of all migrations.
#[derive(Debug, Default)]
pub struct Changes {
    told: Option<BTreeMap<String, v1::Migration>>,
}

impl Changes {
    /// What to tell next, given all that there is, by id.
    pub fn next(&mut self, now: impl Iterator<Item = (String, v1::Migration)>) -> View<v1::WatchMigrationsResponse> {
        let now: BTreeMap<_, _> = now.collect();
        let first = self.told.is_none();
        let before = self.told.get_or_insert_default();
        let changed = now.iter().filter(|(id, migration)| before.get(*id) != Some(migration));
        let response = v1::WatchMigrationsResponse {
            migrations: changed.map(|(_, migration)| migration.clone()).collect(),
            forgotten_ids: before.keys().filter(|id| !now.contains_key(*id)).cloned().collect(),
        };
        *before = now;
        if !first && response == v1::WatchMigrationsResponse::default() { View::Nothing } else { View::Show(response) }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// What is new or different, and what is forgotten.
    type Told = (Vec<(String, u64)>, Vec<String>);

    fn told(changes: &mut Changes, now: &[(&str, u64)]) -> Option<Told> {
        let migration = |id: &str, epoch| v1::Migration { id: id.to_owned(), epoch, ..v1::Migration::default() };
        match changes.next(now.iter().map(|(id, epoch)| ((*id).to_owned(), migration(id, *epoch)))) {
            View::Show(v1::WatchMigrationsResponse { migrations, forgotten_ids }) => {
                let migrations = migrations.into_iter().map(|migration| (migration.id, migration.epoch));
                Some((migrations.collect(), forgotten_ids))
            }
            View::Nothing => None,
            View::Last(_) | View::End => panic!("it does not end by itself"),
        }
    }

    #[test]
    fn everything_is_told_once_and_then_what_changes() {
        let mut changes = Changes::default();
        let one = |id: &str, epoch| (id.to_owned(), epoch);
        assert_eq!(told(&mut changes, &[]), Some((vec![], vec![])));
        assert_eq!(told(&mut changes, &[]), None);
        assert_eq!(told(&mut changes, &[("a", 1), ("b", 1)]), Some((vec![one("a", 1), one("b", 1)], vec![])));
        assert_eq!(told(&mut changes, &[("a", 1), ("b", 2)]), Some((vec![one("b", 2)], vec![])));
        assert_eq!(told(&mut changes, &[("a", 1), ("b", 2)]), None);
        assert_eq!(told(&mut changes, &[("b", 2), ("c", 1)]), Some((vec![one("c", 1)], vec!["a".to_owned()])));
    }
}
