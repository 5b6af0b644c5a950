// The built page in a real browser, against a fake controller that speaks gRPC-Web.
//
// PAGEPORT_SCREENSHOTS=FOLDER also saves what it looks like, light and dark, wide and narrow.
// Needs a chromium: CHROMIUM names it, otherwise the system's is used (tools/install-chromium.sh).
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { create } from "@bufbuild/protobuf";
import { type BrowserContext, chromium, type Page } from "playwright-core";
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from "vitest";

import { FoundVmSchema } from "../../src/gen/pageport/v1/fleet_pb.ts";
import { FakeController } from "./fakeController.ts";
import { completed, failedBefore, fleet, inMemoryPhase, notConverging } from "./fleet.ts";

const DEADLINE_MS = 15_000;
const FLAGS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];
const profile = mkdtempSync(join(tmpdir(), "pageport-browser-"));
const screenshots = process.env["PAGEPORT_SCREENSHOTS"];

let context: BrowserContext;
let page: Page;
let controller: FakeController;
let problems: string[];

beforeAll(async () => {
  context = await chromium.launchPersistentContext(profile, {
    executablePath: process.env["CHROMIUM"] ?? "/usr/bin/chromium",
    headless: true,
    args: FLAGS,
    viewport: { width: 1280, height: 900 },
  });
});
afterAll(async () => {
  await context?.close();
  rmSync(profile, { recursive: true, force: true, maxRetries: 5 });
});

beforeEach(async () => {
  controller = new FakeController(fleet("0199-m1"), [inMemoryPhase(), failedBefore()]);
  await controller.start();
  page = await context.newPage();
  page.setDefaultTimeout(DEADLINE_MS);
  problems = [];
  page.on("pageerror", (error) => problems.push(String(error)));
  page.on("request", (request) => {
    if (!request.url().startsWith(controller.url)) problems.push(`request to ${request.url()}`);
  });
});
afterEach(async () => {
  await page.close();
  await controller.stop();
  expect(problems).toEqual([]);
});

const sees = (text: string | RegExp) => page.getByText(text).first().waitFor();

async function shoot(name: string): Promise<void> {
  if (screenshots === undefined) return;
  for (const scheme of ["light", "dark"] as const) {
    await page.emulateMedia({ colorScheme: scheme, reducedMotion: "reduce" });
    for (const width of [1280, 420]) {
      await page.setViewportSize({ width, height: 900 });
      await page.screenshot({ path: join(screenshots, `${name}-${scheme}-${width}.png`), fullPage: true });
    }
  }
}

test("sites, VMs, replicas and a running migration are shown", async () => {
  await page.goto(controller.url);
  await page.getByRole("status").getByText("live", { exact: true }).waitFor();

  const site = page.getByRole("article", { name: "Site c" });
  await site.getByText("not reachable").waitFor();
  await site.getByText("last seen 2 min ago").waitFor();

  const web = page.getByRole("row", { name: /^web/ });
  await web.getByText("migrating").waitFor();
  await web.getByText("seeded").waitFor();
  expect(await web.getByRole("progressbar", { name: "Seed of web at c" }).getAttribute("aria-valuenow")).toBe("25");
  const db = page.getByRole("row", { name: /^db/ });
  await db.getByText("target missed").waitFor();
  await db.getByText("point 41, 1 min 35 s behind, target 30.0 s").waitFor();
  await page.getByRole("row", { name: /^queue/ }).getByText("QEMU ended with signal 9").waitFor();

  const card = page.getByRole("article", { name: "Migration of web" });
  expect(await card.getByRole("progressbar").getAttribute("aria-valuenow")).toBe("52");
  for (const text of ["142 Mbit/s", "35.2 MiB", "2.40 s"]) await card.getByText(text, { exact: true }).waitFor();
  expect(await card.locator("[aria-current=step]").innerText()).toBe("memory");
  const classes = await card.getByRole("list", { name: "Pages by class" }).innerText();
  expect(classes.replace(/\s+/g, " ")).toContain("teleported 77 % 790 MiB");

  await sees("the worker of c has no space for the replica");
  await shoot("migrating");
});

