import { expect, test } from "vitest";

import { ago, bytes, count, duration, percent, rate } from "./format.ts";

test.each([
  [0n, "0 B"],
  [999n, "999 B"],
  [1000n, "0.98 KiB"],
  [73_610_035n, "70.2 MiB"],
  [1023n << 20n, "1.00 GiB"],
])("%s bytes read %s", (value, text) => expect(bytes(value)).toBe(text));

test.each([
  [0n, "0 bit/s"],
  [142_000_000n, "142 Mbit/s"],
  [999_600n, "1.00 Mbit/s"],
])("%s bit/s read %s", (value, text) => expect(rate(value)).toBe(text));

test.each([
  [312n, "312 ms"],
  [4_896n, "4.90 s"],
  [59_950n, "1 min 0 s"],
  [125_000n, "2 min 5 s"],
  [12_000_000n, "3 h 20 min"],
])("%s ms read %s", (value, text) => expect(duration(value)).toBe(text));

test("counts, shares and times", () => {
  expect(count(1_405_574n)).toBe("1,405,574");
  expect([percent(0), percent(0.0001), percent(0.0234), percent(0.773)]).toEqual(["0 %", "< 0.1 %", "2.3 %", "77 %"]);
  const now = 1_700_000_000_000;
  expect([ago(0n, now), ago(BigInt(now - 1_000), now), ago(BigInt(now - 125_000), now)]).toEqual(["never", "just now", "2 min ago"]);
});
