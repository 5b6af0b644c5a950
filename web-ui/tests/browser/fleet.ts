// A small fleet with something of everything, as a controller would tell it.
import { create } from "@bufbuild/protobuf";

import { SiteSchema, type Vm, VmSchema, VmState, type WatchFleetResponse, WatchFleetResponseSchema, WorkerSchema } from "../../src/gen/pageport/v1/fleet_pb.ts";
import { ConvergenceStatusSchema, type Migration, MigrationSchema, MigrationState } from "../../src/gen/pageport/v1/migration_pb.ts";
import { Convergence } from "../../src/gen/pageport/v1/quote_pb.ts";
import { ReplicaSchema, ReplicaState, ReplicationPhase } from "../../src/gen/pageport/v1/replication_pb.ts";

const GIB = 1n << 30n;

const worker = (site: string, connected: boolean) =>
  create(WorkerSchema, {
    name: `worker-${site}`,
    site,
    connected,
    qemuVersion: "10.0.2",
    accelerator: "kvm",
    memoryTotalBytes: 64n * GIB,
    lastSeenUnixMs: BigInt(Date.now() - 125_000),
  });

const vm = (name: string, more: Partial<Vm>): Vm =>
  create(VmSchema, {
    id: `id-${name}`,
    spec: { name, memoryBytes: 2n * GIB, vcpus: 2 },
    ownerSite: "a",
    ownerWorker: "worker-a",
    state: VmState.RUNNING,
    desiredRunning: true,
    ...more,
  } as Vm);

const protectedAtA = create(ReplicaSchema, {
  site: "a",
  state: ReplicaState.SEEDED,
  protection: { rpoMs: 30_000n, keepPoints: 10 },
  replication: { phase: ReplicationPhase.IDLE, newest: { number: 41n }, lagMs: 95_000n, rpoMissed: true, problem: "worker-a is away" },
  problem: "worker-a is away",
});
const seeded = create(ReplicaSchema, { site: "b", state: ReplicaState.SEEDED, doneBytes: 4n * GIB, totalBytes: 4n * GIB });
const seeding = create(ReplicaSchema, {
  site: "c",
  state: ReplicaState.SEEDING,
  doneBytes: GIB,
  totalBytes: 4n * GIB,
  rateBps: 181_000_000n,
});

export function fleet(migrationId: string): WatchFleetResponse {
  return create(WatchFleetResponseSchema, {
    sites: [
      create(SiteSchema, { name: "a", workers: ["worker-a"], vmsRunning: 1, reachable: true }),
      create(SiteSchema, { name: "b", workers: ["worker-b"], vmsRunning: 1, reachable: true }),
      create(SiteSchema, { name: "c", workers: ["worker-c"], vmsRunning: 0, reachable: false }),
    ],
    workers: [worker("a", true), worker("b", true), worker("c", false)],
    vms: [
      vm("web", { state: migrationId === "" ? VmState.RUNNING : VmState.MIGRATING, migrationId, replicas: [seeded, seeding] }),
      vm("db", { ownerSite: "b", ownerWorker: "worker-b", replicas: [protectedAtA] }),
      vm("batch", { state: VmState.STOPPED, desiredRunning: false }),
      vm("queue", { state: VmState.CRASHED, problem: "QEMU ended with signal 9" }),
    ],
  });
}

const moving = { id: "0199-m1", vmId: "id-web", vmName: "web", fromSite: "a", toSite: "b", createdUnixMs: 2_000n };

export const inMemoryPhase = (): Migration =>
  create(MigrationSchema, {
    ...moving,
    state: MigrationState.RUNNING,
    progress: {
      phase: "memory",
      pages: { zero: 53_760n, teleported: 202_240n, literal: 5_120n },
      memoryBytes: 1_095_216_660n,
      remainingBytes: 1_009_317_314n,
      wanBytes: 36_909_875n,
      rateBps: 142_000_000n,
      elapsedMs: 3_900n,
      etaMs: 2_400n,
    },
  });

export const notConverging = (): Migration => {
  const migration = inMemoryPhase();
  if (migration.progress) {
    const sentence = "will not converge: the guest dirties 37.5 MB/s, which is 19.0 MB/s on the wire, and the link carries 17.7 MB/s";
    const convergence = create(ConvergenceStatusSchema, { outlook: Convergence.NO, sentence });
    Object.assign(migration.progress, { notConverging: true, convergence, etaMs: undefined });
  }
  return migration;
};

export const completed = (): Migration =>
  create(MigrationSchema, {
    ...moving,
    state: MigrationState.COMPLETED,
    endedUnixMs: BigInt(Date.now() - 8_000),
    record: {
      totalTimeMs: 6_210n,
      memoryTimeMs: 4_896n,
      downtimeMs: 312n,
      wanBytes: 73_610_035n,
      diskWanBytes: 1_258_291n,
      memoryBytes: 2_104_492_032n,
      pages: { zero: 81_087n, teleported: 405_574n, literal: 37_757n, fallback: 12n },
      streamDigestMatch: true,
      phases: [
        { name: "connect", durationMs: 52n },
        { name: "disk-sync", durationMs: 1_260n },
        { name: "memory", durationMs: 4_584n },
        { name: "switchover", durationMs: 290n },
        { name: "hand-over", durationMs: 22n },
      ],
      downtimeParts: [
        { name: "last pages", durationMs: 130n },
        { name: "device state", durationMs: 140n },
        { name: "resume", durationMs: 42n },
      ],
    },
  });

export const failedBefore = (): Migration =>
  create(MigrationSchema, {
    id: "0198-m0",
    vmName: "db",
    fromSite: "b",
    toSite: "c",
    state: MigrationState.FAILED,
    createdUnixMs: 1_000n,
    endedUnixMs: BigInt(Date.now() - 3 * 3_600_000),
    reason: "the worker of c has no space for the replica",
  });
