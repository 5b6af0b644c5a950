import { create } from "@bufbuild/protobuf";
import { expect, test } from "vitest";

import { SiteSchema, Takeover_Ground, VmSchema, VmState, WorkerSchema } from "../gen/pageport/v1/fleet_pb.ts";
import { MigrationState } from "../gen/pageport/v1/migration_pb.ts";
import { FlatteningSchema, ReplicaSchema, ReplicaState } from "../gen/pageport/v1/replication_pb.ts";
import { ordered, seedFraction, siteViews, sortedVms, takenOver, vmName } from "./fleet.ts";
import { groundWords, hasEnded, migrationLook, replicaLook, vmLook } from "./states.ts";

test("sites carry their own workers and VMs, sorted as people sort", () => {
  const views = siteViews(
    [create(SiteSchema, { name: "dc-10" }), create(SiteSchema, { name: "dc-2" })],
    [create(WorkerSchema, { name: "w2", site: "dc-2" }), create(WorkerSchema, { name: "w1", site: "dc-2" })],
    [create(VmSchema, { ownerSite: "dc-2" }), create(VmSchema, { ownerSite: "dc-2" })],
  );
  expect(views.map(({ site }) => site.name)).toEqual(["dc-2", "dc-10"]);
  expect(views[0]?.workers.map(({ name }) => name)).toEqual(["w1", "w2"]);
  expect(views.map(({ vms }) => vms)).toEqual([2, 0]);
});

test("VMs are sorted by name, and one without a description by its id", () => {
  const vms = [create(VmSchema, { spec: { name: "web-10" } }), create(VmSchema, { spec: { name: "web-9" } }), create(VmSchema, { id: "a" })];
  expect(sortedVms(vms).map(vmName)).toEqual(["a", "web-9", "web-10"]);
});

test("a seed has a measure only while it runs", () => {
  const replica = (state: ReplicaState, totalBytes: bigint) => create(ReplicaSchema, { state, doneBytes: 1n, totalBytes });
  expect(seedFraction(replica(ReplicaState.SEEDING, 4n))).toBe(0.25);
  expect(seedFraction(replica(ReplicaState.SEEDING, 0n))).toBeUndefined();
  expect(seedFraction(replica(ReplicaState.SEEDED, 4n))).toBeUndefined();
});

test("an order about power is shown until it is carried out", () => {
  const vm = (state: VmState, desiredRunning: boolean) => ordered(create(VmSchema, { state, desiredRunning }));
  expect(vm(VmState.RUNNING, true)).toBe("");
  expect(vm(VmState.RUNNING, false)).toBe("is to stop");
  expect(vm(VmState.STOPPED, true)).toBe("is to start");
  expect(vm(VmState.STOPPED, false)).toBe("");
  expect(vm(VmState.CRASHED, true)).toBe("");
});

test("a VM that was taken over says from whom, on what ground and by whom, the newest time", () => {
  const takeover = { fromWorker: "worker-a", toWorker: "worker-b", reason: "no heartbeat" };
  const vm = (...takeovers: object[]) => takenOver(create(VmSchema, { takeovers: takeovers.map((more) => ({ ...takeover, ...more })) }));
  expect(vm()).toBe("");
  const forced = { ground: Takeover_Ground.OVERRIDE, operator: "ann.operator.pageport" };
  expect(vm(forced)).toBe("taken over from worker-a, forced by ann.operator.pageport: no heartbeat");
  const fenced = { ground: Takeover_Ground.FENCED, agent: "ipmi" };
  expect(vm(forced, fenced)).toBe("taken over from worker-a, its host was fenced by ipmi: no heartbeat");
  const ordered = { ...fenced, operator: "ann.operator.pageport" };
  expect(vm(ordered)).toBe("taken over from worker-a, its host was fenced by ipmi on the order of ann.operator.pageport: no heartbeat");
  expect(vm({ ground: Takeover_Ground.LEASE_EXPIRED })).toBe("taken over from worker-a, its lease had run out: no heartbeat");
  expect(groundWords(99 as Takeover_Ground)).toBe("?");
});

test("a state of a newer API is shown as unknown instead of breaking the page", () => {
  for (const look of [vmLook(99 as VmState), migrationLook(99 as MigrationState), replicaLook({ state: 99 as ReplicaState })]) {
    expect(look).toEqual({ word: "?", tone: "warn" });
  }
  expect(hasEnded(99 as MigrationState)).toBe(false);
});

test("a replica whose image is becoming raw says so, and nothing else", () => {
  const flattening = create(FlatteningSchema, { doneBytes: 1n, totalBytes: 2n });
  expect(replicaLook({ state: ReplicaState.SEEDED, flattening }).word).toBe("flattening");
  expect(replicaLook({ state: ReplicaState.SEEDED }).word).toBe("seeded");
});

test("only the three last states end a migration", () => {
  const all = Object.values(MigrationState).filter((state) => typeof state === "number");
  expect(all.filter(hasEnded)).toEqual([MigrationState.COMPLETED, MigrationState.FAILED, MigrationState.CANCELLED]);
});
