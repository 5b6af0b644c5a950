// The fleet as the page shows it: sites with their workers and how many VMs, VMs by name. Pure.
import { type Site, type Vm, VmState, type Worker } from "../gen/pageport/v1/fleet_pb.ts";
import { type Replica, ReplicaState } from "../gen/pageport/v1/replication_pb.ts";
import { groundWords } from "./states.ts";

export interface SiteView {
  site: Site;
  workers: Worker[];
  vms: number;
}

const byName = <T>(name: (item: T) => string) => (a: T, b: T) => name(a).localeCompare(name(b), "en", { numeric: true });

export function siteViews(sites: Site[], workers: Worker[], vms: Vm[]): SiteView[] {
  return [...sites].sort(byName((site) => site.name)).map((site) => ({
    site,
    workers: workers.filter((worker) => worker.site === site.name).sort(byName((worker) => worker.name)),
    vms: vms.filter((vm) => vm.ownerSite === site.name).length,
  }));
}

export function vmName(vm: Vm): string {
  return vm.spec?.name || vm.id;
}

export function sortedVms(vms: Vm[]): Vm[] {
  return [...vms].sort(byName(vmName));
}

/** How far a seed is, 0 to 1; undefined when nothing is being copied, or replication says how far it is. */
export function seedFraction(replica: Replica): number | undefined {
  if (replica.state !== ReplicaState.SEEDING || replica.totalBytes === 0n || replica.protection !== undefined) return undefined;
  return Math.min(1, Number(replica.doneBytes) / Number(replica.totalBytes));
}

/** What was ordered of a VM and is not so yet; empty when it is as it should be. */
export function ordered(vm: Vm): string {
  if (vm.state === VmState.RUNNING && !vm.desiredRunning) return "is to stop";
  if (vm.state === VmState.STOPPED && vm.desiredRunning) return "is to start";
  return "";
}

/** The newest change of owner that no worker's record proves; empty when there was none. */
export function takenOver(vm: Vm): string {
  const newest = vm.takeovers.at(-1);
  if (newest === undefined) return "";
  const by = newest.agent || newest.operator;
  const order = newest.agent && newest.operator ? ` on the order of ${newest.operator}` : "";
  return `taken over from ${newest.fromWorker}, ${groundWords(newest.ground)}${by && ` by ${by}`}${order}: ${newest.reason}`;
}
