import { create } from "@bufbuild/protobuf";
import { expect, test } from "vitest";

import { ReplicaSchema, ReplicaState, ReplicationPhase } from "../gen/pageport/v1/replication_pb.ts";
import { seedFraction } from "./fleet.ts";
import { protectionFacts, protectionLook } from "./replication.ts";

const protection = { rpoMs: 30_000n, keepPoints: 10 };
const status = (more: object) => ({ phase: ReplicationPhase.IDLE, newest: { number: 41n }, lagMs: 12_300n, ...more });
const replica = (more: object) => create(ReplicaSchema, { state: ReplicaState.SEEDED, protection, replication: status(more) });

test("a protected replica shows its lag against the target and the worst it has been", () => {
  expect(protectionFacts(replica({}))).toBe("point 41, 12.3 s behind, target 30.0 s");
  const worst = replica({ worstRpoMs: 34_000n, windowMs: 86_400_000n });
  expect(protectionFacts(worst)).toBe("point 41, 12.3 s behind, target 30.0 s, worst 34.0 s in 24 h 0 min");
  expect(protectionLook(worst)).toEqual({ word: "up to date", tone: "good" });
});

test("points that are not quiesced as ordered have a reason", () => {
  const facts = protectionFacts(replica({ quiesceProblem: "no guest agent answers" }));
  expect(facts).toBe("point 41, 12.3 s behind, target 30.0 s; quiescing: no guest agent answers");
});

test("a scrub says how far it is, and afterwards only what it found", () => {
  const scrub = { doneBytes: 1n << 30n, totalBytes: 4n << 30n, differentBlocks: 0n, repairedBlocks: 0n };
  const facts = (more: object) => protectionFacts(replica(more)).replace("point 41, 12.3 s behind, target 30.0 s", "");
  expect(facts({ scrub })).toBe("; scrub 25 %");
  expect(facts({ scrub: { ...scrub, differentBlocks: 3n, repairedBlocks: 2n } })).toBe("; scrub 25 %, 3 blocks differ, 2 repaired");
  expect(facts({ scrub: { ...scrub, totalBytes: 0n } })).toBe("; scrub 0 %");
  expect(facts({ lastScrub: scrub })).toBe("");
  expect(facts({ lastScrub: { ...scrub, differentBlocks: 3n, repairedBlocks: 3n } })).toBe("; the last scrub repaired 3 of 3 damaged blocks");
});

test("a missed target is what the badge says, whatever the phase", () => {
  for (const phase of [ReplicationPhase.IDLE, ReplicationPhase.WAITING, ReplicationPhase.INCREMENT]) {
    expect(protectionLook(replica({ phase, rpoMissed: true }))).toEqual({ word: "target missed", tone: "bad" });
  }
});

test("a first copy says how far it is instead of a lag", () => {
  const copying = { phase: ReplicationPhase.FULL_COPY, newest: undefined, doneBytes: 1n << 30n, totalBytes: 4n << 30n };
  const first = create(ReplicaSchema, { state: ReplicaState.SEEDING, protection, replication: status(copying), totalBytes: 4n });
  expect(protectionFacts(first)).toBe("no recovery point yet, 25 % of 4.00 GiB, target 30.0 s");
  expect(protectionLook(first)?.word).toBe("full copy");
  expect(seedFraction(first)).toBeUndefined();
  expect(protectionFacts(create(ReplicaSchema, { protection }))).toBe("no recovery point yet, target 30.0 s");
});

test("a replica that is left as it is has neither", () => {
  const plain = create(ReplicaSchema, { state: ReplicaState.SEEDING });
  expect([protectionLook(plain), protectionFacts(plain)]).toEqual([undefined, ""]);
});

test("a phase of a newer API is shown as unknown", () => {
  expect(protectionLook(replica({ phase: 99 }))).toEqual({ word: "?", tone: "warn" });
});
