//! The network between endpoints: datagrams that get lost and come twice, and pipes that keep their order until they break.
//!
//! Endpoints are numbered: controllers first, then hosts. A direction between two of them can be cut. A pipe notices a cut (or a
//! peer that is gone, behind a cut) only after [`IDLE_US`].

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;

use tokio::sync::mpsc;

use crate::world::World;

/// A pipe over which nothing comes is given up after this.
const IDLE_US: u64 = 3_000_000;

/// A place on the network.
pub type Endpoint = usize;

/// See the module.
#[derive(Debug)]
pub struct Network {
    endpoints: usize,
    cut: RefCell<BTreeSet<(Endpoint, Endpoint)>>,
    /// One datagram in so many is lost, and one comes twice.
    pub loss_one_in: Cell<u64>,
}

impl Network {
    /// Whole.
    pub fn new(endpoints: usize) -> Self {
        Self { endpoints, cut: RefCell::default(), loss_one_in: Cell::new(u64::MAX) }
    }

    /// Cuts one direction.
    pub fn cut(&self, from: Endpoint, to: Endpoint) {
        self.cut.borrow_mut().insert((from, to));
    }

    /// Makes it whole.
    pub fn heal(&self) {
        self.cut.borrow_mut().clear();
    }

    /// All endpoints.
    pub fn endpoints(&self) -> std::ops::Range<Endpoint> {
        0..self.endpoints
    }

    /// Nothing gets through.
    pub fn is_cut(&self, from: Endpoint, to: Endpoint) -> bool {
        self.cut.borrow().contains(&(from, to))
    }
}

impl World {
    fn delay_us(&self) -> u64 {
        if self.one_in(50) { self.between(50_000, 400_000) } else { self.between(500, 25_000) }
    }

    /// Something that may get lost, come twice, or overtake another. Says nothing of its fate.
    pub fn datagram(&self, from: Endpoint, to: Endpoint, deliver: impl Fn() + 'static) {
        if self.network.is_cut(from, to) {
            return;
        }
        let deliver = Rc::new(deliver);
        let loss = self.network.loss_one_in.get();
        let copies = match self.between(1, loss.max(2)) {
            1 if loss != u64::MAX => 0,
            2 if loss != u64::MAX => 2,
            _ => 1,
        };
        for _ in 0..copies {
            let deliver = deliver.clone();
            self.executor.at(self.executor.now_us() + self.delay_us(), move || deliver());
        }
    }

    /// A pipe between two endpoints, its two ends.
    pub fn pipe<A: 'static, B: 'static>(self: &Rc<Self>, a: Endpoint, b: Endpoint) -> (End<A, B>, End<B, A>) {
        let (to_b, from_a) = mpsc::unbounded_channel();
        let (to_a, from_b) = mpsc::unbounded_channel();
        let (to_b, to_a) = (Line::new(a, b, to_b), Line::new(b, a, to_a));
        let near = End { world: self.clone(), out: to_b.clone(), back: Rc::new(to_a.clone()), inbox: from_b };
        let far = End { world: self.clone(), out: to_a, back: Rc::new(to_b), inbox: from_a };
        (near, far)
    }
}

/// One direction of a pipe; empty when it is broken.
#[derive(Debug)]
struct Line<T> {
    from: Endpoint,
    to: Endpoint,
    queue: Rc<RefCell<Option<mpsc::UnboundedSender<T>>>>,
    last_us: Rc<Cell<u64>>,
}

impl<T> Clone for Line<T> {
    fn clone(&self) -> Self {
        Self { from: self.from, to: self.to, queue: self.queue.clone(), last_us: self.last_us.clone() }
    }
}

impl<T: 'static> Line<T> {
    fn new(from: Endpoint, to: Endpoint, queue: mpsc::UnboundedSender<T>) -> Self {
        Self { from, to, queue: Rc::new(RefCell::new(Some(queue))), last_us: Rc::default() }
    }

    fn at_us(&self, world: &World) -> u64 {
        let at_us = (world.executor.now_us() + world.delay_us()).max(self.last_us.get() + 1);
        self.last_us.set(at_us);
        at_us
    }
}

/// What can be broken without knowing what it carries.
trait Break {
    /// The reader learns that nothing comes any more, after what is under way, or after a while behind a cut.
    fn break_off(&self, world: &World);
}

impl<T: 'static> Break for Line<T> {
    fn break_off(&self, world: &World) {
        let at_us = match world.network.is_cut(self.from, self.to) {
            true => world.executor.now_us() + IDLE_US,
            false => self.at_us(world),
        };
        let queue = self.queue.clone();
        world.executor.at(at_us, move || drop(queue.take()));
    }
}

/// One end of a pipe: `Out` goes out, `In` comes in. Dropping it ends the pipe.
#[allow(missing_debug_implementations, reason = "as the world")]
pub struct End<Out: 'static, In: 'static> {
    world: Rc<World>,
    out: Line<Out>,
    back: Rc<dyn Break>,
    inbox: mpsc::UnboundedReceiver<In>,
}

impl<Out, In> End<Out, In> {
    /// Sends; false: the pipe is known to be broken. What is sent into a cut is lost, and breaks the pipe.
    pub fn send(&self, message: Out) -> bool {
        let world = &self.world;
        if self.out.queue.borrow().is_none() {
            return false;
        }
        if world.network.is_cut(self.out.from, self.out.to) {
            self.out.break_off(world);
            self.back.break_off(world);
            return true;
        }
        let queue = self.out.queue.clone();
        let at_us = self.out.at_us(world);
        world.executor.at(at_us, move || {
            if let Some(queue) = queue.borrow().as_ref() {
                // The other end may be gone.
                let _ = queue.send(message);
            }
        });
        true
    }

    /// The next message; [`None`]: the pipe is broken.
    pub async fn recv(&mut self) -> Option<In> {
        self.inbox.recv().await
    }
}

impl<Out, In> Drop for End<Out, In> {
    fn drop(&mut self) {
        self.out.break_off(&self.world);
        self.back.break_off(&self.world);
    }
}
