// A server stream that is opened again whenever it breaks, until it is aborted or has no more to say.
//
//   connecting ─▶ live ─▶ (broken) lost, waiting ─▶ connecting ─▶ live ...
//
// Every watch of the API begins with the present state, so nothing has to be remembered over a loss.
// A stream that is silent for IDLE_LIMIT_MS is opened again: a browser never notices a peer that vanished without a word.
// The pause doubles from FIRST_PAUSE_MS to MAX_PAUSE_MS and falls back once a message has come.

export const FIRST_PAUSE_MS = 500;
export const MAX_PAUSE_MS = 8_000;
export const IDLE_LIMIT_MS = 45_000;

export type Connection =
  | { kind: "connecting" }
  | { kind: "live" }
  | { kind: "lost"; reason: string; pauseMs: number };

export interface WatchOptions<T> {
  open: (signal: AbortSignal) => AsyncIterable<T>;
  onMessage: (message: T) => void;
  onConnection?: (connection: Connection) => void;
  /** Does this message end what is watched? Then the stream's end is no loss. */
  isLast?: (message: T) => boolean;
  /** Is this failure final, so that asking again is of no use? */
  isFinal?: (error: unknown) => boolean;
  signal: AbortSignal;
  idleLimitMs?: number;
  /** Waits, or returns early when aborted; tests bring their own. */
  pause?: (ms: number, signal: AbortSignal) => Promise<void>;
}

export function pauseAfter(losses: number): number {
  return Math.min(FIRST_PAUSE_MS * 2 ** Math.max(0, losses - 1), MAX_PAUSE_MS);
}

export async function watch<T>(options: WatchOptions<T>): Promise<void> {
  const { onConnection, isFinal, signal, pause = sleep } = options;
  let losses = 0;
  onConnection?.({ kind: "connecting" });
  while (!signal.aborted) {
    const attempt = await once(options, () => {
      losses = 0;
      onConnection?.({ kind: "live" });
    });
    if (signal.aborted || attempt.kind === "done") return;
    if (attempt.kind === "failed" && isFinal?.(attempt.error)) return;
    if (attempt.kind === "idle" && attempt.messages > 0) continue;
    losses += 1;
    const pauseMs = pauseAfter(losses);
    const reason = attempt.kind === "failed" ? describe(attempt.error) : REASONS[attempt.kind];
    onConnection?.({ kind: "lost", reason, pauseMs });
    await pause(pauseMs, signal);
  }
}

const REASONS = { ended: "the controller ended the stream", idle: "the controller says nothing" };

type Attempt =
  | { kind: "done" | "ended" }
  | { kind: "idle"; messages: number }
  | { kind: "failed"; error: unknown };

async function once<T>(options: WatchOptions<T>, onLive: () => void): Promise<Attempt> {
  const { open, onMessage, isLast, signal, idleLimitMs = IDLE_LIMIT_MS } = options;
  const idle = new AbortController();
  let messages = 0;
  let timer = setTimeout(() => idle.abort(), idleLimitMs);
  try {
    for await (const message of open(AbortSignal.any([signal, idle.signal]))) {
      clearTimeout(timer);
      timer = setTimeout(() => idle.abort(), idleLimitMs);
      messages += 1;
      onLive();
      onMessage(message);
      if (isLast?.(message)) return { kind: "done" };
    }
    return { kind: "ended" };
  } catch (error) {
    return idle.signal.aborted ? { kind: "idle", messages } : { kind: "failed", error };
  } finally {
    clearTimeout(timer);
  }
}

export function describe(error: unknown): string {
  if (error instanceof Error) {
    const raw = (error as { rawMessage?: unknown }).rawMessage;
    const text = typeof raw === "string" && raw !== "" ? raw : error.message;
    // What browsers say when a server is not there.
    return /failed to fetch|networkerror|load failed|network error/i.test(text) ? "the controller cannot be reached" : text;
  }
  return String(error);
}

function sleep(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const done = () => {
      clearTimeout(timer);
      signal.removeEventListener("abort", done);
      resolve();
    };
    const timer = setTimeout(done, ms);
    signal.addEventListener("abort", done);
  });
}
