//! What many may use together of a pool.
//!
//! Each says what it has before it takes more; what it may not have it does not take. Guarantees: the sum does not grow beyond the bound, however many take
//! at a time. A bound that is lower than what is used already takes nothing from anybody.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pageport_proto::PoolName;

/// The sum over all.
#[derive(Debug)]
pub struct Quota<K> {
    pool: PoolName,
    limit_bytes: Option<u64>,
    used: Mutex<HashMap<K, u64>>,
}

/// Why more may not be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full {
    /// What all use, in bytes.
    pub used_bytes: u64,
    /// What they may, in bytes.
    pub limit_bytes: u64,
}

impl<K: Eq + Hash> Quota<K> {
    /// Of what is in use already; [`None`]: without a bound.
    pub fn new(pool: PoolName, limit_bytes: Option<u64>, used: HashMap<K, u64>) -> Self {
        Self { pool, limit_bytes, used: Mutex::new(used) }
    }

    /// What all use, in bytes.
    pub fn used_bytes(&self) -> u64 {
        sum(&self.lock())
    }

    /// This one uses nothing any more.
    pub fn forget(&self, key: &K) {
        self.lock().remove(key);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<K, u64>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn sum<K>(used: &HashMap<K, u64>) -> u64 {
    used.values().fold(0, |sum, bytes| sum.saturating_add(*bytes))
}

/// One's part in it.
#[derive(Debug, Clone)]
pub struct Share<K> {
    quota: Arc<Quota<K>>,
    key: K,
}

impl<K: Eq + Hash + Copy> Share<K> {
    /// Of this one.
    pub fn new(quota: Arc<Quota<K>>, key: K) -> Self {
        Self { quota, key }
    }

    /// Where there is no bound.
    pub fn unlimited(key: K) -> Self {
        Self::new(Arc::new(Quota::new(PoolName::default(), None, HashMap::new())), key)
    }

    /// Of which pool it is.
    pub fn pool(&self) -> &PoolName {
        &self.quota.pool
    }

    /// It has so much, in bytes.
    pub fn note(&self, bytes: u64) {
        self.quota.lock().insert(self.key, bytes);
    }

    /// It is to have so much, in bytes, and counts with that from now on.
    ///
    /// # Errors
    /// [`Full`]: it counts with what it had.
    pub fn take(&self, bytes: u64) -> Result<(), Full> {
        let mut used = self.quota.lock();
        let own = used.get(&self.key).copied().unwrap_or_default();
        let used_bytes = sum(&used);
        if let Some(limit_bytes) = self.quota.limit_bytes
            && bytes > own
            && (used_bytes - own).saturating_add(bytes) > limit_bytes
        {
            return Err(Full { used_bytes, limit_bytes });
        }
        used.insert(self.key, bytes);
        Ok(())
    }

    /// It has nothing any more.
    pub fn give_back(&self) {
        self.quota.forget(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_does_not_exceed_the_bound_and_what_is_given_back_can_be_taken() {
        let quota = Arc::new(Quota::new(PoolName::default(), Some(100), HashMap::from([(0, 40)])));
        let [one, other] = [1, 2].map(|key| Share::new(quota.clone(), key));
        one.take(50).unwrap();
        assert_eq!(other.take(11), Err(Full { used_bytes: 90, limit_bytes: 100 }));
        other.take(10).unwrap();
        assert_eq!(one.take(51), Err(Full { used_bytes: 100, limit_bytes: 100 }));
        assert_eq!(quota.used_bytes(), 100);
        one.note(20);
        other.take(40).unwrap();
        other.give_back();
        one.take(60).unwrap();
        quota.forget(&0);
        one.take(100).unwrap();
        assert!(one.take(101).is_err());
    }

    #[test]
    fn a_bound_that_was_lowered_takes_nothing_away() {
        let quota = Arc::new(Quota::new(PoolName::default(), Some(10), HashMap::from([(1, 40)])));
        let one = Share::new(quota, 1);
        one.take(40).unwrap();
        one.take(30).unwrap();
        assert_eq!(one.take(31), Err(Full { used_bytes: 30, limit_bytes: 10 }));
        Share::unlimited(1).take(u64::MAX).unwrap();
    }
}
