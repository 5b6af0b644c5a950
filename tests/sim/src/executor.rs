//! [`Executor`]: tasks, processes and time, all simulated: one thread, one order, no clock.
//!
//! A task belongs to a process. A process can be killed (its tasks are dropped where they stand) or frozen (nothing of it runs, its
//! timers go off when it thaws), as SIGKILL and SIGSTOP do. What the world does by itself (a message arrives, a keeper fires) are
//! actions at a moment.
//!
//! Guarantees: the same tasks and actions run in the same order each time. Tasks may use `tokio`'s `mpsc`, `oneshot`, `Mutex` and
//! `Notify`, which are foreseeable; not its `watch` and timers, and `select!` only with `biased`.

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

/// A process of the simulation; a restarted one is another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProcessId(u64);

type TaskId = u64;
type Action = Box<dyn FnOnce()>;

struct Task {
    process: ProcessId,
    waker: Waker,
    future: Option<Pin<Box<dyn Future<Output = ()>>>>,
}

enum Due {
    Wake(Waker),
    Act(Action),
}

/// Woken tasks, in order; shared with wakers.
type Ready = Arc<Mutex<VecDeque<TaskId>>>;

struct TaskWaker {
    task: TaskId,
    ready: Ready,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner).push_back(self.task);
    }
}

#[derive(Default)]
struct Inner {
    now_us: Cell<u64>,
    next: Cell<u64>,
    tasks: RefCell<BTreeMap<TaskId, Task>>,
    alive: RefCell<BTreeSet<ProcessId>>,
    frozen: RefCell<BTreeMap<ProcessId, Vec<TaskId>>>,
    moments: RefCell<BTreeMap<u64, Due>>,
    queue: RefCell<BinaryHeap<Reverse<(u64, u64)>>>,
    ready: Ready,
}

/// See the module.
#[derive(Clone, Default)]
#[allow(missing_debug_implementations, reason = "it is made of futures")]
pub struct Executor {
    inner: Rc<Inner>,
}

impl Executor {
    /// The world's time, in microseconds since it began.
    pub fn now_us(&self) -> u64 {
        self.inner.now_us.get()
    }

    fn next(&self) -> u64 {
        let next = self.inner.next.get();
        self.inner.next.set(next + 1);
        next
    }

    /// A new process.
    pub fn process(&self) -> ProcessId {
        let process = ProcessId(self.next());
        self.inner.alive.borrow_mut().insert(process);
        process
    }

    /// Starts a task; nothing happens if its process is dead.
    pub fn spawn(&self, process: ProcessId, future: impl Future<Output = ()> + 'static) {
        if !self.is_alive(process) {
            return;
        }
        let id = self.next();
        let waker = Waker::from(Arc::new(TaskWaker { task: id, ready: self.inner.ready.clone() }));
        self.inner.tasks.borrow_mut().insert(id, Task { process, waker, future: Some(Box::pin(future)) });
        self.wake(id);
    }

    fn wake(&self, task: TaskId) {
        self.inner.ready.lock().unwrap_or_else(PoisonError::into_inner).push_back(task);
    }

    /// Does it live?
    pub fn is_alive(&self, process: ProcessId) -> bool {
        self.inner.alive.borrow().contains(&process)
    }

    /// Ends a process where it stands. The task that runs now, if it is one of its own, ends at its next wait.
    pub fn kill(&self, process: ProcessId) {
        self.inner.alive.borrow_mut().remove(&process);
        self.inner.frozen.borrow_mut().remove(&process);
        let mut dropped = vec![];
        {
            let mut tasks = self.inner.tasks.borrow_mut();
            tasks.retain(|_, task| {
                let stays = task.process != process;
                if !stays {
                    dropped.extend(task.future.take());
                }
                stays
            });
        }
        // Dropping wakes others: nothing may be borrowed meanwhile.
        drop(dropped);
    }

    /// SIGSTOP.
    pub fn freeze(&self, process: ProcessId) {
        if self.is_alive(process) {
            self.inner.frozen.borrow_mut().entry(process).or_default();
        }
    }

    /// SIGCONT.
    pub fn thaw(&self, process: ProcessId) {
        let held = self.inner.frozen.borrow_mut().remove(&process);
        for task in held.into_iter().flatten() {
            self.wake(task);
        }
    }

