// The fleet as the page shows it: sites with their workers and how many VMs, VMs by name. Pure.
import type { Site, Vm, Worker } from "../gen/pageport/v1/fleet_pb.ts";
import { type Replica, ReplicaState } from "../gen/pageport/v1/replication_pb.ts";

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

/** How far a seed is, 0 to 1; undefined when nothing is being copied. */
export function seedFraction(replica: Replica): number | undefined {
  if (replica.state !== ReplicaState.SEEDING || replica.totalBytes === 0n) return undefined;
  return Math.min(1, Number(replica.doneBytes) / Number(replica.totalBytes));
}

/** Ids of the migrations that VMs name as under way, each once, in a stable order. */
export function migrationsUnderWay(vms: Vm[]): string[] {
  return [...new Set(vms.map((vm) => vm.migrationId).filter((id) => id !== ""))].sort();
}
