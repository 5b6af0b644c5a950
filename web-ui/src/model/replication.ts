// How a protected replica stands, as words and a tone. Pure.
import { type Replica, ReplicationPhase, type ReplicationStatus } from "../gen/pageport/v1/replication_pb.ts";
import { bytes, duration, percent } from "./format.ts";
import type { Look } from "./states.ts";

const PHASE = {
  [ReplicationPhase.UNSPECIFIED]: { word: "?", tone: "warn" },
  [ReplicationPhase.WAITING]: { word: "waiting", tone: "warn" },
  [ReplicationPhase.FULL_COPY]: { word: "full copy", tone: "busy" },
  [ReplicationPhase.INCREMENT]: { word: "up to date", tone: "good" },
  [ReplicationPhase.IDLE]: { word: "up to date", tone: "good" },
  [ReplicationPhase.MIGRATING]: { word: "migrating", tone: "busy" },
} satisfies Record<ReplicationPhase, Look>;

const MISSED: Look = { word: "target missed", tone: "bad" };

/** The badge of a protected replica; undefined for one that is left as it is. */
export function protectionLook(replica: Replica): Look | undefined {
  if (replica.protection === undefined) return undefined;
  if (replica.replication?.rpoMissed) return MISSED;
  const phase = replica.replication?.phase ?? ReplicationPhase.UNSPECIFIED;
  return PHASE[phase] ?? PHASE[ReplicationPhase.UNSPECIFIED];
}

/** Lag against the target, the worst it has been, and why points are not quiesced as ordered; empty for a replica that is left as it is. */
export function protectionFacts(replica: Replica): string {
  const { protection, replication } = replica;
  if (protection === undefined) return "";
  const target = `target ${duration(protection.rpoMs)}`;
  if (replication?.newest === undefined) {
    const { doneBytes = 0n, totalBytes = 0n } = replication ?? {};
    const copied = totalBytes === 0n ? "" : `${percent(Math.min(1, Number(doneBytes) / Number(totalBytes)))} of ${bytes(totalBytes)}, `;
    return `no recovery point yet, ${copied}${target}`;
  }
  const worst = replication.windowMs === 0n ? "" : `, worst ${duration(replication.worstRpoMs)} in ${duration(replication.windowMs)}`;
  const quiescing = replication.quiesceProblem === "" ? "" : `; quiescing: ${replication.quiesceProblem}`;
  return `point ${replication.newest.number}, ${duration(replication.lagMs)} behind, ${target}${worst}${quiescing}${scrubFacts(replication)}`;
}

/** How far a scrub is; of one that has ended only what it found. */
function scrubFacts({ scrub, lastScrub }: ReplicationStatus): string {
  if (scrub !== undefined) {
    const { doneBytes, totalBytes, differentBlocks, repairedBlocks } = scrub;
    const done = totalBytes === 0n ? "0 %" : percent(Math.min(1, Number(doneBytes) / Number(totalBytes)));
    const found = differentBlocks === 0n ? "" : `, ${differentBlocks} blocks differ, ${repairedBlocks} repaired`;
    return `; scrub ${done}${found}`;
  }
  if (lastScrub === undefined || lastScrub.differentBlocks === 0n) return "";
  return `; the last scrub repaired ${lastScrub.repairedBlocks} of ${lastScrub.differentBlocks} damaged blocks`;
}
