//! What replication and seeds may send to a site, and what a move may: a cap on bits per second, shared by all that it bounds, changeable
//! while they run.
//!
//! A token bucket that may go into debt: a message goes out whole once the debt of those before it is paid, so messages larger than
//! the bucket are no special case.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

/// How much may be sent at once after a silence, as time at the full rate.
const BURST: Duration = Duration::from_millis(100);

/// The caps of this worker, by site.
#[derive(Debug, Default)]
pub struct Caps {
    by_site: Mutex<HashMap<String, Arc<Cap>>>,
}

impl Caps {
    /// What goes to this site.
    pub fn towards(&self, site: &str) -> Arc<Cap> {
        let mut by_site = self.by_site.lock().unwrap_or_else(PoisonError::into_inner);
        by_site.entry(site.to_owned()).or_insert_with(|| Arc::new(Cap::none())).clone()
    }
}

/// One cap.
#[derive(Debug)]
pub struct Cap {
    bits_per_s: watch::Sender<u64>,
    account: Mutex<Account>,
}

#[derive(Debug)]
struct Account {
    /// Below zero: a debt.
    bits: f64,
    at: Instant,
}

impl Cap {
    /// No cap.
    pub fn none() -> Self {
        let account = Mutex::new(Account { bits: 0.0, at: Instant::now() });
        Self { bits_per_s: watch::Sender::new(0), account }
    }

    /// From now on; 0: no cap.
    pub fn set(&self, bits_per_s: u64) {
        self.bits_per_s.send_if_modified(|held| std::mem::replace(held, bits_per_s) != bits_per_s);
    }

    /// Waits until so many bytes may be sent.
    pub async fn take(&self, bytes: u64) {
        let mut rate = self.bits_per_s.subscribe();
        loop {
            let bits_per_s = *rate.borrow_and_update();
            let paid =
                self.account.lock().unwrap_or_else(PoisonError::into_inner).pay(bytes, bits_per_s, Instant::now());
            let Some(wait) = paid else { return };
            // A new rate is looked at at once: a wait under a low one could be long.
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                _ = rate.changed() => {}
            }
        }
    }
}

impl Account {
    /// Pays, or says how long to wait before that is possible.
    fn pay(&mut self, bytes: u64, bits_per_s: u64, now: Instant) -> Option<Duration> {
        let rate = bits_per_s as f64;
        let earned = now.duration_since(self.at).as_secs_f64() * rate;
        self.at = now;
        if bits_per_s == 0 {
            self.bits = 0.0;
            return None;
        }
        self.bits = (self.bits + earned).min(rate * BURST.as_secs_f64());
        if self.bits < 0.0 {
            return Some(Duration::from_secs_f64(-self.bits / rate));
        }
        self.bits -= bytes as f64 * 8.0;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends pieces one after the other; returns when the last may go.
    fn send(account: &mut Account, pieces: usize, bytes: u64, bits_per_s: u64, mut now: Instant) -> Instant {
        for _ in 0..pieces {
            while let Some(wait) = account.pay(bytes, bits_per_s, now) {
                // What is rounded down would be waited for for ever.
                now += wait.max(Duration::from_nanos(1));
            }
        }
        now
    }

    #[test]
    fn what_is_taken_keeps_to_the_rate_and_no_rate_takes_no_time() {
        let began = Instant::now();
        let mut account = Account { bits: 0.0, at: began };
        assert_eq!(send(&mut account, 1000, 1 << 20, 0, began), began);
        // 5 MB at 1 MB/s; the last piece goes into debt.
        let took = send(&mut account, 50, 100_000, 8_000_000, began) - began;
        assert!((Duration::from_millis(4899)..=Duration::from_millis(4901)).contains(&took), "{took:?}");
    }

    #[test]
    fn a_silence_earns_a_tenth_of_a_second_and_no_more() {
        let began = Instant::now();
        let mut account = Account { bits: 0.0, at: began };
        let later = began + Duration::from_secs(3600);
        let took = send(&mut account, 31, 100_000, 8_000_000, later) - later;
        assert!((Duration::from_millis(2899)..=Duration::from_millis(2901)).contains(&took), "{took:?}");
    }

    #[tokio::test]
    async fn who_waits_under_a_low_rate_goes_on_when_it_is_raised() {
        let cap = Arc::new(Cap::none());
        cap.set(8);
        cap.take(1_000_000).await;
        let waits = tokio::spawn({
            let cap = cap.clone();
            async move { cap.take(1).await }
        });
        tokio::task::yield_now().await;
        assert!(!waits.is_finished());
        cap.set(0);
        tokio::time::timeout(Duration::from_secs(60), waits).await.unwrap().unwrap();
    }
}
