import { describe as group, expect, test } from "vitest";

import { type Connection, describe, MAX_PAUSE_MS, pauseAfter, watch } from "./watch.ts";

async function* say(...steps: (string | Error)[]): AsyncGenerator<string> {
  for (const step of steps) {
    if (step instanceof Error) throw step;
    yield step;
  }
}

function aborted(signal: AbortSignal): Promise<never> {
  return new Promise((_, reject) => signal.addEventListener("abort", () => reject(new Error("aborted"))));
}

async function follow(streams: AsyncIterable<string>[], stopAfterPauses: number) {
  const abort = new AbortController();
  const [messages, connections, pauses]: [string[], Connection[], number[]] = [[], [], []];
  await watch<string>({
    open: () => streams.shift() ?? say(new Error("no more")),
    onMessage: (message) => messages.push(message),
    onConnection: (connection) => connections.push(connection),
    isLast: (message) => message === "end",
    isFinal: (error) => error instanceof Error && error.message === "final",
    signal: abort.signal,
    pause: async (ms) => {
      pauses.push(ms);
      if (pauses.length >= stopAfterPauses) abort.abort();
    },
  });
  return { messages, kinds: connections.map((connection) => connection.kind), connections, pauses };
}

group("watch", () => {
  test("a broken stream is opened again and goes on", async () => {
    const seen = await follow([say("a", new Error("gone")), say("b", "end")], 9);
    expect(seen.messages).toEqual(["a", "b", "end"]);
    expect(seen.kinds).toEqual(["connecting", "live", "lost", "live", "live"]);
    expect(seen.connections[2]).toEqual({ kind: "lost", reason: "gone", pauseMs: 500 });
  });

  test("pauses grow while nothing comes, and fall back after a message", async () => {
    const gone = () => say(new Error("gone"));
    const seen = await follow([gone(), gone(), gone(), say("a", new Error("gone")), gone()], 5);
    expect(seen.pauses).toEqual([500, 1000, 2000, 500, 1000]);
    expect(pauseAfter(99)).toBe(MAX_PAUSE_MS);
  });

  test("a stream that ends early counts as lost", async () => {
    const seen = await follow([say("a")], 1);
    expect(seen.kinds).toEqual(["connecting", "live", "lost"]);
  });

  test("a silent stream is opened again, and one that never spoke counts as lost", async () => {
    const streams = [
      async function* (signal: AbortSignal) {
        yield "a";
        await aborted(signal);
      },
      (signal: AbortSignal) => ({ [Symbol.asyncIterator]: () => ({ next: () => aborted(signal) }) }),
      (): AsyncIterable<string> => say("end"),
    ];
    const kinds: string[] = [];
    await watch<string>({
      open: (signal) => streams.shift()?.(signal) ?? say(new Error("no more")),
      onMessage: () => undefined,
      onConnection: (connection) => kinds.push(connection.kind === "lost" ? connection.reason : connection.kind),
      isLast: (message) => message === "end",
      idleLimitMs: 5,
      signal: new AbortController().signal,
      pause: async () => undefined,
    });
    expect(kinds).toEqual(["connecting", "live", "the controller says nothing", "live"]);
  });

  test("a final failure ends the watch without a word", async () => {
    const seen = await follow([say(new Error("final"))], 9);
    expect(seen.kinds).toEqual(["connecting"]);
    expect(seen.pauses).toEqual([]);
  });
});

group("describe", () => {
  test("what browsers say of an absent server is put in words", () => {
    expect(describe(new TypeError("Failed to fetch"))).toBe("the controller cannot be reached");
    expect(describe(new Error("there is no leader"))).toBe("there is no leader");
    expect(describe("odd")).toBe("odd");
  });
});
