//! What a fleet of one size goes through, and what is measured on the way.
//!
//! ```text
//! workers connect ─▶ VMs defined ─▶ a fifth run and have replicas ─▶ the leader alone with heartbeats ─▶ one command after the other
//!  ─▶ many at once ─▶ a follower killed and started ─▶ leaders killed, one after the other ─▶ a site drained ─▶ the model
//! ```
//! Commands are given at the leader's own site, so that their latency is that of the agreement. A failover is timed from before
//! the kill to the answer to a command that is given at another site all the time meanwhile.

use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::time::sleep;

use super::arena::{Arena, until};
use super::client::{Client, all_in_parallel, in_parallel, round_trip};
use super::model::{Model, median};
use super::report::FleetFigures;
use super::size::EVACUATED;
use super::{BenchError, Effort, Size, Tell, site};
use crate::replication_bench::meter::cpu_time;

/// How long a follower that is killed stays away.
const AWAY: Duration = Duration::from_secs(1);

/// Goes through all stages.
///
/// # Errors
/// When one fails; everything is taken down.
pub async fn measure(size: Size, effort: Effort, tell: Tell<'_>) -> Result<FleetFigures, BenchError> {
    let mut arena = Arena::start(size, effort).await?;
    let mut figures = FleetFigures { workers: size.workers, vms: size.vms, ..FleetFigures::default() };
    arena.fill(&mut figures, tell).await?;
    arena.rest(&mut figures, tell).await?;
    arena.commands(&mut figures, tell).await?;
    arena.restart(&mut figures, tell).await?;
    arena.failovers(&mut figures, tell).await?;
    arena.drain(&mut figures, tell).await?;
    drop(arena);
    let (plan, (snapshot, bytes)) = tokio::task::spawn_blocking(move || {
        let mut model = Model::new(size);
        let snapshot = model.snapshot()?;
        Ok::<_, BenchError>((model.plan()?, snapshot))
    })
    .await
    .unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))?;
    (figures.evacuated_vms, figures.plan_s) = (size.evacuated(), plan.as_secs_f64());
    (figures.snapshot_s, figures.snapshot_bytes) = (snapshot.as_secs_f64(), bytes);
    tell(&format!("  planned in {:.3} s; a snapshot of {bytes} bytes in {:.3} s", figures.plan_s, figures.snapshot_s));
    Ok(figures)
}

impl Arena {
    /// Makes the fleet.
    async fn fill(&mut self, figures: &mut FleetFigures, tell: Tell<'_>) -> Result<(), BenchError> {
        self.all_connected().await?;
        figures.connect_s = self.began.elapsed().as_secs_f64();
        tell(&format!("  all workers are connected after {:.1} s", figures.connect_s));
        let (size, clients) = (self.size, self.effort.clients);
        let begin = Instant::now();
        self.at_leader(move |client| async move {
            let job = move |vm| {
                let client = client.clone();
                async move { client.define(vm).await }
            };
            all_in_parallel(clients, size.vms, job).await
        })
        .await?;
        figures.defines_per_s = self.size.vms as f64 / begin.elapsed().as_secs_f64();
        tell(&format!("  VMs defined, {:.0} per second", figures.defines_per_s));
        self.at_leader(move |client| async move {
            let leavers: Vec<_> = size.leavers().collect();
            let job = {
                let client = client.clone();
                move |n: usize| {
                    let ((vm, to), client) = (leavers[n], client.clone());
                    async move {
                        client.start(vm).await?;
                        client.seed(vm, to).await
                    }
                }
            };
            all_in_parallel(clients, size.evacuated(), job).await?;
            until(size.evacuated(), "wait until all can leave", || client.movable()).await
        })
        .await?;
        tell(&format!("  {} VMs of a site run and have replicas at the others", self.size.evacuated()));
        Ok(())
    }

    /// The leader alone with its workers' heartbeats.
    async fn rest(&mut self, figures: &mut FleetFigures, tell: Tell<'_>) -> Result<(), BenchError> {
        sleep(self.effort.settle).await;
        let ((site, _), _) = self.seats().await?;
        let leader = self.lab.controller(site);
        let missing = || BenchError::Unknown { what: "what the leader uses" };
        let pid = leader.pid().and_then(|pid| i32::try_from(pid).ok()).ok_or_else(missing)?;
        let (begin, before) = (Instant::now(), cpu_time(pid).map_err(|_| missing())?);
        sleep(self.effort.stretch).await;
        let used = cpu_time(pid).map_err(|_| missing())?.saturating_sub(before);
        figures.leader_cpu_percent = 100.0 * used.as_secs_f64() / begin.elapsed().as_secs_f64();
        figures.leader_memory_bytes = leader.memory_bytes().ok_or_else(missing)?;
        tell(&format!(
            "  the leader, with heartbeats alone: {:.0} % of a processor, {} MB",
            figures.leader_cpu_percent,
            figures.leader_memory_bytes / 1_000_000
        ));
        Ok(())
    }

