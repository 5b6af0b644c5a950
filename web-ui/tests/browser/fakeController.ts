// The web port of a controller, faked: the built page and gRPC-Web on one port, answers decided by the test.
import { createConnectRouter } from "@connectrpc/connect";
import { readFile } from "node:fs/promises";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { extname, join, normalize } from "node:path";
import { fileURLToPath } from "node:url";

import { FleetService, type WatchFleetResponse } from "../../src/gen/pageport/v1/fleet_pb.ts";
import { type Migration, MigrationService } from "../../src/gen/pageport/v1/migration_pb.ts";

const DIST = fileURLToPath(new URL("../../dist/", import.meta.url));
const TYPES: Record<string, string> = { ".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml" };

/** A value that watchers see now and after each change. */
class Cell<T> {
  #value: T;
  #wake: (() => void)[] = [];

  constructor(value: T) {
    this.#value = value;
  }

  get value(): T {
    return this.#value;
  }

  set(value: T): void {
    this.#value = value;
    for (const wake of this.#wake.splice(0)) wake();
  }

  async *follow(signal: AbortSignal): AsyncGenerator<T> {
    while (!signal.aborted) {
      yield this.#value;
      await new Promise<void>((resolve) => {
        this.#wake.push(resolve);
        signal.addEventListener("abort", () => resolve(), { once: true });
      });
    }
  }
}

export class FakeController {
  readonly fleet: Cell<WatchFleetResponse>;
  /** All migrations; watchers are told all of them at first, then what has changed. */
  readonly migrations: Cell<Migration[]>;
  #server: Server | undefined;
  #port = 0;

  constructor(fleet: WatchFleetResponse, migrations: Migration[]) {
    this.fleet = new Cell(fleet);
    this.migrations = new Cell(migrations);
  }

  get url(): string {
    return `http://127.0.0.1:${this.#port}/`;
  }

  async start(): Promise<void> {
    const router = createConnectRouter({ grpcWeb: true, grpc: false, connect: false });
    router.service(FleetService, {
      watchFleet: (_, { signal }) => this.fleet.follow(signal),
    });
    router.service(MigrationService, {
      watchMigrations: async function* (this: FakeController, _: unknown, { signal }: { signal: AbortSignal }) {
        let told: Migration[] = [];
        for await (const now of this.migrations.follow(signal)) {
          const forgottenIds = told.map(({ id }) => id).filter((id) => now.every((migration) => migration.id !== id));
          yield { migrations: now.filter((migration) => !told.includes(migration)), forgottenIds };
          told = now;
        }
      }.bind(this),
    });
    const handlers = new Map(router.handlers.map((handler) => [handler.requestPath, handler]));
    const server = createServer((request, response) => {
      const handler = handlers.get(request.url ?? "");
      const answered = handler === undefined ? serveFile(request, response) : call(handler, request, response);
      // A page that went away in mid-stream is no failure of the test.
      answered.catch(() => response.destroy());
    });
    await new Promise<void>((resolve) => server.listen(this.#port, "127.0.0.1", resolve));
    this.#port = (server.address() as AddressInfo).port;
    this.#server = server;
  }

  /** Goes away, with all its connections. `start` brings it back at the same address. */
  async stop(): Promise<void> {
    const server = this.#server;
    if (server === undefined) return;
    this.#server = undefined;
    const closed = new Promise((resolve) => server.close(resolve));
    server.closeAllConnections();
    await closed;
  }
}

type Handler = ReturnType<typeof createConnectRouter>["handlers"][number];

async function call(handler: Handler, request: IncomingMessage, response: ServerResponse): Promise<void> {
  const gone = new AbortController();
  response.on("close", () => gone.abort());
  const header = new Headers();
  for (const [name, value] of Object.entries(request.headers)) if (typeof value === "string") header.set(name, value);
  const answer = await handler({
    httpVersion: request.httpVersion,
    url: new URL(request.url ?? "/", "http://127.0.0.1").href,
    method: request.method ?? "",
    header,
    body: request,
    signal: gone.signal,
  });
  response.writeHead(answer.status, Object.fromEntries(answer.header ?? []));
  // Trailers of gRPC-Web are part of the body.
  if (answer.body !== undefined) for await (const chunk of answer.body as AsyncIterable<Uint8Array>) response.write(chunk);
  response.end();
}

async function serveFile(request: IncomingMessage, response: ServerResponse): Promise<void> {
  const path = normalize(new URL(request.url ?? "/", "http://x").pathname);
  const file = join(DIST, path === "/" ? "index.html" : path);
  try {
    const content = await readFile(file);
    response.writeHead(200, { "content-type": TYPES[extname(file)] ?? "application/octet-stream" }).end(content);
  } catch {
    response.writeHead(404).end();
  }
}
