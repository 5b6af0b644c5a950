//! [`World`]: chance, clocks and facts, shared by all actors of one schedule.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use pageport_keeper::BootTime;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::time::Instant;

use crate::executor::{Executor, Until};
use crate::invariant::{Fact, Invariants};
use crate::network::Network;

/// What can be changed about a world, to see that the invariants notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Flaw {
    /// None: the product as it is.
    #[default]
    None,
    /// Keepers never fire.
    DeafKeeper,
    /// The leader counts leases shorter than workers do.
    ShortLease,
    /// A worker's records are not on stable storage when it says so.
    LazyRecord,
    /// A controller's log is not on stable storage when it says so.
    LazyLog,
    /// A source sends its release before it has written it.
    EarlyRelease,
}

/// See the module.
#[allow(missing_debug_implementations, reason = "it holds the executor")]
pub struct World {
    /// Tasks and time.
    pub executor: Executor,
    /// Messages.
    pub network: Network,
    /// What is wrong with it on purpose.
    pub flaw: Flaw,
    chance: RefCell<StdRng>,
    zero: Instant,
    facts: RefCell<Invariants>,
    numbers: Cell<u64>,
    /// While it is set, seams may crash.
    pub unsafe_times: Cell<bool>,
}

impl World {
    /// A world from a seed, with so many endpoints on its network.
    pub fn new(seed: u64, flaw: Flaw, endpoints: usize, invariants: Invariants) -> Rc<Self> {
        let executor = Executor::default();
        Rc::new(Self {
            network: Network::new(endpoints),
            executor,
            flaw,
            chance: RefCell::new(StdRng::seed_from_u64(seed)),
            zero: Instant::now(),
            facts: RefCell::new(invariants),
            numbers: Cell::new(0),
            unsafe_times: Cell::new(false),
        })
    }

    /// A number from `low` to `high`, both included.
    pub fn between(&self, low: u64, high: u64) -> u64 {
        self.chance.borrow_mut().random_range(low..=high)
    }

    /// True once in `n` times.
    pub fn one_in(&self, n: u64) -> bool {
        self.between(1, n) == 1
    }

    /// One of them.
    pub fn pick<'a, T>(&self, from: &'a [T]) -> Option<&'a T> {
        let last = from.len().checked_sub(1)?;
        from.get(self.between(0, last as u64) as usize)
    }

    /// A number that was not used before.
    pub fn number(&self) -> u64 {
        self.numbers.set(self.numbers.get() + 1);
        self.numbers.get()
    }

    /// Tells the invariants.
    pub fn tell(&self, fact: &Fact<'_>) {
        self.facts.borrow_mut().see(self.executor.now_us(), fact);
    }

    /// What became of the invariants.
    pub fn invariants(&self) -> std::cell::RefMut<'_, Invariants> {
        self.facts.borrow_mut()
    }
}

/// A clock that runs a little fast or slow, and began somewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clock {
    /// Too fast by so many millionths.
    pub ppm: i64,
    /// What it showed when the world began, in microseconds.
    pub began_us: u64,
}

const MILLION: i128 = 1_000_000;

impl Clock {
    /// The world's own.
    pub const WORLD: Self = Self { ppm: 0, began_us: 0 };

    /// What it shows, in microseconds.
    pub fn us(self, world: &World) -> u64 {
        let elapsed = i128::from(world.executor.now_us());
        self.began_us + (elapsed + elapsed * i128::from(self.ppm) / MILLION) as u64
    }

    /// The same as a moment.
    pub fn instant(self, world: &World) -> Instant {
        world.zero + Duration::from_micros(self.us(world))
    }

    /// The same as time since boot.
    pub fn boot_time(self, world: &World) -> BootTime {
        BootTime::from_nanos(self.us(world) * 1000)
    }

    /// When it will show `local_us`, in the world's time.
    pub fn when_us(self, local_us: u64) -> u64 {
        let elapsed = i128::from(local_us.saturating_sub(self.began_us));
        (elapsed * MILLION).div_euclid(MILLION + i128::from(self.ppm)) as u64 + 1
    }

    /// Waits, by this clock.
    pub fn sleep(self, world: &World, duration: Duration) -> Until {
        let until_us = self.us(world) + duration.as_micros() as u64;
        world.executor.until(self.when_us(until_us))
    }
}
