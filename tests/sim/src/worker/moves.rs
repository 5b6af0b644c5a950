//! The two sides of a move, with the phases of the daemon and their limits; bytes are left out, an image is what a guest remembers.

use std::rc::Rc;
use std::time::Duration;

use pageport_ownership::{Epoch, Event, Guest, Nonce, Record};
use pageport_proto::MigrationId;
use pageport_proto::v1;

use super::host::{Hello, Host};
use super::managed::Managed;
use super::{Side, Worker};
use crate::calls::{Answer, Question};
use crate::hypervisor::{Memory, Qemu};
use crate::network::End;
use crate::world::Flaw;

const ADMIT_LIMIT: Duration = Duration::from_secs(90);
const SWITCHOVER_LIMIT: Duration = Duration::from_secs(30);
const RESUMED_LIMIT: Duration = Duration::from_secs(3600);
const LEASE_LIMIT: Duration = Duration::from_secs(5);

/// What a source says.
pub enum FromSource {
    /// All of the guest's memory.
    Image(Memory),
    /// The commit point is passed.
    Release(Epoch),
    /// It gives up: its revocation is on stable storage.
    Abort,
}

/// What a destination says.
pub enum FromDestination {
    /// A hypervisor waits for the image.
    Accepted,
    /// The image is loaded and verified.
    Ready,
    /// The guest runs.
    Resumed,
    /// It never will, here.
    Refused,
    /// It gives up.
    Abort,
}

type SourceEnd = End<FromSource, FromDestination>;

