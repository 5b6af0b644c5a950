// The state of the page, kept up to date from the controller.
//
//   WatchFleet      ──▶ sites, workers, VMs
//   WatchMigrations ──▶ all migrations, then each that changes
//
// Two streams, however many VMs move: browsers allow about six HTTP/1.1 connections to a host, over all its pages.
import { createClient, type Transport } from "@connectrpc/connect";

import { SvelteMap } from "svelte/reactivity";

import { FleetService, type FoundVm, type Site, type Vm, type Worker } from "../gen/pageport/v1/fleet_pb.ts";
import { type Migration, MigrationService, type WatchMigrationsResponse } from "../gen/pageport/v1/migration_pb.ts";
import { unlisted } from "../model/migration.ts";
import { type Connection, watch } from "./watch.ts";

const CLOCK_MS = 5_000;

export class Live {
  sites = $state.raw<Site[]>([]);
  workers = $state.raw<Worker[]>([]);
  vms = $state.raw<Vm[]>([]);
  found = $state.raw<FoundVm[]>([]);
  readonly migrations = new SvelteMap<string, Migration>();
  connection = $state.raw<Connection>({ kind: "connecting" });
  /** The fleet has been seen at least once. */
  loaded = $state(false);
  /** The migrations have been seen at least once. */
  migrationsLoaded = $state(false);
  /** Why what is shown of migrations may be old; empty while it is not. */
  migrationsProblem = $state("");
  /** Coarse present time, for "3 min ago". */
  now = $state(Date.now());

  #transport: Transport;

  constructor(transport: Transport) {
    this.#transport = transport;
  }

  /** Begins to follow the fleet; the returned function ends it. */
  start(): () => void {
    const abort = new AbortController();
    const clock = setInterval(() => (this.now = Date.now()), CLOCK_MS);
    const fleet = createClient(FleetService, this.#transport);
    void watch({
      open: (signal) => fleet.watchFleet({}, { signal }),
      onMessage: (message) => {
        this.sites = message.sites;
        this.workers = message.workers;
        this.vms = message.vms;
        this.found = message.found;
        this.loaded = true;
        this.now = Date.now();
      },
      onConnection: (connection) => (this.connection = connection),
      signal: abort.signal,
    });

    const migrations = createClient(MigrationService, this.#transport);
    let isFirst = true;
    void watch({
      open: (signal) => {
        isFirst = true;
        return migrations.watchMigrations({}, { signal });
      },
      onMessage: (message) => {
        this.#apply(message, isFirst);
        isFirst = false;
      },
      onConnection: (connection) => (this.migrationsProblem = connection.kind === "lost" ? connection.reason : ""),
      signal: abort.signal,
    });
    return () => {
      clearInterval(clock);
      abort.abort();
    };
  }

  /** The first message of a stream is everything; the others say what has changed. */
  #apply({ migrations, forgottenIds }: WatchMigrationsResponse, isFirst: boolean): void {
    const gone = isFirst ? unlisted(this.migrations.keys(), migrations) : forgottenIds;
    for (const id of gone) this.migrations.delete(id);
    for (const migration of migrations) this.migrations.set(migration.id, migration);
    this.migrationsLoaded = true;
  }
}
