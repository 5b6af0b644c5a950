// What a migration shows: how far it is, what its pages were, what became of it. Pure.
import {
  ConvergencePolicy,
  type ConvergenceRecord,
  type Migration,
  type MigrationProgress,
  MigrationState,
  type MigrationTerms,
  type PageCounts,
} from "../gen/pageport/v1/migration_pb.ts";
import { Convergence } from "../gen/pageport/v1/quote_pb.ts";
import { bytes, duration, rate } from "./format.ts";
import { migrationLook } from "./states.ts";

export const PAGE_BYTES = 4096n;

/** The classes of pages, in the order in which they are drawn. */
export const PAGE_CLASSES = ["teleported", "zero", "literal", "fallback"] as const;
export type PageClass = (typeof PAGE_CLASSES)[number];

export interface ClassShare {
  name: PageClass;
  pages: bigint;
  bytes: bigint;
  /** Of all pages, 0 to 1. */
  share: number;
}

export function classShares(pages: PageCounts | undefined): ClassShare[] {
  const counted = PAGE_CLASSES.map((name) => ({ name, pages: pages?.[name] ?? 0n }));
  const all = counted.reduce((sum, { pages }) => sum + pages, 0n);
  return counted.map(({ name, pages }) => ({
    name,
    pages,
    bytes: pages * PAGE_BYTES,
    share: all === 0n ? 0 : Number(pages) / Number(all),
  }));
}

/** The steps of every migration, as workers name them. */
export const PHASES = ["connect", "disk-sync", "memory", "switchover", "hand-over"] as const;

/** What it is doing: the worker's phase while it runs, the state's word otherwise. */
export function phaseOf(migration: Migration): string {
  const phase = migration.progress?.phase ?? "";
  return migration.state === MigrationState.RUNNING && phase !== "" ? phase : migrationLook(migration.state).word;
}

/** The step to mark; empty before the first. Past the commit point it is the last, whatever was heard of the workers. */
export function stepOf(migration: Migration): string {
  return migration.state === MigrationState.COMMITTED ? "hand-over" : (migration.progress?.phase ?? "");
}

/** How far the present phase is, 0 to 1; undefined when it has no measure. */
export function fractionOf(progress: MigrationProgress | undefined): number | undefined {
  if (progress === undefined) return undefined;
  switch (progress.phase) {
    case "disk-sync":
      return ratio(progress.diskDoneBytes, progress.diskTotalBytes);
    case "memory":
    case "switchover":
      return ratio(progress.memoryBytes, progress.memoryBytes + progress.remainingBytes);
    default:
      return undefined;
  }
}

function ratio(done: bigint, whole: bigint): number | undefined {
  return whole === 0n ? undefined : Math.min(1, Number(done) / Number(whole));
}

export interface Figure {
  label: string;
  value: string;
}

/** The figures beside the bar, most telling first. */
export function liveFigures(progress: MigrationProgress): Figure[] {
  const disk = progress.phase === "disk-sync";
  const done = disk ? progress.diskDoneBytes : progress.memoryBytes;
  const sent = disk ? progress.diskWanBytes : progress.wanBytes;
  const figures = [
    { label: disk ? "disk read" : "memory read", value: bytes(done) },
    { label: "on the wire", value: bytes(sent) },
    { label: "rate", value: rate(progress.rateBps) },
    { label: "elapsed", value: duration(progress.elapsedMs) },
  ];
  if (progress.etaMs !== undefined) figures.push({ label: "time left", value: duration(progress.etaMs) });
  if (progress.waitsFor !== "") figures.push({ label: "switchover waits for", value: progress.waitsFor });
  return figures;
}

export interface Outlook {
  sentence: string;
  /** It will not converge as it goes. */
  alarming: boolean;
}

/** Whether its memory converges, in one sentence; undefined while nobody can say. */
export function outlookOf(progress: MigrationProgress | undefined): Outlook | undefined {
  const { sentence = "", outlook } = progress?.convergence ?? {};
  if (sentence === "") return undefined;
  return { sentence: `${sentence.charAt(0).toUpperCase()}${sentence.slice(1)}.`, alarming: outlook === Convergence.NO };
}

/** The figures of a migration that has ended; none without a record. */
export function recordFigures(migration: Migration): Figure[] {
  const record = migration.record;
  if (record === undefined) return [];
  const factor = record.wanBytes === 0n ? "" : ` (1/${(Number(record.memoryBytes) / Number(record.wanBytes)).toFixed(1)})`;
  return [
    { label: "total time", value: duration(record.totalTimeMs) },
    { label: "memory time", value: duration(record.memoryTimeMs) },
    { label: "downtime", value: duration(record.downtimeMs) },
    { label: "memory moved", value: bytes(record.memoryBytes) },
    { label: "memory on the wire", value: bytes(record.wanBytes) + factor },
    { label: "disk on the wire", value: bytes(record.diskWanBytes) },
    { label: "stream digest", value: record.streamDigestMatch ? "equal" : "DIFFERENT" },
    ...measures(record.convergence),
  ];
}

/** What was done for it to converge; nothing when nothing was. */
function measures(convergence: ConvergenceRecord | undefined): Figure[] {
  if (convergence === undefined || convergence.acted.length === 0) return [];
  const { greatestThrottlePercent: percent, permittedPauseMs } = convergence;
  return [
    { label: "guest slowed down", value: percent === 0 ? "not at all" : `by ${percent} % at most` },
    { label: "permitted pause", value: duration(permittedPauseMs) },
  ];
}

/** Ids that are known here but no longer listed. */
export function unlisted(known: Iterable<string>, listed: Migration[]): string[] {
  const ids = new Set(listed.map(({ id }) => id));
  return [...known].filter((id) => !ids.has(id));
}

/** Newest first. */
export function byAge(migrations: Iterable<Migration>): Migration[] {
  return [...migrations].sort((a, b) => Number(b.createdUnixMs - a.createdUnixMs) || b.id.localeCompare(a.id));
}

/** Has the scheduler not let it begin? */
export const isQueued = (state: MigrationState): boolean => state === MigrationState.REQUESTED;

const USUAL_PRIORITY = 50;

/** What becomes of it if it does not converge; empty for the usual, which is to say so and go on. */
function policyOf({ convergence, longestPauseMs }: MigrationTerms): string {
  switch (convergence) {
    case ConvergencePolicy.THROTTLE:
      return "slows its guest down if it does not converge";
    case ConvergencePolicy.LONGER_PAUSE:
      return `stands still for ${duration(longestPauseMs)} at most if it does not converge`;
    case ConvergencePolicy.GIVE_UP:
      return "gives up if it does not converge";
    case ConvergencePolicy.WAIT:
    case ConvergencePolicy.UNSPECIFIED:
      return "";
  }
}

/** What was asked for beyond the usual; empty when nothing was. */
export function termsOf({ terms }: Migration): string {
  if (terms === undefined) return "";
  const parts = [
    terms.priority === USUAL_PRIORITY ? "" : `priority ${terms.priority}`,
    terms.window === "" ? "" : `${terms.window} UTC`,
    terms.rateBps === 0n ? "" : `at most ${rate(terms.rateBps)}`,
    terms.drains ? "empties its place" : "",
    policyOf(terms),
  ];
  return parts.filter((part) => part !== "").join(" · ");
}