    async fn commands(&mut self, figures: &mut FleetFigures, tell: Tell<'_>) -> Result<(), BenchError> {
        let ((place, _), others) = self.seats().await?;
        let others: Vec<_> = others.into_iter().map(|(_, address)| address).collect();
        let measured = site::at(&self.lab, place, move || async move { round_trip(&others).await }).done().await?;
        let round_trip = measured.map_err(|source| BenchError::Site { site: place.to_owned(), source })?;
        figures.rtt_ms = round_trip.as_secs_f64() * 1e3;

        let Effort { writes, clients, stretch, .. } = self.effort;
        let stopped: Vec<usize> = (0..self.size.vms).filter(|vm| Size::site_of(*vm) != EVACUATED).collect();
        let mut taken = {
            let stopped = stopped.clone();
            self.at_leader(move |client| async move {
                let mut taken = vec![];
                client.write(stopped[0]).await?;
                for n in 0..writes {
                    let begin = Instant::now();
                    client.write(stopped[n % stopped.len()]).await?;
                    taken.push(begin.elapsed().as_secs_f64() * 1e3);
                }
                Ok(taken)
            })
            .await?
        };
        taken.sort_by(f64::total_cmp);
        let at =
            |percent: usize| taken.get((taken.len() * percent / 100).min(taken.len() - 1)).copied().unwrap_or_default();
        (figures.commit_p50_ms, figures.commit_p99_ms) = (at(50), at(99));
        figures.commit_p50_rtts = figures.commit_p50_ms / figures.rtt_ms;
        figures.commit_p99_rtts = figures.commit_p99_ms / figures.rtt_ms;
        tell(&format!(
            "  a command takes {:.1} ms, {:.2} round trips of {:.1} ms (99th percentile: {:.2})",
            figures.commit_p50_ms, figures.commit_p50_rtts, figures.rtt_ms, figures.commit_p99_rtts
        ));

        let (done, time) = self
            .at_leader(move |client| async move {
                let job = move |n: usize| {
                    let (vm, client) = (stopped[n % stopped.len()], client.clone());
                    async move { client.write(vm).await }
                };
                let begin = Instant::now();
                Ok((in_parallel(clients, usize::MAX, stretch, job).await?, begin.elapsed()))
            })
            .await?;
        figures.commands_per_s = done as f64 / time.as_secs_f64();
        tell(&format!("  {clients} clients at once: {:.0} commands per second", figures.commands_per_s));
        Ok(())
    }

    /// A follower is killed and started: until it has all that was committed when it was started.
    async fn restart(&mut self, figures: &mut FleetFigures, tell: Tell<'_>) -> Result<(), BenchError> {
        sleep(self.effort.settle).await;
        let (_, others) = self.seats().await?;
        let Some((place, address)) = others.into_iter().next() else { return Ok(()) };
        self.lab.controller(place).kill()?;
        sleep(AWAY).await;
        let committed = self.at_leader(|client| async move { Ok(client.status().await?.committed_index) }).await?;
        let begin = Instant::now();
        self.lab.controller(place).restart()?;
        self.caught_up(place, address, committed).await?;
        figures.restart_s = begin.elapsed().as_secs_f64();
        tell(&format!("  a follower that was killed is back after {:.2} s", figures.restart_s));
        Ok(())
    }

    async fn failovers(&mut self, figures: &mut FleetFigures, tell: Tell<'_>) -> Result<(), BenchError> {
        let (mut led, mut back) = (vec![], vec![]);
        for _ in 0..self.effort.failovers {
            self.all_connected().await?;
            sleep(self.effort.settle).await;
            let (took, all) = self.failover().await?;
            tell(&format!(
                "  a leader was killed: a command was taken after {:.2} s, all workers were back after {:.1} s",
                took.as_secs_f64(),
                all.as_secs_f64()
            ));
            led.push(took);
            back.push(all);
        }
        figures.failover_worst_s = led.iter().max().copied().unwrap_or_default().as_secs_f64();
        figures.failover_s = median(led).as_secs_f64();
        figures.workers_back_s = median(back).as_secs_f64();
        Ok(())
    }

    /// Kills the leader: until a command is taken by another, and until all workers have reported to that.
    async fn failover(&mut self) -> Result<(Duration, Duration), BenchError> {
        let ((leader, address), others) = self.seats().await?;
        let place = others[0].0;
        let others: Vec<_> = others.into_iter().map(|(_, address)| address).collect();
        let identity = self.identity.clone();
        let (ready, is_ready) = oneshot::channel();
        let (go, gone) = oneshot::channel();
        let taken = site::at(&self.lab, place, move || async move {
            let client = Client::one(&identity, &others)?;
            // Both connections are open before.
            for _ in &others {
                client.status().await?;
            }
            ready.send(()).ok();
            let killed: Instant =
                gone.await.map_err(|_| BenchError::Unknown { what: "whether the leader was killed" })?;
            client.write(1).await?;
            Ok::<_, BenchError>(killed.elapsed())
        });
        if is_ready.await.is_ok() {
            let killed = Instant::now();
            self.lab.controller(leader).kill()?;
            go.send(killed).ok();
            let took = taken.done().await??;
            self.all_connected().await?;
            let all = killed.elapsed();
            let committed = self.at_leader(|client| async move { Ok(client.status().await?.committed_index) }).await?;
            self.lab.controller(leader).restart()?;
            self.caught_up(leader, address, committed).await?;
            return Ok((took, all));
        }
        // Its error says why.
        Ok((taken.done().await??, Duration::ZERO))
    }

    /// A site is drained: until every move is ordered.
    async fn drain(&mut self, figures: &mut FleetFigures, tell: Tell<'_>) -> Result<(), BenchError> {
        self.all_connected().await?;
        sleep(self.effort.settle).await;
        let moves = self.size.evacuated();
        let took = self
            .at_leader(move |client| async move {
                until(moves, "wait until all can leave", || client.movable()).await?;
                let begin = Instant::now();
                client.drain().await?;
                until(moves, "wait until all moves are ordered", || client.migrations()).await?;
                let took = begin.elapsed();
                client.undrain().await?;
                Ok(took)
            })
            .await?;
        figures.drain_queued_s = took.as_secs_f64();
        tell(&format!("  {moves} moves are ordered {:.2} s after a drain", figures.drain_queued_s));
        Ok(())
    }
}
