// States as words and tones. Each map must name every state: the compiler refuses a new one without its entry.
import { Takeover_Ground, VmState } from "../gen/pageport/v1/fleet_pb.ts";
import { MigrationState } from "../gen/pageport/v1/migration_pb.ts";
import { type Replica, ReplicaState } from "../gen/pageport/v1/replication_pb.ts";

/** What a state means for whoever looks: fine, under way, look here, broken, or nothing much. */
export type Tone = "good" | "busy" | "warn" | "bad" | "quiet";

export interface Look {
  word: string;
  tone: Tone;
}

const VM = {
  [VmState.UNSPECIFIED]: { word: "?", tone: "warn" },
  [VmState.UNKNOWN]: { word: "unknown", tone: "warn" },
  [VmState.STOPPED]: { word: "stopped", tone: "quiet" },
  [VmState.STARTING]: { word: "starting", tone: "busy" },
  [VmState.RUNNING]: { word: "running", tone: "good" },
  [VmState.PAUSED]: { word: "paused", tone: "warn" },
  [VmState.MIGRATING]: { word: "migrating", tone: "busy" },
  [VmState.CRASHED]: { word: "crashed", tone: "bad" },
  [VmState.IN_DOUBT]: { word: "in doubt", tone: "bad" },
} satisfies Record<VmState, Look>;

const MIGRATION = {
  [MigrationState.UNSPECIFIED]: { word: "?", tone: "warn" },
  [MigrationState.REQUESTED]: { word: "queued", tone: "quiet" },
  [MigrationState.RUNNING]: { word: "running", tone: "busy" },
  [MigrationState.CANCELLING]: { word: "cancelling", tone: "warn" },
  [MigrationState.COMMITTED]: { word: "committed", tone: "busy" },
  [MigrationState.COMPLETED]: { word: "completed", tone: "good" },
  [MigrationState.FAILED]: { word: "failed", tone: "bad" },
  [MigrationState.CANCELLED]: { word: "cancelled", tone: "quiet" },
} satisfies Record<MigrationState, Look>;

const REPLICA = {
  [ReplicaState.UNSPECIFIED]: { word: "?", tone: "warn" },
  [ReplicaState.SEEDING]: { word: "seeding", tone: "busy" },
  [ReplicaState.SEEDED]: { word: "seeded", tone: "good" },
  [ReplicaState.FAILED]: { word: "failed", tone: "bad" },
  [ReplicaState.OUTDATED]: { word: "outdated", tone: "warn" },
} satisfies Record<ReplicaState, Look>;

const FLATTENING: Look = { word: "flattening", tone: "busy" };

const ENDED = {
  [MigrationState.UNSPECIFIED]: false,
  [MigrationState.REQUESTED]: false,
  [MigrationState.RUNNING]: false,
  [MigrationState.CANCELLING]: false,
  [MigrationState.COMMITTED]: false,
  [MigrationState.COMPLETED]: true,
  [MigrationState.FAILED]: true,
  [MigrationState.CANCELLED]: true,
} satisfies Record<MigrationState, boolean>;

const GROUND = {
  [Takeover_Ground.UNSPECIFIED]: "?",
  [Takeover_Ground.LEASE_EXPIRED]: "its lease had run out",
  [Takeover_Ground.FENCED]: "its host was fenced",
  [Takeover_Ground.OVERRIDE]: "forced",
} satisfies Record<Takeover_Ground, string>;

// A newer controller may send a number that this page does not know.
const NEWER: Look = { word: "?", tone: "warn" };

export const vmLook = (state: VmState): Look => VM[state] ?? NEWER;
export const migrationLook = (state: MigrationState): Look => MIGRATION[state] ?? NEWER;
/** A replica whose image is still becoming raw is none yet, whatever it will be. */
export const replicaLook = ({ state, flattening }: Pick<Replica, "state" | "flattening">): Look =>
  flattening === undefined ? (REPLICA[state] ?? NEWER) : FLATTENING;
export const groundWords = (ground: Takeover_Ground): string => GROUND[ground] ?? NEWER.word;
export const hasEnded = (state: MigrationState): boolean => ENDED[state] ?? false;
