// The state of the page, kept up to date from the controller.
//
//   WatchFleet ──▶ sites, workers, VMs ──(migrations that VMs name)──▶ WatchMigration each ──▶ migrations
//   ListMigrations, on every (re)connection and whenever one has ended ─────────────────────────▲
//
// One stream carries the fleet. Browsers allow about six HTTP/1.1 connections to a host, so at most MAX_WATCHED
// migrations have a stream of their own; the others are as fresh as the last list.
import { Code, ConnectError, createClient, type Transport } from "@connectrpc/connect";

import { SvelteMap } from "svelte/reactivity";

import { FleetService, type Site, type Vm, type Worker } from "../gen/pageport/v1/fleet_pb.ts";
import { type Migration, MigrationService } from "../gen/pageport/v1/migration_pb.ts";
import { migrationsUnderWay } from "../model/fleet.ts";
import { unlisted } from "../model/migration.ts";
import { hasEnded } from "../model/states.ts";
import { type Connection, describe, watch } from "./watch.ts";

export const MAX_WATCHED = 3;
const LIST_TIMEOUT_MS = 10_000;
const CLOCK_MS = 5_000;

export class Live {
  sites = $state.raw<Site[]>([]);
  workers = $state.raw<Worker[]>([]);
  vms = $state.raw<Vm[]>([]);
  readonly migrations = new SvelteMap<string, Migration>();
  connection = $state.raw<Connection>({ kind: "connecting" });
  /** The fleet has been seen at least once. */
  loaded = $state(false);
  /** Why past migrations are not shown; empty when they are. */
  listProblem = $state("");
  /** Coarse present time, for "3 min ago". */
  now = $state(Date.now());

  // Nothing is drawn from it.
  // eslint-disable-next-line svelte/prefer-svelte-reactivity
  #watched = new Set<string>();
  #transport: Transport;

  constructor(transport: Transport) {
    this.#transport = transport;
  }

  /** Begins to follow the fleet; the returned function ends it. */
  start(): () => void {
    const abort = new AbortController();
    const fleet = createClient(FleetService, this.#transport);
    const clock = setInterval(() => (this.now = Date.now()), CLOCK_MS);
    let listed = false;
    void watch({
      open: (signal) => fleet.watchFleet({}, { signal }),
      onMessage: (message) => {
        this.sites = message.sites;
        this.workers = message.workers;
        this.vms = message.vms;
        this.loaded = true;
        this.now = Date.now();
        this.#follow(migrationsUnderWay(message.vms), abort.signal);
        if (!listed) {
          listed = true;
          void this.#list(abort.signal);
        }
      },
      onConnection: (connection) => {
        if (connection.kind === "lost") listed = false;
        this.connection = connection;
      },
      signal: abort.signal,
    });
    return () => {
      clearInterval(clock);
      abort.abort();
    };
  }

  #follow(ids: string[], signal: AbortSignal): void {
    for (const id of ids) {
      if (this.#watched.has(id) || this.#watched.size >= MAX_WATCHED || this.#ended(id)) continue;
      this.#watched.add(id);
      const migrations = createClient(MigrationService, this.#transport);
      const watching = watch({
        open: (signal) => migrations.watchMigration({ id }, { signal }),
        onMessage: ({ migration }) => migration && this.migrations.set(id, migration),
        isLast: ({ migration }) => migration !== undefined && hasEnded(migration.state),
        isFinal: (error) => ConnectError.from(error).code === Code.NotFound,
        signal,
      });
      void watching.then(() => {
        this.#watched.delete(id);
        if (!signal.aborted) void this.#list(signal);
      });
    }
  }

  #ended(id: string): boolean {
    const migration = this.migrations.get(id);
    return migration !== undefined && hasEnded(migration.state);
  }

  async #list(signal: AbortSignal): Promise<void> {
    try {
      const client = createClient(MigrationService, this.#transport);
      const response = await client.listMigrations({}, { signal, timeoutMs: LIST_TIMEOUT_MS });
      for (const id of unlisted(this.migrations.keys(), response.migrations)) {
        if (!this.#watched.has(id)) this.migrations.delete(id);
      }
      for (const migration of response.migrations) {
        // What has a stream of its own is fresher than the list.
        if (!this.#watched.has(migration.id) || !this.migrations.has(migration.id)) this.migrations.set(migration.id, migration);
      }
      this.listProblem = "";
    } catch (error) {
      if (!signal.aborted) this.listProblem = describe(error);
    }
  }
}
