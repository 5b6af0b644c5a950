import { create } from "@bufbuild/protobuf";
import { expect, test } from "vitest";

import {
  ConvergencePolicy,
  MigrationProgressSchema,
  MigrationSchema,
  MigrationState,
  MigrationTermsSchema,
  PageCountsSchema,
} from "../gen/pageport/v1/migration_pb.ts";
import { Convergence } from "../gen/pageport/v1/quote_pb.ts";
import {
  byAge,
  classShares,
  fractionOf,
  isQueued,
  liveFigures,
  outlookOf,
  phaseOf,
  recordFigures,
  stepOf,
  termsOf,
  unlisted,
} from "./migration.ts";

const memory = create(MigrationProgressSchema, {
  phase: "memory",
  memoryBytes: 1n << 30n,
  remainingBytes: 3n << 30n,
  wanBytes: 35n << 20n,
  rateBps: 142_000_000n,
  dirtyRateBps: 300_000_000n,
  elapsedMs: 2_500n,
});

test("shares of page classes add up, and nothing is nothing", () => {
  const shares = classShares(create(PageCountsSchema, { zero: 25n, teleported: 70n, literal: 5n }));
  expect(shares.map(({ name, share }) => [name, share])).toEqual([
    ["teleported", 0.7],
    ["zero", 0.25],
    ["literal", 0.05],
    ["fallback", 0],
  ]);
  expect(shares[0]?.bytes).toBe(70n * 4096n);
  expect(classShares(undefined).every(({ share }) => share === 0)).toBe(true);
});

test("the fraction follows the phase's own measure", () => {
  expect(fractionOf(memory)).toBe(0.25);
  const disk = create(MigrationProgressSchema, { phase: "disk-sync", diskDoneBytes: 1n, diskTotalBytes: 2n, memoryBytes: 9n });
  expect(fractionOf(disk)).toBe(0.5);
  expect(fractionOf(create(MigrationProgressSchema, { phase: "disk-sync", diskDoneBytes: 3n, diskTotalBytes: 2n }))).toBe(1);
  expect(fractionOf(create(MigrationProgressSchema, { phase: "connect" }))).toBeUndefined();
  expect(fractionOf(create(MigrationProgressSchema, { phase: "memory" }))).toBeUndefined();
  expect(fractionOf(undefined)).toBeUndefined();
});

test("the phase shows while it runs, the state otherwise", () => {
  expect(phaseOf(create(MigrationSchema, { state: MigrationState.RUNNING, progress: memory }))).toBe("memory");
  expect(phaseOf(create(MigrationSchema, { state: MigrationState.CANCELLING, progress: memory }))).toBe("cancelling");
  expect(phaseOf(create(MigrationSchema, { state: MigrationState.REQUESTED }))).toBe("queued");
});

test("time left is shown only when it is known", () => {
  const labels = (progress: typeof memory) => liveFigures(progress).map(({ label }) => label);
  expect(labels(memory)).not.toContain("time left");
  expect(labels(create(MigrationProgressSchema, { ...memory, etaMs: 3_400n }))).toContain("time left");
});

test("what the switchover waits for is shown while it is known", () => {
  const waits = create(MigrationProgressSchema, { ...memory, waitsFor: "memory: 1.5 MB to send" });
  expect(liveFigures(waits)).toContainEqual({ label: "switchover waits for", value: "memory: 1.5 MB to send" });
  expect(liveFigures(memory).map(({ label }) => label)).not.toContain("switchover waits for");
});

test("whether a migration converges is said in one sentence, and raises an alarm only when it will not", () => {
  const seen = (outlook: Convergence, sentence: string) =>
    outlookOf(create(MigrationProgressSchema, { convergence: { outlook, sentence } }));
  expect(outlookOf(undefined)).toBeUndefined();
  expect(outlookOf(memory)).toBeUndefined();
  expect(seen(Convergence.UNSPECIFIED, "")).toBeUndefined();
  expect(seen(Convergence.YES, "converges: one more round")).toEqual({ sentence: "Converges: one more round.", alarming: false });
  expect(seen(Convergence.NO, "will not converge: the guest dirties 37.5 MB/s")).toEqual({
    sentence: "Will not converge: the guest dirties 37.5 MB/s.",
    alarming: true,
  });
});

test("what was done for it to converge is told when something was", () => {
  const labels = (acted: ConvergencePolicy[]) => {
    const convergence = { acted, rounds: 9, greatestThrottlePercent: 75, permittedPauseMs: 300n };
    return recordFigures(create(MigrationSchema, { record: { convergence } })).map(({ value }) => value);
  };
  expect(labels([])).not.toContain("by 75 % at most");
  expect(labels([ConvergencePolicy.THROTTLE])).toContain("by 75 % at most");
});

test("different digests cannot be overlooked", () => {
  const figures = (match: boolean) =>
    recordFigures(create(MigrationSchema, { record: { streamDigestMatch: match, memoryBytes: 280n, wanBytes: 10n } }));
  expect(figures(true).at(-1)?.value).toBe("equal");
  expect(figures(false).at(-1)?.value).toBe("DIFFERENT");
  expect(figures(true)[4]?.value).toBe("10 B (1/28.0)");
  expect(recordFigures(create(MigrationSchema))).toEqual([]);
});

test("what is no longer listed is known to be gone", () => {
  expect(unlisted(["a", "b"], [create(MigrationSchema, { id: "b" }), create(MigrationSchema, { id: "c" })])).toEqual(["a"]);
});

test("the newest migration comes first", () => {
  const at = (id: string, createdUnixMs: bigint) => create(MigrationSchema, { id, createdUnixMs });
  expect(byAge([at("a", 1n), at("c", 3n), at("b", 3n)]).map(({ id }) => id)).toEqual(["c", "b", "a"]);
});

test("past the commit point the last step is marked, and a cancel keeps the one that it came in", () => {
  const step = (state: MigrationState, phase?: string) =>
    stepOf(create(MigrationSchema, { state, ...(phase === undefined ? {} : { progress: { phase } }) }));
  expect(step(MigrationState.REQUESTED)).toBe("");
  expect(step(MigrationState.RUNNING, "memory")).toBe("memory");
  expect(step(MigrationState.CANCELLING, "memory")).toBe("memory");
  expect(step(MigrationState.COMMITTED, "switchover")).toBe("hand-over");
});

test("only what was asked for beyond the usual is told of the terms", () => {
  const queued = (terms: object) => create(MigrationSchema, { terms: create(MigrationTermsSchema, { priority: 50, ...terms }) });
  expect(termsOf(create(MigrationSchema))).toBe("");
  expect(termsOf(queued({}))).toBe("");
  expect(termsOf(queued({ priority: 80, window: "22:00-06:00", rateBps: 50_000_000n, drains: true }))).toBe(
    "priority 80 · 22:00-06:00 UTC · at most 50.0 Mbit/s · empties its place",
  );
  expect(termsOf(queued({ convergence: ConvergencePolicy.WAIT }))).toBe("");
  expect(termsOf(queued({ convergence: ConvergencePolicy.LONGER_PAUSE, longestPauseMs: 2_000n }))).toBe(
    "stands still for 2.00 s at most if it does not converge",
  );
  expect(isQueued(MigrationState.REQUESTED)).toBe(true);
  expect(isQueued(MigrationState.RUNNING)).toBe(false);
});