/// Why a move did not happen.
#[derive(Debug, Clone, Copy)]
struct GivenUp(&'static str);

/// The source of a move, from beginning to end.
pub(super) async fn source(
    worker: Rc<Worker>,
    vm: Rc<Managed>,
    id: MigrationId,
    epoch: Epoch,
    peer: Rc<Host>,
    side: Rc<Side>,
) {
    let mut source = Source { worker: worker.clone(), vm, epoch, end: None };
    let cancelled = async {
        while !side.cancelled.get() {
            side.cancel.changed_since(side.cancel.version()).await;
        }
        Err(GivenUp("cancelled"))
    };
    let released = tokio::select! {
        biased;
        given_up = cancelled => given_up,
        released = source.until_released(id, &peer) => released,
    };
    match released {
        Ok(()) => {
            if source.hand_over().await {
                side.record.set(true);
            }
        }
        Err(GivenUp(why)) => {
            source.undo().await;
            *side.failure.borrow_mut() = why.to_owned();
        }
    }
    drop(source);
    side.ended.set(true);
    worker.changed.raise();
}

struct Source {
    worker: Rc<Worker>,
    vm: Rc<Managed>,
    epoch: Epoch,
    end: Option<SourceEnd>,
}

impl Source {
    async fn until_released(&mut self, id: MigrationId, peer: &Rc<Host>) -> Result<(), GivenUp> {
        let world = self.worker.world.clone();
        let qemu = self.vm.qemu().await.ok_or(GivenUp("no hypervisor"))?;
        // connect, disk-sync
        self.worker.seam("connect").await;
        if !self.vm.may_prepare(self.epoch) {
            return Err(GivenUp("not permitted"));
        }
        self.connect(id, peer)?;
        self.expect(ADMIT_LIMIT, |said| matches!(said, FromDestination::Accepted)).await?;
        self.while_no_trouble(Duration::from_millis(world.between(1, 1500))).await?;
        // memory
        self.worker.seam("memory").await;
        let record = self.vm.step(Event::Authorise(self.epoch)).await;
        if !matches!(record, Record::Prepared { epoch, .. } if epoch == self.epoch) {
            return Err(GivenUp("not permitted"));
        }
        self.while_no_trouble(Duration::from_millis(world.between(20, 4000))).await?;
        // switchover: the hypervisor stops the guest by itself
        if qemu.ended().is_some() {
            return Err(GivenUp("the hypervisor ended"));
        }
        self.worker.host.hypervisors.stop(&qemu);
        self.worker.seam("switchover").await;
        let limit = self.worker.host.clock.sleep(&world, SWITCHOVER_LIMIT);
        tokio::select! {
            biased;
            switched = self.switch_over(&qemu) => switched,
            () = limit => Err(GivenUp("the switchover took too long")),
        }
    }

    fn connect(&mut self, id: MigrationId, peer: &Rc<Host>) -> Result<(), GivenUp> {
        let world = &self.worker.world;
        let (near, far) = world.pipe(self.worker.host.endpoint, peer.endpoint);
        let calls = peer.calls.borrow().clone().ok_or(GivenUp("the destination is not reached"))?;
        if world.network.is_cut(self.worker.host.endpoint, peer.endpoint) {
            return Err(GivenUp("the destination is not reached"));
        }
        let hello = Hello { migration: id, vm: self.vm.id(), epoch: self.epoch, end: far };
        calls.send(hello).map_err(|_| GivenUp("the destination is not reached"))?;
        self.end = Some(near);
        Ok(())
    }

    fn end(&mut self) -> Result<&mut SourceEnd, GivenUp> {
        self.end.as_mut().ok_or(GivenUp("not connected"))
    }

    async fn expect(&mut self, limit: Duration, wanted: fn(&FromDestination) -> bool) -> Result<(), GivenUp> {
        let limit = self.worker.host.clock.sleep(&self.worker.world, limit);
        tokio::select! {
            biased;
            said = self.end()?.recv() => match said {
                Some(said) if wanted(&said) => Ok(()),
                Some(_) => Err(GivenUp("the destination gave up")),
                None => Err(GivenUp("the connection broke")),
            },
            () = limit => Err(GivenUp("the destination took too long")),
        }
    }

    async fn while_no_trouble(&mut self, took: Duration) -> Result<(), GivenUp> {
        let took = self.worker.host.clock.sleep(&self.worker.world, took);
        tokio::select! {
            biased;
            _ = self.end()?.recv() => Err(GivenUp("the destination gave up")),
            () = took => Ok(()),
        }
    }

    async fn switch_over(&mut self, qemu: &Rc<Qemu>) -> Result<(), GivenUp> {
        let world = self.worker.world.clone();
        self.worker.sleep(Duration::from_millis(world.between(5, 300))).await;
        if qemu.ended().is_some() {
            return Err(GivenUp("the hypervisor ended"));
        }
        let memory = qemu.memory(&world);
        let epoch = self.epoch;
        self.end()?.send(FromSource::Image(memory));
        self.vm.step(Event::Paused).await;
        self.worker.seam("paused").await;
        self.expect(SWITCHOVER_LIMIT, |said| matches!(said, FromDestination::Ready)).await?;
        if world.flaw == Flaw::EarlyRelease {
            self.end()?.send(FromSource::Release(epoch));
        }
        let record = self.vm.step(Event::Ready(epoch)).await;
        match record {
            Record::Released { epoch: released } if released == epoch => Ok(()),
            _ => Err(GivenUp("not permitted")),
        }
    }

    /// Past the commit point. True: the destination said that the guest runs there.
    async fn hand_over(&mut self) -> bool {
        self.worker.seam("hand-over").await;
        let epoch = self.epoch;
        let worker = self.worker.clone();
        let vm = self.vm.clone();
        let resumed = async {
            let limit = worker.host.clock.sleep(&worker.world, RESUMED_LIMIT);
            let end = self.end.as_mut()?;
            end.send(FromSource::Release(epoch));
            tokio::select! {
                biased;
                said = end.recv() => matches!(said?, FromDestination::Resumed).then_some(()),
                () = limit => None,
            }
        };
        let settled = async {
            loop {
                let seen = vm.changed.version();
                if !matches!(vm.record(), Record::Released { .. }) {
                    return;
                }
                vm.changed.changed_since(seen).await;
            }
        };
        let resumed = tokio::select! {
            biased;
            resumed = resumed => resumed,
            () = settled => None,
        };
        if resumed.is_none() {
            // The record leaves `Released` by what the controllers relay.
            loop {
                let seen = self.vm.changed.version();
                if !matches!(self.vm.record(), Record::Released { .. }) {
                    return false;
                }
                self.vm.changed.changed_since(seen).await;
            }
        }
        self.worker.seam("before the guest that was handed over ends").await;
        self.vm.step(Event::Acquired(self.epoch)).await;
        true
    }

    /// Before the commit point: the guest goes on here, durably.
    async fn undo(&mut self) {
        self.worker.seam("undo").await;
        if let Some(qemu) = self.vm.qemu().await
            && !matches!(qemu.run(), crate::hypervisor::Run::Running { .. })
        {
            self.vm.step(Event::Paused).await;
        }
        self.vm.step(Event::Cancel(self.epoch)).await;
        if let Some(end) = &self.end {
            end.send(FromSource::Abort);
        }
    }
}

/// The destination of a move.
pub(super) struct Destination {
    worker: Rc<Worker>,
    vm: Rc<Managed>,
    epoch: Epoch,
    migration: MigrationId,
    end: End<FromDestination, FromSource>,
}

impl Destination {
    pub(super) fn new(worker: Rc<Worker>, hello: Hello) -> Self {
        let vm = worker.vm(hello.vm);
        Self { worker, vm, epoch: hello.epoch, migration: hello.migration, end: hello.end }
    }

    pub(super) async fn serve(mut self) {
        if self.run().await.is_err() {
            self.end.send(FromDestination::Abort);
            // The source closes when it has heard the last word.
            self.worker.sleep(Duration::from_millis(200)).await;
        }
    }

    async fn run(&mut self) -> Result<(), GivenUp> {
        self.worker.seam("admit").await;
        let qemu = self.admit().await?;
        self.end.send(FromDestination::Accepted);
        if let Err(given_up) = self.load(&qemu).await {
            self.vm.drop_image(&qemu).await;
            return Err(given_up);
        }
        self.worker.seam("resume").await;
        self.resume().await
    }

    async fn admit(&mut self) -> Result<Rc<Qemu>, GivenUp> {
        let nonce = self.worker.world.number();
        self.vm.step(Event::Asked(Nonce(nonce))).await;
        let request = v1::AskAuthorisationRequest {
            worker: self.worker.host.name.to_string(),
            vm_id: self.vm.id().to_string(),
            migration_id: self.migration.to_string(),
            epoch: self.epoch.raw(),
            nonce,
            store_id: self.worker.host.identity.get().0.to_string(),
        };
        let answer = self.worker.ask(|| Question::Authorise(request.clone())).await;
        let Some(Answer::Authorised(answer)) = answer else { return Err(GivenUp("no controller answers")) };
        if !answer.authorised {
            return Err(GivenUp("not authorised"));
        }
        self.vm.step(Event::AuthReply { nonce: Nonce(answer.nonce), epoch: self.epoch }).await;
        if self.vm.authorised() != Some(self.epoch) || self.vm.guest() != Guest::Absent {
            return Err(GivenUp("not permitted"));
        }
        self.vm.learn(&answer.spec.unwrap_or_default()).await;
        self.worker.lease_wanted.raise();
        Ok(self.vm.load_image().await)
    }

    async fn load(&mut self, qemu: &Rc<Qemu>) -> Result<(), GivenUp> {
        self.worker.seam("receive").await;
        let memory = match self.end.recv().await {
            Some(FromSource::Image(memory)) => memory,
            Some(FromSource::Abort) => return Err(GivenUp("the source gave up")),
            Some(FromSource::Release(_)) | None => return Err(GivenUp("lost")),
        };
        self.worker.seam("load").await;
        self.worker.sleep(Duration::from_millis(self.worker.world.between(5, 200))).await;
        if qemu.ended().is_some() {
            return Err(GivenUp("the hypervisor ended"));
        }
        self.worker.host.hypervisors.load(qemu, memory);
        self.wait_for_lease().await?;
        self.vm.step(Event::Loaded(self.epoch)).await;
        if self.vm.guest() != Guest::Loaded(self.epoch) {
            return Err(GivenUp("not permitted"));
        }
        self.end.send(FromDestination::Ready);
        Ok(())
    }

    async fn wait_for_lease(&self) -> Result<(), GivenUp> {
        self.worker.lease_wanted.raise();
        let limit = self.worker.host.clock.sleep(&self.worker.world, LEASE_LIMIT);
        let mut limit = std::pin::pin!(limit);
        loop {
            let seen = self.vm.changed.version();
            if self.vm.permits(self.epoch) {
                return Ok(());
            }
            tokio::select! {
                biased;
                () = self.vm.changed.changed_since(seen) => {}
                () = &mut limit => return Err(GivenUp("no lease")),
            }
        }
    }

    async fn resume(&mut self) -> Result<(), GivenUp> {
        let (vm, epoch) = (self.vm.clone(), self.epoch);
        let settled = async {
            loop {
                let seen = vm.changed.version();
                if vm.guest() != Guest::Loaded(epoch) {
                    return;
                }
                vm.changed.changed_since(seen).await;
            }
        };
        let heard = async {
            loop {
                match self.end.recv().await {
                    Some(FromSource::Release(released)) => drop(self.vm.step(Event::Release(released)).await),
                    Some(FromSource::Abort) => {
                        self.vm.step(Event::Revoked(epoch)).await;
                        return GivenUp("the source gave up");
                    }
                    Some(FromSource::Image(_)) => {}
                    // The controllers' word settles it.
                    None => return std::future::pending().await,
                }
            }
        };
        tokio::select! {
            biased;
            given_up = heard => return Err(given_up),
            () = settled => {}
        }
        self.worker.seam("acquired").await;
        let said = match self.vm.record() {
            Record::Own { own, .. } if own == epoch => FromDestination::Resumed,
            _ => FromDestination::Refused,
        };
        self.end.send(said);
        // The source closes when it has heard the last word.
        self.worker.sleep(Duration::from_secs(2)).await;
        Ok(())
    }
}