test("a migration that will not converge says so", async () => {
  controller.migrations.set([notConverging(), failedBefore()]);
  await page.goto(controller.url);
  await sees("Will not converge: the guest dirties 37.5 MB/s, which is 19.0 MB/s on the wire, and the link carries 17.7 MB/s.");
  await shoot("not-converging");
});

test("VMs that a restore has left out are shown with the way back, and go when they are adopted", async () => {
  const { vms, ...rest } = fleet("");
  const found = [
    create(FoundVmSchema, { id: "id-late", name: "late", workers: ["worker-b"], runs: true }),
    create(FoundVmSchema, { id: "id-nameless", workers: ["worker-a"] }),
  ];
  controller.fleet.set({ ...rest, vms, found });
  await page.goto(controller.url);
  const section = page.getByRole("region", { name: "Found at workers (2)" });
  await section.getByText("late runs at worker-b. Take it back: pageportctl vm adopt late").waitFor();
  await section.getByText("id-nameless is at worker-a. Its definition was not kept").waitFor();
  await shoot("found");
  controller.fleet.set(fleet(""));
  await section.waitFor({ state: "detached" });
});

test("a migration that ends becomes a record", async () => {
  await page.goto(controller.url);
  await page.getByRole("heading", { name: "Moving now" }).waitFor();
  controller.migrations.set([completed(), failedBefore()]);
  controller.fleet.set(fleet(""));
  await page.getByRole("heading", { name: "Moving now" }).waitFor({ state: "detached" });
  await sees("6.21 s, 312 ms downtime, 70.2 MiB sent");
  await sees("70.2 MiB (1/28.6)");
  await page.getByText("stream digest").locator("xpath=following-sibling::dd").getByText("equal", { exact: true }).waitFor();
  await page.getByRole("row", { name: /disk-sync/ }).getByText("1.26 s").waitFor();
  await shoot("completed");
});

test("any number of migrations is live at once, and what is forgotten goes", async () => {
  const move = (n: number, rateBps: bigint) => {
    const migration = inMemoryPhase();
    Object.assign(migration, { id: `0199-n${n}`, vmName: `vm${n}`, createdUnixMs: BigInt(3_000 + n) });
    if (migration.progress) migration.progress.rateBps = rateBps;
    return migration;
  };
  const numbers = [1, 2, 3, 4, 5, 6, 7, 8];
  controller.migrations.set(numbers.map((n) => move(n, 1_000_000n)));
  await page.goto(controller.url);
  controller.migrations.set(numbers.map((n) => move(n, BigInt(n) * 11_000_000n)));
  for (const n of numbers) {
    const card = page.getByRole("article", { name: `Migration of vm${n}` });
    await card.getByText(`${(n * 11).toFixed(n * 11 < 100 ? 1 : 0)} Mbit/s`, { exact: true }).waitFor();
  }
  controller.migrations.set(numbers.slice(1).map((n) => move(n, 1_000_000n)));
  await page.getByRole("article", { name: "Migration of vm1" }).waitFor({ state: "detached" });
});

test("a lost controller is shown, and the page recovers by itself", async () => {
  await page.goto(controller.url);
  await page.getByRole("status").getByText("live", { exact: true }).waitFor();
  await controller.stop();
  await sees("connection lost, trying again");
  await page.getByRole("row", { name: /^web/ }).getByText("migrating").waitFor();
  await shoot("lost");
  controller.fleet.set(fleet(""));
  controller.migrations.set([completed()]);
  await controller.start();
  await page.getByRole("status").getByText("live", { exact: true }).waitFor();
  await page.getByRole("row", { name: /^web/ }).getByText("running").waitFor();
});

test("nothing has to be scrolled sideways on a narrow screen", async () => {
  await page.setViewportSize({ width: 360, height: 800 });
  await page.goto(controller.url);
  await page.getByRole("heading", { name: "Moving now" }).waitFor();
  const overflow = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
  expect(overflow).toBe(0);
});
