// Sizes, rates, durations and counts as people read them. The words and roundings are those of pageportctl.

type Amount = bigint | number;

const BYTES = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
const RATES = ["bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s", "Pbit/s"];

export const bytes = (value: Amount): string => scaled(Number(value), 1024, BYTES);
export const rate = (bps: Amount): string => scaled(Number(bps), 1000, RATES);

function scaled(value: number, base: number, units: string[]): string {
  let unit = 0;
  // 999.5 would round up to four digits.
  while (value >= Math.min(base, 999.5) && unit + 1 < units.length) {
    value /= base;
    unit += 1;
  }
  return `${value.toFixed(unit === 0 ? 0 : decimals(value))} ${units[unit]}`;
}

function decimals(value: number): number {
  if (value < 9.995) return 2;
  return value < 99.95 ? 1 : 0;
}

export function duration(milliseconds: Amount): string {
  const ms = Number(milliseconds);
  if (ms < 1_000) return `${Math.round(ms)} ms`;
  if (ms < 59_950) return `${(ms / 1000).toFixed(decimals(ms / 1000))} s`;
  const seconds = Math.ceil(ms / 1000);
  if (ms < 3_600_000) return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
  return `${Math.floor(ms / 3_600_000)} h ${Math.floor(ms / 60_000) % 60} min`;
}

export const count = (value: Amount): string => Number(value).toLocaleString("en-US");

export function percent(part: number): string {
  if (part > 0 && part < 0.001) return "< 0.1 %";
  return `${(part * 100).toFixed(part > 0 && part < 0.1 ? 1 : 0)} %`;
}

/** How long ago, in the coarseness that a person needs. */
export function ago(unixMs: Amount, nowUnixMs: number): string {
  const ms = nowUnixMs - Number(unixMs);
  if (Number(unixMs) === 0) return "never";
  if (ms < 5_000) return "just now";
  if (ms < 60_000) return `${Math.floor(ms / 1000)} s ago`;
  if (ms < 3_600_000) return `${Math.floor(ms / 60_000)} min ago`;
  if (ms < 86_400_000) return `${Math.floor(ms / 3_600_000)} h ago`;
  return `${Math.floor(ms / 86_400_000)} d ago`;
}