    /// Does something at a moment.
    pub fn at(&self, us: u64, action: impl FnOnce() + 'static) {
        self.put(us, Due::Act(Box::new(action)));
    }

    fn put(&self, us: u64, due: Due) {
        let id = self.next();
        self.inner.moments.borrow_mut().insert(id, due);
        self.inner.queue.borrow_mut().push(Reverse((us.max(self.now_us()), id)));
    }

    /// Waits until a moment.
    pub fn until(&self, us: u64) -> Until {
        Until { executor: self.clone(), us, armed: false }
    }

    /// Runs everything up to a moment.
    pub fn run_until(&self, us: u64) {
        loop {
            self.run_ready();
            let next = self.inner.queue.borrow().peek().copied();
            let Some(Reverse((at_us, id))) = next.filter(|Reverse((at_us, _))| *at_us <= us) else { break };
            self.inner.queue.borrow_mut().pop();
            self.inner.now_us.set(at_us);
            let due = self.inner.moments.borrow_mut().remove(&id);
            match due {
                Some(Due::Wake(waker)) => waker.wake(),
                Some(Due::Act(action)) => action(),
                None => {}
            }
        }
        self.inner.now_us.set(us);
    }

    fn run_ready(&self) {
        loop {
            let task = self.inner.ready.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            let Some(task) = task else { return };
            self.poll(task);
        }
    }

    fn poll(&self, id: TaskId) {
        let (mut future, waker) = {
            let mut tasks = self.inner.tasks.borrow_mut();
            let Some(task) = tasks.get_mut(&id) else { return };
            if let Some(held) = self.inner.frozen.borrow_mut().get_mut(&task.process) {
                held.push(id);
                return;
            }
            // Woken more than once while it ran: it is being polled already.
            let Some(future) = task.future.take() else { return };
            (future, task.waker.clone())
        };
        let polled = future.as_mut().poll(&mut Context::from_waker(&waker));
        let mut tasks = self.inner.tasks.borrow_mut();
        match polled {
            Poll::Ready(()) => drop(tasks.remove(&id)),
            Poll::Pending => match tasks.get_mut(&id) {
                Some(task) => task.future = Some(future),
                // Its process was killed while it ran.
                None => {
                    drop(tasks);
                    drop(future);
                }
            },
        }
    }
}

/// A wait for a moment.
#[allow(missing_debug_implementations, reason = "as the executor")]
pub struct Until {
    executor: Executor,
    us: u64,
    armed: bool,
}

impl Future for Until {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.executor.now_us() >= self.us {
            return Poll::Ready(());
        }
        if !self.armed {
            self.armed = true;
            let us = self.us;
            self.executor.put(us, Due::Wake(context.waker().clone()));
        }
        Poll::Pending
    }
}

/// Something that changes, and those who wait for the next change.
#[derive(Debug, Default, Clone)]
pub struct Signal {
    inner: Rc<SignalInner>,
}

#[derive(Debug, Default)]
struct SignalInner {
    version: Cell<u64>,
    waiting: RefCell<Vec<Waker>>,
}

impl Signal {
    /// It has changed.
    pub fn raise(&self) {
        self.inner.version.set(self.inner.version.get() + 1);
        for waker in self.inner.waiting.take() {
            waker.wake();
        }
    }

    /// How often it has changed.
    pub fn version(&self) -> u64 {
        self.inner.version.get()
    }

    /// Waits until it has changed since it was at `version`.
    pub async fn changed_since(&self, version: u64) {
        std::future::poll_fn(|context| {
            if self.version() != version {
                return Poll::Ready(());
            }
            let mut waiting = self.inner.waiting.borrow_mut();
            if !waiting.iter().any(|waker| waker.will_wake(context.waker())) {
                waiting.push(context.waker().clone());
            }
            Poll::Pending
        })
        .await;
    }
}

impl Executor {
    /// Drops everything: tasks hold the world that holds them.
    pub fn end(&self) {
        let alive: Vec<ProcessId> = self.inner.alive.borrow().iter().copied().collect();
        for process in alive {
            self.kill(process);
        }
        let moments = self.inner.moments.take();
        drop(moments);
        // What was dropped may have planned something.
        drop(self.inner.moments.take());
    }
}
